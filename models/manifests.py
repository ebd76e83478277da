"""Which files a model was first used with, so that a changed one is noticed before it is loaded.

A manifest is a JSON file of names and SHA-256 digests. What the operator, or this repository, has
named beforehand counts from the first use. Torch-free.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from models.errors import ModelUnavailable
from models.fingerprint import write_whole

FOLDER = "manifests"


def manifest_path(data_dir: Path, model_id: str) -> Path:
    """Where a model's manifest lies."""
    return data_dir / FOLDER / f"{quote(model_id, safe='')}.json"


def check_files(
    model_id: str, found: Mapping[str, str], manifest: Path, pinned: Mapping[str, str]
) -> None:
    """Compare a model's files with those it was first used with; new ones are remembered.

    found: the digest of each file by its name in the model. pinned: those named beforehand.
    Raises: ModelUnavailable; OSError where the manifest cannot be written.
    """
    if missing := sorted(pinned.keys() - found.keys()):
        raise ModelUnavailable(f"{missing[0]} has a SHA-256 in models.toml, and is not there")
    first = _read(manifest)
    for name, digest in found.items():
        if digest != pinned.get(name, digest):
            raise ModelUnavailable(f"{name} is not the file that was expected: SHA-256 {digest}")
        if name not in pinned and digest != first.get(name, digest):
            raise ModelUnavailable(
                f"{name} is not the file that was first used; where it was changed on purpose, "
                f"run `inpaint-server models trust {model_id}`"
            )
    if first != (now := first | dict(found)):
        write_whole(manifest, json.dumps(now, indent=1, sort_keys=True))


def _read(manifest: Path) -> dict[str, str]:
    """Nothing for a model's first use. Raises: ModelUnavailable."""
    try:
        return dict(json.loads(manifest.read_text()).items())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{manifest} is no manifest: {error}") from error

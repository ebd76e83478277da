"""Which files a model was first used with, so that a changed one is noticed before it is loaded.

A manifest is a JSON file of names and SHA-256 digests. What the operator, or this repository, has
named beforehand counts from the first use. Torch-free.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from models.checkpoints.files.fingerprint import write_whole
from models.errors import ModelUnavailable

FOLDER = "manifests"
HUB_FOLDER = "blobs"
"""Where the hub's cache keeps the files that a model's folder links to."""

SHA256 = re.compile(r"[0-9a-f]{64}")


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
    first = compare_files(model_id, found, manifest, pinned)
    if first != (now := first | dict(found)):
        write_whole(manifest, json.dumps(now, indent=1, sort_keys=True))


def compare_files(
    model_id: str, found: Mapping[str, str], manifest: Path, pinned: Mapping[str, str]
) -> dict[str, str]:
    """The same for some of a model's files, and without remembering any.

    Returns what is remembered. Raises: ModelUnavailable.
    """
    first = _read(manifest)
    for name, digest in found.items():
        check_digest(name, digest, pinned.get(name))
        if name not in pinned and digest != first.get(name, digest):
            raise ModelUnavailable(
                f"{name} is not the file that was first used; where it was changed on purpose, "
                f"run `inpaint-server models trust {model_id}`"
            )
    return first


def check_digest(name: str, digest: str, expected: str | None) -> None:
    """Compare a file's digest with the one that was named beforehand, if any.

    Raises: ModelUnavailable.
    """
    if expected not in (None, digest):
        raise ModelUnavailable(f"{name} is not the file that was expected: SHA-256 {digest}")


def check_downloads(found: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Compare files in the hub's cache with what the hub said of them.

    The cache keeps a large file under the SHA-256 that the hub gave for it, so that one damaged on
    its way or on the disk is noticed before its first use.
    found, files: the digest and the path of each file by its name in the model.
    Raises: ModelUnavailable.
    """
    for name, digest in found.items():
        kept_as = files[name].resolve()
        if (
            kept_as.parent.name == HUB_FOLDER
            and SHA256.fullmatch(kept_as.name)
            and (kept_as.name != digest)
        ):
            raise ModelUnavailable(
                f"{name} is damaged: the hub gave it another SHA-256; delete {kept_as} and run "
                "`inpaint-server models pull`"
            )


def _read(manifest: Path) -> dict[str, str]:
    """Digests by file; empty on a model's first use. Raises: ModelUnavailable."""
    try:
        return dict(json.loads(manifest.read_text()).items())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{manifest} is no manifest: {error}") from error

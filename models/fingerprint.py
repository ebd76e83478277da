"""Which weights a model has: SHA-256 over its safetensors files, remembered from run to run."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

CACHE_FILE = "weights-sha256.json"


def weights_sha256(files: Sequence[Path], cache_folder: Path) -> str:
    """One digest for all of them: over the sorted digests of the files, whatever their names.

    cache_folder: keeps each file's digest under its path, size and time of change, because a
        checkpoint takes seconds to read.
    Raises: OSError.
    """
    digests = sorted(file_sha256s(files, cache_folder / CACHE_FILE).values())
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def file_sha256s(files: Sequence[Path], cache: Path) -> dict[str, str]:
    """The digest of each file, by path. Raises: OSError."""
    known = _read_cache(cache)
    found = {}
    for path in files:
        status = path.stat()
        name = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        if name not in known:
            with path.open("rb") as file:
                known[name] = hashlib.file_digest(file, "sha256").hexdigest()
            _write_cache(cache, known)
        found[str(path)] = known[name]
    return found


def _read_cache(cache: Path) -> dict[str, str]:
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return dict(known) if isinstance(known, dict) else {}


def _write_cache(cache: Path, known: dict[str, str]) -> None:
    """Whole or not at all: workers that start together write it at the same time."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    own = cache.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(known, indent=1))
    own.replace(cache)

"""Digests of files, remembered from run to run: a checkpoint takes seconds to read."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

CACHE_FILE = "weights-sha256.json"
PIECE_BYTES = 4_194_304


def file_sha256s(
    files: Sequence[Path],
    cache: Path | None,
    report: Callable[[float], None] = lambda share: None,
    *,
    reads_all: bool = False,
) -> dict[str, str]:
    """The digest of each file, by path.

    cache: remembers them under path, inode, size and time of change; None reads all.
    report: told the share that is done, by size, while files are read.
    reads_all: files that the cache knows are read too.
    Raises: OSError.
    """
    known = _read_cache(cache)
    statuses = {path: path.stat() for path in files}
    names = {path: _name(path) for path in files}
    unread = [path for path in files if reads_all or names[path] not in known]
    total = sum(statuses[path].st_size for path in unread)
    done = 0
    for path in unread:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                done += len(piece)
                report(min(1.0, done / total))
        known[names[path]] = digest.hexdigest()
        if cache is not None:
            write_whole(cache, json.dumps(known, indent=1))
    return {str(path): known[names[path]] for path in files}


def cached_sha256s(files: Iterable[Path], cache: Path) -> dict[str, str]:
    """The digests that a cache has of these files as they are now, by path. Raises: OSError."""
    known = _read_cache(cache)
    names = {path: _name(path) for path in files}
    return {str(path): known[name] for path, name in names.items() if name in known}


def _name(path: Path) -> str:
    """What a cache knows a file by."""
    found = path.stat()
    return f"{path.resolve()} {found.st_ino} {found.st_size} {found.st_mtime_ns}"


def digest_of_all(digests: Iterable[str]) -> str:
    """One digest for all of them, whatever their order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return {}
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return dict(known) if isinstance(known, dict) else {}


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: workers that start together write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(text)
    own.replace(path)

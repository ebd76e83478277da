"""What a disk takes for a durable write: the figure that those of accepted jobs depend on."""

import os
import statistics
import time
from pathlib import Path

PAGE = b"x" * 4_096
MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


def fsync_ms(folder: Path, count: int = 60) -> float:
    """Median milliseconds for a page to be appended and be on the disk."""
    path = folder / "fsync-probe"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        return 1000 * statistics.median(append_s(descriptor) for _ in range(count))
    finally:
        os.close(descriptor)
        path.unlink()


def append_s(descriptor: int) -> float:
    """Seconds for one page."""
    os.write(descriptor, PAGE)
    began = time.perf_counter()
    os.fdatasync(descriptor)
    return time.perf_counter() - began


def filesystem_of(folder: Path) -> str:
    """Type of the filesystem a folder lies on, such as ext4."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    path = folder.resolve()
    holding = [mount for mount in mounts if path.is_relative_to(unescaped(mount[1]))]
    return max(holding, key=lambda mount: len(unescaped(mount[1])))[2]


def unescaped(path: str) -> str:
    """A path of /proc/mounts as it is."""
    return path.encode("latin-1").decode("unicode_escape")

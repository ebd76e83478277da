"""What a disk takes for a durable write: the figure that those of accepted jobs depend on."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
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


def start_again_on_slow_disk(fsync_ms: float, folder: Path, command: Sequence[str]) -> None:
    """Put a Python command in the place of this process, with every fsync so much longer.

    Its children see the same disk. folder: for the library, which is built with `cc`.
    Raises: OSError, subprocess.CalledProcessError without a compiler.
    """
    library = folder / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    build = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(build, check=True)
    slow = {"LD_PRELOAD": str(library), "SLOW_DISK_US": str(round(1000 * fsync_ms))}
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, **slow})


def is_slowed_down() -> bool:
    """Whether this process is one that `start_again_on_slow_disk` made."""
    return "SLOW_DISK_US" in os.environ


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

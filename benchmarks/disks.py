"""What a disk takes for a durable write: the figure that those of accepted jobs depend on."""

import os
import statistics
import subprocess
import sys
import tempfile
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


def run_again_on_slow_disk(fsync_ms: float, command: Sequence[str]) -> int:
    """Run a Python command in a process whose every fsync takes so much longer; its exit status.

    Its children see the same disk. Raises: OSError, subprocess.CalledProcessError without a
    compiler.
    """
    source = Path(__file__).with_name("slow_disk.c")
    with tempfile.TemporaryDirectory(prefix="slow-disk-") as folder:
        library = Path(folder, "slow_disk.so")
        build = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True)
        slow = {"LD_PRELOAD": str(library), "SLOW_DISK_US": str(round(1000 * fsync_ms))}
        environment = {**os.environ, **slow}
        return subprocess.run([sys.executable, *command], env=environment, check=False).returncode


def is_slowed_down() -> bool:
    """Whether this process is one that `run_again_on_slow_disk` started."""
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

"""Checks of the data folder and the file store: access, space and speed."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil

from server.core.errors import StorageUnavailable
from server.core.settings import Settings
from server.core.settings.folder import why_open, why_unwritable
from server.core.terminal import size_text
from server.serving.diagnosis.results import CheckResult, error, note, ok, warning
from server.storage.files import PROBE_BYTES, Storage

FOLDER, DISK, STORE = "data folder", "disk", "file store"

LOW_BYTES = 2_000_000_000
"""Free space that is worth a warning: about 700 pictures of 1024×1024."""

SLOW_FSYNC_S = 0.02
"""With a slower fsync fewer than 50 single jobs a second can be accepted."""

FSYNCS = 5
PAGE = bytes(4096)

NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse.glusterfs")


def check_folders(settings: Settings) -> Iterator[CheckResult]:
    """The data folder, its disk, and a file store elsewhere."""
    yield from check_access("data folder", settings.data_dir)
    folder = settings.data_dir
    if folder.is_dir() and (reason := why_open(folder)):
        yield warning(FOLDER, f"other users may enter {folder}: {reason}", f"chmod 700 {folder}")
    if settings.database_url is None:
        yield from check_file_system(existing(settings.data_dir))
    yield from check_disk(existing(settings.data_dir))
    yield from check_store(settings)


def check_access(what: str, folder: Path) -> Iterator[CheckResult]:
    """Whether a folder can be written, or made."""
    user = os.geteuid()
    if folder.exists() and not folder.is_dir():
        yield error(FOLDER, f"{what} {folder} is a file", "name another folder with data_dir")
        return
    found = existing(folder)
    reason = why_unwritable(found)
    if reason:
        made = "" if found == folder else f" {folder} cannot be made:"
        yield error(
            FOLDER,
            f"{what}{made} {reason}",
            access_cure(found, reason),
        )
    elif found == folder:
        yield ok(FOLDER, f"{what} {folder} can be written by uid {user}")
    else:
        yield note(FOLDER, f"{what} {folder} is not there yet; the first start makes it")


def access_cure(folder: Path, reason: str) -> str:
    """What to do about a folder that cannot be written. reason: of `why_unwritable`."""
    if reason.endswith("read-only"):
        return "mount a volume there, or name another folder with data_dir"
    owner = folder.stat().st_uid
    return f"`chown -R {os.geteuid()} {folder}`, or run the server as uid {owner}"


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def check_file_system(folder: Path) -> Iterator[CheckResult]:
    """SQLite's locks need a local file system."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    kind = next((mounts[each] for each in (folder, *folder.parents) if each in mounts), "")
    if kind in NETWORK_FILE_SYSTEMS:
        yield error(
            DISK,
            f"{folder} is on {kind}, where SQLite can lose commits",
            "put the data folder on a local disk, or set database_url to PostgreSQL",
        )


def check_disk(folder: Path) -> Iterator[CheckResult]:
    """Free space, and how long an fsync takes, measured in a file without a name."""
    free = shutil.disk_usage(folder).free
    try:
        write_s, fsync_s = measure(folder)
    except OSError as problem:
        if not why_unwritable(folder):
            yield error(
                DISK,
                f"{folder} takes no file of {size_text(PROBE_BYTES)}: {problem.strerror}; "
                f"{size_text(free)} are free",
                "make room on the disk, or shorten retention.outputs_h",
            )
        return
    if free < LOW_BYTES:
        yield warning(
            DISK,
            f"{folder} has only {size_text(free)} left",
            "make room on the disk, or shorten retention.outputs_h",
        )
    else:
        yield ok(DISK, f"{folder} has {size_text(free)} left")
    speed = (
        f"{size_text(PROBE_BYTES)} take {write_s * 1000:.1f} ms, an fsync {fsync_s * 1000:.1f} ms"
    )
    if fsync_s > SLOW_FSYNC_S:
        yield warning(
            DISK,
            f"the disk of {folder} is slow: {speed}",
            "put the data folder on an SSD; each accepted job waits for an fsync",
        )
    else:
        yield ok(DISK, f"{folder}: {speed}")


def measure(folder: Path) -> tuple[float, float]:
    """Seconds to store a usual input, and the median of an fsync. Raises: OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        write_s = time.perf_counter() - started
        taken = []
        for _ in range(FSYNCS):
            started = time.perf_counter()
            file.write(PAGE)
            file.flush()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - started)
    return write_s, statistics.median(taken)


def check_store(settings: Settings) -> Iterator[CheckResult]:
    """A file store outside the data folder: its folder, or whether the object store answers."""
    url = settings.storage.url
    if url is None:
        return
    parts = urlsplit(url)
    if parts.scheme == "file":
        yield from check_access("file store", Path(unquote(parts.path)))
        return
    place = f"{parts.scheme}://{parts.hostname}{parts.path}"
    started = time.perf_counter()
    try:
        Storage(url, settings.store_options).has("probe")
    except (StorageUnavailable, OSError, ValueError) as problem:
        reason = problem.__cause__ or problem
        yield error(
            STORE,
            f"{place} cannot be read: {str(reason).partition(chr(10))[0][:300]}",
            "check the settings of storage, the AWS_… variables, and the bucket's policy",
        )
    else:
        yield ok(STORE, f"{place} answers in {(time.perf_counter() - started) * 1000:.0f} ms")

"""Where pictures and inputs lie: a local folder or an object store, behind eight calls."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from server.batches import Batches
from server.errors import StorageUnavailable
from server.threads import all_of

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, RetryConfig

PIECE_BYTES = 65_536
"""What is held for a client that takes its picture slowly."""

READ_S = 5
"""For an object store to connect, and for the next bytes of its answer: one that hangs is not
waited for longer. Slow ones are."""

STREAM_S = 300
"""For a whole file, which a client may take slowly."""

READ_AGAIN_S = 2
"""How long a refused call is made again; one that has hung for `READ_S` is not."""

PUT_S, PUT_AGAIN_S = 15, 10
"""The same for storing a whole file, which is worth more patience."""

MAX_RETRIES = 3

CLIENT_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""Where the environment has options of an object store's client, by the scheme of its URL."""

CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "randomize_addresses",
    "read_timeout",
    "timeout",
    "user_agent",
)

CONTENT_TYPES = {".png": "image/png"}
"""What an object store tells browsers of a file, by its suffix."""

PROBE_BYTES = 1_000_000
"""Of a probe: what the input of a picture at 512×512 takes."""

SYNCS, UPLOADS = 8, 64
"""Files that `put_early` brings to the disk, or to an object store, at a time. A thread that comes
back from the disk waits for the interpreter, and many that do so slow down all others."""

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

UNFINISHED = ".unfinished"
"""Suffix of a file that is being written; the janitor finds what a crash left of it."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """key: as given to `put`. changed_at: seconds since the epoch, by the store's clock."""

    key: str
    changed_at: float


class Storage:
    """Bytes under a key such as `generations/<uuid>-0.png`.

    url: `file:///folder`, `s3://bucket/prefix` or what else obstore knows.
    """

    def __init__(self, url: str) -> None:
        self._folder: str | None = None
        if url.startswith("file:"):
            self._store: ObjectStore = LocalStore.from_url(url, mkdir=True)
            self._folder = unquote(urlsplit(url).path)
        else:
            options = client_options(url)
            read: ClientConfig = {
                "connect_timeout": f"{READ_S}s",
                "read_timeout": f"{READ_S}s",
                "timeout": f"{STREAM_S}s",
            }
            self._store = from_url(
                url, client_options=read | options, retry_config=retries(READ_AGAIN_S)
            )
            self._puts = from_url(
                url,
                client_options={"timeout": f"{PUT_S}s", **options},
                retry_config=retries(PUT_AGAIN_S),
            )
        self._threads = ThreadPoolExecutor(UPLOADS if self._folder is None else SYNCS, "put")
        self._folders = Batches(sync_folders, "sync")

    def put(self, key: str, content: bytes) -> None:
        """Store; readers see all of it or nothing, and once this returns it survives a power cut.

        Raises: StorageUnavailable.
        """
        with telling_of(f"cannot write {key}"):
            if self._folder is None:
                kind = CONTENT_TYPES.get(os.path.splitext(key)[1], "application/octet-stream")
                self._puts.put(key, content, attributes={"Content-Type": kind})
                return
            path = os.path.join(self._folder, relative_path(key))
            write(path, content)()
            sync_folder(os.path.dirname(path))

    def put_early(
        self, make: Callable[[], tuple[str, bytes]], is_shown: Callable[[], None]
    ) -> Future[None]:
        """`put` of a new key in a thread; is there once the content survives a power cut.

        make: key and content. is_shown: called in the thread as soon as the content can be read;
        what a crash leaves then may be a part of it. The result raises: StorageUnavailable, and
        what those two raise.
        """
        folders: list[Future[None]] = []

        def put() -> None:
            key, content = make()
            if self._folder is None:
                self.put(key, content)
                is_shown()
                return
            path = os.path.join(self._folder, relative_path(key))
            with telling_of(f"cannot write {key}"):
                sync_bytes = write_new(path, content)
                folders.append(self._folders.begin(os.path.dirname(path)))
                try:
                    is_shown()
                finally:
                    sync_bytes()

        return all_of([self._threads.submit(put)], more=lambda: folders)

    def get(self, key: str) -> bytes | None:
        """The content, None where there is none. Raises: StorageUnavailable."""
        try:
            return bytes(self._store.get(key).bytes())
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise StorageUnavailable(f"cannot read {key}") from error

    def open(self, key: str) -> tuple[int, Iterator[bytes]] | None:
        """The size in bytes, and the content in pieces of 64 KiB; None where there is none.

        Raises: StorageUnavailable, also while pieces are read.
        """
        try:
            found = self._store.get(key)
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise StorageUnavailable(f"cannot read {key}") from error
        return found.meta["size"], self._pieces(key, found)

    def _pieces(self, key: str, found: "GetResult") -> Iterator[bytes]:
        try:
            for piece in found.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)
        except (BaseError, OSError) as error:
            raise StorageUnavailable(f"cannot read {key}") from error

    def probe(self, key: str) -> None:
        """Write a file and remove it, to see that the store takes files.

        As large as a usual input, because a disk that is nearly full still takes small ones.
        Raises: StorageUnavailable.
        """
        content = bytes(PROBE_BYTES)
        if self._folder is None:
            # With the patience of reads: who asks wants to know now.
            with telling_of("cannot write"):
                self._store.put(key, content)
        else:
            self.put(key, content)
        self.delete(key)

    def has(self, key: str) -> bool:
        """Whether there is such a key. Raises: StorageUnavailable."""
        try:
            self._store.head(key)
        except (NotFoundError, FileNotFoundError):
            return False
        except (BaseError, OSError) as error:
            raise StorageUnavailable(f"cannot look for {key}") from error
        return True

    def delete(self, key: str) -> None:
        """Remove; a missing key is fine. Raises: StorageUnavailable."""
        with (
            telling_of(f"cannot delete {key}"),
            contextlib.suppress(NotFoundError, FileNotFoundError),
        ):
            self._store.delete(key)

    def list(self, folder: str, batch: int = 500) -> Iterator[list[StoredFile]]:
        """All files under a folder, in any order, up to `batch` at a time.

        A missing folder is empty. Raises: StorageUnavailable.
        """
        try:
            for chunk in self._store.list(folder, chunk_size=batch):
                yield [
                    StoredFile(each["path"], each["last_modified"].timestamp()) for each in chunk
                ]
        except (BaseError, OSError) as error:
            raise StorageUnavailable(f"cannot list {folder}") from error


def client_options(url: str) -> "ClientConfig":
    """What the environment says of an object store's client, which options of ours would hide."""
    prefix = CLIENT_VARIABLES.get(url.partition(":")[0], "AWS_")
    found = {
        name.removeprefix(prefix).lower(): value
        for name, value in os.environ.items()
        if name.startswith(prefix)
    }
    return cast("ClientConfig", {name: found[name] for name in CLIENT_OPTIONS if name in found})


def retries(again_s: float) -> "RetryConfig":
    """How a call of an object store is made again. again_s: not later than this after the first."""
    return {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=again_s)}


@contextlib.contextmanager
def telling_of(failure: str) -> Iterator[None]:
    """What goes wrong inside as `StorageUnavailable`."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise StorageUnavailable(failure) from error


def relative_path(key: str) -> str:
    """Where below a local store's folder a key lies. Raises: ValueError for a way out of it."""
    parts = [part for part in key.split("/") if part]
    if {".", ".."} & {*parts}:
        raise ValueError(f"illegal character sequence in {key!r}")
    return "/".join(parts)


# Paths are plain texts here: those of `pathlib` take a tenth of the time of an accepted job.


def write(path: str, content: bytes) -> Callable[[], None]:
    """Write a file that is whole under its name, or not there, for whoever looks.

    The call that is given back, which must be made, brings its bytes to the disk; `sync_folder`
    brings its name there, before or after. What a power cut leaves until then may be half a file,
    but then nobody was told that there is one.
    Both raise: OSError. Where the call does, the file is there, and may be lost.
    """
    unfinished = f"{path}.{random.getrandbits(32):08x}{UNFINISHED}"
    sync_bytes = write_new(unfinished, content)
    try:
        os.rename(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            sync_bytes()  # which closes the file
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    return sync_bytes


def write_new(path: str, content: bytes) -> Callable[[], None]:
    """`write` for a name that nobody looks for until this has returned."""
    try:
        descriptor = os.open(path, NEW_FILE, 0o666)
    except FileNotFoundError:
        make_folder(os.path.dirname(path))
        descriptor = os.open(path, NEW_FILE, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise

    def sync_bytes() -> None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return sync_bytes


def make_folder(folder: str) -> None:
    """Make a folder, and those above it, so that they survive a power cut. Raises: OSError."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    make_folder(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(above)


def sync_folder(folder: str) -> None:
    """Bring the names in a folder to the disk. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(folders: Sequence[str]) -> list[StorageUnavailable | None]:
    """`sync_folder` for each, once for all that are the same; what they raise is given back."""
    outcomes: dict[str, StorageUnavailable | None] = {}
    for folder in dict.fromkeys(folders):
        try:
            with telling_of(f"cannot write to {os.path.basename(folder)}"):
                sync_folder(folder)
            outcomes[folder] = None
        except StorageUnavailable as error:
            outcomes[folder] = error
    return [outcomes[folder] for folder in folders]

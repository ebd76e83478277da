"""Where pictures and inputs lie: a local folder or an object store, behind eight calls."""

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from server.core.errors import StorageUnavailable

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

    def put(self, key: str, content: bytes) -> None:
        """Store; readers see all of it or nothing, and once this returns it survives a power cut.

        Raises: StorageUnavailable.
        """
        with telling_of(f"cannot write {key}"):
            if self._folder is None:
                kind = CONTENT_TYPES.get(os.path.splitext(key)[1], "application/octet-stream")
                self._puts.put(key, content, attributes={"Content-Type": kind})
                return
            write(os.path.join(self._folder, relative_path(key)), content)

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


def write(path: str, content: bytes) -> None:
    """Write a file that readers see whole or not at all, and that survives a power cut.

    Raises: OSError.
    """
    unfinished = f"{path}.{random.getrandbits(32):08x}{UNFINISHED}"
    folder = os.path.dirname(path)
    make_folder(folder)
    try:
        descriptor = os.open(unfinished, NEW_FILE, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.rename(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    # The name is durable once the folder is fsynced.
    sync_folder(folder)


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

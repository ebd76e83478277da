"""Storage of pictures and inputs: a local folder or an object store behind eight calls."""

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from server.core.errors import StorageUnavailable

if TYPE_CHECKING:
    from obstore import HTTP_METHOD, GetResult, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Store

CHUNK_BYTES = 65_536
"""Memory held for a client that receives its picture slowly."""

READ_TIMEOUT_S = 5
"""For an object store to connect, and for the next bytes of its answer. A store that hangs is given
up, a slow one is not."""

STREAM_TIMEOUT_S = 300
"""For a whole file, which a client may receive slowly."""

READ_RETRY_S = 2
"""How long a failed call is retried. A call that reached `READ_TIMEOUT_S` is not retried."""

PUT_TIMEOUT_S, PUT_RETRY_S = 15, 10
"""The same limits for storing a whole file. They are longer, because a failed put loses a job's
result."""

MAX_RETRIES = 3

NO_OPTIONS: Mapping[str, str] = {}

CLIENT_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""Prefix of the environment variables for an object store's client, by the URL's scheme."""

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

CONTENT_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
"""The `Content-Type` that an object store sends with a file, by its suffix."""

PROBE_BYTES = 1_000_000
"""Size of a probe: that of an input at 512×512."""

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

UNFINISHED = ".unfinished"
"""Suffix of a file that is being written. `jobs/retention.py` removes what a crash leaves."""

MISSING = (NotFoundError, FileNotFoundError)
"""What obstore raises for a key that does not exist."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """key: as given to `put`. changed_at: seconds since the epoch, by the store's clock.

    size: in bytes.
    """

    key: str
    changed_at: float
    size: int


def check_object_store(url: str, options: Mapping[str, str]) -> None:
    """Raises: ValueError for options of an object store as `Storage` does. Makes no folder."""
    if not url.startswith("file:"):
        Storage(url, options)


class Storage:
    """Bytes under a key such as `generations/<uuid>-0.png`.

    url: `file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.
    options: of an object store's client, named as its environment variables, which they precede.
    Raises: ValueError for options that the client does not know, or that lack something.
    """

    def __init__(self, url: str, options: Mapping[str, str] = NO_OPTIONS) -> None:
        self._folder: str | None = None
        if url.startswith("file:"):
            self._store: ObjectStore = LocalStore.from_url(url, mkdir=True)
            self._folder = unquote(urlsplit(url).path)
        else:
            read: ClientConfig = {
                "connect_timeout": f"{READ_TIMEOUT_S}s",
                "read_timeout": f"{READ_TIMEOUT_S}s",
                "timeout": f"{STREAM_TIMEOUT_S}s",
            }
            self._store = open_object_store(url, options, read, READ_RETRY_S)
            put: ClientConfig = {"timeout": f"{PUT_TIMEOUT_S}s"}
            self._puts = open_object_store(url, options, put, PUT_RETRY_S)

    def put(self, key: str, content: bytes) -> None:
        """Store a file atomically. It survives a power cut once this returns.

        Raises: StorageUnavailable.
        """
        with storage_errors(f"cannot write {key}"):
            if self._folder is None:
                kind = CONTENT_TYPES.get(os.path.splitext(key)[1], "application/octet-stream")
                self._puts.put(key, content, attributes={"Content-Type": kind})
                return
            write(os.path.join(self._folder, relative_path(key)), content)

    def get(self, key: str) -> bytes | None:
        """The content, None for a missing key. Raises: StorageUnavailable."""
        with storage_errors(f"cannot read {key}"), contextlib.suppress(*MISSING):
            return bytes(self._store.get(key).bytes())
        return None

    def open(self, key: str) -> tuple[int, Iterator[bytes]] | None:
        """The size in bytes, and the content in chunks of 64 KiB; None for a missing key.

        Raises: StorageUnavailable, also while chunks are read.
        """
        with storage_errors(f"cannot read {key}"), contextlib.suppress(*MISSING):
            found = self._store.get(key)
            return found.meta["size"], self._chunks(key, found)
        return None

    def _chunks(self, key: str, found: "GetResult") -> Iterator[bytes]:
        with storage_errors(f"cannot read {key}"):
            for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def probe(self, key: str) -> None:
        """Write a file and remove it, to check that the store accepts files.

        The file is as large as a usual input, because a nearly full disk still takes small files.
        Raises: StorageUnavailable.
        """
        content = bytes(PROBE_BYTES)
        if self._folder is None:
            # With the short timeouts of reads, because a request may wait for the probe.
            with storage_errors("cannot write"):
                self._store.put(key, content)
        else:
            self.put(key, content)
        self.delete(key)

    def has(self, key: str) -> bool:
        """Whether the key exists. Raises: StorageUnavailable."""
        with storage_errors(f"cannot look up {key}"), contextlib.suppress(*MISSING):
            self._store.head(key)
            return True
        return False

    def find(self, key: str) -> StoredFile | None:
        """The facts about a file, None for a missing key. Raises: StorageUnavailable."""
        with storage_errors(f"cannot look up {key}"), contextlib.suppress(*MISSING):
            return stored_file(key, self._store.head(key))
        return None

    def delete(self, key: str) -> None:
        """Remove a key, which may be missing. Raises: StorageUnavailable."""
        with storage_errors(f"cannot delete {key}"), contextlib.suppress(*MISSING):
            self._store.delete(key)

    def delete_all(self, keys: Sequence[str]) -> None:
        """Remove keys, any of which may be missing. S3 takes up to 1,000 in one request.

        Raises: StorageUnavailable, when some may be removed already.
        """
        if not keys:
            return
        with storage_errors(f"cannot delete {len(keys)} files"), contextlib.suppress(*MISSING):
            self._store.delete([*keys])
            return
        # A store without such a request has stopped at a missing key.
        for key in keys:
            self.delete(key)

    def sign(self, key: str, method: "HTTP_METHOD", valid_s: int) -> str:
        """A link to a key of an object store, which needs no credentials. The key may be missing.

        Raises: StorageUnavailable, when the credentials' provider does not answer.
        """
        with storage_errors(f"cannot sign a link to {key}"):
            store = cast("S3Store", self._store)
            return obstore.sign(store, method, key, timedelta(seconds=valid_s))

    def list(self, folder: str, batch: int = 500) -> Iterator[list[StoredFile]]:
        """All files under a folder, in any order, up to `batch` at a time.

        A missing folder is empty. Raises: StorageUnavailable.
        """
        with storage_errors(f"cannot list {folder}"):
            for chunk in self._store.list(folder, chunk_size=batch):
                yield [stored_file(each["path"], each) for each in chunk]


def stored_file(key: str, meta: "ObjectMeta") -> StoredFile:
    """What an object store, or a folder, tells about a file."""
    return StoredFile(key, meta["last_modified"].timestamp(), meta["size"])


def open_object_store(
    url: str, options: Mapping[str, str], client: "ClientConfig", retry_s: float
) -> ObjectStore:
    """A store of obstore. client: the limits of one call, unless the operator has set others.

    Raises: ValueError.
    """
    ours, config = split_options(url, options)
    try:
        return from_url(
            url,
            config=cast("S3Config", config),
            client_options=client | ours,
            retry_config=retry_config(retry_s),
        )
    except BaseError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the file store {url} cannot be used: {reason}") from error


def split_options(url: str, options: Mapping[str, str]) -> tuple["ClientConfig", Mapping[str, str]]:
    """The options of the HTTP client, and those of the store.

    Those of the client come from the environment too, because obstore ignores it once it gets any.
    """
    prefix = CLIENT_VARIABLES[url.partition(":")[0]]
    found = {
        name.removeprefix(prefix).lower(): value
        for name, value in {**os.environ, **options}.items()
        if name.startswith(prefix)
    }
    client = {name: found[name] for name in CLIENT_OPTIONS if name in found}
    if options.get("AWS_ENDPOINT", "").startswith("http://"):
        client["allow_http"] = "true"
    names = {f"{prefix}{name}".upper() for name in CLIENT_OPTIONS}
    config = {name.lower(): value for name, value in options.items() if name not in names}
    return cast("ClientConfig", client), config


def retry_config(timeout_s: float) -> "RetryConfig":
    """Retries of one object store call. timeout_s: from the first attempt to the last retry."""
    return {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=timeout_s)}


@contextlib.contextmanager
def storage_errors(failure: str) -> Iterator[None]:
    """Turn the errors of obstore and the operating system into `StorageUnavailable`."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise StorageUnavailable(failure) from error


def relative_path(key: str) -> str:
    """A key's path below the store's folder. Raises: ValueError for a path traversal."""
    parts = [part for part in key.split("/") if part]
    if {".", ".."} & {*parts}:
        raise ValueError(f"illegal character sequence in {key!r}")
    return "/".join(parts)


def write(path: str, content: bytes) -> None:
    """Write a file atomically and durably: write, fsync, rename, fsync the folder.

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
    # The new name is durable only after an fsync of the folder.
    fsync_folder(folder)


def make_folder(folder: str) -> None:
    """Make a folder and its parents durably. Raises: OSError."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    fsync_folder(parent)


def fsync_folder(folder: str) -> None:
    """Make the names in a folder durable. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

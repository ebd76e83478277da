"""Where pictures and inputs lie: a local folder or an object store, behind five calls."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from server.errors import StorageUnavailable

if TYPE_CHECKING:
    from obstore import GetResult

PIECE_BYTES = 65_536
"""What is held for a client that takes its picture slowly."""


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
        if url.startswith("file:"):
            self._store: ObjectStore = LocalStore.from_url(url, mkdir=True)
        else:
            self._store = from_url(url)

    def put(self, key: str, content: bytes) -> None:
        """Store; readers see all of it or nothing. Raises: StorageUnavailable."""
        try:
            self._store.put(key, content)
        except (BaseError, OSError) as error:
            raise StorageUnavailable(f"cannot write {key}") from error

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

    def delete(self, key: str) -> None:
        """Remove; a missing key is fine. Raises: StorageUnavailable."""
        try:
            self._store.delete(key)
        except (NotFoundError, FileNotFoundError):
            return
        except (BaseError, OSError) as error:
            raise StorageUnavailable(f"cannot delete {key}") from error

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

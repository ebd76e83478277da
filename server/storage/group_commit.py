"""`GroupCommit`: group commit, so that writes which arrive together share one fsync.

A commit takes as long as the disk takes to fsync, whatever the transaction holds. On a disk of 4 ms
one commit a job would bound a server to some hundred jobs a second.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from sqlalchemy import Connection, Engine

from server.core.errors import ApiError

T = TypeVar("T")
R = TypeVar("R")


class WriteFailed(Exception):
    """A write raised, so its transaction was rolled back. The cause is what the write raised."""


class GroupCommit(Generic[T, R]):
    """Shared transactions for the threads of one process.

    write: makes one item's writes. It may refuse an item by an `ApiError`, before it has written
        anything for it.
    """

    def __init__(self, engine: Engine, write: Callable[[Connection, T], R]) -> None:
        self._engine = engine
        self._write = write
        self._waiting: list[tuple[T, Future[R]]] = []
        self._waiting_lock = threading.Lock()
        self._commit_lock = threading.Lock()

    def run(self, item: T) -> R:
        """Write an item and wait until it is durable.

        Raises: what `write` raises for this item, and then nothing of it is kept; what the commit
        raises, and then nobody knows whether it is kept.
        """
        outcome: Future[R] = Future()
        with self._waiting_lock:
            self._waiting.append((item, outcome))
        # Whoever gets the lock commits for all who wait for it; the others find theirs done.
        with self._commit_lock:
            if not outcome.done():
                with self._waiting_lock:
                    group, self._waiting = self._waiting, []
                self._commit(group)
        return outcome.result()

    def _commit(self, group: Sequence[tuple[T, Future[R]]]) -> None:
        try:
            results = self._attempt([item for item, _ in group])
        except WriteFailed as failed:
            if len(group) == 1:
                group[0][1].set_exception(failed.__cause__)
            else:  # each alone, so that one bad item does not sink its neighbours
                for member in group:
                    self._commit([member])
        except Exception as error:  # noqa: BLE001 - every member of the group raises it
            for _, outcome in group:
                outcome.set_exception(error)
        else:
            for (_, outcome), result in zip(group, results, strict=True):
                if isinstance(result, ApiError):
                    outcome.set_exception(result)
                else:
                    outcome.set_result(result)

    def _attempt(self, items: Sequence[T]) -> list[R | ApiError]:
        """Raises: WriteFailed; what kept the transaction from beginning or from its commit."""
        with self._engine.begin() as connection:
            return [self._write_or_refuse(connection, item) for item in items]

    def _write_or_refuse(self, connection: Connection, item: T) -> R | ApiError:
        try:
            return self._write(connection, item)
        except ApiError as refusal:
            return refusal
        except Exception as error:
            raise WriteFailed from error

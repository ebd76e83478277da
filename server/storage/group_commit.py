"""`GroupCommit`: writes that arrive together share one transaction and one fsync.

A commit takes as long as the disk's fsync, however much the transaction holds. On a disk that takes
4 ms, one commit per job would limit a server to some hundred jobs a second.
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

    write: makes one item's writes. It may refuse an item by an `ApiError`, but only before its
        first write for that item.
    """

    def __init__(self, engine: Engine, write: Callable[[Connection, T], R]) -> None:
        self._engine = engine
        self._write = write
        self._waiting: list[tuple[T, Future[R]]] = []
        self._waiting_lock = threading.Lock()
        self._commit_lock = threading.Lock()

    def run(self, item: T) -> R:
        """Write an item and wait until it is durable.

        Raises: what `write` raises for this item, which is rolled back then; what the commit
        raises, after which the item may or may not be durable.
        """
        outcome: Future[R] = Future()
        with self._waiting_lock:
            self._waiting.append((item, outcome))
        # The thread that gets the lock commits for all; the others then find their items done.
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
            else:  # each alone, so that one bad item does not fail the others
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
        """Raises: WriteFailed; any error of BEGIN or COMMIT."""
        with self._engine.begin() as connection:
            return [self._write_or_refuse(connection, item) for item in items]

    def _write_or_refuse(self, connection: Connection, item: T) -> R | ApiError:
        try:
            return self._write(connection, item)
        except ApiError as refusal:
            return refusal
        except Exception as error:
            raise WriteFailed from error

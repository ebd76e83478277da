"""`GroupCommit`: writes that arrive together share one transaction, and one wait for the disk."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from sqlalchemy import Connection, Engine

from server.batches import Batches

REST_S = 0.002
"""Between two commits of SQLite, twice as long as others wait until they look whether it is free.
Who went on at once would keep them out for a dozen commits; and the next one is all the larger."""

T = TypeVar("T")
R = TypeVar("R")


class WorkFailed(Exception):
    """Raised in a transaction that is thus rolled back; the cause is what the work raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


class GroupCommit(Generic[T, R]):
    """Writes of several threads in shared transactions.

    work: makes the writes of a group; for each, in order, its result, or an error for its caller
        alone, before which it has written nothing. Where the work raises, all is rolled back and
        every member is done again in a transaction of its own.
    name: of the thread.
    """

    def __init__(
        self,
        engine: Engine,
        work: Callable[[Connection, Sequence[T]], Sequence[R | Exception]],
        name: str,
    ) -> None:
        self._engine = engine
        self._work = work
        rest = let_others_write if engine.dialect.name == "sqlite" else None
        self._batches: Batches[T, R] = Batches(self._commit, name, rest)

    def begin(self, item: T) -> Future[R]:
        """Have a write made; its result is there once it is durable."""
        return self._batches.begin(item)

    def run(self, item: T) -> R:
        """The same, and wait for it.

        Raises: what the work has for it, then nothing of it is kept; what the commit raises.
        """
        return self._batches.run(item)

    def _commit(self, group: list[T]) -> Sequence[R | Exception]:
        try:
            return self._attempt(group)
        except WorkFailed as failed:
            return [failed.cause] if len(group) == 1 else [self._alone(item) for item in group]

    def _alone(self, item: T) -> R | Exception:
        try:
            (outcome,) = self._attempt([item])
        except WorkFailed as failed:
            return failed.cause
        except Exception as error:  # noqa: BLE001 - its caller raises it
            return error
        return outcome

    def _attempt(self, group: Sequence[T]) -> Sequence[R | Exception]:
        """Raises: WorkFailed; what kept the transaction from beginning or from being committed."""
        with self._engine.begin() as connection:
            try:
                return self._work(connection, group)
            except Exception as error:
                raise WorkFailed(error) from error


def let_others_write() -> None:
    """Leave the database alone for a moment."""
    time.sleep(REST_S)


def each(work: Callable[[Connection, T], R]) -> Callable[[Connection, Sequence[T]], list[R]]:
    """Work for a group, one member after the other."""
    return lambda connection, group: [work(connection, item) for item in group]

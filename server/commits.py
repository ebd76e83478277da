"""`GroupCommit`: writes that arrive together share one transaction, and one wait for the disk.

A commit waits some milliseconds for the disk, whatever is in it. The first of several callers
becomes their leader: it takes what has gathered, runs it in the order of arrival, commits, and each
caller gets its own result only then. Those who come meanwhile make up the next group. There is no
thread of its own and so nothing to stop: every write belongs to a caller that waits for it.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine

R = TypeVar("R")


class Write(Generic[R]):
    """One caller's part of a transaction.

    woken: the caller may go on; its part `is_done`, or it is to lead the next group.
    """

    def __init__(self, work: Callable[[Connection], R]) -> None:
        self.work = work
        self.woken = threading.Event()
        self.is_done = False
        self.error: BaseException | None = None
        self._result: list[R] = []

    def run(self, connection: Connection) -> None:
        """Do it; it may be done again where a neighbour's failure undid it."""
        self.error = None
        self._result = [self.work(connection)]

    def result(self) -> R:
        """What the work gave; raises what it raised, or what kept it from being committed."""
        if self.error is not None:
            raise self.error
        return self._result[0]


class GroupCommit:
    """Runs writes of several threads in shared transactions.

    refusals: errors that a work raises before it has written anything. Its neighbours go on, where
    after any other error all is undone and they are done again.
    """

    def __init__(self, engine: Engine, refusals: tuple[type[Exception], ...] = ()) -> None:
        self._engine = engine
        self._refusals = refusals
        self._waiting: list[Write[Any]] = []
        self._has_leader = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[Connection], R]) -> R:
        """The work's result, once it is durable. The work may run more than once.

        Raises: what the work raises, then nothing of it is kept; sqlalchemy.exc.SQLAlchemyError.
        """
        write = Write(work)
        with self._lock:
            self._waiting.append(write)
            is_leader, self._has_leader = not self._has_leader, True
        if not is_leader:
            write.woken.wait()
        if not write.is_done:
            self._lead()
        return write.result()

    def _lead(self) -> None:
        """Commit what has gathered, and hand over to the first who came meanwhile."""
        with self._lock:
            group, self._waiting = self._waiting, []
        try:
            self._commit(group)
        finally:
            with self._lock:
                successor = self._waiting[0] if self._waiting else None
                self._has_leader = successor is not None
            # First of all, so that the disk is not idle while the others are told.
            if successor is not None:
                successor.woken.set()
            for write in group:
                write.is_done = True
                write.woken.set()

    def _commit(self, group: list[Write[Any]]) -> None:
        """Commit the group, without the members that fail; each has its result or its error."""
        left = group
        try:
            while left:
                failed = self._attempt(left)
                if failed is None:
                    return
                # Those that were refused may find more room now.
                left = [write for write in left if write is not failed]
        except BaseException as error:
            for write in left:
                write.error = error
            # Only the leader's own thread is to stop for an interrupt.
            if not isinstance(error, Exception):
                raise

    def _attempt(self, group: list[Write[Any]]) -> Write[Any] | None:
        """Run and commit all. The first that fails is given back, and all is rolled back.

        Raises: what kept the transaction from beginning or from being committed.
        """
        with self._engine.connect() as connection, connection.begin() as transaction:
            for write in group:
                try:
                    write.run(connection)
                except self._refusals as error:
                    write.error = error
                except Exception as error:  # noqa: BLE001 - its caller raises it
                    write.error = error
                    transaction.rollback()
                    return write
        return None

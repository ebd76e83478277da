"""Faults of the database, at the n-th call."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError


@dataclass
class Fault:
    """Strikes once, at the n-th call of a kind."""

    at: int
    calls: int = 0
    has_struck: bool = False

    @property
    def strikes(self) -> bool:
        """Counts a call; whether it is the n-th."""
        self.calls += 1
        self.has_struck = self.has_struck or self.calls == self.at
        return self.calls == self.at

    def count(self, *_arguments: Any) -> None:
        """Raises: OperationalError at the n-th call."""
        if self.strikes:
            raise OperationalError("a call", None, Exception("the disk is gone"))


@contextmanager
def commit_fails(engine: Engine, fault: Fault) -> Iterator[None]:
    """The transaction is undone."""
    event.listen(engine, "commit", fault.count)
    yield
    event.remove(engine, "commit", fault.count)


@contextmanager
def answer_is_lost(engine: Engine, fault: Fault) -> Iterator[None]:
    """The commit takes effect, and its caller does not learn of it."""
    dialect: Any = engine.dialect
    do_commit = dialect.do_commit

    def commit(connection: Any) -> None:
        do_commit(connection)
        fault.count()

    dialect.do_commit = commit
    yield
    del dialect.do_commit  # the class's own is there again

"""Clocks for times that one process writes and another compares."""

import time
from collections.abc import Callable

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from server.storage.database import read_only

MEASURE_S = 60.0
"""Seconds between two measurements of a PostgreSQL server's clock."""

NOW = text("SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)")


class DatabaseClock:
    """Seconds since the epoch. Safe for several threads.

    With PostgreSQL this is the database server's clock, so that all machines agree. SQLite serves
    one machine, whose wall clock is read once when the process starts. In between, the process's
    steady clock counts on, so that a jump of the wall clock changes nothing.
    steady_clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        wall_clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._steady_clock = steady_clock
        self._offset_s = wall_clock() - steady_clock()
        self._is_remote = engine.dialect.name != "sqlite"
        self._measure_at = steady_clock()

    def __call__(self) -> float:
        """Never fails: when the server does not answer, the last measurement stays in use."""
        if self._is_remote and self._steady_clock() >= self._measure_at:
            self._measure_at = self._steady_clock() + MEASURE_S
            self._measure()
        return self._offset_s + self._steady_clock()

    def _measure(self) -> None:
        try:
            with read_only(self._engine) as connection:
                now: float = connection.execute(NOW).scalar_one()
        except SQLAlchemyError:
            self._measure_at = self._steady_clock()  # the next call measures again
        else:
            self._offset_s = now - self._steady_clock()


class EarlierClock:
    """Seconds since the epoch: the wall clock or the database's, whichever is earlier.

    For removals, which cannot be undone. A file that is old by this clock is old by both, so that
    no single jump of the wall clock makes files old at once.
    """

    def __init__(
        self,
        engine: Engine,
        wall_clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall_clock = wall_clock
        self._database_clock = DatabaseClock(engine, wall_clock, steady_clock)

    def __call__(self) -> float:
        return min(self._wall_clock(), self._database_clock())

"""`ChangeSignal`: detects commits of other connections, for threads that wait for them."""

import time
from typing import ClassVar, Protocol

import pysqlite3.dbapi2 as sqlite
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import PoolProxiedConnection

from server.storage.database import Topic

REFRESH_S = 1.0
"""Without a notification from PostgreSQL a change is reported after so long all the same, because
a listening connection may be dead unnoticed."""


class ChangeSignal:
    """Whether another connection has committed since the last poll, without a lock or a query.

    A poll costs microseconds and may report a change that is none. SQLite reports every commit that
    has returned; PostgreSQL's notification arrives some milliseconds later. For one thread.
    topic: the channel that PostgreSQL listens to. refresh_s: see `REFRESH_S`.
    """

    def __init__(self, engine: Engine, topic: Topic, refresh_s: float = REFRESH_S) -> None:
        if engine.dialect.name == "sqlite":
            self._source: ChangeSource = DataVersion(engine)
            return
        # PostgreSQL's driver takes 8 MB, so a process on SQLite does not load it.
        from server.storage.listener import Notifications

        self._source = Notifications(engine, topic, refresh_s)

    def has_changed(self) -> bool:
        """Also true when the database fails: the caller's next read raises the error."""
        try:
            return self._source.poll()
        except self._source.errors:
            self._source.close()
            return True

    def wait(self, timeout_s: float) -> None:
        """Wait until there may be a change, at most so long; on SQLite always so long."""
        try:
            self._source.wait(timeout_s)
        except self._source.errors:
            self._source.close()
            time.sleep(timeout_s)  # Or a database that is down would keep the caller busy.

    def __enter__(self) -> "ChangeSignal":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Return the connection to the pool."""
        self._source.close()


class ChangeSource(Protocol):
    """How one kind of database reports other connections' commits. errors: what `poll` raises."""

    errors: ClassVar[tuple[type[Exception], ...]]

    def poll(self) -> bool:
        """Whether there were commits since the last poll; connects first if necessary."""

    def wait(self, timeout_s: float) -> None:
        """As `ChangeSignal.wait`."""

    def close(self) -> None:
        """Disconnect. The next poll connects again and reports a change."""


class DataVersion:
    """SQLite counts the commits of other connections: `PRAGMA data_version`."""

    errors: ClassVar[tuple[type[Exception], ...]] = (SQLAlchemyError, sqlite.Error)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: PoolProxiedConnection | None = None
        self._version: int | None = None

    def poll(self) -> bool:
        # The driver's own connection, because a poll happens a hundred times a second.
        self._connection = self._connection or self._engine.raw_connection()
        cursor = self._connection.cursor()
        cursor.execute("PRAGMA data_version")
        (version,) = cursor.fetchone() or (None,)
        cursor.close()
        is_new, self._version = version != self._version, version
        return is_new

    def wait(self, timeout_s: float) -> None:
        time.sleep(timeout_s)  # Nothing wakes the readers of a SQLite file.

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._version = None

"""`ChangeSignal`: whether others have written to the database, for threads that wait for it."""

from collections.abc import Collection
from typing import ClassVar, Protocol

import pysqlite3.dbapi2 as sqlite
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import PoolProxiedConnection

from server.storage.database import Topic

LOOK_ANYWAY_S = 1.0
"""A connection may be dead without anybody knowing: PostgreSQL's silence is believed no longer."""


class ChangeSignal:
    """Tells whether anybody else has committed since the last look, without a lock or a query.

    A look costs microseconds and may say yes for nothing. With SQLite it sees every commit that has
    returned; PostgreSQL's word of one comes some milliseconds later. Belongs to one thread.
    topics: of which PostgreSQL tells. look_anyway_s: see `LOOK_ANYWAY_S`.
    """

    def __init__(
        self,
        engine: Engine,
        topics: Collection[Topic] = tuple(Topic),
        look_anyway_s: float = LOOK_ANYWAY_S,
    ) -> None:
        if engine.dialect.name == "sqlite":
            self._watch: Watch = DataVersion(engine)
            return
        # PostgreSQL's driver is 8 MB that others do not need.
        from server.storage.notifications import Notifications

        self._watch = Notifications(engine, topics, look_anyway_s)

    def has_changed(self) -> bool:
        """Also yes where the database fails: who looks closer meets the error where it is
        handled.
        """
        try:
            return self._watch.look()
        except self._watch.errors:
            self._watch.close()
            return True

    def __enter__(self) -> "ChangeSignal":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._watch.close()


class Watch(Protocol):
    """How one kind of database tells of others' commits. errors: where it fails."""

    errors: ClassVar[tuple[type[Exception], ...]]

    def look(self) -> bool:
        """Whether there were any since the last look; connects where it is not connected."""

    def close(self) -> None:
        """The next look connects anew, and says yes."""


class DataVersion:
    """SQLite counts others' commits for each connection: `PRAGMA data_version`."""

    errors: ClassVar[tuple[type[Exception], ...]] = (SQLAlchemyError, sqlite.Error)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: PoolProxiedConnection | None = None
        self._version: int | None = None

    def look(self) -> bool:
        # The driver's own connection: a look happens a hundred times a second.
        self._connection = self._connection or self._engine.raw_connection()
        cursor = self._connection.cursor()
        cursor.execute("PRAGMA data_version")
        (version,) = cursor.fetchone() or (None,)
        cursor.close()
        is_new, self._version = version != self._version, version
        return is_new

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._version = None

"""PostgreSQL's word of others' commits: `database.notify` sends it, who listens here gets it."""

import time
from collections.abc import Collection
from typing import Any, ClassVar

import psycopg
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from server.storage.database import Topic


class Notifications:
    """A `Watch` of `changes.py`. look_anyway_s: how long silence is believed."""

    errors: ClassVar[tuple[type[Exception], ...]] = (SQLAlchemyError, psycopg.Error)

    def __init__(self, engine: Engine, topics: Collection[Topic], look_anyway_s: float) -> None:
        self._engine = engine
        self._topics = topics
        self._look_anyway_s = look_anyway_s
        self._connection: psycopg.Connection[Any] | None = None
        self._said_yes_at = 0.0

    def look(self) -> bool:
        if self._connection is None:
            self._connection = self._listen()
            is_new = True
        else:
            is_new = bool([*self._connection.notifies(timeout=0)])
        now = time.monotonic()
        if is_new or now - self._said_yes_at >= self._look_anyway_s:
            self._said_yes_at = now
            return True
        return False

    def _listen(self) -> psycopg.Connection[Any]:
        # Not of the pool, which would reset it: a listening connection is never between two uses.
        args, options = self._engine.dialect.create_connect_args(self._engine.url)
        connection = psycopg.connect(*args, autocommit=True, **options)
        for topic in self._topics:
            connection.execute(f"LISTEN {topic}".encode())
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

"""PostgreSQL's LISTEN, which receives what `database.notify` sends at each commit."""

import time
from typing import Any, ClassVar

import psycopg
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from server.storage.database import Topic


class Notifications:
    """A `ChangeSource`. refresh_s: see `notify.REFRESH_S`."""

    errors: ClassVar[tuple[type[Exception], ...]] = (SQLAlchemyError, psycopg.Error)

    def __init__(self, engine: Engine, topic: Topic, refresh_s: float) -> None:
        self._engine = engine
        self._topic = topic
        self._refresh_s = refresh_s
        self._connection: psycopg.Connection[Any] | None = None
        self._reported_at = 0.0
        self._has_news = False

    def poll(self) -> bool:
        if self._connection is None:
            self._connection = self._listen()
            is_new = True
        else:
            is_new = bool([*self._connection.notifies(timeout=0)]) or self._has_news
        self._has_news = False
        now = time.monotonic()
        if is_new or now - self._reported_at >= self._refresh_s:
            self._reported_at = now
            return True
        return False

    def wait(self, timeout_s: float) -> None:
        self._connection = self._connection or self._listen()
        notifies = self._connection.notifies(timeout=timeout_s, stop_after=1)
        self._has_news = bool([*notifies]) or self._has_news

    def _listen(self) -> psycopg.Connection[Any]:
        # Not from the pool, which would reset the connection and so end its LISTEN.
        args, options = self._engine.dialect.create_connect_args(self._engine.url)
        connection = psycopg.connect(*args, autocommit=True, **options)
        try:
            connection.execute(f"LISTEN {self._topic}".encode())
        except psycopg.Error:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

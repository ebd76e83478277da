"""PostgreSQL's word of others' commits: `database.py` has it sent, who listens here gets it."""

import time
from typing import Any, ClassVar

import psycopg
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from server.database import CHANNEL


class Notifications:
    """A `Watch` of `changes.py`. look_anyway_s: how long silence is believed."""

    errors: ClassVar[tuple[type[Exception], ...]] = (SQLAlchemyError, psycopg.Error)

    def __init__(self, engine: Engine, look_anyway_s: float) -> None:
        self._engine = engine
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
        connection.execute(f"LISTEN {CHANNEL}")
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

"""`only_one`: of all processes that share a database, one does what need not be done twice."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

TURN_LOCK = 0x1_4E_9A_16
"""Number of an advisory lock: arbitrary, but the same for all processes of this server."""


@contextmanager
def only_one(engine: Engine) -> Iterator[Callable[[], bool]]:
    """A lock that is not waited for; call what it gives to learn whether this process holds it.

    Whoever holds it keeps it until the end of the block, or of its process, or of its connection
    to PostgreSQL, which it must ask about from time to time. Until then another process may do the
    same work too, and that must do no harm. Raises: SQLAlchemyError.
    """
    locked = file_lock(engine) if engine.dialect.name == "sqlite" else advisory_lock(engine)
    with locked as is_held:
        yield is_held


@contextmanager
def file_lock(engine: Engine) -> Iterator[Callable[[], bool]]:
    """A lock on a file beside the database, whose processes are on one machine."""
    # Never on the database's own file: closing that would release SQLite's locks.
    database = Path(engine.url.database or "")
    path = database.with_name(f".{database.name}-turn")
    with ExitStack() as stack:
        is_held = True
        try:
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_held = False
        except OSError:
            pass  # On a full disk, say. The work is then done by all, rather than by none.
        yield lambda: is_held


@contextmanager
def advisory_lock(engine: Engine) -> Iterator[Callable[[], bool]]:
    """PostgreSQL's, of one connection, which is held meanwhile."""
    # A transaction that stays open for hours would keep PostgreSQL from removing dead rows.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:

        def is_held() -> bool:
            # A session gets its own lock again, so this asks whether the connection lives, too.
            try:
                return bool(connection.scalar(select(func.pg_try_advisory_lock(TURN_LOCK))))
            except SQLAlchemyError:
                return False

        try:
            yield is_held
        finally:
            connection.invalidate()  # The pool would keep the connection, and with it the lock.

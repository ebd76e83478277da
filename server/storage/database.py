"""Tables, connections and transactions, for SQLite and PostgreSQL alike."""

import functools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import pysqlite3.dbapi2 as sqlite
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from server.core.logs import get_logger

logger = get_logger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"

POOL_SIZE = 24
"""Connections that a process keeps open once they were needed."""

MORE_CONNECTIONS = 26
"""Opened at a peak besides. With them there is one for every thread, see `services.py`."""

POOL_TIMEOUT_S = 5
"""For a connection of the pool to come free."""

CHECKPOINT_PAGES = 4_000
"""Pages of 4 KiB in SQLite's write-ahead log after which a commit moves them to the database. A new
job takes some 24 pages: with SQLite's default of 1,000 two commits a second would wait three times
for the disk when 100 jobs a second arrive."""

WAL_BYTES = 32_000_000
"""A write-ahead log that grew longer, because readers needed its pages, is cut to this size when
SQLite begins it anew."""

BUSY_TIMEOUT_MS = 10_000
"""For SQLite's lock, while another transaction writes."""

SWITCH_PAUSE_MS = 20

FILE_OPTION = "database_file"
"""Execution option of an engine for a SQLite file: its `DatabaseFile`."""

PRIMARY_CODE = 0xFF
"""The bits of SQLite's result codes that say what is wrong; those above say why."""

POSTGRESQL = "postgresql+psycopg"

# A line that is cut in silence tells neither side. Without these a call would wait for an answer,
# and a lock for its holder, until the kernel gives up after hours.
CONNECT_TIMEOUT_S = 5

SILENT_LINE_S = 15
"""After which an unanswered byte, or an unanswered question on an idle line, ends a connection."""

IDLE_TRANSACTION_S = 10
"""Ours do nothing between two statements. One that does belongs to a process that stands still or
is cut off, and may hold the lock that all submits wait for."""

LOCK_S = 20
"""Twice that: who waits behind such a process still gets its turn."""

STATEMENT_S = 30
"""Far beyond ours, which count a queue or go through a batch; a migration has no limit."""


class Topic(StrEnum):
    """What PostgreSQL tells listeners of: a channel for each."""

    QUEUED = "inpaint_queued"
    """Jobs that a worker may claim."""
    ENDED = "inpaint_ended"
    """Jobs in a terminal state."""
    PROGRESS = "inpaint_progress"
    """Jobs that were claimed or have come further."""


SqliteVersion = tuple[int, int, int]

SOUND_WAL: SqliteVersion = (3, 51, 3)

SOUND_BACKPORTS: dict[tuple[int, int], SqliteVersion] = {(3, 44): (3, 44, 6), (3, 50): (3, 50, 7)}
"""SQLite versions without the WAL-reset bug: the first one, and those of two older lines."""

MIGRATION_LOCK = 0x1_4E_9A_14
"""An advisory lock's number: any, but the same for all processes of this server."""


class DatabaseFileGone(OperationalError):
    """A SQLite file is not, or no longer, the one under its path. reason: a sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(None, None, sqlite.OperationalError(reason))
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class DatabaseFile:
    """The file of a SQLite database, known by its inode from when it was first opened.

    SQLite goes on with an open file that was moved, removed or replaced: what it commits then is
    lost at the next start, and nobody reads what others write to the file that has come instead.
    must_exist: it is not made where it is missing.
    """

    def __init__(self, path: str, *, must_exist: bool) -> None:
        self._path = path
        self._must_exist = must_exist
        self._opened: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises: DatabaseFileGone where the path leads to another file by now, or to none."""
        if self._opened is not None and self._find() != self._opened:
            raise DatabaseFileGone(
                f"the database file {self._path} was moved, removed or replaced while it was in use"
            )

    def before_connect(self, *_arguments: object) -> None:
        """As an event of the engine. Raises: DatabaseFileGone."""
        self.check()
        if self._must_exist and self._find() is None:
            raise DatabaseFileGone(f"the database file {self._path} is not there")

    def after_connect(self, *_arguments: object) -> None:
        """As an event of the engine, once the file is there."""
        self._opened = self._opened or self._find()

    def _find(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino


def check_file(engine: Engine) -> None:
    """Raises: DatabaseFileGone where a SQLite's file was moved, removed or replaced. A `stat`."""
    file: DatabaseFile | None = engine.get_execution_options().get(FILE_OPTION)
    if file is not None:
        file.check()


def open_engine(
    url: str,
    sqlite_version: SqliteVersion = sqlite.sqlite_version_info,
    *,
    must_exist: bool = False,
) -> Engine:
    """An engine for a SQLAlchemy URL. The folder of a SQLite file is made where it is missing.

    Its errors name no parameters: prompts are among them, and errors are logged.
    must_exist: a SQLite file is not made either; transactions fail until another process has made
    it.
    """
    if make_url(url).get_backend_name() == "sqlite":
        return _open_sqlite(url, sqlite_version, must_exist)
    return _open_postgresql(url)


def _open_postgresql(url: str) -> Engine:
    parsed = make_url(url)
    return create_engine(
        # In the URL, from where a listening connection takes them too.
        parsed.set(drivername=POSTGRESQL, query=_limits(parsed.query)),
        pool_pre_ping=True,
        pool_size=POOL_SIZE,
        max_overflow=MORE_CONNECTIONS,
        pool_timeout=POOL_TIMEOUT_S,
        hide_parameters=True,
    )


def _limits(own: Mapping[str, Any]) -> dict[str, Any]:
    """Connection parameters that bound every wait. own: the operator's, which prevail."""
    settings = {
        "statement_timeout": STATEMENT_S,
        "lock_timeout": LOCK_S,
        "idle_in_transaction_session_timeout": IDLE_TRANSACTION_S,
    }
    options = [f"-c {name}={seconds}s" for name, seconds in settings.items()]
    return {
        "connect_timeout": str(CONNECT_TIMEOUT_S),
        "tcp_user_timeout": str(SILENT_LINE_S * 1000),
        "keepalives": "1",
        "keepalives_idle": "5",
        "keepalives_interval": "5",
        "keepalives_count": "2",
        **own,
        "options": " ".join([*options, own.get("options", "")]).strip(),
    }


def _open_sqlite(url: str, version: SqliteVersion, must_exist: bool) -> Engine:
    database = make_url(url).database
    if database:
        Path(database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(
        url,
        module=sqlite,
        connect_args={"isolation_level": None},
        pool_use_lifo=True,
        pool_size=POOL_SIZE,
        max_overflow=MORE_CONNECTIONS,
        pool_timeout=POOL_TIMEOUT_S,
        hide_parameters=True,
    )
    journal_mode = "WAL"
    if not has_sound_wal(version):
        # API and workers are several processes, so no pool can hold the only connection. With a
        # rollback journal the lock of the file lets one connection write at a time.
        journal_mode = "DELETE"
        logger.warning(
            "this SQLite can lose commits in WAL mode: using its slower rollback journal",
            version=".".join(map(str, version)),
        )
    event.listen(engine, "connect", functools.partial(_set_pragmas, journal_mode))
    event.listen(engine, "begin", _begin)
    if database:
        file = DatabaseFile(database, must_exist=must_exist)
        event.listen(engine, "do_connect", file.before_connect)
        event.listen(engine, "connect", file.after_connect)
        engine.update_execution_options(**{FILE_OPTION: file})
    return engine


def has_sound_wal(version: SqliteVersion) -> bool:
    """False where several connections in WAL mode can lose committed transactions."""
    repaired = SOUND_BACKPORTS.get(version[:2], SOUND_WAL)
    return version >= repaired


def _set_pragmas(journal_mode: str, connection: sqlite.Connection, _record: object) -> None:
    # The timeout comes first: switching the journal already needs the lock.
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _switch_journal(connection, journal_mode)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    connection.execute("PRAGMA foreign_keys = ON")


def _switch_journal(connection: sqlite.Connection, mode: str) -> None:
    """Does nothing for a database that is in this mode, which the file remembers."""
    # For this switch alone SQLite does not wait: two processes that open a new file together would
    # find it locked, in spite of the timeout.
    for _ in range(BUSY_TIMEOUT_MS // SWITCH_PAUSE_MS):
        try:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            return
        except sqlite.OperationalError as error:
            if code_of(error) != sqlite.SQLITE_BUSY:
                raise
            time.sleep(SWITCH_PAUSE_MS / 1000)
    connection.execute(f"PRAGMA journal_mode = {mode}")


def _begin(connection: Connection) -> None:
    # A deferred transaction that turns from reading to writing fails at once when another one
    # writes, whatever the timeout; taking the lock at the start waits instead. Readers that run
    # outside a write transaction use `read_only`.
    is_read_only = connection.get_execution_options().get("is_read_only")
    connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")
    # Not before: the file may be replaced while this transaction waits for its lock.
    check_file(connection.engine)


def code_of(error: sqlite.Error) -> int:
    """SQLite's result code."""
    # The driver's own complaints have none.
    code: int = getattr(error, "sqlite_errorcode", sqlite.SQLITE_ERROR)
    return code & PRIMARY_CODE


@contextmanager
def read_only(engine: Engine) -> Iterator[Connection]:
    """A connection that never waits for a writer."""
    with engine.connect().execution_options(is_read_only=True) as connection:
        yield connection


def notify(connection: Connection, topic: Topic) -> None:
    """Have PostgreSQL tell listeners of the transaction's changes once, and if, it is committed.

    For transactions that have changed rows of the topic only: every listener looks at the database
    for each. SQLite's readers see commits by themselves.
    """
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql(f"NOTIFY {topic}")


def migrate(engine: Engine) -> None:
    """Bring the schema to this version; does nothing where it is.

    Processes that migrate at once do it one after the other.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        if engine.dialect.name != "sqlite":  # there the transaction itself is the lock
            for limit in ("statement_timeout", "lock_timeout"):
                connection.exec_driver_sql(f"SET LOCAL {limit} = 0")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def open_migrated(url: str) -> Engine:
    """`open_engine` and `migrate`. Raises: ValueError, with one sentence for the operator."""
    try:
        engine = open_engine(url)
        migrate(engine)
    except (SQLAlchemyError, sqlite.Error, CommandError, OSError, ValueError) as error:
        raise ValueError(why_unusable(url, error)) from error
    return engine


def why_unusable(url: str, error: Exception) -> str:
    """Which database it is, and what is wrong with it; never the password."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return "the database's URL cannot be read"
    reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    if parsed.password:
        reason = reason.replace(str(parsed.password), "(password)")
    if isinstance(error, CommandError):
        return f"the database is of another version of this program: {reason}"
    if parsed.get_backend_name() != "sqlite":
        where = f"{parsed.host or 'this machine'}:{parsed.port or 5432}"
        return f"database {parsed.database} at {where} cannot be used: {reason}"
    cause = getattr(error, "orig", error)
    damaged = (sqlite.SQLITE_NOTADB, sqlite.SQLITE_CORRUPT)
    if isinstance(cause, sqlite.Error) and code_of(cause) in damaged:
        return f"database {parsed.database} is damaged, or no SQLite file: {reason}"
    return f"database {parsed.database} cannot be used by uid {os.geteuid()}: {reason}"

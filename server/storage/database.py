"""Connections and transactions, for SQLite and PostgreSQL alike."""

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
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from server.core.logs import get_logger

logger = get_logger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"

SQLITE_POOL, SQLITE_OVERFLOW = 24, 26
"""Connections to a SQLite file that a process keeps open, and those opened at a peak besides. With
them every thread of `api/services.py` has one."""

CONNECTIONS = 18
"""PostgreSQL connections of an engine whose caller has no budget. A server has a fixed number for
all its clients, so a thread waits for one of these instead of opening another."""

LEAST_CONNECTIONS = 2
"""An engine needs 2, because a transaction may read the database's clock on another connection."""

LISTENERS = 1
"""Connections of a process besides those of its engines: `listener.py` holds it all the time."""

POOL_TIMEOUT_S = 5
"""The longest wait for a free connection of the pool."""

CHECKPOINT_PAGES = 4_000
"""Pages of 4 KiB in SQLite's write-ahead log after which a commit checkpoints them. A new job takes
about 24 pages. At 100 jobs a second SQLite's default of 1,000 would checkpoint, with three fsyncs,
in two commits of each second."""

WAL_BYTES = 32_000_000
"""SQLite truncates the write-ahead log to this size when it restarts the log. A log grows longer
while readers need its pages."""

BUSY_TIMEOUT_MS = 10_000
"""The longest wait for SQLite's lock while another transaction writes."""

SWITCH_PAUSE_MS = 20
"""Between two attempts to switch the journal."""

FILE_OPTION = "database_file"
"""Execution option of an engine for a SQLite file: its `DatabaseFile`."""

PRIMARY_CODE_MASK = 0xFF
"""The bits of SQLite's primary result code; the bits above extend it."""

POSTGRESQL = "postgresql+psycopg"

# Neither side notices when a network drops its packets. Without these limits a call would wait for
# an answer, and a lock for its holder, until the kernel gives up after hours.
CONNECT_TIMEOUT_S = 5

DEAD_PEER_TIMEOUT_S = 15
"""A connection ends when sent bytes or a keep-alive probe stay unacknowledged for so long."""

IDLE_TRANSACTION_TIMEOUT_S = 10
"""Our transactions are never idle between two statements. An idle one belongs to a process that is
suspended or cut off, and may hold the lock that all submits wait for."""

LOCK_TIMEOUT_S = 20
"""Longer than an idle transaction lasts, so that a transaction behind a suspended process still
gets the lock."""

STATEMENT_TIMEOUT_S = 30
"""Our statements count a queue or change a batch, and take far less. Migrations have no limit."""


class Topic(StrEnum):
    """The channels of PostgreSQL's NOTIFY.

    Claims and heartbeats have none, because PostgreSQL flushes commits with a NOTIFY one by one.
    """

    QUEUED = "inpaint_queued"
    """Jobs that a worker may claim."""
    ENDED = "inpaint_ended"
    """Jobs in a terminal state."""


SqliteVersion = tuple[int, int, int]

SOUND_WAL: SqliteVersion = (3, 51, 3)

SOUND_BACKPORTS: dict[tuple[int, int], SqliteVersion] = {(3, 44): (3, 44, 6), (3, 50): (3, 50, 7)}
"""SQLite versions without the WAL-reset bug: the first one, and the backports to older releases."""

MIGRATION_LOCK = 0x1_4E_9A_14
"""Number of an advisory lock: arbitrary, but the same for all processes of this server."""


class DatabaseFileGone(OperationalError):
    """The path of a SQLite file leads to no file or to another one. reason: a sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(None, None, sqlite.OperationalError(reason))
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class DatabaseFile:
    """The file of a SQLite database, recognized by its inode since it was first opened.

    SQLite keeps using an open file that was moved, removed or replaced. Its commits are then lost
    at the next start, and other processes write to the new file unseen.
    must_exist: a missing file is an error; otherwise SQLite creates it.
    """

    def __init__(self, path: str, *, must_exist: bool) -> None:
        self._path = path
        self._must_exist = must_exist
        self._opened: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises: DatabaseFileGone when the path now leads to another file, or to none."""
        if self._opened is not None and self._find() != self._opened:
            raise DatabaseFileGone(
                f"the database file {self._path} was moved, removed or replaced while it was in use"
            )

    def before_connect(self, *_arguments: object) -> None:
        """Listener for the engine's `do_connect`. Raises: DatabaseFileGone."""
        self.check()
        if self._must_exist and self._find() is None:
            raise DatabaseFileGone(f"the database file {self._path} is not there")

    def after_connect(self, *_arguments: object) -> None:
        """Listener for the engine's `connect`, when the file exists."""
        self._opened = self._opened or self._find()

    def _find(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino


def check_file(engine: Engine) -> None:
    """Check with one `stat` that a SQLite file is still the one that was opened.

    Raises: DatabaseFileGone.
    """
    file: DatabaseFile | None = engine.get_execution_options().get(FILE_OPTION)
    if file is not None:
        file.check()


def open_engine(
    url: str,
    sqlite_version: SqliteVersion = sqlite.sqlite_version_info,
    *,
    must_exist: bool = False,
    connections: int = CONNECTIONS,
) -> Engine:
    """An engine for a SQLAlchemy URL. A missing folder of a SQLite file is created.

    Errors hide statement parameters, because prompts are among them and errors are logged.
    must_exist: never create the SQLite file; transactions fail until another process creates it.
    connections: the most that are open to PostgreSQL at a time, at least `LEAST_CONNECTIONS`.
    """
    if make_url(url).get_backend_name() == "sqlite":
        return _open_sqlite(url, sqlite_version, must_exist)
    return _open_postgresql(url, connections)


def _open_postgresql(url: str, connections: int) -> Engine:
    parsed = make_url(url)
    return create_engine(
        # In the URL, because a listening connection is opened from the URL too.
        parsed.set(drivername=POSTGRESQL, query=_limits(parsed.query)),
        pool_pre_ping=True,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_S,
        hide_parameters=True,
    )


def _limits(own: Mapping[str, Any]) -> dict[str, Any]:
    """Connection parameters that bound every wait. own: the operator's, which take precedence."""
    settings = {
        "statement_timeout": STATEMENT_TIMEOUT_S,
        "lock_timeout": LOCK_TIMEOUT_S,
        "idle_in_transaction_session_timeout": IDLE_TRANSACTION_TIMEOUT_S,
    }
    options = [f"-c {name}={seconds}s" for name, seconds in settings.items()]
    return {
        "fallback_application_name": "inpaint-server",
        "connect_timeout": str(CONNECT_TIMEOUT_S),
        "tcp_user_timeout": str(DEAD_PEER_TIMEOUT_S * 1000),
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
        pool_size=SQLITE_POOL,
        max_overflow=SQLITE_OVERFLOW,
        pool_timeout=POOL_TIMEOUT_S,
        hide_parameters=True,
    )
    journal_mode = "WAL"
    if not has_sound_wal(version):
        # Several processes open the file, so one shared connection cannot avoid the bug. A rollback
        # journal does: its file lock lets one connection write at a time.
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
    """False for versions in which several connections in WAL mode can lose commits."""
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
    """Set the journal mode, which the file stores; a no-op when it is set already."""
    # SQLite's busy timeout does not cover this switch. Without retries, one of two processes that
    # open a new file together would fail because the file is locked.
    for _ in range(BUSY_TIMEOUT_MS // SWITCH_PAUSE_MS):
        try:
            connection.execute(f"PRAGMA journal_mode = {mode}")
            return
        except sqlite.OperationalError as error:
            if result_code(error) != sqlite.SQLITE_BUSY:
                raise
            time.sleep(SWITCH_PAUSE_MS / 1000)
    connection.execute(f"PRAGMA journal_mode = {mode}")


def _begin(connection: Connection) -> None:
    # A deferred transaction that turns from reading to writing fails at once when another one
    # writes, whatever the timeout. IMMEDIATE takes the lock at the start and waits for it. Readers
    # outside a write transaction use `read_only`.
    is_read_only = connection.get_execution_options().get("is_read_only")
    connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")
    # After BEGIN, because the file may be replaced while this transaction waits for its lock.
    check_file(connection.engine)


def result_code(error: sqlite.Error) -> int:
    """SQLite's primary result code."""
    # Errors that the driver itself raises have none.
    code: int = getattr(error, "sqlite_errorcode", sqlite.SQLITE_ERROR)
    return code & PRIMARY_CODE_MASK


@contextmanager
def read_only(engine: Engine) -> Iterator[Connection]:
    """A connection that never waits for a writer."""
    with engine.connect().execution_options(is_read_only=True) as connection:
        yield connection


def notify(connection: Connection, topic: Topic) -> None:
    """Have PostgreSQL wake listeners when this transaction commits. SQLite's poll the file instead.

    Call it only after a change to rows of the topic, because every listener then reads the
    database.
    """
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql(f"NOTIFY {topic}")


def migrate(engine: Engine) -> None:
    """Bring the schema to this version. Processes that migrate together do it one by one."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        if engine.dialect.name != "sqlite":  # SQLite's write transaction is the lock itself
            for limit in ("statement_timeout", "lock_timeout"):
                connection.exec_driver_sql(f"SET LOCAL {limit} = 0")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def open_for_reading(url: str) -> Engine:
    """An engine that changes nothing, not even the files beside a SQLite database.

    A SQLite file must be there: reading creates none.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return _open_postgresql(url, LEAST_CONNECTIONS)
    path = Path(parsed.database or "").absolute()
    # A file that no process has open has no shared memory. SQLite would create it, as the user who
    # reads, and a server of another user could then not open its own database.
    is_open = path.with_name(f"{path.name}-shm").exists()
    address = f"{path.as_uri()}?{'mode=ro' if is_open else 'mode=ro&immutable=1'}"
    return create_engine(
        "sqlite://", module=sqlite, creator=lambda: sqlite.connect(address, uri=True)
    )


def known_schemas() -> list[str]:
    """The schema versions that this program knows, the newest first."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]


def open_migrated(url: str, connections: int = CONNECTIONS) -> Engine:
    """`open_engine` and `migrate`. Raises: ValueError, with one sentence for the operator."""
    try:
        engine = open_engine(url, connections=connections)
        migrate(engine)
    except (SQLAlchemyError, sqlite.Error, CommandError, OSError, ValueError) as error:
        raise ValueError(why_unusable(url, error)) from error
    return engine


def schema_of(engine: Engine) -> str | None:
    """The schema version of the tables; None where nobody has made them yet."""
    if not inspect(engine).has_table("alembic_version"):
        return None
    with read_only(engine) as connection:
        query = text("SELECT version_num FROM alembic_version")
        found: str = connection.execute(query).scalar_one()
    return found


def require_migrated(url: str) -> None:
    """Raises: ValueError, with one sentence for the operator, unless the schema is this version's.

    It changes nothing.
    """
    engine = open_for_reading(url)
    try:
        found = schema_of(engine)
    except (SQLAlchemyError, sqlite.Error, OSError) as error:
        raise ValueError(why_unusable(url, error)) from error
    finally:
        engine.dispose()
    known = known_schemas()
    if found is not None and found not in known:
        raise ValueError(
            f"the database has schema {found}, and this program knows {known[0]} at most: "
            "install the newer version"
        )
    if found != known[0]:
        state = "no tables yet" if found is None else f"schema {found}"
        raise ValueError(
            f"the database has {state}, and this version needs {known[0]}: "
            "run `inpaint-server migrate`"
        )


def why_unusable(url: str, error: Exception) -> str:
    """A sentence that names the database and the reason, without the password."""
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
    if isinstance(cause, sqlite.Error) and result_code(cause) in damaged:
        return f"database {parsed.database} is damaged, or no SQLite file: {reason}"
    return f"database {parsed.database} cannot be used by uid {os.geteuid()}: {reason}"

"""Tables, connections and transactions, for SQLite and PostgreSQL alike."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pysqlite3.dbapi2 as sqlite
from alembic import command
from alembic.config import Config
from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Dialect,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    create_engine,
    event,
    make_url,
)

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS = 10_000
SWITCH_PAUSE_MS = 20

metadata = MetaData()


class JsonScalar(TypeDecorator[Any]):
    """Any JSON value, kept as text.

    SQLite would keep a lone number in a column of type JSON as a number of its own: 1.0 would come
    back as 1, and an integer beyond 64 bits as a float.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        return json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


jobs = Table(
    "jobs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("state", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("dialect", Text, nullable=False),
    Column("request", JSON, nullable=False),
    Column("params", JSON, nullable=False),
    Column("file_prefix", Text, nullable=False, unique=True),
    Column("work", Float, nullable=False),
    Column("webhook", Text),
    Column("track_id", JsonScalar),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("attempt", Integer, nullable=False, default=0),
    Column("worker_id", Text),
    Column("lease_until", Float),
    Column("step", Integer, nullable=False, default=0),
    Column("total_steps", Integer, nullable=False, default=0),
    Column("run_s", Float),
    Column("flagged", JSON),
    Column("error", Text),
    CheckConstraint(
        "state IN ('queued', 'running', 'finished', 'failed', 'cancelled')", name="state_known"
    ),
    CheckConstraint(
        "(state = 'running') = (worker_id IS NOT NULL AND lease_until IS NOT NULL)",
        name="running_has_lease",
    ),
    CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="failed_has_error"),
    # Ids go out to clients and must never be given twice, not even after the newest row is deleted.
    sqlite_autoincrement=True,
)
Index("jobs_by_state", jobs.c.state, jobs.c.id)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job_id", Integer, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("url", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="state_known"),
)
Index("deliveries_by_job", deliveries.c.job_id)
Index("deliveries_due", deliveries.c.state, deliveries.c.due_at)

delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("delivery_id", Text, ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("duration_s", Float, nullable=False),
    Column("status", Integer),
    Column("outcome", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("device", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("seen_at", Float, nullable=False),
    CheckConstraint("state IN ('loading', 'ready', 'failed')", name="state_known"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("requests_per_minute", Integer),
    Column("max_waiting", Integer),
    Column("priority", Integer, nullable=False),
    Column("fetch_networks", JSON, nullable=False),
    Column("force_safety_checker", Boolean, nullable=False),
)


def open_engine(url: str) -> Engine:
    """An engine for a SQLAlchemy URL. The folder of a SQLite file is made where it is missing.

    Its errors name no parameters: prompts are among them, and errors are logged.
    """
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    database = make_url(url).database
    if database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    # Python's own sqlite3 may carry a SQLite older than 3.51.3, whose WAL can lose commits when
    # there are several connections; the pysqlite3 wheel brings a newer one.
    engine = create_engine(
        url, module=sqlite, connect_args={"isolation_level": None}, hide_parameters=True
    )
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin_immediate)
    return engine


def _set_pragmas(connection: sqlite.Connection, _record: object) -> None:
    # The timeout comes first: switching to WAL already needs the lock.
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _switch_to_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _switch_to_wal(connection: sqlite.Connection) -> None:
    """Does nothing for a database that is in WAL mode, which the file remembers."""
    # For this switch alone SQLite does not wait: two processes that open a new file together would
    # find it locked, in spite of the timeout.
    for _ in range(BUSY_TIMEOUT_MS // SWITCH_PAUSE_MS):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite.OperationalError:
            time.sleep(SWITCH_PAUSE_MS / 1000)
    connection.execute("PRAGMA journal_mode = WAL")


def _begin_immediate(connection: Connection) -> None:
    # A deferred transaction that turns from reading to writing fails at once when another one
    # writes, whatever the timeout; taking the lock at the start waits instead. Readers that run
    # outside a write transaction use `read_only`.
    if connection.get_execution_options().get("is_read_only"):
        connection.exec_driver_sql("BEGIN")
    else:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def read_only(engine: Engine) -> Iterator[Connection]:
    """A connection that never waits for a writer."""
    with engine.connect().execution_options(is_read_only=True) as connection:
        yield connection


def migrate(engine: Engine) -> None:
    """Bring the schema to this version; does nothing where it is."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


class ChangeSignal:
    """Tells whether anybody else has committed since the last look, without a lock or a query.

    SQLite: `PRAGMA data_version` of a connection of its own. Elsewhere every look says yes.
    Belongs to one thread.
    """

    def __init__(self, engine: Engine) -> None:
        # The driver's own connection: a look happens a hundred times a second.
        self._connection = engine.raw_connection() if engine.dialect.name == "sqlite" else None
        self._version: int | None = None

    def has_changed(self) -> bool:
        if self._connection is None:
            return True
        try:
            cursor = self._connection.cursor()
            cursor.execute("PRAGMA data_version")
            (version,) = cursor.fetchone() or (None,)
            cursor.close()
        except sqlite.Error:
            return True  # whoever looks closer now meets the error where it is handled
        is_new, self._version = version != self._version, version
        return is_new

    def __enter__(self) -> "ChangeSignal":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        if self._connection is not None:
            self._connection.close()

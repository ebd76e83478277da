"""Schema, migrations, connections and the change signal, on real SQLite files and PostgreSQL."""

import asyncio
import math
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import URL, Engine, inspect, text
from sqlalchemy.exc import DBAPIError, OperationalError

from server.api.services import STORE_THREADS
from server.jobs.store import JobStore
from server.jobs.submissions import SUBMIT_LOCK
from server.storage.database import (
    CONNECTIONS,
    MIGRATION_LOCK,
    MIGRATIONS,
    SQLITE_OVERFLOW,
    SQLITE_POOL,
    DatabaseFileGone,
    SqliteVersion,
    Topic,
    has_sound_wal,
    migrate,
    notify,
    open_engine,
    open_migrated,
    read_only,
    require_migrated,
)
from server.storage.notify import ChangeSignal
from server.storage.tables import metadata
from server.webhooks.sender import DATABASE_THREADS
from tests.support.jobs import new_job
from tests.support.postgres import PostgresServer
from tests.support.proxies import LoopThread, running_proxy

REPORT = text(
    "INSERT INTO workers VALUES (:id, 'cpu', 'builtin', 'ready', 'ready', 0)"
)  # the smallest write there is

HEARING_S = 60.0
"""Far beyond what a commit's word takes."""


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    engine = open_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    with opened(f"sqlite:///{tmp_path}/new/folder/inpaint.db") as engine:
        migrate(engine)
        yield engine


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create_database()
    yield str(server.url(name))
    server.drop(name)


def pragma(engine: Engine, name: str) -> Any:
    with read_only(engine) as connection:
        return connection.execute(text(f"PRAGMA {name}")).scalar_one()


def test_migrations_lead_to_the_tables_of_the_code(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_migrations_lead_to_the_constraints_of_the_code(engine: Engine, empty_url: str) -> None:
    """Alembic's comparison leaves out CHECK constraints."""

    def checks(of: Engine) -> set[tuple[str, str, str]]:
        look = inspect(of)
        return {
            (table, str(check["name"]), " ".join(check["sqltext"].split()))
            for table in metadata.tables
            for check in look.get_check_constraints(table)
        }

    with opened(empty_url) as other:
        metadata.create_all(other)
        if other.dialect.name == engine.dialect.name:
            assert checks(engine) == checks(other)
        assert {check[:2] for check in checks(engine)} == {check[:2] for check in checks(other)}


def test_sqlite_never_gives_an_id_twice(sqlite_engine: Engine) -> None:
    with read_only(sqlite_engine) as connection:
        query = text("SELECT sql FROM sqlite_master WHERE name = 'jobs'")
        assert re.search(r"id INTEGER NOT NULL.*AUTOINCREMENT", str(connection.scalar(query)), re.S)


def test_migrating_twice_changes_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(REPORT, {"id": "kept"})
    migrate(engine)
    with read_only(engine) as connection:
        assert connection.execute(text("SELECT id FROM workers")).scalar_one() == "kept"


def test_times_that_earlier_releases_measured_are_kept(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    store = JobStore(engine)
    for _ in range(3):
        store.submit(new_job())
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0008")
        connection.exec_driver_sql("UPDATE jobs SET created_at = 100")
        connection.exec_driver_sql("UPDATE jobs SET started_at = 107, run_s = 3 WHERE id = 1")
        connection.exec_driver_sql("UPDATE jobs SET started_at = 7, run_s = -90 WHERE id = 2")

    migrate(engine)

    with read_only(engine) as connection:
        columns = "submitted_s, queued_s, run_s"
        rows = connection.exec_driver_sql(f"SELECT {columns} FROM jobs ORDER BY id").all()
    assert rows == [(100, 7, 3), (100, 0, 0), (100, None, None)]


def _migrate_in_process(url: str, start: Any) -> None:
    with opened(url) as engine:
        start.wait()
        migrate(engine)


@pytest.mark.process
def test_processes_may_migrate_at_once(empty_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    processes = [
        spawn.Process(target=_migrate_in_process, args=(empty_url, start)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with opened(empty_url) as engine:
        assert {"jobs", "workers"} <= set(inspect(engine).get_table_names())


@pytest.mark.postgres
def test_shorter_postgresql_url_means_the_same_driver(postgres_server: PostgresServer) -> None:
    urls = [
        postgres_server.url("postgres").set(drivername=name)
        for name in ("postgresql", "postgresql+psycopg")
    ]
    for url in urls:
        with opened(url.render_as_string()) as engine, engine.connect() as connection:
            assert engine.dialect.driver == "psycopg"
            assert connection.scalar(text("SELECT 1")) == 1


class TestLimitsOfWaiting:
    """PostgreSQL only: SQLite's `busy_timeout` is among the pragmas below."""

    pytestmark = pytest.mark.postgres

    @pytest.fixture
    def address(self, postgres_server: PostgresServer) -> Iterator[URL]:
        name = postgres_server.create_migrated()
        yield postgres_server.url(name)
        postgres_server.drop(name)

    LIMITS = {
        "statement_timeout": "30s",
        "lock_timeout": "20s",
        "idle_in_transaction_session_timeout": "10s",
    }

    def test_server_ends_what_takes_too_long(self, address: URL) -> None:
        with opened(str(address)) as engine, engine.connect() as connection:
            found = {name: connection.scalar(text(f"SHOW {name}")) for name in self.LIMITS}
        assert found == self.LIMITS

    def test_operators_own_options_prevail(self, address: URL) -> None:
        own = {"options": "-c lock_timeout=7s", "keepalives_idle": "50"}
        with opened(str(address.update_query_dict(own))) as engine, engine.connect() as connection:
            found = {name: connection.scalar(text(f"SHOW {name}")) for name in self.LIMITS}
            assert connection.engine.url.query["keepalives_idle"] == "50"
        assert found == {**self.LIMITS, "lock_timeout": "7s"}

    def test_migration_waits_for_another_without_a_limit(self, address: URL) -> None:
        hasty = {"options": "-c lock_timeout=1ms"}
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        with (
            opened(str(address.update_query_dict(hasty))) as engine,
            ThreadPoolExecutor(1) as threads,
        ):
            with engine.begin() as other, engine.connect() as looking:
                other.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
                migrating = threads.submit(migrate, engine)
                while not looking.scalar(waiting):
                    assert not migrating.done()
            migrating.result(HEARING_S)

    def test_kernel_ends_a_dead_connection(self, address: URL) -> None:
        """The pool's connections and a listening one."""
        folder = Path(str(address.query["host"]))
        (server,) = folder.glob(".s.PGSQL.*[0-9]")
        wanted = {
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 5,
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 5,
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 2,
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 15_000,
        }
        with (
            LoopThread() as thread,
            running_proxy(thread, lambda: asyncio.open_unix_connection(str(server))) as proxy,
            opened(str(address.set(host="127.0.0.1", port=proxy.port, query={}))) as engine,
            ChangeSignal(engine, Topic.ENDED) as signal,
        ):
            assert signal.has_changed()
            with engine.connect() as connection:
                sockets = [
                    connection.connection.driver_connection.fileno(),  # type: ignore[union-attr]
                    signal._source._connection.fileno(),  # type: ignore[attr-defined]
                ]
                for number in sockets:
                    with socket.socket(fileno=os.dup(number)) as line:
                        found = {option: line.getsockopt(*option) for option in wanted}
                    assert found == wanted

    def test_process_that_stands_still_loses_its_locks(self, address: URL) -> None:
        """A submit's lock, which all others wait for."""
        command = [sys.executable, "-c", STAND_STILL, str(address), str(SUBMIT_LOCK)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
            opened(str(address)) as engine,
        ):
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            try:
                with engine.begin() as connection:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SUBMIT_LOCK})")
            finally:
                process.kill()


STAND_STILL = """
import os, signal, sys
from server.storage.database import open_engine
connection = open_engine(sys.argv[1]).connect()
connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({sys.argv[2]})")
# In place of our own limit, which is long; last, as it counts from here on.
connection.exec_driver_sql("SET idle_in_transaction_session_timeout = '200ms'")
print("locked", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


THREADS = STORE_THREADS + DATABASE_THREADS + 3 + 2 + 1
"""Of the API process: of the store, the webhooks, the janitor, the watcher, a group commit. One of
the janitor's holds a lock on a connection of its own, so it counts twice."""


def test_pool_has_a_connection_for_every_thread(engine: Engine) -> None:
    in_all = SQLITE_POOL + SQLITE_OVERFLOW if engine.dialect.name == "sqlite" else CONNECTIONS
    assert in_all >= THREADS
    with ExitStack() as stack:
        for _ in range(in_all):
            stack.enter_context(read_only(engine))


@pytest.mark.parametrize(
    ("name", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 10_000)],
)
def test_connections_are_durable_and_patient(
    name: str, value: object, sqlite_engine: Engine
) -> None:
    assert pragma(sqlite_engine, name) == value


def test_sqlite_is_without_the_wal_reset_bug(sqlite_engine: Engine) -> None:
    with read_only(sqlite_engine) as connection:
        version: str = connection.execute(text("SELECT sqlite_version()")).scalar_one()
    assert tuple(map(int, version.split("."))) >= (3, 51, 3)


@pytest.mark.parametrize(
    ("version", "is_sound"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 0), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 53, 0), True),
        ((4, 0, 0), True),
    ],
)
def test_sqlite_with_the_wal_reset_bug_is_known(version: SqliteVersion, is_sound: bool) -> None:
    assert has_sound_wal(version) is is_sound


def test_old_sqlite_leaves_wal_with_a_warning(
    sqlite_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for a file that a newer one has used."""
    report(sqlite_engine, "before")
    sqlite_engine.dispose()
    old = open_engine(str(sqlite_engine.url), sqlite_version=(3, 40, 1))
    assert "can lose commits" in caplog.text
    assert pragma(old, "journal_mode") == "delete"
    report(old, "after")
    with ChangeSignal(old, Topic.ENDED) as signal:
        assert [signal.has_changed(), signal.has_changed()] == [True, False]
        report(old, "seen")
        assert signal.has_changed()
    assert pragma(old, "integrity_check") == "ok"
    old.dispose()


def test_readers_do_not_wait_for_a_writer(engine: Engine) -> None:
    with engine.begin() as writer:
        writer.execute(REPORT, {"id": "unseen"})
        with read_only(engine) as reader:
            assert reader.execute(text("SELECT count(*) FROM workers")).scalar_one() == 0


def test_write_transactions_take_the_lock_at_their_start(sqlite_engine: Engine) -> None:
    impatient = open_engine(str(sqlite_engine.url))
    with sqlite_engine.begin(), impatient.connect().execution_options(is_read_only=True) as other:
        other.execute(text("PRAGMA busy_timeout = 0"))
        other.rollback()
        with pytest.raises(OperationalError, match="locked"):
            other.exec_driver_sql("BEGIN IMMEDIATE")
    impatient.dispose()


def test_who_waits_too_long_for_a_writer_gives_up(sqlite_engine: Engine) -> None:
    with sqlite_engine.connect() as impatient:
        driver: Any = impatient.connection.driver_connection
        driver.execute("PRAGMA busy_timeout = 50")
        with sqlite_engine.begin(), pytest.raises(OperationalError, match="locked"):
            impatient.begin()
        with impatient.begin():
            impatient.execute(REPORT, {"id": "after"})


def test_file_that_is_moved_while_a_writer_takes_its_lock_is_noticed(
    sqlite_engine: Engine,
) -> None:
    database = Path(str(sqlite_engine.url.database))
    with sqlite_engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.set_trace_callback(lambda _statement: database.rename(f"{database}.moved"))
        with pytest.raises(DatabaseFileGone, match="moved, removed or replaced"):
            connection.begin()
        driver.set_trace_callback(None)


def test_errors_do_not_show_parameters(engine: Engine) -> None:
    query = text("SELECT nothing FROM workers WHERE id = :prompt")
    with engine.connect() as connection, pytest.raises(DBAPIError) as failed:
        connection.execute(query, {"prompt": "canary"})
    assert "canary" not in str(failed.value)


def report(engine: Engine, worker_id: str) -> None:
    with engine.begin() as connection:
        connection.execute(REPORT, {"id": worker_id})
        notify(connection, Topic.ENDED)


def watching(engine: Engine) -> ChangeSignal:
    """One that says yes for a reason only."""
    return ChangeSignal(engine, Topic.ENDED, math.inf)


def hears(signal: ChangeSignal) -> bool:
    """Whether it says yes before long: PostgreSQL's word comes a little after the commit."""
    give_up_at = time.monotonic() + HEARING_S
    while time.monotonic() < give_up_at:
        if signal.has_changed():
            return True
    return False


class TestChangeSignal:
    def test_first_look_says_yes(self, engine: Engine) -> None:
        with watching(engine) as signal:
            assert [signal.has_changed(), signal.has_changed()] == [True, False]

    def test_a_commit_of_another_connection_is_seen_once(self, engine: Engine) -> None:
        with watching(engine) as signal:
            signal.has_changed()
            with engine.begin() as connection:
                connection.execute(REPORT, {"id": "new"})
                notify(connection, Topic.ENDED)
                assert not signal.has_changed()
            assert [hears(signal), signal.has_changed()] == [True, False]

    @pytest.mark.postgres
    def test_commit_ends_a_wait(self, postgres_server: PostgresServer) -> None:
        name = postgres_server.create_migrated()
        with (
            opened(str(postgres_server.url(name))) as engine,
            watching(engine) as signal,
            ThreadPoolExecutor(1) as pool,
        ):
            signal.has_changed()
            signal.wait(0.0)  # from now on it can be woken
            waiting = pool.submit(signal.wait, HEARING_S)
            report(engine, "new")
            began = time.monotonic()
            waiting.result()
            assert time.monotonic() - began < HEARING_S / 2
            assert signal.has_changed()
        postgres_server.drop(name)

    def test_what_is_rolled_back_is_not_seen(self, engine: Engine) -> None:
        with watching(engine) as signal:
            signal.has_changed()
            with engine.connect() as connection:
                connection.execute(REPORT, {"id": "new"})
                notify(connection, Topic.ENDED)
            assert not signal.has_changed()

    def test_looking_works_while_a_writer_holds_the_lock(self, engine: Engine) -> None:
        with watching(engine) as signal, engine.begin():
            assert signal.has_changed()

    def test_closed_signal_looks_anew(self, engine: Engine) -> None:
        with watching(engine) as signal:
            signal.has_changed()
            signal.close()
            assert [signal.has_changed(), signal.has_changed()] == [True, False]

    @pytest.mark.postgres
    def test_silence_is_believed_for_a_while_only(self, postgres_server: PostgresServer) -> None:
        name = postgres_server.create_migrated()
        with (
            opened(str(postgres_server.url(name))) as engine,
            ChangeSignal(engine, Topic.ENDED, refresh_s=0) as signal,
        ):
            assert [signal.has_changed() for _ in range(3)] == [True] * 3
        postgres_server.drop(name)

    @pytest.mark.postgres
    def test_lost_connection_says_yes_and_comes_back(self, postgres_server: PostgresServer) -> None:
        name = postgres_server.create_migrated()
        with opened(str(postgres_server.url(name))) as engine, watching(engine) as signal:
            signal.has_changed()
            assert not signal.has_changed()
            kill = text(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            with engine.connect() as connection:
                connection.execute(kill)
            assert hears(signal), "of the loss"
            assert [signal.has_changed(), signal.has_changed()] == [True, False], "connected anew"
            report(engine, "after")
            assert hears(signal)
        postgres_server.drop(name)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (None, "has no tables yet"),
        ("0001", "has schema 0001, and this version needs .*: run `inpaint-server migrate`"),
        ("9999", "has schema 9999, and this program knows .* at most"),
    ],
)
def test_only_this_versions_schema_is_accepted(
    schema: str | None, sentence: str, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'inpaint.db'}"
    if schema is None:
        statement = "CREATE TABLE other (id INTEGER)"
    else:
        open_migrated(url).dispose()
        require_migrated(url)
        statement = f"UPDATE alembic_version SET version_num = '{schema}'"
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()
    with pytest.raises(ValueError, match=sentence):
        require_migrated(url)


def test_database_that_is_away_has_no_schema(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        require_migrated(f"sqlite:///{tmp_path / 'inpaint.db'}")

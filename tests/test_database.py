"""Schema, migrations, connections and the change signal, on real SQLite files."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import CreateTable

from server.database import ChangeSignal, metadata, migrate, open_engine, read_only

REPORT = text(
    "INSERT INTO workers VALUES (:id, 'cpu', 'builtin', 'ready', 'ready', 0)"
)  # the smallest write there is


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    engine = open_engine(f"sqlite:///{tmp_path}/new/folder/inpaint.db")
    migrate(engine)
    yield engine
    engine.dispose()


def pragma(engine: Engine, name: str) -> Any:
    with read_only(engine) as connection:
        return connection.execute(text(f"PRAGMA {name}")).scalar_one()


def test_migrations_lead_to_the_tables_of_the_code(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrations_lead_to_the_constraints_of_the_code(engine: Engine, tmp_path: Path) -> None:
    """Alembic's comparison leaves out CHECK constraints and AUTOINCREMENT."""

    def definitions(of: Engine) -> set[tuple[str, frozenset[str]]]:
        query = text("SELECT name, sql FROM sqlite_master WHERE name IN ('jobs', 'workers')")
        with of.connect() as connection:
            return {
                (name, frozenset(line.strip(" \t,") for line in sql.splitlines()))
                for name, sql in connection.execute(query)
            }

    other = open_engine(f"sqlite:///{tmp_path}/other.db")
    metadata.create_all(other)
    assert definitions(engine) == definitions(other)
    other.dispose()


def test_schema_compiles_for_postgresql() -> None:
    dialect = make_url("postgresql+psycopg://").get_dialect()()
    for table in metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))


def test_migrating_twice_changes_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(REPORT, {"id": "kept"})
    migrate(engine)
    with read_only(engine) as connection:
        assert connection.execute(text("SELECT id FROM workers")).scalar_one() == "kept"


def _migrate_in_process(url: str, start: Any) -> None:
    engine = open_engine(url)
    start.wait()
    migrate(engine)
    engine.dispose()


def test_processes_may_migrate_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    url = f"sqlite:///{tmp_path}/inpaint.db"
    processes = [spawn.Process(target=_migrate_in_process, args=(url, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    engine = open_engine(url)
    assert {"jobs", "workers"} <= set(inspect(engine).get_table_names())
    engine.dispose()


@pytest.mark.parametrize(
    ("name", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 10_000)],
)
def test_connections_are_durable_and_patient(name: str, value: object, engine: Engine) -> None:
    assert pragma(engine, name) == value


def test_sqlite_is_without_the_wal_reset_bug(engine: Engine) -> None:
    with read_only(engine) as connection:
        version: str = connection.execute(text("SELECT sqlite_version()")).scalar_one()
    assert tuple(map(int, version.split("."))) >= (3, 51, 3)


def test_readers_do_not_wait_for_a_writer(engine: Engine) -> None:
    with engine.begin() as writer:
        writer.execute(REPORT, {"id": "unseen"})
        with read_only(engine) as reader:
            assert reader.execute(text("SELECT count(*) FROM workers")).scalar_one() == 0


def test_write_transactions_take_the_lock_at_their_start(engine: Engine, tmp_path: Path) -> None:
    impatient = open_engine(str(engine.url))
    with engine.begin(), impatient.connect().execution_options(is_read_only=True) as other:
        other.execute(text("PRAGMA busy_timeout = 0"))
        other.rollback()
        with pytest.raises(OperationalError, match="locked"):
            other.exec_driver_sql("BEGIN IMMEDIATE")
    impatient.dispose()


def test_errors_do_not_show_parameters(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(OperationalError) as failed:
        connection.execute(text("SELECT :prompt FROM nowhere"), {"prompt": "canary"})
    assert "canary" not in str(failed.value)


class TestChangeSignal:
    def test_first_look_says_yes(self, engine: Engine) -> None:
        signal = ChangeSignal(engine)
        assert [signal.has_changed(), signal.has_changed()] == [True, False]
        signal.close()

    def test_a_commit_of_another_connection_is_seen_once(self, engine: Engine) -> None:
        signal = ChangeSignal(engine)
        signal.has_changed()
        with engine.begin() as connection:
            connection.execute(REPORT, {"id": "new"})
            assert not signal.has_changed()
        assert [signal.has_changed(), signal.has_changed()] == [True, False]
        signal.close()

    def test_looking_works_while_a_writer_holds_the_lock(self, engine: Engine) -> None:
        signal = ChangeSignal(engine)
        with engine.begin():
            assert signal.has_changed()
        signal.close()

"""A process of the version before goes on while a newer one has migrated the database.

The tables of each version are read back from the database itself, and used as that version's
statements use them: columns by name, prepared before the migration and run again after it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Column, Connection, Engine, MetaData, Table, insert, select
from sqlalchemy.exc import DBAPIError

from server.storage.database import MIGRATIONS, known_schemas, open_engine
from tests.support.postgres import PostgresServer

PREPARED_AFTER = 6
"""psycopg prepares a statement on the server once it has run five times."""

RENAMING = {"0006", "0011"}
"""Migrations that older processes do not survive, of releases before this promise. No new one may
join them: rename a column by adding the new one, and remove the old one a release later."""

VALUES = {
    **dict.fromkeys(("INTEGER", "BIGINT"), 1),
    **dict.fromkeys(("FLOAT", "DOUBLE_PRECISION", "REAL"), 1.0),
    "TEXT": "x",
    "BOOLEAN": False,
    "JSON": {},
}
"""A value for each type that a column has."""

STATES = {"jobs": "queued", "deliveries": "pending", "workers": "loading"}


def config_of(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        engine = open_engine(f"sqlite:///{tmp_path}/inpaint.db")
        yield engine
        engine.dispose()
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create_database()
    engine = open_engine(str(server.url(name)))
    yield engine
    engine.dispose()
    server.drop(name)


def test_process_of_the_version_before_survives_each_migration(empty_engine: Engine) -> None:
    first, *later = reversed(known_schemas())
    upgrade(empty_engine, first)
    broken = {revision for revision in later if not survives(empty_engine, revision)}
    assert broken == RENAMING


def survives(engine: Engine, revision: str) -> bool:
    """Migrate to a revision; whether reads and writes of the one before still work."""
    before = MetaData()
    before.reflect(engine)
    tables = [each for each in before.sorted_tables if each.name != "alembic_version"]
    with engine.connect() as old_process:
        for _ in range(PREPARED_AFTER):
            read(old_process, tables)
        upgrade(engine, revision)
        try:
            read(old_process, tables)
            write(old_process, tables)
            read(old_process, tables)
        except DBAPIError:
            return False
        finally:
            old_process.rollback()
    return True


def upgrade(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        command.upgrade(config_of(connection), revision)


def read(connection: Connection, tables: list[Table]) -> None:
    for table in tables:
        connection.execute(select(*table.columns)).all()
    connection.rollback()


def write(connection: Connection, tables: list[Table]) -> None:
    """A row for each table, with what that version had to give."""
    for table in tables:
        needed = [
            each
            for each in table.columns
            if each.primary_key or not (each.nullable or each.server_default)
        ]
        values = {each.name: value_of(table, each) for each in needed}
        connection.execute(insert(table).values(values))


def value_of(table: Table, column: Column[Any]) -> Any:
    if column.name == "state":
        return STATES[table.name]
    return VALUES[type(column.type).__visit_name__]

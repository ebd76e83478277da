"""SQLite's write-ahead log stays short, whoever writes and reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from server.database import open_engine
from server.wal import checkpoint, shorten_log

MOVE_PAGES, RESTART_PAGES = 20, 60
ROW_BYTES = 3_000
"""Each row takes a page of its own in the table, and the one that counts them."""


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """Of two processes, as far as SQLite can tell."""
    both = tuple(open_engine(f"sqlite:///{tmp_path / 'log.sqlite'}") for _ in range(2))
    with both[0].begin() as connection:
        connection.execute(text("CREATE TABLE filling (content BLOB)"))
    yield both[0], both[1]
    for each in both:
        each.dispose()


def write(engine: Engine, rows: int) -> None:
    """So many commits."""
    for _ in range(rows):
        with engine.begin() as connection:
            connection.execute(text(f"INSERT INTO filling VALUES (randomblob({ROW_BYTES}))"))


def log_of(engine: Engine) -> tuple[int, int]:
    """Pages in the log, and how many of them were moved."""
    connection = engine.raw_connection()
    try:
        return checkpoint(connection.driver_connection, "NOOP")
    finally:
        connection.close()


def shorten(engine: Engine) -> None:
    shorten_log(engine, MOVE_PAGES, RESTART_PAGES)


def test_few_pages_stay_where_they_are(engines: tuple[Engine, Engine]) -> None:
    write(engines[0], 3)
    before = log_of(engines[0])
    shorten(engines[0])
    assert log_of(engines[0]) == before
    assert before[1] == 0


def test_many_pages_are_moved_and_the_log_begins_anew(engines: tuple[Engine, Engine]) -> None:
    write(engines[0], MOVE_PAGES)
    shorten(engines[0])
    pages, moved = log_of(engines[0])
    assert pages == moved > MOVE_PAGES
    write(engines[0], 1)
    assert log_of(engines[0])[0] < MOVE_PAGES


def test_log_begins_anew_though_there_is_always_something_new(
    engines: tuple[Engine, Engine],
) -> None:
    """What a reader with an older view kept back; by itself no more of it would be moved."""
    write(engines[0], RESTART_PAGES)
    with engines[1].connect().execution_options(is_read_only=True) as reading:
        reading.execute(text("SELECT count(*) FROM filling")).scalar_one()
        write(engines[0], 1)
        shorten(engines[0])  # and does not wait for who reads
        write(engines[0], 1)
        pages, moved = log_of(engines[0])
        assert pages > RESTART_PAGES
        assert 0 < pages - moved < MOVE_PAGES
    shorten(engines[0])
    write(engines[0], 1)
    assert log_of(engines[0])[0] < MOVE_PAGES
    with engines[1].connect().execution_options(is_read_only=True) as reading:
        count = reading.execute(text("SELECT count(*) FROM filling")).scalar_one()
    assert count == RESTART_PAGES + 3


def test_database_without_such_a_log_is_left_alone(tmp_path: Path) -> None:
    """That of a SQLite whose own log is not sound."""
    engine = open_engine(f"sqlite:///{tmp_path / 'old.sqlite'}", sqlite_version=(3, 40, 0))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE filling (content BLOB)"))
    write(engine, MOVE_PAGES)
    shorten(engine)
    assert log_of(engine) == (-1, -1)
    engine.dispose()

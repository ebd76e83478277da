"""SQLite's write-ahead log stays bounded, and shrinks again after a reader has kept it long."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from server.storage.database import CHECKPOINT_PAGES, WAL_BYTES, open_engine, read_only

ROW_BYTES = 1_000_000
FRAME_BYTES = 4_096 + 24
"""A page in the log, and its header."""

LONGEST_BYTES = CHECKPOINT_PAGES * FRAME_BYTES + 2 * ROW_BYTES


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "log.sqlite"


@pytest.fixture
def engines(database: Path) -> Iterator[tuple[Engine, Engine]]:
    """Of two processes, as far as SQLite can tell."""
    both = tuple(open_engine(f"sqlite:///{database}") for _ in range(2))
    with both[0].begin() as connection:
        connection.execute(text("CREATE TABLE filling (content BLOB)"))
    yield both[0], both[1]
    for each in both:
        each.dispose()


def write(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO filling VALUES (randomblob({ROW_BYTES}))"))


def count(engine: Engine) -> int:
    with read_only(engine) as connection:
        found: int = connection.execute(text("SELECT count(*) FROM filling")).scalar_one()
    return found


def log_bytes(database: Path) -> int:
    return database.with_name(f"{database.name}-wal").stat().st_size


def test_log_stays_bounded_with_two_processes(
    engines: tuple[Engine, Engine], database: Path
) -> None:
    rows = 3 * LONGEST_BYTES // ROW_BYTES
    for index in range(rows):
        write(engines[index % 2])
        assert count(engines[(index + 1) % 2]) == index + 1
        assert log_bytes(database) <= LONGEST_BYTES


def test_log_that_a_reader_kept_long_is_cut(engines: tuple[Engine, Engine], database: Path) -> None:
    rows = WAL_BYTES // ROW_BYTES + 10
    with read_only(engines[1]) as reading:
        reading.execute(text("SELECT count(*) FROM filling")).scalar_one()
        for _ in range(rows):
            write(engines[0])
        assert log_bytes(database) > WAL_BYTES
    write(engines[0])  # moves all pages, as nobody reads any more
    write(engines[0])  # begins the log anew
    assert log_bytes(database) <= WAL_BYTES
    assert count(engines[1]) == rows + 2

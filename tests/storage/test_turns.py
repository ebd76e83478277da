"""One process of all that share a database does what need not be done twice."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from server.storage.database import open_engine
from server.storage.turns import TURN_LOCK, only_one
from tests.support.waiting import until

HEARING_S = 20.0

HOLD = """
import sys
from server.storage.database import open_engine
from server.storage.turns import only_one
with only_one(open_engine(sys.argv[1])) as is_held:
    print(is_held(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(url: str) -> Iterator[Engine]:
    """Of another process, as far as a database can tell."""
    engine = open_engine(url)
    yield engine
    engine.dispose()


def test_one_holds_it_until_its_block_ends(engine: Engine, other: Engine) -> None:
    with only_one(engine) as is_ours:
        assert is_ours()
        for _ in range(2):
            with only_one(other) as is_theirs:
                assert not is_theirs()
        assert is_ours()
    with only_one(other) as is_theirs, only_one(engine) as is_ours:
        assert (is_theirs(), is_ours()) == (True, False)


@pytest.mark.process
def test_process_that_is_killed_holds_it_no_more(url: str, engine: Engine) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, url]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with only_one(engine) as is_ours:
            assert not is_ours()
        process.kill()
        process.wait()
    with only_one(engine) as is_ours:
        if engine.dialect.name == "sqlite":
            assert is_ours()
        else:
            until(is_ours, HEARING_S, "PostgreSQL reads the end of the connection")


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_where_nothing_can_be_locked_all_hold_it(engine: Engine, other: Engine) -> None:
    database = Path(engine.url.database or "")
    database.with_name(f".{database.name}-turn").mkdir()
    with only_one(engine) as is_ours, only_one(other) as is_theirs:
        assert (is_ours(), is_theirs()) == (True, True)


@pytest.mark.postgres
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_lost_connection_is_noticed(engine: Engine, other: Engine) -> None:
    end = text(
        "SELECT pg_terminate_backend(pid) FROM pg_locks "
        "WHERE locktype = 'advisory' AND objid = :number"
    )
    with only_one(engine) as is_ours:
        assert is_ours()
        with other.connect() as connection:
            connection.execute(end, {"number": TURN_LOCK})
        with only_one(other) as is_theirs:
            until(is_theirs, HEARING_S, "the process of the connection ends")
            assert not is_ours()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]

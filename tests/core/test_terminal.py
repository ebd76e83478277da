"""What strangers wrote reaches the operator's terminal as text, never as control codes or rows."""

import contextlib
import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, insert

from server.api.auth.keys import KeyStore
from server.cli.main import main
from server.core.terminal import printable
from server.jobs.store import JobStore
from server.storage.database import open_engine
from server.storage.tables import api_keys, deliveries
from tests.support.databases import migrated_sqlite
from tests.support.jobs import new_job

pytestmark = pytest.mark.slow

HOSTILE = "\x1b[2J\x1b]0;title\x07\r\n99\tdelivered\u202e\u2066\u2028\u2029\x85\x9b31m\x7f"
STORED = st.text(st.characters(exclude_categories=["Cs"]))
"""What a database takes: no lone surrogates."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    migrated_sqlite(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = open_engine(f"sqlite:///{folder}/inpaint.db")
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def job_id(engine: Engine) -> int:
    return JobStore(engine).submit(new_job()).id


def printed_by(folder: Path, *arguments: str) -> list[list[str]]:
    """Rows and columns on standard output, in which every character prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main([*arguments, "--data-dir", str(folder)]) == 0
    rows = [line.split("\t") for line in output.getvalue().removesuffix("\n").split("\n")]
    assert all(cell.isprintable() for row in rows for cell in row)
    return rows


@given(st.text())
@example("\ud800" + HOSTILE)
def test_every_character_prints(text: str) -> None:
    assert printable(text).isprintable()


@given(st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" ")))
def test_text_that_prints_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_what_does_not_print_can_still_be_read() -> None:
    assert printable("a\x1b[2J\n\u202eb") == r"a\x1b[2J\n\u202eb"


@given(st.lists(STORED, min_size=1, max_size=3))
@example([f"http://127.0.0.1/{HOSTILE}"])
def test_listed_webhooks_are_a_line_each(
    folder: Path, engine: Engine, job_id: int, urls: list[str]
) -> None:
    with engine.begin() as connection:
        connection.execute(delete(deliveries))
        for number, url in enumerate(urls):
            call = {"id": str(number), "job_id": job_id, "url": url, "host": "h", "attempt": 0}
            times = {"state": "pending", "due_at": 0.0, "created_at": 0.0}
            connection.execute(insert(deliveries).values(call | times))
    _head, *rows = printed_by(folder, "webhooks", "list", "--state", "all")
    assert [row[:4] for row in rows] == [[str(job_id), "pending", "0", "not tried"]] * len(urls)
    assert sorted(row[4] for row in rows) == sorted(map(printable, urls))


@given(STORED)
@example(HOSTILE)
def test_listed_keys_are_a_line_each(folder: Path, engine: Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(delete(api_keys))
    KeyStore(engine).create(name)
    _head, row = printed_by(folder, "keys", "list")
    assert row[1] == printable(name)


def test_refusals_are_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["webhooks", "list", "--config", str(tmp_path / f"x{HOSTILE}.toml")]) == 2
    assert main(["models", "verify", f"x/{HOSTILE}", "--data-dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert [line[:7] for line in lines] == ["error: "] * 2
    assert all(line.isprintable() for line in lines)


def test_log_on_a_terminal_holds_no_control_codes_of_strangers() -> None:
    program = f"""
from server.core.logs import configure_logging, get_logger
configure_logging()
logger = get_logger("server.test")
logger.info("request", path={HOSTILE!r}, detail="x\\x1b[2Jy", job_id=7)
import logging
logging.getLogger("library").warning("odd %s", "\\x1b]0;title\\x07")
try:
    raise ValueError("\\x1b[2J")
except ValueError:
    logger.exception("failed")
"""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            subprocess.run(
                [sys.executable, "-c", program], stderr=theirs, check=True, env={"TERM": "dumb"}
            )
        finally:
            os.close(theirs)
        shown = b"".join(read_to_end(screen)).decode()
    assert "\x1b[2J" not in shown
    assert "ValueError" in shown.splitlines()[-1]
    steering = {each for each in shown if not each.isprintable()}
    assert steering <= {"\r", "\n", "\x1b"}, "colours of our own begin with ESC"


def read_to_end(screen: io.FileIO) -> Iterator[bytes]:
    """What a terminal got, whose other end is closed."""
    with contextlib.suppress(OSError):  # what Linux says at the end
        while piece := screen.read(4096):
            yield piece

"""Wake-ups: who waits is woken, and nobody waits for those who have gone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy.pool import QueuePool

from server.storage.database import Topic, notify, open_engine, wakeup_pipes_of
from server.storage.wakeups import WakeupPipe, wake_all
from tests.support.databases import migrated_sqlite

pytestmark = pytest.mark.process

FOREVER_S = 1_000.0
"""A test that waits so long fails by its own limit."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "wakeups"


@pytest.fixture
def pipe(folder: Path) -> Iterator[WakeupPipe]:
    pipe = WakeupPipe(folder)
    yield pipe
    pipe.close()


def was_woken(pipe: WakeupPipe) -> bool:
    """Whether a wait would end at once."""
    before = os.times().elapsed
    pipe.wait(1.0)
    return os.times().elapsed - before < 0.9


def test_wakeup_ends_every_wait_once(folder: Path, pipe: WakeupPipe) -> None:
    other = WakeupPipe(folder)
    wake_all(folder)
    wake_all(folder)
    pipe.wait(FOREVER_S)
    other.wait(FOREVER_S)
    other.close()

    assert not was_woken(pipe)


def test_wakeup_never_waits_for_a_reader(folder: Path, pipe: WakeupPipe) -> None:
    (path,) = folder.iterdir()
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.close(writer)

    wake_all(folder)
    pipe.wait(FOREVER_S)


def test_closed_pipe_leaves_nothing(folder: Path, pipe: WakeupPipe) -> None:
    pipe.close()
    assert not [*folder.iterdir()]
    wake_all(folder)


def test_pipe_of_a_killed_process_is_removed(folder: Path, pipe: WakeupPipe) -> None:
    program = (
        "import os, pathlib, sys; from server.storage.wakeups import WakeupPipe\n"
        "pipe = WakeupPipe(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], timeout=60)
    assert len([*folder.iterdir()]) == 2
    wake_all(folder)

    assert len([*folder.iterdir()]) == 1
    pipe.wait(FOREVER_S)


def test_where_no_pipe_can_be_time_passes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pipe = WakeupPipe(tmp_path / "file")
    wake_all(tmp_path / "file")

    assert not was_woken(pipe)
    pipe.close()


def test_nothing_but_pipes_is_written_to(folder: Path, pipe: WakeupPipe, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (folder / "link").symlink_to(victim)
    (folder / "file").write_text("kept")
    wake_all(folder)
    pipe.wait(FOREVER_S)
    assert [victim.read_text(), (folder / "file").read_text()] == ["kept", "kept"]


def test_commit_counts_although_nobody_can_be_woken(tmp_path: Path) -> None:
    engine = open_engine(migrated_sqlite(tmp_path))
    wakeup_pipes_of(engine).symlink_to(wakeup_pipes_of(engine))  # a loop that nobody can read
    for _ in range(3):
        with engine.begin() as connection:
            notify(connection, Topic.QUEUED)
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    assert pool.checkedout() == 0
    engine.dispose()

"""Bells: who waits is woken, and nobody waits for those who have gone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from server.storage.bells import Bell, ring

pytestmark = pytest.mark.process

FOREVER_S = 1_000.0
"""A test that waits so long fails by its own limit."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bells"


@pytest.fixture
def bell(folder: Path) -> Iterator[Bell]:
    bell = Bell(folder)
    yield bell
    bell.close()


def has_rung(bell: Bell) -> bool:
    """Whether a wait would end at once."""
    before = os.times().elapsed
    bell.wait(1.0)
    return os.times().elapsed - before < 0.9


def test_ring_ends_every_wait_once(folder: Path, bell: Bell) -> None:
    other = Bell(folder)
    ring(folder)
    ring(folder)
    bell.wait(FOREVER_S)
    other.wait(FOREVER_S)
    other.close()

    assert not has_rung(bell)


def test_ring_never_waits_for_a_reader(folder: Path, bell: Bell) -> None:
    (path,) = folder.iterdir()
    pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, bytes(4096))
    os.close(pipe)

    ring(folder)
    bell.wait(FOREVER_S)


def test_closed_bell_leaves_nothing(folder: Path, bell: Bell) -> None:
    bell.close()
    assert not [*folder.iterdir()]
    ring(folder)


def test_bell_of_a_killed_process_is_removed(folder: Path, bell: Bell) -> None:
    program = (
        "import os, pathlib, sys; from server.storage.bells import Bell\n"
        "bell = Bell(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], timeout=60)
    assert len([*folder.iterdir()]) == 2
    ring(folder)

    assert len([*folder.iterdir()]) == 1
    bell.wait(FOREVER_S)


def test_where_no_pipe_can_be_time_passes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bell = Bell(tmp_path / "file")
    ring(tmp_path / "file")

    assert not has_rung(bell)
    bell.close()

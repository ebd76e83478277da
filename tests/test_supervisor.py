"""Workers are started, started again, and their jobs taken back, whatever the database says."""

import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from server.jobs import JobStore
from server.supervisor import Supervisor

WAIT_S = 60
BROKEN = ["--config", "no-such-file.toml"]
"""Flags that end a worker at once."""
AT_ONCE = (0.01, 0.01)


class CountingStore(JobStore):
    """A store that counts how often jobs were taken back, and fails as often as told."""

    def __init__(self, engine: Engine, failures: int, enough: int) -> None:
        super().__init__(engine)
        self.calls = 0
        self.is_enough = threading.Event()
        self._failures, self._enough = failures, enough

    def requeue_of(self, worker_id: str) -> int:
        self.calls += 1
        if self.calls >= self._enough:
            self.is_enough.set()
        if self.calls <= self._failures:
            raise OperationalError("UPDATE jobs", None, Exception("disk full"))
        return super().requeue_of(worker_id)


@pytest.mark.parametrize("failures", [0, 2])
def test_worker_that_ends_is_started_again(engine: Engine, failures: int) -> None:
    store = CountingStore(engine, failures, enough=3)
    with Supervisor(["cpu"], BROKEN, store, AT_ONCE):
        assert store.is_enough.wait(WAIT_S), "a failing database must not end the keeper"


def test_each_device_has_a_worker_of_its_own(engine: Engine, tmp_path: Path) -> None:
    store = CountingStore(engine, failures=0, enough=2)
    with Supervisor(["cpu", "cpu"], BROKEN, store, AT_ONCE) as running:
        assert store.is_enough.wait(WAIT_S)
    names = {keeper.name for keeper in running._keepers}
    assert len(names) == 2

"""Workers are started and restarted, and their jobs queued again, even if the database fails."""

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from server.jobs.job import Job, JobState
from server.jobs.store import WORKER_LOST, JobStore
from server.jobs.watcher import JobWatcher
from server.jobs.workers import WorkerRegistry, WorkerStatus
from server.serving.supervisor import (
    StallDetector,
    Supervisor,
    worker_children,
)
from tests.support.clocks import Clock
from tests.support.databases import migrated_sqlite, rename_table
from tests.support.jobs import new_job, worker_status
from tests.support.odd_worker import BAD_PREFIX

pytestmark = pytest.mark.process

WAIT_S = 60
BROKEN = ["--config", "no-such-file.toml"]
"""Flags that end a worker at once."""
AT_ONCE = (0.01, 0.01)
NEVER = (3_600.0, 3_600.0)
STALLS_S = (120.0, 1_800.0)
"""Longer than a test lasts."""


@pytest.fixture
def url(tmp_path: Path) -> str:
    """One kind of database is enough here: these tests start processes."""
    return migrated_sqlite(tmp_path)


class CountingRegistry(WorkerRegistry):
    """Records calls. removed: a worker's row was removed. others_sought: `alive` was called."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.removed = threading.Event()
        self.others_sought = threading.Event()

    def remove(self, worker_id: str) -> None:
        """As the base class."""
        super().remove(worker_id)
        self.removed.set()

    def alive(self) -> list[WorkerStatus]:
        """As the base class."""
        self.others_sought.set()
        return super().alive()


class CountingStore(JobStore):
    """A store that counts calls of `requeue_of`, and fails the first ones.

    workers: how many different ones must have ended besides.
    """

    def __init__(self, engine: Engine, failures: int, enough: int, workers: int = 1) -> None:
        super().__init__(engine)
        self.workers: CountingRegistry = CountingRegistry(engine, time.time, time.monotonic)
        self.calls = 0
        self.is_enough = threading.Event()
        self._failures, self._enough, self._different = failures, enough, workers
        self._ended: set[str] = set()

    def requeue_of(self, worker_id: str) -> int:
        self.calls += 1
        self._ended.add(worker_id)
        if self.calls >= self._enough and len(self._ended) >= self._different:
            self.is_enough.set()
        if self.calls <= self._failures:
            raise OperationalError("UPDATE jobs", None, Exception("disk full"))
        return super().requeue_of(worker_id)


@pytest.mark.parametrize("failures", [0, 2])
def test_worker_that_ends_is_started_again(engine: Engine, failures: int) -> None:
    store = CountingStore(engine, failures, enough=3)
    with Supervisor(worker_children(["cpu"], BROKEN, store, STALLS_S), AT_ONCE):
        assert store.is_enough.wait(WAIT_S), "a failing database must not end the thread"


def test_each_device_has_a_worker_of_its_own(engine: Engine) -> None:
    store = CountingStore(engine, failures=0, enough=2, workers=2)
    with Supervisor(worker_children(["cpu", "cpu"], BROKEN, store, STALLS_S), AT_ONCE):
        assert store.is_enough.wait(WAIT_S)


def test_supervisor_has_ended_when_its_workers_are_gone(engine: Engine) -> None:
    running = Supervisor(worker_children(["cpu"], BROKEN, JobStore(engine), STALLS_S), AT_ONCE)
    with running:
        assert not running.has_ended
        running.stop()
    assert running.has_ended


def test_killed_worker_is_not_ready_any_more(engine: Engine, url: str) -> None:
    store = CountingStore(engine, failures=0, enough=1)
    store.submit(new_job(file_prefix=BAD_PREFIX))
    with keeping(store, odd_worker(url, "crash"), NEVER):
        assert store.workers.removed.wait(WAIT_S)
        assert store.workers.alive() == []


def test_why_a_worker_failed_is_told_until_the_end(engine: Engine, url: str) -> None:
    store = CountingStore(engine, failures=0, enough=3)
    with keeping(store, odd_worker(url, "fail"), AT_ONCE):
        assert store.is_enough.wait(WAIT_S)
        assert not store.workers.removed.is_set()
    assert store.workers.alive() == []


def test_server_ends_when_no_worker_can_be_used(engine: Engine, url: str) -> None:
    store = CountingStore(engine, failures=0, enough=2, workers=2)
    workers = worker_children(["cpu", "cpu"], [], store, STALLS_S, odd_worker(url, "unusable"))
    with Supervisor(workers, NEVER) as running:
        assert store.workers.others_sought.wait(WAIT_S)
    assert running.failure == "failed"
    assert store.is_enough.is_set(), "before both have tried"


def test_server_goes_on_while_another_worker_is_ready(engine: Engine, url: str) -> None:
    store = CountingStore(engine, failures=0, enough=3)
    store.workers.report(worker_status("elsewhere", time.time(), "ready"))
    workers = worker_children(["cpu"], [], store, STALLS_S, odd_worker(url, "unusable"))
    with Supervisor(workers, NEVER, unusable_delay_s=0.01) as running:
        assert store.is_enough.wait(WAIT_S)
    assert running.failure is None


def test_server_goes_on_when_its_worker_was_ready_before(engine: Engine) -> None:
    store = JobStore(engine)
    (worker,) = worker_children(["cpu"], [], store, STALLS_S)
    worker_id = worker.label["worker_id"]
    assert worker.leaves_no_worker()
    store.workers.report(worker_status(worker_id, time.time(), "ready"))
    assert not worker.new_stall_detector().has_stalled()
    worker.requeue_jobs()
    assert store.workers.alive() == []
    assert not worker.leaves_no_worker()


def test_unusable_worker_is_started_again_seldom(engine: Engine, url: str) -> None:
    """As often as it may end for other reasons: not at all while this test looks on."""
    store = CountingStore(engine, failures=0, enough=1)
    with keeping(store, odd_worker(url, "unusable"), AT_ONCE):
        assert store.is_enough.wait(WAIT_S)
        settled = CountingStore(engine, failures=0, enough=3)
        with keeping(settled, odd_worker(url, "fail"), AT_ONCE):
            assert settled.is_enough.wait(WAIT_S)
        assert store.calls == 1


@pytest.mark.parametrize("manner", ["fail", "unusable"])
def test_starts_that_fail_in_a_row_are_counted(engine: Engine, url: str, manner: str) -> None:
    store = CountingStore(engine, failures=1, enough=4)
    (worker,) = worker_children(["cpu"], [], store, STALLS_S, odd_worker(url, manner))
    with Supervisor([worker], AT_ONCE, unusable_delay_s=0.01):
        assert store.is_enough.wait(WAIT_S)
    # The first run ended while the database failed, so it is not counted.
    assert worker.failed_starts == store.calls - 1


def test_worker_that_was_ready_has_started(engine: Engine) -> None:
    store = JobStore(engine)
    (worker,) = worker_children(["cpu"], [], store, STALLS_S)
    for _ in range(2):
        worker.requeue_jobs()
    assert worker.failed_starts == 2
    store.workers.report(worker_status(worker.label["worker_id"], time.time(), "ready"))
    worker.requeue_jobs()
    assert worker.failed_starts == 0
    worker.requeue_jobs()
    assert worker.failed_starts == 1


def keeping(
    store: JobStore,
    command: Sequence[str],
    delays_s: tuple[float, float],
    stalls_s: tuple[float, float] = STALLS_S,
) -> Supervisor:
    """Of one worker, which this command starts."""
    return Supervisor(worker_children(["cpu"], [], store, stalls_s, command), delays_s)


def odd_worker(url: str, manner: str) -> Sequence[str]:
    return (sys.executable, "-m", "tests.support.odd_worker", url, manner)


def ended(store: JobStore, job_ids: Sequence[int]) -> list[Job]:
    """The jobs, once all have ended."""

    async def wait() -> list[Job | None]:
        async with JobWatcher(store, 1) as watcher:
            return await asyncio.gather(*(watcher.wait(job_id, WAIT_S) for job_id in job_ids))

    jobs = [job for job in asyncio.run(wait()) if job is not None]
    assert len(jobs) == len(job_ids), "a job did not end"
    return jobs


def test_worker_that_hangs_is_killed_and_its_job_made_by_the_next(engine: Engine, url: str) -> None:
    store = JobStore(engine)
    job_id = store.submit(new_job()).id
    with keeping(store, odd_worker(url, "hang"), AT_ONCE, (3.0, 60.0)):
        (job,) = ended(store, [job_id])
    assert job.state is JobState.FINISHED
    assert job.attempt > 1  # on a machine that stands still the next one may be killed too


def test_worker_that_hangs_while_it_starts_is_killed(engine: Engine, url: str) -> None:
    store = CountingStore(engine, failures=0, enough=1)
    with keeping(store, odd_worker(url, "never-ready"), NEVER, (60.0, 0.5)):
        assert store.is_enough.wait(WAIT_S)


def test_job_that_kills_its_workers_is_set_aside_and_the_others_are_made(
    engine: Engine, url: str
) -> None:
    store = JobStore(engine)
    ids = [store.submit(new_job()).id for _ in range(2)]
    bad = store.submit(new_job(file_prefix=BAD_PREFIX)).id
    ids += [store.submit(new_job()).id for _ in range(2)]
    with keeping(store, odd_worker(url, "crash"), AT_ONCE):
        jobs = {job.id: job for job in ended(store, [*ids, bad])}
    assert (jobs[bad].state, jobs[bad].error) == (JobState.FAILED, WORKER_LOST)
    assert {jobs[job_id].state for job_id in ids} == {JobState.FINISHED}


def test_worker_that_cannot_be_started_is_tried_again(engine: Engine) -> None:
    store = CountingStore(engine, failures=0, enough=3)
    with keeping(store, ("/no/such/program",), AT_ONCE):
        assert store.is_enough.wait(WAIT_S)


class TestStallDetector:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def store(self, engine: Engine) -> JobStore:
        return JobStore(engine)

    @pytest.fixture
    def detector(self, store: JobStore, clock: Clock) -> StallDetector:
        detector = StallDetector(store, "w", 10, 1_000, clock)
        assert not detector.has_stalled()
        return detector

    def say(self, store: JobStore, state: str, seen_at: float) -> None:
        store.workers.report(worker_status("w", seen_at, state))

    def test_silent_worker_has_stalled(
        self, store: JobStore, clock: Clock, detector: StallDetector
    ) -> None:
        for second in range(3):
            clock.now += 9
            self.say(store, "ready", second)
            assert not detector.has_stalled(), "it speaks"
        clock.now += 9
        assert not detector.has_stalled()
        clock.now += 2
        assert detector.has_stalled()

    def test_loading_may_take_long_while_it_gets_on(
        self, store: JobStore, clock: Clock, detector: StallDetector
    ) -> None:
        for second in range(3):
            self.say(store, "loading", second)
            clock.now += 1
            assert not detector.has_stalled()
            clock.now += 990
            assert not detector.has_stalled()
        clock.now += 20
        assert detector.has_stalled()

    def test_worker_that_never_says_a_word_has_stalled(
        self, clock: Clock, detector: StallDetector
    ) -> None:
        clock.now += 990
        assert not detector.has_stalled()
        clock.now += 20
        assert detector.has_stalled()

    def test_word_of_an_earlier_life_does_not_count(self, store: JobStore, clock: Clock) -> None:
        self.say(store, "ready", 0)
        detector = StallDetector(store, "w", 10, 1_000, clock)
        for _ in range(3):
            assert not detector.has_stalled()
            clock.now += 300

    def test_jump_of_the_workers_clock_is_a_word_like_any(
        self, store: JobStore, clock: Clock, detector: StallDetector
    ) -> None:
        for seen_at in (1e9, 1.0, 1e9):
            clock.now += 9
            self.say(store, "ready", seen_at)
            assert not detector.has_stalled()

    def test_time_without_a_database_does_not_count(
        self, store: JobStore, engine: Engine, clock: Clock, detector: StallDetector
    ) -> None:
        clock.now += 1
        self.say(store, "ready", 0)
        assert not detector.has_stalled()
        rename_table(engine, "workers", "gone")
        clock.now += 1_000
        assert not detector.has_stalled()
        rename_table(engine, "gone", "workers")
        clock.now += 9
        assert not detector.has_stalled()
        clock.now += 2
        assert detector.has_stalled()

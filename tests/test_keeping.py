"""From decoded pictures to a durable job: what is kept when the last step fails."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool

from server.decoders import DecodedPair
from server.errors import Conflict, QueueFull, StorageUnavailable
from server.idempotency import Idempotency
from server.job_store import JobStore
from server.jobs import JobState
from server.storage import Storage
from tests.test_faults import Fault, answer_is_lost, commit_fails, keep
from tests.test_job_store import new_job, waiting_in

PAIR = DecodedPair(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
ONCE = Idempotency("key", "digest")
MANY = 64
WAIT_S = 20


def wait_for_rows(store: JobStore) -> None:
    """Until all that have begun are there: they are written one after the other."""
    assert store.withdraw(store.submit(new_job()))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "files").as_uri())


def test_job_is_durable_with_its_input(engine: Engine, storage: Storage) -> None:
    job = keep(JobStore(engine), storage, new_job(), PAIR, None)
    assert storage.has(job.input_key)


def test_input_stays_when_the_answer_of_the_commit_is_lost(
    engine: Engine, storage: Storage
) -> None:
    """The client asks again, and the job that there is needs it."""
    store, new = JobStore(engine), new_job()
    with answer_is_lost(engine, Fault(1)), pytest.raises(OperationalError):
        keep(store, storage, new, PAIR, ONCE)
    again = new_job()
    job = keep(store, storage, again, PAIR, ONCE)
    assert job.file_prefix == new.file_prefix
    assert (storage.has(new.input_key), storage.has(again.input_key)) == (True, False)


def test_input_of_a_commit_that_failed_is_left_to_the_janitor(
    engine: Engine, storage: Storage
) -> None:
    new = new_job()
    with commit_fails(engine, Fault(1)), pytest.raises(OperationalError):
        keep(JobStore(engine), storage, new, PAIR, None)
    assert storage.has(new.input_key)


class FailingDisk(Storage):
    """What readers see does not reach the disk.

    meanwhile: what happens until that is known, once the job's row has begun, if it has.
    """

    def __init__(self, folder: Path, meanwhile: Callable[[], object] = bool) -> None:
        super().__init__(folder.as_uri())
        self._meanwhile = meanwhile
        self._thread = ThreadPoolExecutor(1)

    def put_early(
        self, make: Callable[[], tuple[str, bytes]], is_shown: Callable[[], None]
    ) -> Future[None]:
        """As the base class."""
        stored = super().put_early(make, is_shown)

        def fail() -> None:
            stored.result()
            self._meanwhile()
            raise StorageUnavailable("EIO")

        return self._thread.submit(fail)


class DistantStorage(Storage):
    """As an object store: nobody sees a file before it is there for good."""

    def __init__(self, folder: Path, may_end: threading.Event) -> None:
        super().__init__(folder.as_uri())
        self._thread = ThreadPoolExecutor(1)
        self._may_end = may_end
        self.is_asked = threading.Event()

    def put_early(
        self, make: Callable[[], tuple[str, bytes]], is_shown: Callable[[], None]
    ) -> Future[None]:
        """As the base class."""

        def put() -> None:
            self.is_asked.set()
            assert self._may_end.wait(WAIT_S)
            self.put(*make())
            is_shown()

        return self._thread.submit(put)


@pytest.mark.parametrize(
    ("webhook", "once", "rows"),
    [(None, None, 1), ("http://x/", None, 0), (None, ONCE, 0)],
    ids=["nobody hears of it", "webhook", "idempotency key"],
)
def test_job_whose_input_does_not_reach_the_disk_was_never_there(
    webhook: str | None, once: Idempotency | None, rows: int, engine: Engine, tmp_path: Path
) -> None:
    """A row before that only where nobody else can hear of the job."""
    store, seen, new = JobStore(engine), list[int](), new_job(webhook=webhook)

    def look() -> None:
        wait_for_rows(store)
        seen.append(waiting_in(store))

    storage = FailingDisk(tmp_path / "files", look)
    with pytest.raises(StorageUnavailable):
        keep(store, storage, new, PAIR, once)
    assert seen == [rows]
    assert waiting_in(store) == 0
    assert not storage.has(new.input_key)
    sound = Storage((tmp_path / "files").as_uri())
    job = keep(store, sound, new_job(), PAIR, once)
    assert job.state is JobState.QUEUED  # its idempotency key was free again


def test_job_that_has_ended_needs_its_input_no_longer(engine: Engine, tmp_path: Path) -> None:
    store = JobStore(engine)

    def work() -> None:
        wait_for_rows(store)
        for job in store.claim("w", 1):
            assert store.finish(job, [False])

    job = keep(store, FailingDisk(tmp_path / "files", work), new_job(), PAIR, None)
    assert job.state is JobState.FINISHED


@pytest.mark.parametrize("once", [None, ONCE], ids=["plain", "idempotency key"])
def test_row_waits_for_a_store_that_shows_nothing_early(
    once: Idempotency | None, engine: Engine, tmp_path: Path
) -> None:
    store, may_end = JobStore(engine), threading.Event()
    storage = DistantStorage(tmp_path / "files", may_end)
    with ThreadPoolExecutor(1) as thread:
        kept = thread.submit(keep, store, storage, new_job(), PAIR, once)
        assert storage.is_asked.wait(WAIT_S)
        wait_for_rows(store)
        assert waiting_in(store) == 0
        may_end.set()
        assert storage.has(kept.result(WAIT_S).input_key)
    assert waiting_in(store) == 1


def test_many_jobs_are_withdrawn_together(engine: Engine) -> None:
    """A disk that fails, fails for all who wait for it; they take one connection, not one each."""
    store = JobStore(engine, max_waiting=1_000, max_waiting_per_key=1_000)
    jobs = [store.submit(new_job()) for _ in range(MANY)]
    in_use: list[int] = []
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    with ThreadPoolExecutor(MANY) as threads:
        event.listen(engine, "checkout", lambda *_: in_use.append(pool.checkedout()))
        assert all(threads.map(store.withdraw, jobs))
    assert {*in_use} == {1}
    assert waiting_in(store) == 0
    assert not store.withdraw(jobs[0])


def test_input_of_a_refused_job_is_removed(engine: Engine, storage: Storage) -> None:
    full, new = JobStore(engine, max_waiting=1), new_job()
    keep(full, storage, new_job(), PAIR, ONCE)
    with pytest.raises(QueueFull):
        keep(full, storage, new, PAIR, None)
    with pytest.raises(Conflict):
        keep(full, storage, new, PAIR, Idempotency("key", "another digest"))
    assert not storage.has(new.input_key)

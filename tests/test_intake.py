"""From decoded pictures to a durable job: what is kept when the last step fails."""

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from server.errors import Conflict, QueueFull, StorageUnavailable
from server.idempotency import Idempotency
from server.intake import submit
from server.job_store import JobStore
from server.jobs import JobState
from server.sandbox import DecodedPair
from server.storage import Storage
from tests.test_faults import Fault, answer_is_lost, commit_fails
from tests.test_job_store import new_job

PAIR = DecodedPair(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
ONCE = Idempotency("key", "digest")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "files").as_uri())


def test_job_is_durable_with_its_input(engine: Engine, storage: Storage) -> None:
    job = submit(JobStore(engine), storage, new_job(), PAIR, None)
    assert storage.has(job.input_key)


def test_input_stays_when_the_answer_of_the_commit_is_lost(
    engine: Engine, storage: Storage
) -> None:
    """The client asks again, and the job that there is needs it."""
    store, new = JobStore(engine), new_job()
    with answer_is_lost(engine, Fault(1)), pytest.raises(OperationalError):
        submit(store, storage, new, PAIR, ONCE)
    again = new_job()
    job = submit(store, storage, again, PAIR, ONCE)
    assert job.file_prefix == new.file_prefix
    assert (storage.has(new.input_key), storage.has(again.input_key)) == (True, False)


def test_input_of_a_commit_that_failed_is_left_to_the_janitor(
    engine: Engine, storage: Storage
) -> None:
    new = new_job()
    with commit_fails(engine, Fault(1)), pytest.raises(OperationalError):
        submit(JobStore(engine), storage, new, PAIR, None)
    assert storage.has(new.input_key)


class FailingDisk(Storage):
    """What readers see does not reach the disk."""

    def put_early(self, key: str, content: bytes) -> Future[None]:
        """As the base class."""
        super().put_early(key, content).result()
        stored: Future[None] = Future()
        stored.set_exception(StorageUnavailable("EIO"))
        return stored


def test_job_whose_input_does_not_reach_the_disk_was_never_there(
    engine: Engine, tmp_path: Path
) -> None:
    store, storage = JobStore(engine), FailingDisk((tmp_path / "files").as_uri())
    with pytest.raises(StorageUnavailable):
        submit(store, storage, new_job(webhook="http://x/"), PAIR, ONCE)
    assert store.figures().waiting == 0
    job = submit(store, Storage((tmp_path / "files").as_uri()), new_job(), PAIR, ONCE)
    assert job.state is JobState.QUEUED  # its idempotency key was free again


def test_input_of_a_refused_job_is_removed(engine: Engine, storage: Storage) -> None:
    full, new = JobStore(engine, max_waiting=1), new_job()
    submit(full, storage, new_job(), PAIR, ONCE)
    with pytest.raises(QueueFull):
        submit(full, storage, new, PAIR, None)
    with pytest.raises(Conflict):
        submit(full, storage, new, PAIR, Idempotency("key", "another digest"))
    assert not storage.has(new.input_key)

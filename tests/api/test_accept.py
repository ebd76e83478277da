"""From decoded pictures to a durable job: what is kept when the last step fails."""

from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from server.core.errors import Conflict, QueueFull, StorageUnavailable
from server.jobs.idempotency import Idempotency
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.sandbox.decoded import DecodedPair
from server.storage.files import Storage
from tests.support.faults import Fault, answer_is_lost, commit_fails
from tests.support.jobs import new_job, submit_pair, waiting_in

PAIR = DecodedPair(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
ONCE = Idempotency("key", "digest")


class FullDisk(Storage):
    """Takes nothing."""

    def put(self, key: str, content: bytes) -> None:
        """As the base class."""
        raise StorageUnavailable("ENOSPC")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "files").as_uri())


def test_job_is_durable_with_its_input(engine: Engine, storage: Storage) -> None:
    job = submit_pair(JobStore(engine), storage, new_job(), PAIR, None)
    assert storage.has(job.input_key)


def test_input_stays_when_the_answer_of_the_commit_is_lost(
    engine: Engine, storage: Storage
) -> None:
    """The client asks again, and the job that there is needs it."""
    store, new = JobStore(engine), new_job()
    with answer_is_lost(engine, Fault(1)), pytest.raises(OperationalError):
        submit_pair(store, storage, new, PAIR, ONCE)
    again = new_job()
    job = submit_pair(store, storage, again, PAIR, ONCE)
    assert job.file_prefix == new.file_prefix
    assert (storage.has(new.input_key), storage.has(again.input_key)) == (True, False)


def test_input_of_a_commit_that_failed_is_left_to_the_janitor(
    engine: Engine, storage: Storage
) -> None:
    new = new_job()
    with commit_fails(engine, Fault(1)), pytest.raises(OperationalError):
        submit_pair(JobStore(engine), storage, new, PAIR, None)
    assert storage.has(new.input_key)


@pytest.mark.parametrize("once", [None, ONCE], ids=["plain", "idempotency key"])
def test_no_row_without_a_durable_input(
    once: Idempotency | None, engine: Engine, tmp_path: Path
) -> None:
    store = JobStore(engine)
    with pytest.raises(StorageUnavailable):
        submit_pair(store, FullDisk(tmp_path.as_uri()), new_job(), PAIR, once)
    assert waiting_in(store) == 0
    job = submit_pair(store, Storage(tmp_path.as_uri()), new_job(), PAIR, once)
    assert job.state is JobState.QUEUED, "the idempotency key is still free"


def test_input_of_a_refused_job_is_removed(engine: Engine, storage: Storage) -> None:
    full, new = JobStore(engine, max_waiting=1), new_job()
    submit_pair(full, storage, new_job(), PAIR, ONCE)
    with pytest.raises(QueueFull):
        submit_pair(full, storage, new, PAIR, None)
    with pytest.raises(Conflict):
        submit_pair(full, storage, new, PAIR, Idempotency("key", "another digest"))
    assert not storage.has(new.input_key)

"""Previews on their way to the file store: one at a time, and none after the job's end."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine

from server.core.errors import StorageUnavailable
from server.jobs.job import Job, RequestFacts
from server.jobs.store import JobStore
from server.storage.files import Storage
from server.worker.previews import PreviewFiles
from tests.support.jobs import claim_one, new_job

PICTURE = np.zeros((2, 3, 3), np.uint8)


class SlowStorage(Storage):
    """One that writes when it is told to, and fails while it is broken."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.may_write = threading.Event()
        self.may_write.set()
        self.is_broken = False

    def put(self, key: str, content: bytes) -> None:
        self.may_write.wait(20)
        if self.is_broken:
            raise StorageUnavailable("cannot write")
        super().put(key, content)


@pytest.fixture
def storage(tmp_path: Path) -> SlowStorage:
    return SlowStorage(tmp_path.as_uri())


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


@pytest.fixture
def job(engine: Engine) -> Job:
    store = JobStore(engine)
    store.submit(new_job(request=RequestFacts(previews=True)))
    return claim_one(store)


def wait_for(thread: ThreadPoolExecutor, previews: PreviewFiles) -> None:
    """All that was begun is done, and known."""
    thread.submit(lambda: None).result()
    previews.collect()


def test_step_is_known_once_the_file_is_there(
    storage: SlowStorage, thread: ThreadPoolExecutor, job: Job
) -> None:
    previews = PreviewFiles(storage, thread)
    assert [previews.is_due(job, step) for step in (0, 1)] == [False, True]
    storage.may_write.clear()
    previews.store(job, 1, PICTURE)
    previews.collect()
    assert previews.step_of(job) is None
    assert not previews.is_due(job, 2), "one is on its way"
    storage.may_write.set()
    wait_for(thread, previews)
    assert previews.step_of(job) == 1
    assert [previews.is_due(job, step) for step in (1, 2)] == [False, True]
    assert (storage.get(job.preview_key) or b"").startswith(b"\x89PNG")


def test_nothing_is_due_for_a_job_that_did_not_ask(
    storage: SlowStorage, thread: ThreadPoolExecutor, engine: Engine
) -> None:
    store = JobStore(engine)
    store.submit(new_job())
    assert not PreviewFiles(storage, thread).is_due(claim_one(store), 5)


def test_preview_that_cannot_be_stored_is_forgotten(
    storage: SlowStorage,
    thread: ThreadPoolExecutor,
    job: Job,
    caplog: pytest.LogCaptureFixture,
) -> None:
    previews = PreviewFiles(storage, thread)
    storage.is_broken = True
    previews.store(job, 1, PICTURE)
    wait_for(thread, previews)
    assert "preview not stored" in caplog.text
    assert previews.step_of(job) is None
    storage.is_broken = False
    assert previews.is_due(job, 1)
    previews.store(job, 1, PICTURE)
    wait_for(thread, previews)
    assert previews.step_of(job) == 1


def test_dropped_job_leaves_no_file(
    storage: SlowStorage, thread: ThreadPoolExecutor, job: Job
) -> None:
    previews = PreviewFiles(storage, thread)
    storage.may_write.clear()
    previews.store(job, 1, PICTURE)
    previews.drop(job)
    storage.may_write.set()
    wait_for(thread, previews)
    assert storage.get(job.preview_key) is None
    assert previews.step_of(job) is None

"""Rows of the job table: made, claimed and read as server and worker do."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from models.params import InpaintParams, SchedulerName
from server.api.accept import put_input, submit
from server.jobs.idempotency import Idempotency
from server.jobs.job import Job, JobState, NewJob, RequestFacts
from server.jobs.store import JobStore
from server.jobs.watcher import JobWatcher
from server.jobs.workers import WorkerStatus
from server.sandbox.decoded import DecodedPair
from server.storage.files import Storage

PARAMS = InpaintParams(prompt="a cat", seed=7, samples=2, scheduler=SchedulerName.DDIM)

ROW = {
    "state": "queued",
    "key_id": "k",
    "dialect": "v3",
    "request": {},
    "params": {},
    "file_prefix": "p",
    "work": 1.0,
    "created_at": 0.0,
}


def new_job(**changes: Any) -> NewJob:
    plain = NewJob(
        dialect="v3",
        request=RequestFacts(init_image="http://x/a.png"),
        params=PARAMS,
        key_id="somebody",
        file_prefix=str(uuid.uuid4()),
        work=1_000.0,
    )
    return replace(plain, **changes)


def submit_pair(
    store: JobStore, storage: Storage, new: NewJob, pair: DecodedPair, once: Idempotency | None
) -> Job:
    """As `accept` does with a decoded pair."""
    put_input(storage, new, pair)
    return submit(store, storage, new, once).job


def claim_one(store: JobStore, worker_id: str = "w") -> Job:
    (job,) = store.claim(worker_id, 1)
    return job


def get(store: JobStore, job_id: int) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job


def state_of(store: JobStore, job_id: int) -> JobState:
    return get(store, job_id).state


def waiting_in(store: JobStore) -> int:
    """How many jobs wait."""
    return store.forecast(lambda _device: 1).waiting


def worker_status(worker_id: str, seen_at: float, state: str = "ready") -> WorkerStatus:
    return WorkerStatus(worker_id, "cpu", "builtin", state, state, seen_at)


def seen_now(worker: WorkerStatus) -> WorkerStatus:
    """Heard of lately at whatever time the test runs."""
    return replace(worker, seen_at=time.time())


def claim_job(store: JobStore, job_id: int) -> Job:
    """The job, held by a worker; those before it are held too."""
    while claimed := store.claim("test", 10):
        for job in claimed:
            if job.id == job_id:
                return job
    raise AssertionError(f"no job {job_id} waits")


LONG_S = 60
"""Longer than any test takes: a wait that lasts so long was not woken."""

R = TypeVar("R")


def run_with(store: JobStore, body: Callable[[JobWatcher], Awaitable[R]]) -> R:
    """Run `body` on an event loop beside a watcher; it must end well before `LONG_S`."""

    async def run() -> R:
        async with JobWatcher(store, max_streams_per_key=100) as watcher:
            async with asyncio.timeout(LONG_S / 2):
                return await body(watcher)

    return asyncio.run(run())

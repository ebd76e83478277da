"""The look at the server: what it counts, and that many callers share one."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, update

from server.api.monitoring.status import (
    KEPT_S,
    Disk,
    QueueStatus,
    ServerStatus,
    StatusReader,
    WebhookStatus,
    disk_of,
)
from server.jobs.estimates import Estimator
from server.jobs.job import Heartbeat
from server.jobs.store import JobStore
from server.jobs.workers import ALIVE_S
from server.storage.tables import deliveries
from tests.support.clocks import Clock
from tests.support.jobs import claim_one, new_job, worker_status


@dataclass
class Place:
    """A server's database, and what reads its status."""

    engine: Engine
    store: JobStore
    reader: StatusReader
    looks: int = 0

    async def look(self, read: Callable[[], ServerStatus]) -> ServerStatus:
        """A thread's work, which takes until the next turn of the event loop."""
        self.looks += 1
        await asyncio.sleep(0)
        return read()

    def latest(self) -> asyncio.Task[ServerStatus]:
        return asyncio.create_task(self.reader.latest(self.look))


@pytest.fixture
def place(engine: Engine, clock: Clock, tmp_path: Path) -> Place:
    store = JobStore(engine, clock=clock, steady_clock=clock, shared_clock=clock)
    estimator = Estimator(lambda _new: store.forecast(lambda _device: 1))
    reader = StatusReader(engine, store, estimator, tmp_path, clock=clock, steady_clock=clock)
    return Place(engine, store, reader)


def test_server_without_anything(place: Place, tmp_path: Path) -> None:
    found = place.reader.read()

    assert found.workers == []
    assert (found.queue.waiting, found.queue.running, found.queue.oldest_s) == (0, 0, None)
    assert found.webhooks == WebhookStatus(0, 0, 0)
    assert found.disk == disk_of(tmp_path)


def test_workers_and_what_they_run(place: Place, clock: Clock) -> None:
    store = place.store
    for worker_id, state in (("b", "ready"), ("a", "ready"), ("c", "failed")):
        store.workers.report(worker_status(worker_id, clock.now, state))
    for _ in range(3):
        store.submit(new_job())
    for worker_id, state in (("d", "failed"), ("e", "ready")):
        store.workers.report(worker_status(worker_id, clock.now - ALIVE_S, state))
    held = [claim_one(store, "b"), claim_one(store, "a"), claim_one(store, "b")]
    store.heartbeat_all([Heartbeat(held[0], 5, 20), Heartbeat(held[2], 1, 30)])

    loads = place.reader.read().workers

    assert [(each.status.id, each.status.state) for each in loads] == [
        ("a", "ready"),
        ("b", "ready"),
        ("c", "failed"),
        ("d", "failed"),
    ]
    assert [(each.jobs, each.step, each.total_steps) for each in loads] == [
        (1, 0, 0),
        (2, 6, 50),
        (0, 0, 0),
        (0, 0, 0),
    ]


def test_age_of_the_queue_is_that_of_its_oldest_job(place: Place, clock: Clock) -> None:
    running, waiting = place.store.submit(new_job()), place.store.submit(new_job())
    claim_one(place.store)
    clock.now += 40
    place.store.submit(new_job())
    clock.now += 2

    queue = place.reader.read().queue

    assert isinstance(queue, QueueStatus)
    assert (queue.waiting, queue.running, queue.oldest_s) == (2, 1, 42)
    assert running.id < waiting.id


def test_calls_that_are_not_delivered(place: Place) -> None:
    job = place.store.submit(new_job())
    calls = [("pending", 0), ("pending", 1), ("pending", 4), ("dead", 10), ("delivered", 1)]
    shared = {"job_id": job.id, "url": "http://x", "host": "x", "due_at": 0.0, "created_at": 0.0}
    with place.engine.begin() as connection:
        for number, (state, attempt) in enumerate(calls):
            row = {**shared, "id": f"msg_{number}", "state": state, "attempt": attempt}
            connection.execute(insert(deliveries).values(row))

    assert place.reader.read().webhooks == WebhookStatus(untried=1, retrying=2, dead=1)

    with place.engine.begin() as connection:
        connection.execute(update(deliveries).values(state="delivered"))
    assert place.reader.read().webhooks == WebhookStatus(0, 0, 0)


def test_disk_of_a_folder_that_is_missing(tmp_path: Path) -> None:
    assert disk_of(tmp_path / "missing") is None
    assert isinstance(found := disk_of(tmp_path), Disk)
    assert 0 < found.free <= found.total


async def test_callers_share_a_look(place: Place, clock: Clock) -> None:
    first = [place.latest() for _ in range(20)]
    statuses = await asyncio.gather(*first)
    clock.now += KEPT_S - 0.1
    again = await place.latest()
    assert {id(each) for each in [*statuses, again]} == {id(again)}
    assert place.looks == 1

    clock.now += 0.1
    assert (await place.latest()).at == clock.now
    assert place.looks == 2


async def test_caller_who_leaves_does_not_end_the_look_of_others(place: Place) -> None:
    leaving, staying = place.latest(), place.latest()
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).workers == []
    assert leaving.cancelled()


async def test_look_that_fails_is_tried_again_later(place: Place, clock: Clock) -> None:
    async def fail(_read: Callable[[], ServerStatus]) -> ServerStatus:
        raise ConnectionError

    for _ in range(2):
        with pytest.raises(ConnectionError):
            await place.reader.latest(fail)
    with pytest.raises(ConnectionError):
        await place.latest()
    assert place.looks == 0

    clock.now += KEPT_S
    assert (await place.latest()).workers == []

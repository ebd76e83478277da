"""`StatusReader`: the server as its operator sees it, from one short look at the database.

It has numbers and states only. Prompts, keys, addresses of clients and receivers, names of machines
and why a worker failed are left out, because every holder of a key may read it.
"""

import asyncio
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, case, func, literal, select

from server.api.monitoring.last_hour import LastHour, read_last_hour
from server.jobs.estimates import Estimator
from server.jobs.job import JobState
from server.jobs.outbox import DeliveryState
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.storage.database import read_only
from server.storage.tables import deliveries, jobs

KEPT_S = 3.0
"""How long a status is given again. Pages ask every few seconds for as long as they are open; a
hundred open pages therefore cost the database no more than one. It is shorter than the time between
two questions of a page, so that none is told the same twice."""

MAX_COUNTED = 10_000
"""Webhook calls of a state that are counted. Dead ones stay for weeks, and may be many."""


def in_text(state: JobState | DeliveryState) -> ColumnElement[str]:
    """A state as part of a statement's text.

    For a parameter PostgreSQL would take, from the sixth execution on, one plan that fits every
    state, and read the whole table.
    """
    return literal(state.value, literal_execute=True)


HELD = (
    select(
        jobs.c.worker_id,
        func.count().label("jobs"),
        func.sum(jobs.c.step).label("step"),
        func.sum(jobs.c.total_steps).label("total_steps"),
    )
    .where(jobs.c.state == in_text(JobState.RUNNING))
    .group_by(jobs.c.worker_id)
)


def counted(state: DeliveryState) -> Select[int, int]:
    """How many calls are in a state, at most `MAX_COUNTED`, and how many of them were tried."""
    some = select(deliveries.c.attempt).where(deliveries.c.state == in_text(state))
    attempt = some.limit(MAX_COUNTED).subquery().c.attempt
    return select(func.count(), func.coalesce(func.sum(case((attempt > 0, 1), else_=0)), 0))


PENDING, DEAD = counted(DeliveryState.PENDING), counted(DeliveryState.DEAD)


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker of `WorkerRegistry.seen`, and what it runs.

    step, total_steps: of all its jobs together.
    """

    status: WorkerStatus
    jobs: int = 0
    step: int = 0
    total_steps: int = 0


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """wait_s: estimated seconds until a job submitted now would start.

    oldest_s: since the oldest waiting job was submitted; None where none waits.
    """

    waiting: int
    running: int
    wait_s: float
    oldest_s: float | None


@dataclass(frozen=True, slots=True)
class WebhookStatus:
    """Calls that are not delivered, each number at most `MAX_COUNTED`.

    untried: wait for their first try. retrying: failed and will be tried again. dead: given up.
    """

    untried: int
    retrying: int
    dead: int


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes of the disk that holds the data folder of this machine."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """at: when it was read, in seconds since the epoch. disk: None where the folder is missing."""

    at: float
    workers: Sequence[WorkerLoad]
    queue: QueueStatus
    last_hour: LastHour
    webhooks: WebhookStatus
    disk: Disk | None


class StatusReader:
    """data_dir: the folder whose disk is reported.

    clock: seconds since the epoch. steady_clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        estimator: Estimator,
        data_dir: Path,
        *,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._store = store
        self._estimator = estimator
        self._data_dir = data_dir
        self._clock = clock
        self._steady_clock = steady_clock
        self._read_at = 0.0
        self._reading: asyncio.Task[ServerStatus] | None = None

    async def latest(
        self,
        in_thread: Callable[[Callable[[], ServerStatus]], Coroutine[Any, Any, ServerStatus]],
    ) -> ServerStatus:
        """A status that is at most `KEPT_S` old. in_thread: runs `read` off the event loop.

        All callers share one look, also one that takes long or fails. Raises: SQLAlchemyError.
        """
        now = self._steady_clock()
        is_old = now - self._read_at >= KEPT_S
        if self._reading is None or (self._reading.done() and is_old):
            self._read_at = now
            self._reading = asyncio.create_task(in_thread(self.read))
        # A caller that goes away must not end the look that others wait for.
        return await asyncio.shield(self._reading)

    def read(self) -> ServerStatus:
        """A look at the database and the disk. Raises: SQLAlchemyError."""
        forecast = self._estimator.forecast()
        oldest_s = self._store.demand().oldest_wait_s
        seen = self._store.workers.seen()
        now = self._clock()
        with read_only(self._engine) as connection:
            return ServerStatus(
                now,
                read_loads(connection, seen),
                QueueStatus(forecast.waiting, forecast.running, forecast.wait_s, oldest_s),
                read_last_hour(connection, now),
                read_webhooks(connection),
                disk_of(self._data_dir),
            )


def read_loads(connection: Connection, seen: Sequence[WorkerStatus]) -> list[WorkerLoad]:
    """The workers in the order of their ids, each with what it runs."""
    held = {
        row.worker_id: (row.jobs, row.step, row.total_steps) for row in connection.execute(HELD)
    }
    ordered = sorted(seen, key=lambda worker: worker.id)
    return [WorkerLoad(worker, *held.get(worker.id, ())) for worker in ordered]


def read_webhooks(connection: Connection) -> WebhookStatus:
    pending, retrying = connection.execute(PENDING).one()
    dead, _ = connection.execute(DEAD).one()
    return WebhookStatus(pending - retrying, retrying, dead)


def disk_of(folder: Path) -> Disk | None:
    """The disk that holds a folder; None where there is no such folder."""
    with suppress(OSError):
        usage = shutil.disk_usage(folder)
        return Disk(usage.total, usage.free)
    return None

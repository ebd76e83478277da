"""Liveness and readiness: `/healthz`, `/readyz`, `/readyz/workers`."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from server.api.dependencies import ServicesOf
from server.api.health import PROBE_PATIENCE_S, Store
from server.api.services import WEBHOOKS, Services
from server.jobs.workers import WorkerStatus

router = APIRouter()

PLAIN_STATES = ("ready", "loading")
"""Of workers; told by their number and by how far they are."""

NOT_READY_HEADERS = {"Retry-After": "5"}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(services: ServicesOf) -> JSONResponse:
    """Whether this process takes requests; the reason where not, and how many workers there are."""
    return to_probe_answer(await readiness(services), needs_worker=False)


@router.get("/readyz/workers")
async def readyz_workers(services: ServicesOf) -> JSONResponse:
    """Whether a request made now would be worked on: the same, and a worker is ready."""
    return to_probe_answer(await readiness(services), needs_worker=True)


@dataclass(frozen=True, slots=True)
class Readiness:
    """How things stand.

    troubles: why no requests can be taken, in words. workers: those heard of lately, none where the
    database does not answer. reason: all of it in words for anybody; why a worker failed names
    paths and tells of libraries, that is on the admin port.
    """

    troubles: Sequence[str]
    workers: Sequence[WorkerStatus]
    reason: str

    def is_ready(self, *, needs_worker: bool) -> bool:
        """needs_worker: whether a job would be made too."""
        has_worker = any(worker.state == "ready" for worker in self.workers)
        return not self.troubles and (has_worker or not needs_worker)


async def readiness(services: Services) -> Readiness:
    """Ask the database for its workers, unless it is known to fail."""
    workers = await workers_seen(services)
    failing = services.background.failing()
    troubles = ["draining"] if services.watcher.is_released else []
    troubles += services.health.troubles
    troubles += [f"{name} failed lately" for name in failing if name == WEBHOOKS]
    others = [f"{name} failed lately" for name in failing if name != WEBHOOKS]
    counts = describe_workers(workers, len(services.settings.worker_devices))
    return Readiness(troubles, workers, "; ".join([*troubles, *counts, *others]))


async def workers_seen(services: Services) -> list[WorkerStatus]:
    """None are seen where the database does not answer in time."""
    if Store.DATABASE in services.health.failing:
        return []
    try:
        async with asyncio.timeout(PROBE_PATIENCE_S):
            return await services.in_store_thread(services.store.workers.alive)
    except (TimeoutError, SQLAlchemyError) as error:
        services.health.note(Store.DATABASE, error)
    return []


def describe_workers(workers: Sequence[WorkerStatus], expected: int) -> list[str]:
    """How many are in each state, and how far those are that load."""
    states = Counter(worker.state for worker in workers)
    total = max(expected, len(workers))
    loading = [worker.detail for worker in workers if worker.state == "loading"]
    others = [f"{states[each]} {each}" for each in sorted(states) if each not in PLAIN_STATES]
    return [f"{states['ready']}/{total} workers ready", *loading, *others]


def to_probe_answer(found: Readiness, *, needs_worker: bool) -> JSONResponse:
    """The public one."""
    is_ready = found.is_ready(needs_worker=needs_worker)
    states = Counter(worker.state for worker in found.workers)
    body = {
        "status": "ok" if is_ready else "unavailable",
        "reason": found.reason,
        "workers": {state: states[state] for state in ("ready", "loading", "failed")},
    }
    return JSONResponse(body, 200 if is_ready else 503, {} if is_ready else NOT_READY_HEADERS)

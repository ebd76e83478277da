"""Liveness and readiness: `/healthz`, `/readyz`, `/readyz/workers`."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from server.api.dependencies import ServicesOf
from server.api.monitoring.health import PROBE_TIMEOUT_S, Store
from server.api.services import WEBHOOKS, Services
from server.jobs.workers import WorkerStatus

router = APIRouter()

REPORTED_STATES = ("ready", "loading")
"""Worker states that the reason reports in another way: by count, and by loading progress."""

NOT_READY_HEADERS = {"Retry-After": "5"}


READINESS_SCHEMA = {
    "type": "object",
    "required": ["status", "reason", "workers"],
    "properties": {
        "status": {"enum": ["ok", "unavailable"]},
        "reason": {"type": "string", "description": "What is missing, and the number of workers"},
        "workers": {
            "type": "object",
            "description": "Their number by state",
            "additionalProperties": {"type": "integer"},
        },
    },
}
READINESS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": READINESS_SCHEMA}}}
    for status, text in ((200, "Ready"), (503, "Not ready"))
}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Liveness: the event loop answers."""
    return {"status": "ok"}


@router.get("/readyz", responses=READINESS)
async def readyz(services: ServicesOf) -> JSONResponse:
    """Readiness of this process, with the reason and the number of workers."""
    return to_probe_answer(await readiness(services), needs_worker=False)


@router.get("/readyz/workers", responses=READINESS)
async def readyz_workers(services: ServicesOf) -> JSONResponse:
    """Readiness of this process and of at least one worker."""
    return to_probe_answer(await readiness(services), needs_worker=True)


@dataclass(frozen=True, slots=True)
class Readiness:
    """What the probes report.

    problems: why this process accepts no requests. workers: as `WorkerRegistry.seen`; none while
    the database does not answer. reason: a public sentence. It leaves out why a worker failed,
    because that names paths and libraries; the admin port reports it.
    """

    problems: Sequence[str]
    workers: Sequence[WorkerStatus]
    reason: str

    def is_ready(self, *, needs_worker: bool) -> bool:
        """needs_worker: a worker must be ready too."""
        has_worker = any(worker.state == "ready" for worker in self.workers)
        return not self.problems and (has_worker or not needs_worker)


async def readiness(services: Services) -> Readiness:
    """The state of the stores, of the background tasks and of the workers."""
    workers = await workers_seen(services)
    failing = services.background.failing()
    problems = ["draining"] if services.watcher.is_stopping else []
    problems += services.health.problems
    problems += [f"{name} failed lately" for name in failing if name == WEBHOOKS]
    others = [f"{name} failed lately" for name in failing if name != WEBHOOKS]
    counts = describe_workers(workers, len(services.settings.worker_devices))
    return Readiness(problems, workers, "; ".join([*problems, *counts, *others]))


async def workers_seen(services: Services) -> list[WorkerStatus]:
    """As `WorkerRegistry.seen`; none when the database fails or is too slow."""
    if Store.DATABASE in services.health.failing:
        return []
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return await services.in_store_thread(services.store.workers.seen)
    except (TimeoutError, SQLAlchemyError) as error:
        services.health.record_failure(Store.DATABASE, error)
    return []


def describe_workers(workers: Sequence[WorkerStatus], expected: int) -> list[str]:
    """The number of workers in each state, and the progress of those that load."""
    states = Counter(worker.state for worker in workers)
    total = max(expected, len(workers))
    loading = [worker.detail for worker in workers if worker.state == "loading"]
    others = [f"{states[each]} {each}" for each in sorted(states) if each not in REPORTED_STATES]
    return [f"{states['ready']}/{total} workers ready", *loading, *others]


def to_probe_answer(found: Readiness, *, needs_worker: bool) -> JSONResponse:
    """The public answer of a probe."""
    is_ready = found.is_ready(needs_worker=needs_worker)
    states = Counter(worker.state for worker in found.workers)
    body = {
        "status": "ok" if is_ready else "unavailable",
        "reason": found.reason,
        "workers": {state: states[state] for state in ("ready", "loading", "failed")},
    }
    return JSONResponse(body, 200 if is_ready else 503, {} if is_ready else NOT_READY_HEADERS)

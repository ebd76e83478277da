"""The vendor's endpoints, the pictures and the probes.

Each reads with the dialect, calls the services, and writes with the dialect.
"""

import asyncio
import base64
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse, Response, StreamingResponse

from models.diffusion.enhance import Enhancement
from server.api.accept import (
    ServicesOf,
    accept,
    admit,
    base_url_of,
    called_url_of,
    eta_s,
    find_job,
)
from server.api.auth.keyring import Caller
from server.api.bodies import Fields, read_fields, release_body
from server.api.dialects.v3 import reading as v3
from server.api.health import PROBE_PATIENCE_S, Store
from server.api.services import WEBHOOKS, Services
from server.core.errors import RouteNotFound
from server.core.logs import get_logger
from server.core.settings import Base64Output, Settings
from server.jobs.job import OUTPUT_FOLDER, OUTPUT_STEM, Job, JobState
from server.jobs.workers import WorkerStatus

logger = get_logger(__name__)

router = APIRouter()

OUTPUT_NAME = re.compile(rf"({OUTPUT_STEM})\.(png|base64)")
PLAIN_STATES = ("ready", "loading")
"""Of workers; told by their number and by how far they are."""

NOT_READY_HEADERS = {"Retry-After": "5"}

OUTPUT_HEADERS = {
    "Cache-Control": "public, max-age=86400, immutable",
    "Content-Disposition": "inline",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


async def get_fields(request: Request, services: ServicesOf) -> Fields:
    """The request's parameters, wherever they stand. Raises: InvalidBody."""
    return await read_fields(request, services.settings.max_body_bytes)


FieldsOf = Annotated[Fields, Depends(get_fields)]


async def get_caller(request: Request, fields: FieldsOf) -> Caller:
    """Who calls, and what they may do. Raises: InvalidApiKey, RateLimited."""
    return admit(request, v3.read_key(fields, request.headers))


CallerOf = Annotated[Caller, Depends(get_caller)]


async def get_key_id(caller: CallerOf) -> str:
    """Whose request it is."""
    return caller.key_id


KeyId = Annotated[str, Depends(get_key_id)]


@router.post("/api/v3/inpaint", openapi_extra=v3.INPAINT_OPENAPI)
async def inpaint(
    request: Request, services: ServicesOf, fields: FieldsOf, caller: CallerOf
) -> JSONResponse:
    """Repaint the white part of a mask in an image."""
    own_hold_s = caller.limits.hold_s
    hold_s = services.settings.hold_s if own_hold_s is None else own_hold_s
    hold_until = time.monotonic() + hold_s
    if v3.is_fetch(fields):
        return await fetch(request, services, fields, caller.key_id)
    job_id = await submit(request, services, fields, caller)
    # The framework keeps `fields` until the answer is there, and they may hold pictures.
    fields.clear()
    release_body(request)
    ended = await services.watcher.wait(job_id, max(0.0, hold_until - time.monotonic()))
    base_url = base_url_of(request, services.settings)
    if ended is None:
        job = await find_job(services, job_id, caller.key_id)
        return JSONResponse(v3.write_processing(job, await eta_s(services, job), base_url))
    if ended.state is JobState.FINISHED:
        output = await outputs(services, ended, base_url)
        if output is not None:
            return JSONResponse(v3.write_success(ended, output))
    return JSONResponse(v3.write_failed(ended))


@router.post("/api/v3/fetch", openapi_extra=v3.FETCH_OPENAPI)
async def fetch(
    request: Request, services: ServicesOf, fields: FieldsOf, key_id: KeyId
) -> JSONResponse:
    """The result of the job named by `request_id`."""
    return await fetch_job(request, services, v3.read_job_id(fields), key_id)


@router.post("/api/v3/fetch/{job_id}", openapi_extra=v3.KEY_OPENAPI)
async def fetch_by_path(
    request: Request, services: ServicesOf, job_id: str, key_id: KeyId
) -> JSONResponse:
    """The result of a job."""
    return await fetch_job(request, services, v3.parse_job_id(job_id), key_id)


@router.post("/api/v3/system_load", openapi_extra=v3.KEY_OPENAPI)
async def system_load(services: ServicesOf, key_id: KeyId) -> JSONResponse:
    """The queue's length in jobs and seconds."""
    forecast = await services.in_store_thread(services.estimator.forecast)
    return JSONResponse(v3.write_system_load(forecast.waiting, forecast.wait_s))


@router.head(f"/{OUTPUT_FOLDER}/{{name}}", include_in_schema=False)
@router.get(f"/{OUTPUT_FOLDER}/{{name}}")
async def output(request: Request, services: ServicesOf, name: str) -> Response:
    """A picture, or its base64 text; no more of it in memory than the client is about to take."""
    match = OUTPUT_NAME.fullmatch(name)
    key = f"{OUTPUT_FOLDER}/{match[1]}.png" if match else None
    found = await services.in_file_thread(services.storage.open, key) if key else None
    if match is None or found is None:
        raise RouteNotFound
    size, pieces = found
    media_type = "image/png"
    if match[2] == "base64":
        size, pieces, media_type = (size + 2) // 3 * 4, in_base64(pieces), "text/plain"
    headers = {**OUTPUT_HEADERS, "Content-Length": str(size)}
    if request.method == "HEAD":
        return Response(b"", 200, headers, media_type)

    async def content() -> AsyncIterator[bytes]:
        while (piece := await services.in_file_thread(next, pieces, None)) is not None:
            yield piece

    return StreamingResponse(content(), 200, headers, media_type)


def in_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of the text."""
    rest = b""
    for piece in pieces:
        whole = rest + piece
        end = len(whole) - len(whole) % 3
        yield base64.b64encode(whole[:end])
        rest = whole[end:]
    yield base64.b64encode(rest)


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


async def submit(request: Request, services: Services, fields: Fields, caller: Caller) -> int:
    """Make a job of an inpaint call; gives its id. Raises: as `v3.read_inpaint`, `accept`."""
    asked = v3.read_inpaint(fields, reading_policy(services.settings, caller))
    base_url = base_url_of(request, services.settings)
    submitted = await accept(services, asked, caller, base_url, called_url_of(request))
    if asked.notices:
        # By their codes: what a client wrote stays out of the log.
        ignored = ", ".join(asked.notices)
        logger.info("parameters ignored", job_id=submitted.job.id, detail=ignored)
    return submitted.job.id


async def fetch_job(request: Request, services: Services, job_id: int, key_id: str) -> JSONResponse:
    """A job as fetch tells of it. Raises: JobNotFound, StorageUnavailable."""
    job = await find_job(services, job_id, key_id)
    if job.has_pictures:
        output = await outputs(services, job, base_url_of(request, services.settings))
        if output is not None:
            return JSONResponse(v3.write_fetch_success(job, output))
    if job.state.is_terminal:
        return JSONResponse(v3.write_failed(job))
    return JSONResponse(v3.write_fetch_processing(job, await eta_s(services, job)))


async def outputs(services: Services, job: Job, base_url: str) -> list[str] | None:
    """The finished pictures as the client asked for them: URLs, or base64 texts.

    The row says whether there are any; the files of texts are read, and without one of them the
    result is None. Raises: StorageUnavailable.
    """
    urls = [f"{base_url}/{OUTPUT_FOLDER}/{name}" for name in job.output_names]
    if not v3.V3Facts.of(job).wants_base64:
        return urls
    if services.settings.base64_output is Base64Output.LINK:
        return [url.removesuffix(".png") + ".base64" for url in urls]
    pictures = [await services.in_file_thread(services.storage.get, key) for key in job.output_keys]
    texts = [base64.b64encode(each).decode() for each in pictures if each is not None]
    return texts if len(texts) == len(pictures) else None


def reading_policy(settings: Settings, caller: Caller) -> v3.ReadingPolicy:
    """What of the dialect's reading the operator decides, for this caller."""
    return v3.ReadingPolicy(
        steps_policy=settings.steps_policy,
        force_safety_check=settings.safety.force or caller.limits.force_safety_checker,
        enhancement=Enhancement(settings.enhance.suffix, settings.enhance.negative_list),
        models=settings.offered_models,
        https_webhooks=settings.webhook.https_only,
    )


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
            return await services.in_store_thread(services.store.workers.seen)
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

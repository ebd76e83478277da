"""The native API's endpoints: create, list, follow and cancel jobs; masks; webhooks; status.

An endpoint reads with `reading`, calls `accept` or the stores, and writes with `writing`. Errors
are raised; `server/api/errors.py` turns them into problems through `write_error`.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from starlette.responses import JSONResponse, StreamingResponse

from server.api.accept import accept
from server.api.bodies import parsed, read_json
from server.api.dependencies import (
    CallerOf,
    ServicesOf,
    base_url_of,
    called_url_of,
    cancel,
    find_job,
    reading_policy,
)
from server.api.dialects.base import Dialect, JobRequest
from server.api.dialects.explanations import headers_of
from server.api.dialects.native import (
    checks,
    description,
    events,
    problems,
    reading,
    replays,
    status,
    writing,
)
from server.api.dialects.native.checks import CheckAnswer
from server.api.dialects.native.problems import declare
from server.api.dialects.native.writing import (
    DeliveryAnswer,
    DeliveryList,
    JobAnswer,
    JobDetails,
    JobList,
    PingAnswer,
)
from server.api.services import Services
from server.core.errors import ApiError, Conflict, ConflictKind, StorageUnavailable
from server.jobs.idempotency import Idempotency
from server.jobs.job import Job, JobState, Submitted
from server.jobs.outbox import DeliveryState
from server.jobs.watcher import Subscription

router = APIRouter()

MAX_PAGE = 100
IDEMPOTENCY_KEY, REPLAYED = "Idempotency-Key", "Idempotency-Replayed"
EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""`no` makes nginx pass on each event at once instead of buffering it."""


async def get_key_id(caller: CallerOf) -> str:
    """The key id of the caller, which owns the jobs."""
    return caller.key_id


KeyId = Annotated[str, Depends(get_key_id)]
JobId = Annotated[int, Path(ge=1, le=2**63 - 1)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Entries of a page")]
Before = Annotated[
    int | None, Query(ge=1, le=2**63 - 1, description="Jobs with smaller ids only: the next page")
]


async def get_body(request: Request, services: ServicesOf, _caller: CallerOf) -> bytes:
    """The JSON body. It depends on the caller, so that an unknown caller's body is never read.

    Raises: InvalidBody, BodyTooLarge.
    """
    return await read_json(request, services.settings.max_body_bytes)


BodyOf = Annotated[bytes, Depends(get_body)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias=IDEMPOTENCY_KEY,
        description="1 to 255 visible ASCII characters. For 24 hours the same key with the same "
        "body gives the same job, with another body an error",
        # Described here, but checked in `reading`, which has an error code of its own for it.
        json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    ),
]


async def get_job(services: ServicesOf, key_id: KeyId, job_id: JobId) -> Job:
    """The job of the path. Raises: JobNotFound, also for a job of another key."""
    return await find_job(services, job_id, key_id)


JobOf = Annotated[Job, Depends(get_job)]


async def get_subscription(
    services: ServicesOf, caller: CallerOf, job: JobOf
) -> AsyncIterator[Subscription]:
    """A subscription to the job of the path, until the answer has ended. Raises: TooManyStreams."""
    with services.watcher.subscribe(job.id, caller.key_id, caller.key_digest) as subscription:
        yield subscription


SubscriptionOf = Annotated[Subscription, Depends(get_subscription)]


@router.post(
    "/api/jobs",
    status_code=202,
    response_model=JobAnswer,
    response_description="Accepted and durable",
    responses={
        200: {"model": JobAnswer, "description": "Accepted before, with the same key"},
        **declare(400, 409, 413, 422),
    },
    openapi_extra=description.NEW_JOB,
)
async def create_job(
    request: Request,
    services: ServicesOf,
    caller: CallerOf,
    body: BodyOf,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Repaint the white part of a mask in an image."""
    settings = services.settings
    policy = reading_policy(settings, caller)

    def read(body: bytes) -> tuple[JobRequest, Idempotency | None]:
        job_request, sent = reading.read_job(body, policy)
        return job_request, reading.read_idempotency(idempotency_key, sent.body_sha256)

    job_request, once = await parsed(read, body)
    base_url = base_url_of(request, settings)
    called_url = called_url_of(request)
    submitted = await accept(services, job_request, caller, base_url, called_url, once)
    return await answer_submitted(services, submitted, base_url)


@router.post(
    "/api/masks/check",
    responses=declare(400, 413, 422),
    openapi_extra=description.CHECK,
)
async def check_mask(
    request: Request, services: ServicesOf, caller: CallerOf, body: BodyOf
) -> CheckAnswer:
    """Look for mistakes in a mask before a job is sent: inverted, empty, stretched, noisy.

    The body is that of a new job, and the same limits hold. Nothing is stored, and no device works.
    """
    policy = reading_policy(services.settings, caller)

    def read(body: bytes) -> JobRequest:
        return reading.read_job(body, policy, reading.CheckRequest)[0]

    job_request = await parsed(read, body)
    base_url = base_url_of(request, services.settings)
    return await checks.check(services, job_request, caller, base_url, called_url_of(request))


@router.get("/api/jobs", responses=declare(422))
async def list_jobs(
    request: Request,
    services: ServicesOf,
    key_id: KeyId,
    state: Annotated[JobState | None, Query(description="Jobs in this state only")] = None,
    limit: Limit = 20,
    before: Before = None,
) -> JobList:
    """The key's own jobs, newest first."""
    jobs = await services.in_store_thread(
        services.store.list_of, key_id, state=state, limit=limit, before_id=before
    )
    base_url = base_url_of(request, services.settings)
    return JobList(
        jobs=[writing.write_entry(job, base_url) for job in jobs],
        next_before=jobs[-1].id if len(jobs) == limit else None,
    )


@router.get("/api/jobs/{job_id}", response_model=JobAnswer, responses=declare(404))
async def read_job(request: Request, services: ServicesOf, job: JobOf) -> Response:
    """A job: its progress, its result, and how it was made."""
    base_url = base_url_of(request, services.settings)
    return to_response(await build_job_answer(services, job, base_url))


@router.post(
    "/api/jobs/{job_id}/replay",
    status_code=202,
    response_model=JobAnswer,
    response_description="Accepted and durable",
    responses={
        200: {"model": JobAnswer, "description": "Accepted before, with the same key"},
        **declare(404, 409, 422),
    },
)
async def replay_job(
    request: Request,
    services: ServicesOf,
    caller: CallerOf,
    job: JobOf,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Make a finished job's pictures again, with its parameters, seed, model and images.

    The new job's `replay` compares them with the pictures that there are. It needs the images,
    which servers keep only where their operator has chosen so.
    """
    base_url = base_url_of(request, services.settings)
    digest = hashlib.sha256(f"replay {job.id}".encode()).hexdigest()
    once = reading.read_idempotency(idempotency_key, digest)
    submitted = await replays.submit_replay(services, job, caller, base_url, once)
    return await answer_submitted(services, submitted, base_url)


@router.post("/api/jobs/{job_id}/cancel", responses=declare(404, 409))
async def cancel_job(request: Request, services: ServicesOf, job: JobOf) -> JobAnswer:
    """Cancel a queued or running job; cancelling it again changes nothing.

    A running job leaves the device between two steps, within a second.
    """
    ended = await cancel(services, job)
    if ended.state is not JobState.CANCELLED:
        raise Conflict(ConflictKind.JOB_ENDED)
    return await build_job_answer(services, ended, base_url_of(request, services.settings))


@router.get(
    "/api/jobs/{job_id}/events",
    response_class=Response,
    responses={**events.describe_stream(), **declare(404)},
)
async def follow_job(
    request: Request,
    services: ServicesOf,
    job: JobOf,
    subscription: SubscriptionOf,
    last_event_id: Annotated[
        str | None, Header(description="Not needed to connect again: the present state comes first")
    ] = None,
) -> Response:
    """Follow a job as server-sent events, from its present state to its end."""
    if job.state.is_terminal and last_event_id == job.state:
        return Response(status_code=204)  # an EventSource connects no more after 204
    base_url = base_url_of(request, services.settings)

    async def read_ended() -> JobAnswer:
        ended = await services.in_store_thread(services.store.get, job.id)
        return await build_job_answer(services, ended or job, base_url)

    async def read_preview() -> bytes | None:
        try:
            return await services.in_file_thread(services.storage.get, job.preview_key)
        except StorageUnavailable:
            return None  # a missing preview must not end the stream

    stream = events.write_events(subscription, read_ended, read_preview)
    return StreamingResponse(stream, 200, EVENT_HEADERS, "text/event-stream")


@router.get("/api/jobs/{job_id}/deliveries", responses=declare(404))
async def list_deliveries_of_job(services: ServicesOf, job: JobOf) -> DeliveryList:
    """The job's webhook call and its attempts; empty before the job has ended."""
    return await build_delivery_list(services, job)


@router.post(
    "/api/jobs/{job_id}/deliveries/redeliver", status_code=202, responses=declare(404, 409)
)
async def redeliver(services: ServicesOf, job: JobOf) -> DeliveryList:
    """Repeat the job's webhook call now, delivered or dead, with the same `webhook-id`.

    Refused once the job's pictures have been removed. 30 a minute, pings included.
    """
    services.webhooks.limit_manual_calls(job.key_id)
    await services.in_store_thread(services.deliveries.redeliver, job.id)
    return await build_delivery_list(services, job)


@router.get("/api/deliveries", responses=declare(422))
async def list_deliveries(
    services: ServicesOf,
    key_id: KeyId,
    state: Annotated[
        DeliveryState | None, Query(description="Calls in this state only; dead: given up")
    ] = None,
    limit: Limit = 20,
    before: Before = None,
) -> DeliveryList:
    """The webhook calls of the key's jobs, newest job first."""
    statuses = await services.in_store_thread(
        services.deliveries.list_of, key_id, state=state, limit=limit, before_job_id=before
    )
    return DeliveryList(
        deliveries=[
            writing.write_delivery(each, services.webhooks.open_hosts) for each in statuses
        ],
        next_before=statuses[-1].job_id if len(statuses) == limit else None,
    )


@router.post(
    "/api/webhooks/ping",
    responses=declare(400, 413, 422),
    openapi_extra=description.PING,
)
async def ping(services: ServicesOf, caller: CallerOf, body: BodyOf) -> PingAnswer:
    """Send a signed test event to a URL, as a webhook would be sent, and report the answer.

    30 a minute, redeliveries included. Why there was no answer is reported in the log only.
    """
    url = reading.read_ping(body, https_only=services.settings.webhook.https_only)
    return writing.write_ping(*await services.webhooks.ping(url, caller.webhook_grant))


@router.get("/api/status", responses=declare())
async def read_status(services: ServicesOf, _caller: CallerOf) -> status.StatusAnswer:
    """The server's workers, queue, last hour, webhooks and disk, of all keys together.

    Numbers and states only. An answer may be three seconds old.
    """
    found = await services.status.latest(services.in_store_thread)
    return status.write_status(found, services.settings)


async def answer_submitted(services: Services, submitted: Submitted, base_url: str) -> Response:
    """The answer to a call that makes a job: 202, or 200 for one that was made before."""
    headers = {"Location": f"{base_url}/api/jobs/{submitted.job.id}"}
    if not submitted.is_new:
        headers[REPLAYED] = "true"
    answer = await build_job_answer(services, submitted.job, base_url)
    return to_response(answer, 202 if submitted.is_new else 200, headers)


def to_response(
    answer: JobAnswer, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response. FastAPI would validate our own answer a second time."""
    return Response(answer.model_dump_json(), status, headers, "application/json")


async def build_job_answer(services: Services, job: Job, base_url: str) -> JobAnswer:
    """A job in full: a finished job with its receipt, a waiting one with position and estimate."""
    receipt = position = eta_s = None
    if job.state is JobState.FINISHED:
        receipt = await services.in_store_thread(services.store.receipt_of, job.id)
    elif not job.state.is_terminal:
        forecast = await services.in_store_thread(services.estimator.forecast, job.id)
        position = forecast.position(job.id) if job.state is JobState.QUEUED else None
        eta_s = services.quotes.quote(job.id, forecast.eta_s(job.id))
    replay = await replays.read_replay(services, job)
    return writing.write_job(job, JobDetails(receipt, position, eta_s, replay), base_url)


async def build_delivery_list(services: Services, job: Job) -> DeliveryList:
    """The webhook calls of one job."""
    statuses = await services.in_store_thread(services.deliveries.of_job, job.id)
    held = services.webhooks.open_hosts
    answers: list[DeliveryAnswer] = [writing.write_delivery(each, held) for each in statuses]
    return DeliveryList(deliveries=answers, next_before=None)


def write_error(error: ApiError, request: Request) -> Response:
    """An error as a problem (RFC 9457)."""
    problem = problems.write_problem(error, request.scope.get("request_id", ""))
    body = problem.model_dump(mode="json")
    return JSONResponse(body, problem.status, headers_of(error), problems.MEDIA_TYPE)


NATIVE = Dialect(
    name=reading.DIALECT,
    router=router,
    owns=problems.is_native,
    write_error=write_error,
    write_webhook=writing.write_webhook,
    description=description.DESCRIPTION,
    to_api_error=reading.to_call_error,
)

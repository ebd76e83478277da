"""The V3 endpoints: inpaint, fetch and system_load.

An endpoint reads with `reading`, calls `accept` or the stores, and writes with `writing`. Inpaint
holds its call until the job ends, at most for the hold time.
"""

import base64
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from server.api.accept import accept
from server.api.auth.keyring import Caller
from server.api.bodies import Fields, read_fields, release_body
from server.api.dependencies import (
    ServicesOf,
    admit,
    base_url_of,
    called_url_of,
    eta_s,
    find_job,
    get_services,
    reading_policy,
)
from server.api.dialects.base import Dialect
from server.api.dialects.vendor import reading, writing
from server.api.services import Services
from server.core.errors import ApiError
from server.core.settings import Base64Output, ErrorStatus
from server.jobs.job import OUTPUT_FOLDER, Job, JobState

router = APIRouter()


async def get_fields(request: Request, services: ServicesOf) -> Fields:
    """The parameters of body and query. Raises: InvalidBody."""
    return await read_fields(request, services.settings.max_body_bytes)


FieldsOf = Annotated[Fields, Depends(get_fields)]


async def get_caller(request: Request, fields: FieldsOf) -> Caller:
    """The caller with its limits. Raises: InvalidApiKey, RateLimited."""
    return admit(request, reading.read_key(fields, request.headers))


CallerOf = Annotated[Caller, Depends(get_caller)]


async def get_key_id(caller: CallerOf) -> str:
    """The key id of the caller, which owns the jobs."""
    return caller.key_id


KeyId = Annotated[str, Depends(get_key_id)]


@router.post("/api/v3/inpaint", openapi_extra=reading.INPAINT_OPENAPI)
async def inpaint(
    request: Request, services: ServicesOf, fields: FieldsOf, caller: CallerOf
) -> JSONResponse:
    """Repaint the white part of a mask in an image."""
    own_hold_s = caller.limits.hold_s
    hold_s = services.settings.hold_s if own_hold_s is None else own_hold_s
    hold_until = time.monotonic() + hold_s
    if reading.is_fetch(fields):
        return await fetch(request, services, fields, caller.key_id)
    job_id = await submit(request, services, fields, caller)
    # The call may wait long now. FastAPI keeps a reference to `fields`, which may hold megabytes
    # of pictures, so their memory and their share of the body limit are released here.
    fields.clear()
    release_body(request)
    ended = await services.watcher.wait(job_id, max(0.0, hold_until - time.monotonic()))
    base_url = base_url_of(request, services.settings)
    if ended is None:
        job = await find_job(services, job_id, caller.key_id)
        return JSONResponse(writing.write_processing(job, await eta_s(services, job), base_url))
    if ended.state is JobState.FINISHED:
        output = await outputs(services, ended, base_url)
        if output is not None:
            return JSONResponse(writing.write_success(ended, output))
    return JSONResponse(writing.write_failed(ended))


@router.post("/api/v3/fetch", openapi_extra=reading.FETCH_OPENAPI)
async def fetch(
    request: Request, services: ServicesOf, fields: FieldsOf, key_id: KeyId
) -> JSONResponse:
    """The result of the job named by `request_id`."""
    return await fetch_job(request, services, reading.read_job_id(fields), key_id)


@router.post("/api/v3/fetch/{job_id}", openapi_extra=reading.KEY_OPENAPI)
async def fetch_by_path(
    request: Request, services: ServicesOf, job_id: str, key_id: KeyId
) -> JSONResponse:
    """The result of a job."""
    return await fetch_job(request, services, reading.parse_job_id(job_id), key_id)


@router.post("/api/v3/system_load", openapi_extra=reading.KEY_OPENAPI)
async def system_load(services: ServicesOf, key_id: KeyId) -> JSONResponse:
    """The queue's length in jobs and seconds."""
    forecast = await services.in_store_thread(services.estimator.forecast)
    return JSONResponse(writing.write_system_load(forecast.waiting, forecast.wait_s))


async def submit(request: Request, services: Services, fields: Fields, caller: Caller) -> int:
    """Make a job of an inpaint call; its id. Raises: as `reading.read_inpaint`, `accept`."""
    job_request = reading.read_inpaint(fields, reading_policy(services.settings, caller))
    base_url = base_url_of(request, services.settings)
    submitted = await accept(services, job_request, caller, base_url, called_url_of(request))
    return submitted.job.id


async def fetch_job(request: Request, services: Services, job_id: int, key_id: str) -> JSONResponse:
    """A job as a fetch call's answer. Raises: JobNotFound, StorageUnavailable."""
    job = await find_job(services, job_id, key_id)
    if job.has_pictures:
        output = await outputs(services, job, base_url_of(request, services.settings))
        if output is not None:
            return JSONResponse(writing.write_fetch_success(job, output))
    if job.state.is_terminal:
        return JSONResponse(writing.write_failed(job))
    return JSONResponse(writing.write_fetch_processing(job, await eta_s(services, job)))


async def outputs(services: Services, job: Job, base_url: str) -> list[str] | None:
    """The finished pictures in the form the client asked for: URLs, or base64 texts.

    None when texts were asked for and a file has been removed. Raises: StorageUnavailable.
    """
    urls = [f"{base_url}/{OUTPUT_FOLDER}/{name}" for name in job.output_names]
    if not reading.V3Facts.of(job).wants_base64:
        return urls
    if services.settings.base64_output is Base64Output.LINK:
        return [url.removesuffix(".png") + ".base64" for url in urls]
    pictures = [await services.in_file_thread(services.storage.get, key) for key in job.output_keys]
    texts = [base64.b64encode(each).decode() for each in pictures if each is not None]
    return texts if len(texts) == len(pictures) else None


def write_error(error: ApiError, request: Request) -> Response:
    """An error in the vendor's form.

    The setting `error_status` may turn its status into 200, under the vendor's own paths only:
    probes, browsers and caches must not mistake other errors for a success.
    """
    may_answer_200 = writing.may_answer_200(request.scope["path"])
    error_status = (
        get_services(request).settings.error_status if may_answer_200 else ErrorStatus.HTTP
    )
    body = writing.write_error(error, request.scope.get("request_id", ""))
    return JSONResponse(body, writing.write_status(error, error_status))


V3 = Dialect(
    name=reading.DIALECT,
    router=router,
    owns=writing.owns_errors_of,
    write_error=write_error,
    write_webhook=writing.write_webhook,
)

"""Replicate's API: predictions, files that are uploaded before them, models, and the account."""

import hashlib
import re
import time
from collections.abc import Iterable
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from models.params import OutputFormat
from server.api.accept import accept
from server.api.auth.keyring import Caller
from server.api.bodies import read_fields, release_body
from server.api.dependencies import (
    CallerOf,
    ServicesOf,
    base_url_of,
    called_url_of,
    cancel,
    find_job,
    reading_policy,
)
from server.api.dialects.base import Dialect
from server.api.dialects.inline import InlinePicture, filled, find_pictures
from server.api.dialects.replicate import description, reading, writing
from server.api.dialects.uploads import Upload, store_upload
from server.api.services import Services
from server.core.errors import ImageProblem, ImageUnavailable, JobFailed, RouteNotFound
from server.jobs.job import UPLOAD_FOLDER, UPLOAD_NAME, Job
from server.jobs.retention import HOUR_S
from server.storage.files import Storage

router = APIRouter()

PAGE = 20
FILE_NAME = re.compile(UPLOAD_NAME)


async def get_job(services: ServicesOf, caller: CallerOf, prediction_id: str) -> Job:
    """The job of the path. Raises: JobNotFound, also for a job of another key."""
    return await find_job(services, reading.read_job_id(prediction_id), caller.key_id)


JobOf = Annotated[Job, Depends(get_job)]


@router.post("/v1/predictions", status_code=201, **description.CREATE)
async def create_prediction(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Make a prediction of a version; with `Prefer: wait` the answer waits for its end."""
    return await create(request, services, caller, None)


@router.post(
    "/v1/models/{owner}/{name}/predictions", status_code=201, **description.CREATE_OF_MODEL
)
async def create_prediction_of_model(
    request: Request, services: ServicesOf, caller: CallerOf, owner: str, name: str
) -> Response:
    """Make a prediction of a model; otherwise as the call without a model in its path."""
    return await create(request, services, caller, f"{owner}/{name}")


async def create(
    request: Request, services: Services, caller: Caller, path_model: str | None
) -> Response:
    """The answer to a call that makes a prediction. Raises: as `accept`, and for its fields."""
    wait_s = reading.read_wait_s(request.headers.getlist("prefer"))
    wait_until = time.monotonic() + wait_s
    job = await submit(request, services, caller, path_model)
    if wait_s:
        # The call may wait long now, so its share of the body limit is released.
        release_body(request)
        ended = await services.watcher.wait(job.id, max(0.0, wait_until - time.monotonic()))
        job = ended or job
    base_url = base_url_of(request, services.settings)
    output, pictures = await output_of(services, job, base_url)
    written = JSONResponse(writing.write_created(job, base_url, output), 201)
    return filled(services, written, pictures)


async def submit(
    request: Request, services: Services, caller: Caller, path_model: str | None
) -> Job:
    """Make a job of a call. The fields, which may hold megabytes, are gone when this returns."""
    fields = await read_fields(request, services.settings.max_body_bytes)
    policy = reading_policy(services.settings, caller)
    job_request = reading.read_prediction(fields, path_model, policy)
    base_url = base_url_of(request, services.settings)
    return (await accept(services, job_request, caller, base_url, called_url_of(request))).job


async def output_of(
    services: Services, job: Job, base_url: str
) -> tuple[list[str] | None, list[InlinePicture]]:
    """The output of a finished job, None without pictures, and the pictures that it holds itself.

    Replicate's clients make files of https and data URIs alone, so a server that is reached over
    http gives data URIs. Raises: StorageUnavailable.
    """
    if base_url.startswith("https:") or not job.has_pictures:
        return writing.picture_urls(job, base_url), []
    try:
        pictures = await find_pictures(services, job)
    except JobFailed:
        return None, []  # somebody removed the files
    return [writing.data_uri(each, job.params.output_format) for each in pictures], pictures


@router.get("/v1/predictions", **description.LIST)
async def list_predictions(
    request: Request, services: ServicesOf, caller: CallerOf, cursor: str = ""
) -> JSONResponse:
    """The key's own predictions, newest first, a page at a time. Pictures are URLs here."""
    before_id, after_id = reading.read_cursor(cursor)
    jobs = await services.in_store_thread(
        services.store.list_of,
        caller.key_id,
        limit=PAGE + 1,
        before_id=before_id,
        after_id=after_id,
    )
    # One more than a page was read, to know whether there is another page in that direction.
    has_more, is_backwards = len(jobs) > PAGE, after_id is not None
    page = jobs[-PAGE:] if is_backwards else jobs[:PAGE]
    body = writing.write_page(
        page,
        base_url_of(request, services.settings),
        has_newer=has_more if is_backwards else before_id is not None,
        has_older=has_more or is_backwards,
    )
    return JSONResponse(body)


@router.get("/v1/predictions/{prediction_id}", **description.PREDICTION)
async def read_prediction(request: Request, services: ServicesOf, job: JobOf) -> Response:
    """A prediction, as far as it is."""
    return await answer(request, services, job)


@router.post("/v1/predictions/{prediction_id}/cancel", **description.PREDICTION)
async def cancel_prediction(request: Request, services: ServicesOf, job: JobOf) -> Response:
    """Cancel a prediction. One that has ended stays as it is."""
    return await answer(request, services, await cancel(services, job))


async def answer(request: Request, services: Services, job: Job) -> Response:
    """A prediction with its output."""
    base_url = base_url_of(request, services.settings)
    output, pictures = await output_of(services, job, base_url)
    written = JSONResponse(writing.write_prediction(job, base_url, output))
    return filled(services, written, pictures)


@router.post("/v1/files", status_code=201, **description.CREATE_FILE)
async def create_file(request: Request, services: ServicesOf, caller: CallerOf) -> JSONResponse:
    """Store a picture for the predictions that follow. Its metadata is not kept."""
    fields = await read_fields(request, services.settings.max_body_bytes)
    content = fields.get("content")
    if not isinstance(content, bytes):
        raise ImageUnavailable({"content": ImageProblem.NOT_AN_IMAGE})
    base_url = base_url_of(request, services.settings)
    upload = await store_upload(services, caller, content, base_url, "content")
    digest = await to_thread.run_sync(sha256_of, (content,))
    return JSONResponse(write_file(services, upload, digest, time.time()), 201)


@router.get("/v1/files/{file_id}", **description.FILE)
async def read_file(
    request: Request, services: ServicesOf, caller: CallerOf, file_id: str
) -> JSONResponse:
    """An uploaded file. Whoever knows its id may read it, as with its URL."""
    if not FILE_NAME.fullmatch(file_id):
        raise RouteNotFound
    key = f"{UPLOAD_FOLDER}/{file_id}"
    found = await services.in_file_thread(services.storage.find, key)
    # A digest takes a core, as thumbnails do, and its file is read piece by piece.
    async with services.picture_slots.held_by(caller.key_id):
        digest = await services.in_file_thread(stored_digest, services.storage, key)
    if found is None or digest is None:
        raise RouteNotFound
    url = f"{base_url_of(request, services.settings)}/{key}"
    upload = Upload(file_id, file_id, url, media_type_of(file_id), found.size)
    return JSONResponse(write_file(services, upload, digest, found.changed_at))


def stored_digest(storage: Storage, key: str) -> str | None:
    """SHA-256 of a stored file, None where it is missing. Raises: StorageUnavailable."""
    found = storage.open(key)
    return None if found is None else sha256_of(found[1])


def sha256_of(pieces: Iterable[bytes]) -> str:
    """SHA-256 of a file in pieces, in hexadecimal digits. Takes a few ms per megabyte."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def media_type_of(name: str) -> str:
    """The media type of an upload, by its suffix."""
    return next(each.media_type for each in OutputFormat if name.endswith(each.suffix))


def write_file(
    services: Services, upload: Upload, digest: str, created_at: float
) -> dict[str, Any]:
    """An upload with the time until which it is kept."""
    kept_s = services.settings.retention.uploads_h * HOUR_S
    return writing.write_file(upload, digest, created_at, kept_s)


@router.get("/v1/models/{owner}/{name}", **description.MODEL)
async def read_model(
    request: Request, services: ServicesOf, caller: CallerOf, owner: str, name: str
) -> JSONResponse:
    """A model by any name: predictions of one that is not offered are made by the server's own."""
    version = version_behind(services, caller, f"{owner}/{name}")
    base_url = base_url_of(request, services.settings)
    return JSONResponse(writing.write_model(owner, name, version, base_url))


@router.get("/v1/models/{owner}/{name}/versions", **description.VERSIONS)
async def list_versions(
    services: ServicesOf, caller: CallerOf, owner: str, name: str
) -> JSONResponse:
    """The one version of a model."""
    version = writing.write_version(version_behind(services, caller, f"{owner}/{name}"))
    return JSONResponse({"previous": None, "next": None, "results": [version]})


def version_behind(services: Services, caller: Caller, name: str) -> str:
    """The version that makes the predictions of `owner/name`."""
    _, facts = reading.read_model(name, reading_policy(services.settings, caller))
    return facts.version


@router.get("/v1/models/{owner}/{name}/versions/{version}", **description.VERSION)
async def read_version(_caller: CallerOf, owner: str, name: str, version: str) -> JSONResponse:
    """A version by any id: all have the same inputs. Clients ask for it after a prediction."""
    return JSONResponse(writing.write_version(version))


@router.get("/v1/account", **description.ACCOUNT)
async def read_account(caller: CallerOf) -> JSONResponse:
    """Whose key it is."""
    return JSONResponse(writing.write_account(caller))


REPLICATE = Dialect(
    name=reading.DIALECT,
    router=router,
    owns=writing.owns,
    write_error=writing.write_error,
    write_webhook=writing.write_webhook,
    description=description.DESCRIPTION,
)

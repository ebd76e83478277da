"""OpenAI's images API: edits, generations, and the list of models.

A call reads with `reading`, is accepted, waits, and is written by `writing`; one that asks for a
stream is answered by `stream`.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from models.imaging.mask_reading import MaskRule
from server.api.accept import accept
from server.api.auth.keyring import Caller
from server.api.bodies import read_fields, release_body
from server.api.dependencies import (
    CallerOf,
    ServicesOf,
    base_url_of,
    called_url_of,
    cancel,
    reading_policy,
)
from server.api.dialects.base import Dialect, JobRequest, ReadingPolicy
from server.api.dialects.inline import InlinePicture, fill, filled, find_pictures
from server.api.dialects.openai import description, reading, writing
from server.api.dialects.openai.reading import Call
from server.api.dialects.openai.stream import PictureStream
from server.api.dialects.waiting import wait_for_pictures, with_pictures
from server.api.services import Services
from server.core.errors import ImageUnavailable, JobNotFound, RouteNotFound, StorageUnavailable
from server.jobs.job import Job

IMAGES = "/v1/images/"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""`no` makes nginx pass on each event at once instead of buffering it."""


async def get_cleanup() -> AsyncIterator[AsyncExitStack]:
    """Collects callbacks that run once the answer has been sent, or its client has left."""
    async with AsyncExitStack() as cleanup:
        yield cleanup


CleanupOf = Annotated[AsyncExitStack, Depends(get_cleanup)]

router = APIRouter()

Read = Callable[[Mapping[str, Any], ReadingPolicy], tuple[JobRequest, Call]]


@router.post("/v1/images/edits", **description.EDIT)
async def edit(
    request: Request, services: ServicesOf, caller: CallerOf, cleanup: CleanupOf
) -> Response:
    """Repaint the transparent part of a mask in an image."""
    job, call = await submit(request, services, caller, reading.read_edit)
    return await answer(request, services, caller, cleanup, (job, call))


@router.post("/v1/images/generations", **description.GENERATION)
async def generate(
    request: Request, services: ServicesOf, caller: CallerOf, cleanup: CleanupOf
) -> Response:
    """Make pictures from a text."""
    job, call = await submit(request, services, caller, reading.read_generation)
    return await answer(request, services, caller, cleanup, (job, call))


async def submit(
    request: Request, services: Services, caller: Caller, read: Read
) -> tuple[Job, Call]:
    """Make a job of a call. The fields, which may hold megabytes, are gone when this returns.

    Raises: as `accept`; InvalidBody, InvalidRequest.
    """
    settings = services.settings
    fields = await read_fields(request, settings.max_body_bytes, reading.REPEATED_FIELDS)
    job_request, call = read(fields, reading_policy(settings, caller))
    base_url, called_url = base_url_of(request, settings), called_url_of(request)
    try:
        submitted = await accept(services, job_request, caller, base_url, called_url)
    except ImageUnavailable as error:
        if job_request.mask_rule is not MaskRule.TRANSPARENT_OR_ALL:
            raise
        # The client sent no mask: the image served as the mask too, so the error names it alone.
        raise ImageUnavailable({"init_image": next(iter(error.problems.values()))}) from error
    return submitted.job, call


async def answer(
    request: Request,
    services: Services,
    caller: Caller,
    cleanup: AsyncExitStack,
    submitted: tuple[Job, Call],
) -> Response:
    """The pictures, once they are made or as they come. Raises: as `wait_for_pictures`."""
    job, call = submitted
    # The call may wait long now, so its share of the body limit is released.
    release_body(request)
    if call.is_stream:
        return open_stream(services, caller, cleanup, job, call)
    job = await wait_for_pictures(services, request, job)
    pictures = await find_pictures(services, job) if writing.needs_files(call) else []
    body = writing.write_pictures(call, job, pictures)
    return filled(services, Response(body, media_type="application/json"), pictures)


def open_stream(
    services: Services, caller: Caller, cleanup: AsyncExitStack, job: Job, call: Call
) -> StreamingResponse:
    """Stream a job's events; a stream that ends early cancels its job. Raises: TooManyStreams."""
    cleanup.push_async_callback(cancel, services, job)
    subscription = cleanup.enter_context(
        services.watcher.subscribe(job.id, caller.key_id, caller.key_digest)
    )

    async def read_end() -> tuple[Job, list[InlinePicture]]:
        ended = await services.in_store_thread(services.store.get, job.id)
        if ended is None:
            raise JobNotFound
        return ended, await find_pictures(services, with_pictures(ended))

    async def read_preview() -> bytes | None:
        try:
            return await services.in_file_thread(services.storage.get, job.preview_key)
        except StorageUnavailable:
            return None  # a missing preview must not end the stream

    wait_s = services.settings.wait_s
    fill_event = partial(fill, services)
    stream = PictureStream(call, job, subscription, wait_s, read_end, read_preview, fill_event)
    return StreamingResponse(stream.events(), 200, STREAM_HEADERS, "text/event-stream")


@router.get("/v1/models", **description.MODELS)
async def list_models(services: ServicesOf, caller: CallerOf) -> JSONResponse:
    """The models that a call may name."""
    return JSONResponse(writing.write_models(reading_policy(services.settings, caller)))


@router.get("/v1/models/{name}", **description.MODEL_CALL)
async def read_model(services: ServicesOf, caller: CallerOf, name: str) -> JSONResponse:
    """A model by its id or alias. Raises: RouteNotFound."""
    if reading.find_model(name, reading_policy(services.settings, caller)) is None:
        raise RouteNotFound
    return JSONResponse(writing.write_model(name))


def owns(path: str) -> bool:
    """Whether errors under a path are OpenAI's. Paths of models `owner/name` are Replicate's."""
    is_model = path.startswith(f"{writing.MODELS}/") and path.count("/") == 3
    return path.startswith(IMAGES) or path == writing.MODELS or is_model


OPENAI = Dialect(
    name=reading.DIALECT,
    router=router,
    owns=owns,
    write_error=writing.write_error,
    write_webhook=writing.write_webhook,
    description=description.DESCRIPTION,
)

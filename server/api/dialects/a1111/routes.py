"""The endpoints of A1111's web UI below `/sdapi/v1`.

`img2img` and `txt2img` read with `reading`, call `accept`, wait, and write with `writing`. The
answers about models and options are in `catalogue`. A caller sees and interrupts its own jobs of
this dialect.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.accept import accept
from server.api.auth.keyring import Caller
from server.api.bodies import Fields, parsed, read_fields, release_body
from server.api.dependencies import (
    CallerOf,
    ServicesOf,
    base_url_of,
    called_url_of,
    cancel,
    eta_s,
    get_caller,
    reading_policy,
)
from server.api.dialects.a1111 import catalogue, description, reading, sampling, writing
from server.api.dialects.a1111.checkpoints import title_of
from server.api.dialects.a1111.leftovers import to_code
from server.api.dialects.a1111.png_info import read_png_info
from server.api.dialects.a1111.reading import A1111Facts, Call
from server.api.dialects.base import Dialect, JobRequest, ReadingPolicy
from server.api.dialects.fields import FALSE_WORDS, FieldReader
from server.api.dialects.inline import InlinePicture, filled, find_pictures
from server.api.dialects.waiting import wait_for_pictures
from server.api.services import Services
from server.core.errors import JobFailed, StorageUnavailable
from server.core.logs import get_logger
from server.jobs.job import Job, JobState

logger = get_logger(__name__)

PREFIX = "/sdapi/v1"
MAX_JOBS = 1_000
"""Largest number of a caller's jobs in one state that are read."""


async def get_fields(request: Request, services: ServicesOf, _caller: CallerOf) -> Fields:
    """The fields of a call. It depends on the caller, so a stranger's body is never read.

    Raises: InvalidBody.
    """
    return await read_fields(request, services.settings.max_body_bytes)


FieldsOf = Annotated[Fields, Depends(get_fields)]


async def get_policy(services: ServicesOf, caller: CallerOf) -> ReadingPolicy:
    return reading_policy(services.settings, caller)


PolicyOf = Annotated[ReadingPolicy, Depends(get_policy)]

router = APIRouter(prefix=PREFIX, dependencies=[Depends(get_caller)])

Read = Callable[[Mapping[str, Any], ReadingPolicy], tuple[JobRequest, Call]]


@router.post("/img2img", **description.IMG2IMG)
async def img2img(
    request: Request, services: ServicesOf, fields: FieldsOf, caller: CallerOf
) -> Response:
    """Change a picture, or the part of it that a mask marks."""
    return await make(request, services, fields, caller, reading.read_img2img)


@router.post("/txt2img", **description.TXT2IMG)
async def txt2img(
    request: Request, services: ServicesOf, fields: FieldsOf, caller: CallerOf
) -> Response:
    """Make a picture from a text."""
    return await make(request, services, fields, caller, reading.read_txt2img)


async def make(
    request: Request, services: Services, fields: Fields, caller: Caller, read: Read
) -> Response:
    """Make pictures and wait for them. Raises: as `read`, `accept`, `wait_for_pictures`."""
    job, call = await submit(request, services, fields, caller, read)
    if not call.repeats_pictures:
        # The call may wait long now, so its share of the body limit is released.
        release_body(request)
    pictures: list[InlinePicture] | None = None
    try:
        job = await wait_for_pictures(services, request, job)
        pictures = await find_pictures(services, job) if call.sends_images else []
    except JobFailed as failure:
        # `interrupt` cancels jobs, and A1111 answers an interrupted call as a success.
        if failure.code != JobState.CANCELLED:
            raise
    settings = services.settings
    model = title_of(job.params.model or settings.model, settings.offered_models)
    # The answer repeats the sent pictures, which may be megabytes.
    written = await to_thread.run_sync(writing.write_pictures, call, job, model, pictures)
    return filled(services, written, pictures or ())


async def submit(
    request: Request, services: Services, fields: Fields, caller: Caller, read: Read
) -> tuple[Job, Call]:
    """Make a job of a call. Raises: as `read`, `accept`."""
    job_request, call = read(fields, reading_policy(services.settings, caller))
    base_url = base_url_of(request, services.settings)
    submitted = await accept(services, job_request, caller, base_url, called_url_of(request))
    fields.clear()  # FastAPI keeps a reference to it, and it may hold megabytes
    job = submitted.job
    if call.not_applied:
        codes = ", ".join(dict.fromkeys(map(to_code, call.not_applied)))
        logger.info("parameters not applied", job_id=job.id, detail=codes)
    return job, call


@router.get("/progress", **description.PROGRESS)
async def progress(
    services: ServicesOf,
    caller: CallerOf,
    id_task: str = "",
    skip_current_image: str = "",
) -> Response:
    """The progress of the caller's newest job, or of the job that it named `id_task`."""
    job = await find_live_job(services, caller.key_id, id_task)
    if job is None:
        return writing.to_response(writing.IDLE)
    wants_image = skip_current_image.strip().lower() in ("", *FALSE_WORDS)
    preview = await read_preview(services, job) if wants_image else None
    return writing.to_response(writing.write_progress(job, await eta_s(services, job), preview))


@router.post("/interrupt", **description.EMPTY_OBJECT)
async def interrupt(services: ServicesOf, caller: CallerOf) -> Response:
    """Cancel the caller's own running jobs; where none runs, those that wait."""
    await cancel_own_jobs(services, caller.key_id)
    return writing.to_response({})


@router.post("/skip", **description.NOTHING)
async def skip(services: ServicesOf, caller: CallerOf) -> Response:
    """As `interrupt`, because the pictures of a call are made side by side."""
    await cancel_own_jobs(services, caller.key_id)
    return writing.to_response(None)


async def live_jobs(services: Services, key_id: str, state: JobState) -> list[Job]:
    """A key's jobs of this dialect in one state, newest first."""
    jobs = await services.in_store_thread(
        services.store.list_of, key_id, state=state, limit=MAX_JOBS, before_id=None
    )
    return [job for job in jobs if job.dialect == reading.DIALECT]


async def find_live_job(services: Services, key_id: str, task_id: str) -> Job | None:
    """The newest running job of a key, else its newest waiting one.

    task_id: only jobs that the client has given this name; empty for all.
    """
    for state in (JobState.RUNNING, JobState.QUEUED):
        for job in await live_jobs(services, key_id, state):
            if not task_id or A1111Facts.of(job).task_id == task_id:
                return job
    return None


async def cancel_own_jobs(services: Services, key_id: str) -> None:
    """Cancel the key's running jobs of this dialect; where none runs, those that wait."""
    jobs = await live_jobs(services, key_id, JobState.RUNNING)
    for job in jobs or await live_jobs(services, key_id, JobState.QUEUED):
        await cancel(services, job)


async def read_preview(services: Services, job: Job) -> bytes | None:
    """The job's latest preview; None without one, and while the file store is away."""
    if job.preview_step is None:
        return None
    try:
        return await services.in_file_thread(services.storage.get, job.preview_key)
    except StorageUnavailable:
        return None


@router.get("/options", **description.OPTIONS)
async def read_options(services: ServicesOf) -> Response:
    """What holds for a call that overrides nothing."""
    return writing.to_response(catalogue.write_options(services.settings.offered_models))


@router.post("/options", **description.SET_OPTIONS)
async def set_options(fields: FieldsOf, policy: PolicyOf) -> Response:
    """Refuse every change, because options would hold for all clients."""
    catalogue.refuse_changes(fields, policy)
    return writing.to_response(None)


@router.get("/sd-models", **description.LISTS["sd-models"])
async def list_models(services: ServicesOf) -> Response:
    """The models that a call may name."""
    return writing.to_response(catalogue.list_models(services.settings.offered_models))


@router.get("/loras", **description.LISTS["loras"])
async def list_loras(services: ServicesOf) -> Response:
    """The LoRAs that a prompt may name."""
    return writing.to_response(catalogue.list_loras(services.settings.offered_loras))


@router.get("/samplers", **description.LISTS["samplers"])
async def list_samplers() -> Response:
    """The samplers by A1111's names."""
    return writing.to_response(sampling.list_samplers())


@router.get("/schedulers", **description.LISTS["schedulers"])
async def list_schedulers() -> Response:
    """A1111's names of noise spacings."""
    return writing.to_response(sampling.list_schedulers())


@router.post("/png-info", **description.PNG_INFO)
async def png_info(fields: FieldsOf) -> Response:
    """What is written in a PNG about how it was made."""
    reader = FieldReader(fields)
    content = reader.image("image").content
    reader.raise_errors()
    image = content.encode() if isinstance(content, str) else content
    return writing.to_response(await parsed(read_png_info, image))


def answering(body: Any) -> Callable[[], Awaitable[Response]]:
    """An endpoint that always answers the same."""

    async def endpoint() -> Response:
        return writing.to_response(body)

    return endpoint


for name, body in catalogue.NONE_HERE.items():
    router.add_api_route(
        f"/{name}", answering(body), methods=["GET"], **description.describe_constant(name, body)
    )
for name in catalogue.REFRESHED:
    router.add_api_route(
        f"/{name}", answering(None), methods=["POST"], **description.describe_constant(name, None)
    )


def owns(path: str) -> bool:
    """Whether errors under a path are A1111's."""
    return path.startswith("/sdapi/")


A1111 = Dialect(
    name=reading.DIALECT,
    router=router,
    owns=owns,
    write_error=writing.write_error,
    write_webhook=writing.write_webhook,
    description=description.DESCRIPTION,
)

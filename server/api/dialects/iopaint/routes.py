"""IOPaint's API: a call that waits for its picture, and the calls that its page makes first."""

from pathlib import PurePath

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from server.api.accept import accept
from server.api.auth.keyring import Caller
from server.api.bodies import parsed, read_fields, release_body
from server.api.dependencies import CallerOf, ServicesOf, base_url_of, called_url_of, reading_policy
from server.api.dialects.base import Dialect
from server.api.dialects.inline import find_pictures, read_picture
from server.api.dialects.iopaint import captions, description, reading, writing
from server.api.dialects.waiting import wait_for_pictures
from server.api.services import Services
from server.core.errors import ImageProblem, ImageUnavailable, InvalidRequest
from server.jobs.job import Job

router = APIRouter(prefix=writing.PREFIX)


@router.post("/inpaint", response_class=Response, **description.INPAINT)
async def inpaint(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Repaint the white part of a mask; the answer is the picture's file."""
    job, ignored = await submit(request, services, caller)
    release_body(request)  # the call may wait long now
    job = await wait_for_pictures(services, request, job)
    (picture,) = await find_pictures(services, job)
    headers = writing.write_headers(job, picture.size, ignored)
    return StreamingResponse(read_picture(services, picture), 200, headers)


async def submit(request: Request, services: Services, caller: Caller) -> tuple[Job, list[str]]:
    """Make a job of a call; the job, and the names of fields that are not applied.

    The fields, which may hold megabytes, are gone when this returns.
    Raises: as `read_inpaint`, `accept`.
    """
    settings = services.settings
    fields = await read_fields(request, settings.max_body_bytes)
    policy = reading_policy(settings, caller)
    job_request, ignored = await reading.read_inpaint(
        fields, policy, settings.fetch.max_image_bytes
    )
    base_url, called_url = base_url_of(request, settings), called_url_of(request)
    submitted = await accept(services, job_request, caller, base_url, called_url)
    return submitted.job, ignored


@router.get("/server-config", **description.SERVER_CONFIG)
async def server_config(services: ServicesOf, _caller: CallerOf) -> JSONResponse:
    """What the page may show."""
    return JSONResponse(writing.write_server_config(services.settings.model))


@router.get("/model", **description.MODEL)
async def current_model(services: ServicesOf, _caller: CallerOf) -> JSONResponse:
    """The server's model."""
    return JSONResponse(writing.write_model(services.settings.model))


@router.post("/model", **description.SWITCH_MODEL)
async def switch_model(request: Request, services: ServicesOf, _caller: CallerOf) -> JSONResponse:
    """The server's model, if it is named: one caller cannot switch it for all others."""
    fields = await read_fields(request, services.settings.max_body_bytes)
    model = services.settings.model
    if fields.get("name") not in (model, PurePath(model).name):
        raise InvalidRequest({"name": [f"The name must be {PurePath(model).name}."]})
    return JSONResponse(writing.write_model(model))


@router.get("/samplers", **description.SAMPLERS)
async def samplers(_caller: CallerOf) -> list[str]:
    """IOPaint's samplers that this server has."""
    return reading.offered_samplers()


@router.get("/inputimage", **description.INPUT_IMAGE)
async def input_image(_caller: CallerOf) -> JSONResponse:
    """The picture that IOPaint's command line opens; there is none here."""
    return JSONResponse({"detail": "No input image configured"})


@router.post("/gen-info", **description.GEN_INFO)
async def gen_info(request: Request, services: ServicesOf, _caller: CallerOf) -> JSONResponse:
    """The prompts that are written into a PNG, which the page fills in."""
    fields = await read_fields(request, services.settings.max_body_bytes)
    content = fields.get("file")
    if not isinstance(content, bytes):
        raise ImageUnavailable({"file": ImageProblem.NOT_AN_IMAGE})
    prompt, negative_prompt = await parsed(captions.read_prompts, content)
    return JSONResponse({"prompt": prompt, "negative_prompt": negative_prompt})


IOPAINT = Dialect(
    name=reading.DIALECT,
    router=router,
    owns=writing.owns,
    write_error=writing.write_error,
    write_webhook=writing.write_webhook,
    description=description.DESCRIPTION,
    exposed_headers=writing.EXPOSED_HEADERS,
)

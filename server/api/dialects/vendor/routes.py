"""The vendor's endpoints: calls for pictures and fetches, the same in every family.

An endpoint reads with `reading`, calls `accept` or the stores, and writes with `writing`. A call
for pictures is held until its job ends, at most for the hold time.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

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
from server.api.dialects.inline import InlinePicture, filled, find_pictures
from server.api.dialects.openapi import Call
from server.api.dialects.uploads import store_upload
from server.api.dialects.vendor import description, problems, reading, writing
from server.api.dialects.vendor.families import (
    FAMILIES,
    V3_FAMILY,
    Family,
    Task,
    family_of,
    is_later_path,
)
from server.api.services import Services
from server.core.errors import ApiError, ImageProblem, ImageUnavailable, JobFailed
from server.core.settings.sections import Base64Output, ErrorStatus
from server.egress.downloads import FetchFailed
from server.egress.sources import load_inline
from server.jobs.job import OUTPUT_FOLDER, Job, JobState

WriteSuccess = Callable[[Job, Sequence[str], Family], writing.Body]


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


@dataclass(frozen=True, slots=True)
class PictureCall:
    """The endpoint of one task of a family."""

    family: Family
    task: Task

    async def answer(
        self, request: Request, services: ServicesOf, fields: FieldsOf, caller: CallerOf
    ) -> Response:
        """Make pictures."""
        if reading.is_fetch(fields):
            return await FetchCalls(self.family).by_field(request, services, fields, caller.key_id)
        key = reading.read_key(fields, request.headers)
        with services.shadow.beside(request, fields, key) as take:
            try:
                response = await self.make(request, services, fields, caller)
            except ApiError as error:
                take(write_error(error, request))
                raise
            take(response)
            return response

    async def make(
        self, request: Request, services: Services, fields: Fields, caller: Caller
    ) -> Response:
        """Submit a job and wait for its end, at most for the hold time."""
        hold_until = time.monotonic() + hold_s_of(services, caller)
        job = await self.submit(request, services, fields, caller)
        if reading.VendorFacts.of(job).is_instant:
            hold_until = 0
        # The call may wait long now. FastAPI keeps a reference to `fields`, which may hold
        # megabytes of pictures, so their memory and their share of the body limit are released.
        fields.clear()
        release_body(request)
        ended = await services.watcher.wait(job.id, max(0.0, hold_until - time.monotonic()))
        base_url = base_url_of(request, services.settings)
        if ended is None:
            job = await find_job(services, job.id, caller.key_id)
            eta = await eta_s(services, job)
            return JSONResponse(writing.write_processing(job, eta, base_url, self.family))
        if ended.state is JobState.FINISHED:
            write = writing.write_success
            success = await answer_with_pictures(services, ended, base_url, self.family, write)
            if success is not None:
                return success
        return JSONResponse(writing.write_failed(ended, self.family))

    async def submit(
        self, request: Request, services: Services, fields: Fields, caller: Caller
    ) -> Job:
        """Make a job of the call. Raises: as `reading.read_job`, `accept`."""
        policy = reading_policy(services.settings, caller)
        job_request = reading.read_job(fields, policy, self.family, self.task)
        base_url = base_url_of(request, services.settings)
        submitted = await accept(services, job_request, caller, base_url, called_url_of(request))
        return submitted.job


@dataclass(frozen=True, slots=True)
class FetchCalls:
    """The fetches of a family, which find the jobs of every other one, too."""

    family: Family

    async def by_field(
        self, request: Request, services: ServicesOf, fields: FieldsOf, key_id: KeyId
    ) -> Response:
        """The result of the job named by `request_id`."""
        return await self.fetch(request, services, reading.read_job_id(fields), key_id)

    async def by_path(
        self, request: Request, services: ServicesOf, job_id: str, key_id: KeyId
    ) -> Response:
        """The result of a job."""
        return await self.fetch(request, services, reading.parse_job_id(job_id), key_id)

    async def fetch(
        self, request: Request, services: Services, job_id: int, key_id: str
    ) -> Response:
        """A job as a fetch call's answer. Raises: JobNotFound, StorageUnavailable."""
        job = await find_job(services, job_id, key_id)
        if job.has_pictures:
            base_url = base_url_of(request, services.settings)
            write = writing.write_fetch_success
            success = await answer_with_pictures(services, job, base_url, self.family, write)
            if success is not None:
                return success
        if job.state.is_terminal:
            return JSONResponse(writing.write_failed(job, self.family))
        eta = await eta_s(services, job)
        return JSONResponse(writing.write_fetch_processing(job, eta, self.family))


async def upload(
    request: Request, services: ServicesOf, fields: FieldsOf, caller: CallerOf
) -> JSONResponse:
    """Store a picture for an hour; calls for pictures may name its link."""
    is_crop_wanted = reading.wants_crop(fields)
    name, source = reading.read_upload(fields)
    settings = services.settings
    try:
        content = await load_inline(source.content, settings.fetch.max_image_bytes)
    except FetchFailed as error:
        if error.kind is ImageProblem.NOT_A_SOURCE:
            raise reading.not_an_upload(name) from error
        raise ImageUnavailable({name: error.kind}) from error
    stored = await store_upload(services, caller, content, base_url_of(request, settings), name)
    return JSONResponse(writing.write_upload(stored, is_crop_wanted=is_crop_wanted))


async def system_load(services: ServicesOf, key_id: KeyId) -> JSONResponse:
    """The queue's length in jobs and seconds."""
    forecast = await services.in_store_thread(services.estimator.forecast)
    return JSONResponse(writing.write_system_load(forecast.waiting, forecast.wait_s))


def hold_s_of(services: Services, caller: Caller) -> float:
    """How long a call of this caller is held."""
    own_hold_s = caller.limits.hold_s
    return services.settings.hold_s if own_hold_s is None else own_hold_s


async def answer_with_pictures(
    services: Services, job: Job, base_url: str, family: Family, write: WriteSuccess
) -> Response | None:
    """A success with the pictures in the form the client asked for: URLs, or base64 texts.

    None when texts were asked for and a file has been removed. Raises: StorageUnavailable.
    """
    output = [f"{base_url}/{OUTPUT_FOLDER}/{name}" for name in job.output_names]
    pictures: list[InlinePicture] = []
    if reading.VendorFacts.of(job).wants_base64:
        if family.is_later or services.settings.base64_output is Base64Output.LINK:
            output = [url.removesuffix(".png") + ".base64" for url in output]
        else:
            try:
                pictures = await find_pictures(services, job)
            except JobFailed:
                return None
            output = [each.mark for each in pictures]
    return filled(services, JSONResponse(write(job, output, family)), pictures)


def write_error(error: ApiError, request: Request) -> Response:
    """An error in the form of the path's family.

    The setting `error_status` may turn its status into 200, under the vendor's own paths only:
    probes, browsers and caches must not mistake other errors for a success.
    """
    path = request.scope["path"]
    may_answer_200 = problems.may_answer_200(path)
    error_status = (
        get_services(request).settings.error_status if may_answer_200 else ErrorStatus.HTTP
    )
    body = problems.write_error(error, request.scope.get("request_id", ""), family_of(path))
    return JSONResponse(body, problems.write_status(error, error_status))


def make_router(families: Iterable[Family]) -> APIRouter:
    """The calls for pictures and the fetches of families."""
    router = APIRouter()

    def post(path: str, endpoint: Callable[..., Any], described: Call) -> None:
        router.add_api_route(path, endpoint, methods=["POST"], **described)

    for family in families:
        for path, task in family.paths.items():
            post(path, PictureCall(family, task).answer, description.describe_call(family, task))
        fetch, path = FetchCalls(family), f"{family.prefix}/fetch"
        post(path, fetch.by_field, description.describe_fetch(family, by_field=True))
        by_path = description.describe_fetch(family, by_field=False)
        post(f"{path}/{{job_id}}", fetch.by_path, by_path)
    return router


def make_v3_router() -> APIRouter:
    """V3, with the calls that only it has."""
    router = make_router([V3_FAMILY])
    crop = description.describe_upload("V3", "image")
    router.add_api_route("/api/v3/base64_crop", upload, methods=["POST"], **crop)
    load = description.SYSTEM_LOAD
    router.add_api_route("/api/v3/system_load", system_load, methods=["POST"], **load)
    return router


def make_later_router() -> APIRouter:
    """All families but V3."""
    router = make_router(family for family in FAMILIES if family.is_later)
    to_url = description.describe_upload("Vendor", "base64_string")
    router.add_api_route("/api/v6/base64_to_url", upload, methods=["POST"], **to_url)
    return router


VENDOR = Dialect(
    name="vendor",
    router=make_later_router(),
    owns=is_later_path,
    write_error=write_error,
    write_webhook=writing.write_webhook,
    description=description.LATER_DESCRIPTION,
)
"""The vendor's APIs after V3. It stands before `V3`, which owns all paths below `/api/`."""

V3 = Dialect(
    name="v3",
    router=make_v3_router(),
    owns=lambda path: path.startswith("/api/"),
    write_error=write_error,
    write_webhook=writing.write_webhook,
    description=description.V3_DESCRIPTION,
)

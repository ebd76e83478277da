"""The native dialect's errors: RFC 9457 problems from a closed list of codes and sentences."""

from typing import Any

from pydantic import BaseModel, Field

from models.params import RANGES
from server.api.dialects.native.reading import FieldProblem, write_field_problem
from server.core.errors import (
    ApiError,
    BodyTooLarge,
    Conflict,
    ConflictKind,
    EncodedBody,
    ImageProblem,
    ImageUnavailable,
    InvalidApiKey,
    InvalidBody,
    InvalidForm,
    InvalidHost,
    InvalidRequest,
    JobNotFound,
    LoopbackOnly,
    QueueFull,
    RateLimited,
    RemoteOrigin,
    RouteNotFound,
    ServerBusy,
    StorageUnavailable,
    TooManyFields,
    TooManyStreams,
)
from server.egress.policy import MAX_URL_CHARS

MEDIA_TYPE = "application/problem+json"
PATHS = ("/api/jobs", "/api/deliveries", "/api/webhooks")
MAX_NAME_CHARS = 100


class FieldError(BaseModel):
    """One field at fault."""

    field: str
    code: str
    message: str


class Problem(BaseModel):
    """Why a call was refused. Programs read `code`, people `title`."""

    type: str = Field(default="about:blank", description="As RFC 9457 wants it")
    title: str
    status: int
    code: str
    request_id: str = Field(description="Name it when asking the server's operator")
    errors: list[FieldError] = []
    retry_after_s: int | None = None


PROBLEMS: dict[type[ApiError], tuple[int, str, str]] = {
    InvalidBody: (400, "invalid_body", "The body is no JSON object"),
    InvalidForm: (400, "invalid_form", "The form is broken or not in UTF-8"),
    BodyTooLarge: (413, "body_too_large", "The body is too large"),
    EncodedBody: (
        415,
        "unsupported_encoding",
        "The body has another Content-Encoding than gzip and deflate",
    ),
    TooManyFields: (400, "too_many_fields", "The request has more than 200 parameters"),
    InvalidHost: (
        400,
        "invalid_host",
        "The Host header is missing, repeated, malformed or not a name of this server",
    ),
    InvalidRequest: (422, "invalid_fields", "Fields are missing or wrong"),
    ImageUnavailable: (422, "image_unavailable", "An image cannot be used"),
    InvalidApiKey: (401, "invalid_api_key", "The API key is missing or unknown"),
    LoopbackOnly: (
        403,
        "loopback_only",
        "Without API keys this server serves its own machine only",
    ),
    JobNotFound: (404, "job_not_found", "There is no such job of this key"),
    RouteNotFound: (404, "not_found", "There is no such path"),
    QueueFull: (429, "queue_full", "Too many jobs are waiting"),
    TooManyStreams: (429, "too_many_streams", "The key has too many event streams open"),
    RateLimited: (429, "rate_limited", "Too many calls, or wrong keys, in a minute"),
    ServerBusy: (503, "server_busy", "The server has no room for the request now"),
    StorageUnavailable: (503, "storage_unavailable", "The server cannot store requests now"),
    ApiError: (500, "internal_error", "Something went wrong on the server"),
}
"""Status, code, title; a class that is not listed is written as its nearest base."""

REMOTE_SENTENCES = {
    RemoteOrigin.ADDRESS: "the call comes from another address",
    RemoteOrigin.HOST: "the call has the Host of another machine",
    RemoteOrigin.PAGE: "the call comes from a web page of another origin, or from a file",
}

METHOD_NOT_ALLOWED = (405, "method_not_allowed", "This path does not know the method")

CONFLICTS = {
    ConflictKind.JOB_ENDED: (409, "The job has ended already"),
    ConflictKind.NO_DELIVERY: (409, "The job has no webhook call to make again"),
    ConflictKind.PICTURES_EXPIRED: (409, "The job's pictures have been removed"),
    ConflictKind.IDEMPOTENCY_KEY_REUSED: (
        422,
        "The idempotency key came before, with another body",
    ),
}

IMAGE_SENTENCES = {
    ImageProblem.NOT_REACHABLE: "could not be downloaded",
    ImageProblem.NOT_FOUND: "was not found: its host answers 404 or 410",
    ImageProblem.FORBIDDEN: "is not given out: its host answers 401 or 403",
    ImageProblem.HOST_FAILED: "could not be downloaded: its host answers with an error",
    ImageProblem.COMPRESSED: "is sent by its host in a compression other than gzip and deflate",
    ImageProblem.INVALID_URL: "must be an absolute http or https URL, without a user name",
    ImageProblem.URL_TOO_LONG: f"must be a URL of at most {MAX_URL_CHARS} characters",
    ImageProblem.PRIVATE_ADDRESS: "is at a private address; the server's operator can allow it "
    "with INPAINT_FETCH__ALLOW_CIDRS or INPAINT_FETCH__ALLOW_HOSTS",
    ImageProblem.PORT_NOT_ALLOWED: "is at a port other than 80 and 443; the server's operator can "
    "allow it with INPAINT_FETCH__ALLOW_PORTS",
    ImageProblem.TOO_LARGE: "is too large",
    ImageProblem.NOT_A_SOURCE: "must be an http or https URL, a data URI or base64",
    ImageProblem.NOT_AN_IMAGE: "is no picture",
    ImageProblem.UNSUPPORTED: "is in a format other than PNG, JPEG and WEBP, or an unusual form",
    ImageProblem.DAMAGED: "is damaged or incomplete",
    ImageProblem.TOO_SLOW: "takes too long to decode",
}


def is_native(path: str) -> bool:
    """Whether errors under a path are written as problems."""
    return any(path == each or path.startswith(f"{each}/") for each in PATHS)


def write_problem(error: ApiError, request_id: str) -> tuple[Problem, dict[str, str]]:
    """The body of an error, and the headers that go with it."""
    status, code, title = describe(error)
    problem = Problem(
        title=title,
        status=status,
        code=code,
        request_id=request_id,
        errors=write_fields(error),
        retry_after_s=error.retry_after_s,
    )
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RouteNotFound) and error.allowed:
        headers["Allow"] = error.allowed
    return problem, headers


def describe(error: ApiError) -> tuple[int, str, str]:
    """Status, code and title."""
    match error:
        case Conflict(kind=kind):
            status, title = CONFLICTS[kind]
            return status, kind.value, title
        case RouteNotFound(allowed=allowed) if allowed:
            return METHOD_NOT_ALLOWED
        case LoopbackOnly(remote_origin=remote_origin):
            status, code, title = PROBLEMS[LoopbackOnly]
            return status, code, f"{title}; {REMOTE_SENTENCES[remote_origin]}"
    known = next(each for each in type(error).__mro__ if each in PROBLEMS)
    return PROBLEMS[known]


def write_fields(error: ApiError) -> list[FieldError]:
    """The fields at fault; empty for errors that concern no field."""
    match error:
        case InvalidRequest(fields=fields):
            return [write_field(name, FieldProblem(codes[0])) for name, codes in fields.items()]
        case ImageUnavailable(problems=problems):
            return [
                FieldError(field=name, code=kind.value, message=IMAGE_SENTENCES[kind])
                for name, kind in problems.items()
            ]
    return []


def write_field(name: str, problem: FieldProblem) -> FieldError:
    """One field at fault. The name of an unknown field is the client's own text, so it is cut."""
    shown = name if name in RANGES else name[:MAX_NAME_CHARS]
    message = write_field_problem(name, problem)
    return FieldError(field=shown, code=problem.value, message=message)


def declare(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of an endpoint's errors; those of every endpoint are added.

    The default stops FastAPI from adding its own form of validation error.
    """
    declared: dict[int | str, dict[str, Any]] = {
        status: describe_answer(titles_of(status))
        for status in sorted({*statuses, 401, 403, 429, 503, 500})
    }
    # One reference by class makes FastAPI list the schema that the others name.
    return declared | {"default": {"model": Problem, **describe_answer("Any other error")}}


def describe_answer(text: str) -> dict[str, Any]:
    """A problem in OpenAPI, under the media type it is sent with."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": text, "content": content}


def titles_of(status: int) -> str:
    """The titles of all problems with one status."""
    titles = [title for each, _, title in PROBLEMS.values() if each == status]
    titles += [title for each, title in CONFLICTS.values() if each == status]
    return "; ".join(titles)

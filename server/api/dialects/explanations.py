"""What every `ApiError` means: HTTP status, code and sentence, which dialects write in their form.

The vendor's dialects have sentences and statuses of their own, in `vendor/problems.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from server.core.errors import (
    ApiError,
    BodyTooLarge,
    Conflict,
    ConflictKind,
    CrossSite,
    DeadlineUnmeetable,
    EncodedBody,
    ImageProblem,
    ImageUnavailable,
    InvalidApiKey,
    InvalidBody,
    InvalidForm,
    InvalidHost,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    JobTooSlow,
    LoopbackOnly,
    QueueFull,
    RateLimited,
    RemoteOrigin,
    RouteNotFound,
    ServerBusy,
    StorageUnavailable,
    TooManyFields,
    TooManyStreams,
    UploadsLimited,
)
from server.egress.policy import MAX_URL_CHARS


@dataclass(frozen=True, slots=True)
class Explanation:
    """An error for a client.

    code: for programs. title: a sentence without a full stop. fields: for each parameter at fault
        a sentence about it.
    """

    status: int
    code: str
    title: str
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The fields' sentences, else the title, for dialects whose errors are one text."""
        if not self.fields:
            return f"{self.title}."
        return " ".join(f"{sentence.rstrip('.')}." for sentence in self.fields.values())

    @property
    def first_field(self) -> str | None:
        """The first parameter at fault; None where no parameter is."""
        return next(iter(self.fields), None)


EXPLANATIONS: dict[type[ApiError], tuple[int, str, str]] = {
    InvalidBody: (400, "invalid_body", "The body is not a JSON object"),
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
    CrossSite: (
        403,
        "cross_site",
        "A web page of another origin calls with a key that the browser has stored",
    ),
    JobNotFound: (404, "job_not_found", "This key has no such job"),
    RouteNotFound: (404, "not_found", "There is no such path"),
    QueueFull: (429, "queue_full", "Too many jobs are waiting"),
    DeadlineUnmeetable: (409, "deadline_unmeetable", "The deadline cannot be met"),
    TooManyStreams: (429, "too_many_streams", "The key has too many event streams open"),
    RateLimited: (429, "rate_limited", "Too many calls or wrong keys in a minute"),
    UploadsLimited: (
        429,
        "uploads_limited",
        "Too many uploads, or too many bytes of uploads, in a minute",
    ),
    ServerBusy: (503, "server_busy", "The server has no room for the request now"),
    JobFailed: (500, "job_failed", "The picture could not be made"),
    JobTooSlow: (504, "job_too_slow", "The picture was not finished in time"),
    StorageUnavailable: (503, "storage_unavailable", "The server cannot store requests now"),
    ApiError: (500, "internal_error", "Something went wrong on the server"),
}
"""Status, code, title."""

REMOTE_SENTENCES = {
    RemoteOrigin.ADDRESS: "the call comes from another address",
    RemoteOrigin.HOST: "the call has the Host of another machine",
    RemoteOrigin.PAGE: "the call comes from a web page of another origin, or from a file",
}

METHOD_NOT_ALLOWED = (405, "method_not_allowed", "This path does not support the method")

CONFLICTS = {
    ConflictKind.JOB_ENDED: (409, "The job has ended already"),
    ConflictKind.NO_DELIVERY: (409, "The job has no webhook call to make again"),
    ConflictKind.PICTURES_EXPIRED: (409, "The job's pictures have been removed"),
    ConflictKind.JOB_NOT_FINISHED: (409, "The job has not finished, or has no pictures"),
    ConflictKind.INPUT_GONE: (
        409,
        "The job's stored images have been removed; the server's operator can keep those of "
        "finished jobs with INPAINT_RETENTION__KEEP_INPUTS",
    ),
    ConflictKind.IDEMPOTENCY_KEY_REUSED: (
        422,
        "The idempotency key was used before, with another body",
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
    ImageProblem.NOT_AN_IMAGE: "is not a picture",
    ImageProblem.UNSUPPORTED: "is in a format other than PNG, JPEG and WEBP, or an unusual form",
    ImageProblem.DAMAGED: "is damaged or incomplete",
    ImageProblem.NO_TRANSPARENCY: "has no transparent pixel: here the transparent pixels of a mask "
    "are repainted, and its colours mean nothing",
    ImageProblem.TOO_SLOW: "takes too long to decode",
}


def explain(error: ApiError) -> Explanation:
    """What an error means; a class that is not listed has the meaning of its nearest base."""
    known = next(each for each in type(error).__mro__ if each in EXPLANATIONS)
    status, code, title = EXPLANATIONS[known]
    match error:
        case Conflict(kind=kind):
            status, title = CONFLICTS[kind]
            return Explanation(status, kind.value, title)
        case RouteNotFound(allowed=allowed) if allowed:
            return Explanation(*METHOD_NOT_ALLOWED)
        case DeadlineUnmeetable(eta_s=eta_s):
            return Explanation(status, code, f"{title}: the job would end in about {eta_s:g} s")
        case LoopbackOnly(remote_origin=remote_origin):
            title = f"{title}; {REMOTE_SENTENCES[remote_origin]}"
        case JobFailed(code=failure, sentence=sentence):
            return Explanation(status, failure, sentence)
        case InvalidRequest(fields=fields):
            texts = {name: " ".join(sentences) for name, sentences in fields.items()}
            return Explanation(status, code, title, texts)
        case ImageUnavailable(problems=problems):
            texts = {
                name: f"The {name.replace('_', ' ')} {IMAGE_SENTENCES[problem]}"
                for name, problem in problems.items()
            }
            return Explanation(status, code, title, texts)
    return Explanation(status, code, title)


def headers_of(error: ApiError) -> dict[str, str]:
    """An error's headers. `answer_error` adds `Retry-After` for all dialects."""
    if isinstance(error, InvalidApiKey):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, RouteNotFound) and error.allowed:
        return {"Allow": error.allowed}
    return {}

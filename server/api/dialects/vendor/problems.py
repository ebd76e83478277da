"""stablediffusionapi.com, writing: errors, with their status and in the words of a family."""

from typing import Any

from server.api.dialects import explanations
from server.api.dialects.explanations import explain
from server.api.dialects.fields import NOT_A_SOURCE
from server.api.dialects.vendor.families import V3_FAMILY, Family, is_later_path
from server.api.dialects.vendor.writing import in_spelling_of
from server.core.errors import (
    ApiError,
    BodyTooLarge,
    CrossSite,
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
    UploadsLimited,
)
from server.core.settings.sections import ErrorStatus
from server.egress.policy import MAX_URL_CHARS

Body = dict[str, Any]


VENDOR_SENTENCES = {
    ImageProblem.INVALID_URL: "must be a valid URL.",
    ImageProblem.URL_TOO_LONG: f"URL may not be greater than {MAX_URL_CHARS} characters.",
    ImageProblem.NOT_A_SOURCE: NOT_A_SOURCE,
    ImageProblem.NOT_AN_IMAGE: "is not a PNG, JPEG or WEBP image.",
    ImageProblem.UNSUPPORTED: "is of an unsupported kind: send a PNG, JPEG or WEBP image.",
}
"""Where the vendor has a sentence of its own, or clients know this server's."""

IMAGE_SENTENCES = {
    problem: VENDOR_SENTENCES.get(problem, f"{sentence}.")
    for problem, sentence in explanations.IMAGE_SENTENCES.items()
}

REMOTE_TIPS = {
    RemoteOrigin.ADDRESS: "Its operator makes keys with `inpaint-server keys create`.",
    RemoteOrigin.HOST: "The call has the Host of another machine: its operator names it in "
    "INPAINT_ALLOWED_HOSTS, or makes keys with `inpaint-server keys create`.",
    RemoteOrigin.PAGE: "The call comes from a web page of another origin, or from a file: "
    "its operator names its Origin in INPAINT_CORS_ORIGINS, or makes keys with "
    "`inpaint-server keys create`.",
}


def may_answer_200(path: str) -> bool:
    """Whether a path belongs to the vendor's API, whose errors may have the status 200."""
    return path.startswith("/api/v3/") or is_later_path(path)


def write_status(error: ApiError, error_status: ErrorStatus) -> int:
    """HTTP status of an error; with `LEGACY` 200 for all but wrong paths, as the vendor sends."""
    if error_status is ErrorStatus.LEGACY and not isinstance(error, RouteNotFound):
        return 200
    if isinstance(error, RouteNotFound):
        return 404
    status = explain(error).status
    return 400 if status == 422 else status


def write_error(error: ApiError, request_id: str, family: Family = V3_FAMILY) -> Body:
    """The body of an error. request_id: for errors that only the log explains."""
    body = write_v3_error(error, request_id)
    if not family.is_later:
        return body
    message = body["message"]
    text = message if isinstance(message, str) else to_text(message)
    return in_spelling_of(family, body | {"message": text, "messege": text})


def to_text(message: Body) -> str:
    """The sentences about all fields, with the names of fields as they are sent."""
    return " ".join(
        sentence.replace(name.replace("_", " "), name, 1)
        for name, sentences in message.items()
        for sentence in sentences
    )


def write_v3_error(error: ApiError, request_id: str) -> Body:
    """The body of an error in V3, where the message about fields is an object of lists."""
    match error:
        case JobNotFound():
            sentence = "Request not found"
            return {
                "status": "failed",
                "id": "",
                "message": sentence,
                "messege": sentence,
                "output": "",
            }
        case InvalidRequest(fields=fields):
            return {"status": "error", "message": fields}
        case ImageUnavailable(problems=problems):
            return {
                "status": "error",
                "message": {
                    name: [f"The {name.replace('_', ' ')} {IMAGE_SENTENCES[problem]}"]
                    for name, problem in problems.items()
                },
            }
        case QueueFull() | RateLimited():
            reason, tips = write_limit(error)
            return {
                "status": "error",
                "message": f"Rate limit exceeded. {reason}",
                "tips": tips,
                "retry_after": error.retry_after_s,
            }
    message, tip = write_plain_error(error, request_id)
    return {"status": "error", "message": message, "tip": tip}


def write_limit(error: QueueFull | RateLimited) -> tuple[str, str]:
    """Reason and tip of an exceeded limit; the vendor calls each of them a rate limit."""
    match error:
        case QueueFull(limit=limit):
            tips = "Wait for earlier requests to finish, then try again."
            return f"Maximum {limit} queued requests allowed.", tips
        case UploadsLimited():
            reason = "Too many uploads, or too many bytes of uploads, came in a minute."
        case RateLimited(limit=None):
            reason = "Too many wrong keys came from this address."
        case RateLimited(limit=limit):
            reason = f"Maximum {limit} requests per minute allowed."
    return reason, "Wait for the seconds of retry_after, then try again."


def write_plain_error(error: ApiError, request_id: str) -> tuple[str, str]:
    """Message and tip of the errors that the vendor's other forms do not cover."""
    match error:
        case InvalidApiKey():
            return "Invalid Api Key", "Send the key this server's operator gave you as 'key'."
        case LoopbackOnly(remote_origin=remote_origin):
            sentence = "Without API keys this server serves its own machine only"
            return sentence, REMOTE_TIPS[remote_origin]
        case CrossSite():
            sentence = "A web page of another origin calls with a key that the browser has stored"
            tip = "Its operator names the page's Origin in INPAINT_CORS_ORIGINS."
            return sentence, f"Send the key as 'key'. {tip}"
        case BodyTooLarge():
            return "Invalid API Request", "Send a smaller body: images by URL, for instance."
        case EncodedBody():
            return (
                "Invalid API Request",
                "Send it without a Content-Encoding, or as gzip or deflate.",
            )
        case TooManyFields():
            return "Invalid API Request", "Send 200 parameters at most."
        case InvalidHost():
            return "Invalid API Request", "Send one Host header with a name of this server."
        case InvalidForm():
            tip = "Send the form in UTF-8 and whole, a multipart form with its boundary."
            return "Invalid API Request", tip
        case InvalidBody():
            return "Invalid API Request", "Send the parameters as a JSON object in UTF-8."
        case RouteNotFound():
            return "Not found", "Pictures are made at POST /api/v3/inpaint."
        case ServerBusy():
            return "The server is busy", "Try again in a few seconds."
        case StorageUnavailable():
            return "The server cannot store requests now", "Try again in a few seconds."
    return explain(error).title, f"Name {request_id} when asking its operator."

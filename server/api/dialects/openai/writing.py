"""OpenAI's images API, writing: pictures, models, and errors."""

import base64
import json
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from server.api.dialects.base import ReadingPolicy
from server.api.dialects.explanations import Explanation, explain, headers_of
from server.api.dialects.inline import InlinePicture
from server.api.dialects.openai.reading import AUTO, B64_JSON, URL, Call, public_names
from server.core.errors import ApiError, ImageUnavailable, JobFailed, RouteNotFound
from server.core.notices import Notice
from server.jobs.job import OUTPUT_FOLDER, Job

Body = dict[str, Any]

MAX_INLINE_BYTES = 32_000_000
"""A call that names no `response_format` gets URLs and files; above this size of all files, URLs
alone."""

IMAGE_FIELDS = {"init_image": "image", "mask_image": "mask"}
"""OpenAI's names of the images."""

USAGE: Body = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""Nothing is counted in tokens here, but clients' types require the numbers."""

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
MODELS = "/v1/models"
MODELS_SINCE = 0
"""The time that models name as their creation, because it is not known."""


def needs_files(call: Call) -> bool:
    """Whether the answer to a call may hold the pictures themselves."""
    return call.is_stream or call.response_format != URL


def write_pictures(call: Call, job: Job, pictures: Sequence[InlinePicture]) -> bytes:
    """The answer's JSON, with marks. pictures: empty where the call does not need them."""
    size = sum(each.size for each in pictures)
    is_inline = call.response_format == B64_JSON or size <= MAX_INLINE_BYTES
    has_urls = call.response_format != B64_JSON
    data = [write_url(job, index) if has_urls else {} for index in range(job.params.samples)]
    for item, picture in zip(data, pictures if is_inline else (), strict=False):
        item["b64_json"] = picture.mark
    for index, item in enumerate(data):
        item |= write_picture_facts(job, index)
    return to_json({"created": created_at(job), "data": data, **write_facts(call, job)})


def write_completed(call: Call, job: Job, index: int, picture: InlinePicture) -> Body:
    """A stream's last event of a picture, with its mark."""
    return {
        **write_event_head(call, job, "completed", picture.mark),
        **write_url(job, index),
        **write_picture_facts(job, index),
        **write_facts(call, job),
    }


def write_partial(call: Call, job: Job, index: int, preview: bytes) -> Body:
    """A stream's event of a preview, which is a small PNG whatever the picture's format."""
    return {
        **write_event_head(call, job, "partial_image", base64.b64encode(preview).decode()),
        "partial_image_index": index,
        "background": "opaque",
        "output_format": "png",
        "quality": AUTO,
        "size": size_of(job),
    }


def write_event_head(call: Call, job: Job, name: str, text: str) -> Body:
    """The first fields of every event with a picture. text: its base64, or its mark."""
    return {
        "type": f"{call.event}.{name}",
        "b64_json": text,
        "created_at": created_at(job),
    }


def write_url(job: Job, index: int) -> Body:
    return {"url": f"{job.request.base_url}/{OUTPUT_FOLDER}/{job.output_names[index]}"}


def write_picture_facts(job: Job, index: int) -> Body:
    """The seed that makes the picture again, and whether the safety checker replaced it."""
    is_flagged = bool(job.flagged and job.flagged[index])
    return {"seed": job.params.sample_seed(index), **({"flagged": True} if is_flagged else {})}


def write_facts(call: Call, job: Job) -> Body:
    """Facts that all pictures of a job share. `warnings`, a key of ours, is left out if empty."""
    warnings = [write_warning(each, call) for each in job.request.warnings]
    return {
        "background": "opaque",
        "output_format": job.params.output_format.value,
        "quality": AUTO,
        "size": size_of(job),
        "usage": USAGE,
        **({"warnings": warnings} if warnings else {}),
    }


def write_warning(notice: Notice, call: Call) -> Body:
    """A warning. That about ignored fields names the fields."""
    warning: Body = {"code": notice.value, "message": notice.sentence}
    if notice is Notice.FIELDS_IGNORED:
        warning["fields"] = [*call.ignored]
    return warning


def created_at(job: Job) -> int:
    """Seconds since the epoch."""
    return int(job.finished_at or job.created_at)


def size_of(job: Job) -> str:
    """Width and height; "auto" where the picture keeps the init image's, which no row holds."""
    return AUTO if job.params.only_masked else f"{job.params.width}x{job.params.height}"


def write_models(policy: ReadingPolicy) -> Body:
    """All models by their public names, and by the operator's aliases."""
    names = [*public_names(policy.models), *policy.aliases]
    return {"object": "list", "data": [write_model(name) for name in names]}


def write_model(name: str) -> Body:
    return {
        "id": name,
        "object": "model",
        "created": MODELS_SINCE,
        "owned_by": "inpaint-server",
    }


def write_error(error: ApiError, request: Request) -> Response:
    """An error as OpenAI writes it; a wrong field or image has the status 400 there."""
    explanation = named_as_sent(error)
    body = write_problem(explanation)
    if isinstance(error, RouteNotFound) and request.scope["path"].startswith(f"{MODELS}/"):
        message = f"There is no such model; GET {MODELS} lists those of this server."
        body["error"] |= {"message": message, "param": "model", "code": "model_not_found"}
    headers = headers_of(error)
    if isinstance(error, JobFailed):
        # OpenAI's clients repeat a call that was answered 5xx, unless this header forbids it.
        headers["x-should-retry"] = "false"
    status = 400 if explanation.status == 422 else explanation.status
    return JSONResponse(body, status, headers)


def write_stream_error(error: ApiError) -> Body:
    """The data of an error event."""
    return {"type": "error", **write_problem(named_as_sent(error))}


def named_as_sent(error: ApiError) -> Explanation:
    """The explanation of an error, with OpenAI's names of the images."""
    if isinstance(error, ImageUnavailable):
        error = ImageUnavailable(
            {IMAGE_FIELDS.get(name, name): problem for name, problem in error.problems.items()}
        )
    return explain(error)


def write_problem(explanation: Explanation) -> Body:
    """The object that OpenAI's clients make an exception of."""
    kind = "server_error" if explanation.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": explanation.text,
            "type": ERROR_TYPES.get(explanation.status, kind),
            "param": explanation.first_field,
            "code": explanation.code,
        }
    }


def write_webhook(job: Job) -> Body:
    """OpenAI's images API knows no webhooks, and no call of this dialect sets one."""
    return {"id": job.id, "state": job.state, "error": job.error}


def to_json(body: Any) -> bytes:
    """JSON in ASCII, because a repeated text may hold what UTF-8 cannot write."""
    return json.dumps(body, allow_nan=False).encode()

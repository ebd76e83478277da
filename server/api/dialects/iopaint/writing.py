"""IOPaint 1.6, writing: the answers that its page asks for first, pictures, and errors."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from server.api.dialects.explanations import explain, headers_of
from server.api.dialects.iopaint.reading import offered_samplers
from server.core.errors import ApiError, ImageUnavailable
from server.jobs.job import Job

Body = dict[str, Any]

PREFIX = "/api/v1"
VENDOR_PREFIX = f"{PREFIX}/enterprise"
"""The vendor's calls below `PREFIX`."""

FIELD_NAMES = {"init_image": "image", "mask_image": "mask"}

SEED, WARNINGS, IGNORED = EXPOSED_HEADERS = ("X-Seed", "X-Warnings", "X-Ignored-Fields")


def owns(path: str) -> bool:
    """Whether errors under a path are written as IOPaint does."""
    return is_below(path, PREFIX) and not is_below(path, VENDOR_PREFIX)


def is_below(path: str, prefix: str) -> bool:
    """Whether a path is a prefix or lies below it."""
    return path == prefix or path.startswith(f"{prefix}/")


def write_headers(job: Job, size: int, ignored: Sequence[str]) -> dict[str, str]:
    """The headers of a picture of `size` bytes: also the seed and what was not applied as sent."""
    media_type = job.params.output_format.media_type
    headers = {"Content-Type": media_type, "Content-Length": str(size)}
    headers[SEED] = str(job.params.seed)
    if job.request.warnings:
        headers[WARNINGS] = ", ".join(job.request.warnings)
    if ignored:
        headers[IGNORED] = ", ".join(ignored)
    return headers


def write_model(model: str) -> Body:
    """A model and what the page may offer for it. A path is shown by its last part alone."""
    name = PurePath(model).name
    return {
        "name": name,
        "path": name,
        "model_type": "diffusers_sd_inpaint",
        "is_single_file_diffusers": False,
        "need_prompt": True,
        "controlnets": [],
        "brushnets": [],
        "support_strength": True,
        "support_outpainting": True,
        "support_lcm_lora": False,
        "support_controlnet": False,
        "support_brushnet": False,
        "support_powerpaint_v2": False,
    }


def write_server_config(model: str) -> Body:
    """What the page may show: one model, its samplers, and no plugins."""
    return {
        "plugins": [],
        "modelInfos": [write_model(model)],
        "removeBGModel": "",
        "removeBGModels": [],
        "realesrganModel": "",
        "realesrganModels": [],
        "interactiveSegModel": "",
        "interactiveSegModels": [],
        "enableFileManager": False,
        "enableAutoSaving": False,
        "enableControlnet": False,
        "controlnetMethod": None,
        "disableModelSwitch": True,
        "isDesktop": False,
        "samplers": offered_samplers(),
    }


def write_error(error: ApiError, _request: Request) -> Response:
    """An error; the page shows `errors`."""
    if isinstance(error, ImageUnavailable):
        error = ImageUnavailable(
            {FIELD_NAMES.get(name, name): problem for name, problem in error.problems.items()}
        )
    explanation = explain(error)
    text = explanation.text
    body = {"error": explanation.code, "detail": text, "body": "", "errors": text}
    return JSONResponse(body, explanation.status, headers_of(error))


def write_webhook(job: Job) -> Body:
    """IOPaint knows no webhooks, and no call of this dialect sets one."""
    return {"id": job.id, "state": job.state}

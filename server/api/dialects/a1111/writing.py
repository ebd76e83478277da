"""A1111's web UI, writing: pictures with their `info`, progress, and errors."""

import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import Request
from starlette.responses import Response

from models.imaging.captions import write_caption
from server.api.dialects.a1111.reading import A1111Facts, Call
from server.api.dialects.explanations import explain, headers_of
from server.api.dialects.inline import InlinePicture
from server.core.errors import ApiError, ImageUnavailable, InvalidApiKey
from server.jobs.job import Job, JobState

Body = dict[str, Any]

NOT_APPLIED, WARNINGS, INTERRUPTED = "Not applied", "Warnings", "Interrupted"
"""Keys of ours in `extra_generation_params`, in A1111's style of keys that people read."""

BASIC = {"WWW-Authenticate": 'Basic realm="inpaint-server", charset="UTF-8"'}
SUBSEED = -1


def to_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response in ASCII, because repeated texts may hold what UTF-8 cannot write."""
    return Response(json.dumps(body, allow_nan=False), status, headers, "application/json")


def write_pictures(
    call: Call, job: Job, model: str, pictures: Sequence[InlinePicture] | None
) -> Response:
    """The answer to `img2img` and `txt2img`, with the pictures' marks.

    model: its title. pictures: None for an interrupted job.
    """
    sent = pictures if call.sends_images and pictures is not None else ()
    body = {
        "images": [picture.mark for picture in sent],
        "parameters": to_json_value(call.parameters),
        "info": json.dumps(write_info(call, job, model, is_interrupted=pictures is None)),
    }
    return to_response(body)


def write_info(call: Call, job: Job, model: str, *, is_interrupted: bool) -> Body:
    """What was made and how; the field names and their order are A1111's."""
    params, samples = job.params, job.params.samples
    seeds = [params.sample_seed(index) for index in range(samples)]
    captions = [write_caption(params, seed, params.scheduler, model) for seed in seeds]
    return {
        "prompt": params.prompt,
        "all_prompts": [params.prompt] * samples,
        "negative_prompt": params.negative_prompt,
        "all_negative_prompts": [params.negative_prompt] * samples,
        "seed": params.seed,
        "all_seeds": seeds,
        "subseed": SUBSEED,
        "all_subseeds": [SUBSEED] * samples,
        "subseed_strength": 0,
        "width": params.width,
        "height": params.height,
        "sampler_name": call.sampler,
        "cfg_scale": params.guidance_scale,
        "steps": params.num_inference_steps,
        "batch_size": call.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": params.strength if job.request.init_image else None,
        "extra_generation_params": write_extra(call, job, is_interrupted=is_interrupted),
        "index_of_first_image": 0,
        "infotexts": [] if is_interrupted else captions,
        "styles": [],
        "job_timestamp": timestamp_of(job),
        "clip_skip": params.clip_skip + 1,
        # Whether the UNet sees the masked picture; only the worker knows the UNet.
        "is_using_inpainting_conditioning": False,
        "version": f"inpaint-server {version('inpaint-server')}",
    }


def write_extra(call: Call, job: Job, *, is_interrupted: bool) -> Body:
    """Further facts about a job, by A1111's keys and ours."""
    params = job.params
    extra: Body = {}
    if job.request.mask_image:
        extra["Mask blur"] = params.mask_blur
    if call.not_applied:
        extra[NOT_APPLIED] = ", ".join(call.not_applied)
    if job.request.warnings:
        extra[WARNINGS] = ". ".join(notice.sentence for notice in job.request.warnings)
    if is_interrupted:
        extra[INTERRUPTED] = True
    return extra


def timestamp_of(job: Job) -> str:
    """When a job was made, in UTC."""
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(job.created_at))


def to_json_value(value: Any) -> Any:
    """A value that was read from JSON, without numbers that JSON cannot write."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [to_json_value(each) for each in value]
    if isinstance(value, Mapping):
        return {name: to_json_value(each) for name, each in value.items()}
    return value


IDLE: Body = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "state": {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    },
    "current_image": None,
    "textinfo": None,
}
"""The progress of a caller that has no job."""


def write_progress(job: Job, eta_s: float, preview: bytes | None) -> Body:
    """How far a job is. preview: a PNG, if there is one.

    A job's pictures are made side by side, so the steps are those of all of them.
    """
    is_waiting = job.state is JobState.QUEUED
    state = {
        **IDLE["state"],
        "job": A1111Facts.of(job).task_id or str(job.id),
        "job_count": 1,
        "job_timestamp": timestamp_of(job),
        "sampling_step": job.step,
        "sampling_steps": job.total_steps,
    }
    return {
        "progress": job.step / job.total_steps if job.total_steps else 0.0,
        "eta_relative": eta_s,
        "state": state,
        "current_image": None if preview is None else base64.b64encode(preview).decode(),
        "textinfo": "Waiting..." if is_waiting else None,
    }


def write_error(error: ApiError, _request: Request) -> Response:
    """An error as A1111 writes its exceptions."""
    explanation = explain(error)
    detail = explanation.text
    if isinstance(error, ImageUnavailable):
        detail = f"Invalid encoded image: {detail}"
    headers = BASIC if isinstance(error, InvalidApiKey) else headers_of(error)
    body = {"error": explanation.code, "detail": detail, "body": "", "errors": detail}
    return to_response(body, explanation.status, headers)


def write_webhook(job: Job) -> Body:
    """A1111 knows no webhooks, and no call of this dialect sets one."""
    return {"id": job.id, "state": job.state, "error": job.error}

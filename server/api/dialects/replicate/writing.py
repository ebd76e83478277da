"""Replicate's API, writing: predictions, files, models, errors, and the webhook body."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from models.params import OutputFormat
from server.api.auth.keyring import Caller
from server.api.dialects.explanations import explain, headers_of
from server.api.dialects.inline import InlinePicture
from server.api.dialects.replicate.catalogue import COG_VERSION, openapi_schema
from server.api.dialects.replicate.reading import ReplicateFacts
from server.api.dialects.uploads import Upload
from server.core.errors import ApiError, ImageUnavailable
from server.core.notices import Notice
from server.jobs.job import OUTPUT_FOLDER, Job, JobState

Body = dict[str, Any]

MEDIA_TYPE = "application/problem+json"
STATUS = {
    JobState.QUEUED: "starting",
    JobState.RUNNING: "processing",
    JobState.FINISHED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "canceled",
}
INPUT_NAMES = {"init_image": "image", "mask_image": "mask"}
TOLD_IN_FULL = (Notice.FIELDS_IGNORED, Notice.MODEL_REPLACED)
"""Notices whose fields and models the logs name in sentences of their own."""

BAR_CHARS = 20
OFFERED_SINCE = time.time()
"""The time that models name as their creation: the start of this process."""


def owns(path: str) -> bool:
    """Whether a path belongs to this API; `/v1/models` and one name below it do not."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["v1", "models"]:
        return len(parts) > 3
    return parts[:1] == ["v1"] and parts[1:2] in (["predictions"], ["files"], ["account"])


def write_prediction(job: Job, base_url: str, output: Sequence[str] | None) -> Body:
    """A job. output: URLs or data URIs of its pictures, None where there are none."""
    facts, url = ReplicateFacts.of(job), f"{base_url}/v1/predictions/{job.id}"
    return {
        "id": str(job.id),
        "model": facts.model,
        "version": facts.version,
        "status": STATUS[job.state],
        "input": write_input(job),
        "output": None if output is None else [*output],
        "error": job.error,
        "logs": write_logs(job, facts),
        "metrics": {} if job.run_s is None else {"predict_time": job.run_s},
        "created_at": moment(job.created_at),
        "started_at": moment(job.started_at),
        "completed_at": moment(job.finished_at),
        "data_removed": job.expired_at is not None,
        "source": "api",
        "urls": {"get": url, "cancel": f"{url}/cancel"},
    }


def write_created(job: Job, base_url: str, output: Sequence[str] | None) -> Body:
    """A job as the answer to the call that made it.

    A job that has not ended is "starting" even while it runs: after a call that waited, Replicate's
    Python client takes any other status for the end.
    """
    prediction = write_prediction(job, base_url, output)
    return prediction if job.state.is_terminal else prediction | {"status": "starting"}


def write_input(job: Job) -> Body:
    """The inputs as they were used."""
    params = job.params
    images = {"image": job.request.init_image, "mask": job.request.mask_image}
    return {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        **{name: source for name, source in images.items() if source},
        "width": params.width,
        "height": params.height,
        "num_outputs": params.samples,
        "num_inference_steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        "strength": params.strength,
        "scheduler": params.scheduler,
        "seed": params.seed,
        "output_format": params.output_format,
        "output_quality": params.output_quality,
        "disable_safety_checker": not params.safety_check,
    }


def write_logs(job: Job, facts: ReplicateFacts) -> str:
    """What differs from the request, the seed, and how far the job is: a line each."""
    lines = [f"Using seed: {job.params.seed}"]
    if facts.asked_model:
        lines.append(f"{facts.asked_model!r} is not offered here: {facts.model} was taken")
    if facts.ignored:
        lines.append(f"Ignored, because they are not known here: {', '.join(facts.ignored)}")
    if facts.unsent_events:
        events = ", ".join(facts.unsent_events)
        lines.append(f"The webhook is called when the prediction has completed, not for: {events}")
    lines += [each.sentence for each in job.request.warnings if each not in TOLD_IN_FULL]
    if job.total_steps:
        lines.append(write_progress(job.step, job.total_steps))
    return "\n".join(lines)


def write_progress(step: int, total: int) -> str:
    """A progress bar in the form that clients read: `50%|#####     | 10/20`."""
    bar = "#" * (BAR_CHARS * step // total)
    return f"{100 * step // total:3d}%|{bar:<{BAR_CHARS}}| {step}/{total}"


def picture_urls(job: Job, base_url: str) -> list[str] | None:
    """The URLs of a job's pictures; None where it has none."""
    if not job.has_pictures:
        return None
    return [f"{base_url}/{OUTPUT_FOLDER}/{name}" for name in job.output_names]


def data_uri(picture: InlinePicture, kind: OutputFormat) -> str:
    """A picture as a data URI, with its mark."""
    return f"data:{kind.media_type};base64,{picture.mark}"


def write_webhook(job: Job) -> Body:
    """The body of the webhook: the ended prediction with the URLs of its pictures."""
    base_url = job.request.base_url
    return write_prediction(job, base_url, picture_urls(job, base_url))


def write_page(jobs: Sequence[Job], base_url: str, *, has_newer: bool, has_older: bool) -> Body:
    """A page of predictions, newest first, with the URLs of the pages beside it."""
    url = f"{base_url}/v1/predictions?cursor="
    return {
        "previous": f"{url}after-{jobs[0].id}" if jobs and has_newer else None,
        "next": f"{url}before-{jobs[-1].id}" if jobs and has_older else None,
        "results": [write_prediction(job, base_url, picture_urls(job, base_url)) for job in jobs],
    }


def write_file(upload: Upload, digest: str, created_at: float, kept_s: float) -> Body:
    """An uploaded file. Its URL is what a prediction gets as its input. digest: SHA-256."""
    return {
        "id": upload.name,
        "name": upload.name,
        "content_type": upload.media_type,
        "size": upload.size,
        "etag": digest,
        "checksums": {"sha256": digest},
        "metadata": {},
        "created_at": moment(created_at),
        "expires_at": moment(created_at + kept_s),
        "urls": {"get": upload.url},
    }


def write_model(owner: str, name: str, version: str, base_url: str) -> Body:
    """A model. Everything that only Replicate's site knows is empty."""
    return {
        "url": f"{base_url}/v1/models/{owner}/{name}",
        "owner": owner,
        "name": name,
        "description": None,
        "visibility": "public",
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": write_version(version),
    }


def write_version(version: str) -> Body:
    return {
        "id": version,
        "created_at": moment(OFFERED_SINCE),
        "cog_version": COG_VERSION,
        "openapi_schema": openapi_schema(),
    }


def write_account(caller: Caller) -> Body:
    """The caller, who has no other name than the key's id."""
    return {
        "type": "user",
        "username": caller.key_id,
        "name": caller.key_id,
        "github_url": None,
    }


def write_error(error: ApiError, _request: Request) -> Response:
    """An error as a problem (RFC 7807), with Replicate's names of the images."""
    if isinstance(error, ImageUnavailable):
        error = ImageUnavailable(
            {INPUT_NAMES.get(name, name): problem for name, problem in error.problems.items()}
        )
    explanation = explain(error)
    body = {
        "title": explanation.title,
        "detail": explanation.text,
        "status": explanation.status,
    }
    return JSONResponse(body, explanation.status, headers_of(error), MEDIA_TYPE)


def moment(seconds: float | None) -> str | None:
    """Seconds since the epoch as ISO 8601 in UTC."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")

"""stablediffusionapi.com, writing: job answers and the webhook body. Errors are in `problems.py`.

The vendor's spellings (`messege`, `meta.H`) stand here. Bodies are plain dicts, because their order
is part of the contract.
"""

import math
from collections.abc import Sequence
from typing import Any

from server.api.dialects.uploads import Upload
from server.api.dialects.vendor.families import V3_FAMILY, Family
from server.api.dialects.vendor.reading import VendorFacts, family_of_job
from server.core.notices import Notice
from server.jobs.job import OUTPUT_FOLDER, Job, JobState

Body = dict[str, Any]


def write_meta(job: Job, family: Family = V3_FAMILY) -> Body:
    """The parameters as they were used."""
    params, request = job.params, job.request
    images = {"init_image": request.init_image, "mask_image": request.mask_image}
    later = {"model_id": params.model or "", "scheduler": params.scheduler or ""}
    return {
        "H": params.height,
        "W": params.width,
        "file_prefix": job.file_prefix,
        "guidance_scale": params.guidance_scale,
        **{name: description for name, description in images.items() if description},
        **(later if family.is_later else {}),
        "n_samples": params.samples,
        "negative_prompt": params.negative_prompt,
        "outdir": "out",
        "prompt": params.prompt,
        "safetychecker": "yes" if params.safety_check else "no",
        "seed": params.seed,
        "steps": params.num_inference_steps,
        "strength": params.strength,
    }


def write_success(job: Job, output: Sequence[str], family: Family = V3_FAMILY) -> Body:
    """A finished job as the answer of the call that made it. output: URLs or base64 texts."""
    if VendorFacts.of(job).is_check:
        return write_verdict(job)
    return {
        "status": "success",
        "generationTime": job.run_s,
        "id": job.id,
        "output": list(output),
        **({"proxy_links": list(output)} if family.is_later else {}),
        "meta": write_meta(job, family),
        **(write_later_facts(job) if family.is_later else {}),
    }


def write_later_facts(job: Job) -> Body:
    """What the later families add to a finished job."""
    return {
        "nsfw_content_detected": any(job.flagged or ()),
        "webhook_status": "" if job.webhook is None else "queued",
        "tip": write_tip(job),
    }


def write_tip(job: Job) -> str:
    """What was not applied as sent; `""` where that is nothing."""
    names = VendorFacts.of(job).not_applied
    sentences = [f"Not applied here: {', '.join(names)}"] if names else []
    warnings = [each for each in job.request.warnings if each is not Notice.FIELDS_IGNORED]
    sentences += [notice.sentence for notice in warnings]
    return " ".join(f"{sentence}." for sentence in sentences)


def write_verdict(job: Job) -> Body:
    """The answer of nsfw_image_check."""
    return {
        "status": "success",
        "id": job.id,
        "images": job.request.init_image,
        "has_nsfw_concept": [bool(verdict) for verdict in job.flagged or ()],
    }


def write_processing(job: Job, eta_s: float, base_url: str, family: Family = V3_FAMILY) -> Body:
    """The answer of a call whose job is not finished within the hold time."""
    sentence = "Try to fetch request after given estimated time"
    tip = "The picture is being made. POST your key to fetch_result after eta seconds."
    body = {
        "status": "processing",
        "tip": f"{tip} {write_tip(job)}".strip() if family.is_later else tip,
        "eta": eta_s,
        "messege": sentence,
        "message": sentence,
        "fetch_result": f"{base_url}{family.prefix}/fetch/{job.id}",
        "id": job.id,
        "output": [],
        "meta": write_meta(job, family),
    }
    return in_spelling_of(family, body)


def write_fetch_success(job: Job, output: Sequence[str], family: Family = V3_FAMILY) -> Body:
    """A finished job as a fetch call's answer."""
    body = write_success(job, output, family)
    if family.is_later or VendorFacts.of(job).is_check:
        return body
    first = ("status", "id", "output")
    return {name: body[name] for name in first} | body


def write_fetch_processing(job: Job, eta_s: float, family: Family = V3_FAMILY) -> Body:
    """The answer of a fetch call before the job's end; the vendor too sends `output` as `""`."""
    body = {
        "status": "processing",
        "id": job.id,
        "messege": "Request processing",
        "message": "Request processing",
        "output": "",
        "eta": eta_s,
    }
    return in_spelling_of(family, body)


def write_failed(job: Job, family: Family = V3_FAMILY) -> Body:
    """The answer for a job that ended without pictures, or whose pictures have been removed."""
    is_cancelled = job.state is JobState.CANCELLED
    reason = "The job was cancelled" if is_cancelled else "The pictures are no longer there"
    message = f"Failed, Try Again. {job.error or reason}"
    body = {
        "status": "failed",
        "id": job.id,
        "message": message,
        "messege": message,
        "output": "",
    }
    return in_spelling_of(family, body)


def write_webhook(job: Job) -> Body:
    """The webhook body of a job that has ended; pictures are URLs, never base64.

    The vendor's body is the success or the failure answer with `track_id` beside its fields.
    A success stays a success after its pictures were removed, because an earlier attempt may have
    reported it.
    """
    if job.state is JobState.FINISHED:
        base_url = job.request.base_url
        names = job.output_names if job.has_pictures else []
        output = [f"{base_url}/{OUTPUT_FOLDER}/{name}" for name in names]
        return {**write_success(job, output, family_of_job(job)), "track_id": job.track_id}
    failed = write_failed(job)
    return {
        "status": failed["status"],
        "id": job.id,
        "message": failed["message"],
        "track_id": job.track_id,
    }


def in_spelling_of(family: Family, body: Body) -> Body:
    """A body without `messege` where the family does not send that."""
    return {name: value for name, value in body.items() if name != "messege" or family.says_messege}


def write_upload(upload: Upload, *, is_crop_wanted: bool) -> Body:
    """The answer of base64_crop and base64_to_url. `request_id` fits a 32-bit integer."""
    tip = {"tip": "The picture is stored whole: crop is not applied here."}
    return {
        "status": "success",
        "messege": "image uploaded",
        "message": "image uploaded",
        "link": upload.url,
        "output": [upload.url],
        "request_id": int(upload.id[:8], 16) >> 1,
        **(tip if is_crop_wanted else {}),
    }


def write_system_load(waiting: int, wait_s: float) -> Body:
    """The queue's length in jobs and in whole seconds."""
    return {"queue_num": waiting, "queue_time": math.ceil(wait_s), "status": "ok"}

"""The native dialect, writing: jobs, lists, webhook calls and their attempts, and the webhook body.

The pydantic models come first, as OpenAPI shows them; the functions that fill them follow. Errors
are in `problems.py`, server-sent events in `events.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field

from models.imaging.mask_reading import MaskReading
from server.api.dialects.native.replays import Replay
from server.core.notices import Notice
from server.jobs.job import OUTPUT_FOLDER, THUMBNAIL_PATH, Failure, Job, JobState
from server.jobs.outbox import DeliveryState
from server.jobs.receipts import Intake, Model, Receipt
from server.webhooks.deliveries import LISTED_ATTEMPTS, Attempt, DeliveryStatus


class Progress(BaseModel):
    """Denoising steps, over all samples; 0 of 0 before the first."""

    step: int
    total_steps: int


class JobError(BaseModel):
    """Why a job failed. Programs read `code`, people `message`."""

    code: Failure
    message: str


class Picture(BaseModel):
    """Where a picture is."""

    url: str
    thumbnail_url: str = Field(description="WebP of at most 256 pixels a side")


class Output(Picture):
    """A picture. All but URLs and seed are null where the job has no receipt."""

    seed: int
    sha256: str | None = Field(description="SHA-256 of the file, hexadecimal")
    is_flagged: bool | None = Field(
        description="The safety checker's verdict; a flagged one is replaced as `flagged_as` says"
    )
    changed_outside: int | None = Field(
        description="Pixels outside the mask and its blur that differ from the init image"
    )
    largest_difference_outside: int | None = Field(description="By how much, 0 to 255")


class JobSummary(BaseModel):
    """A job in short, as webhooks have it."""

    id: int
    state: JobState
    created_at: datetime
    started_at: datetime | None = Field(description="When the latest attempt began")
    finished_at: datetime | None
    expired_at: datetime | None = Field(description="When its pictures were removed, if they were")
    progress: Progress
    attempts: int = Field(description="How often a worker took it; 3 at most")
    samples: int
    error: JobError | None
    track_id: str | int | float | bool | None


class JobEntry(JobSummary):
    """A job in a list."""

    prompt: str
    outputs: list[Picture] = Field(description="A finished job's pictures, until they are removed")


class Mask(BaseModel):
    """How the mask was read, and the repainted area, the blur's reach included."""

    read_as: MaskReading | None = Field(
        description="Which pixels the mask was taken to mean. `white`: the lighter, the more, as "
        "documented. `nonzero`: 1, where there are no values but 0 and 1. `low_byte`: 8-bit values "
        "in 16 bits. `labels`: all labels of a palette but black. `opaque`: what is drawn on a "
        "transparent canvas. `transparent`: the hole in a picture. null in jobs of older versions"
    )
    coverage: float | None = Field(
        description="Share of the picture, 0 to 1; null before the job has finished"
    )
    box: tuple[int, int, int, int] | None = Field(
        description="Left, top, right, bottom in pixels, the last two excluded; null where nothing "
        "is repainted, and before the job has finished"
    )


class WarningAnswer(BaseModel):
    """What a client should know although the job succeeds. Programs read `code`."""

    code: Notice
    message: str


class Timings(BaseModel):
    """Milliseconds of the stages, in order; null for those not reached or not known.

    Prepare, denoise and decode share the device with other jobs and include waiting for it.
    """

    fetch: float | None = Field(default=None, description="Both images, side by side")
    decode_images: float | None = None
    queued: float | None = Field(default=None, description="Until the latest attempt began")
    prepare: float | None = Field(default=None, description="Input, text and VAE encoders")
    denoise: float | None = None
    decode: float | None = Field(
        default=None, description="VAE decoder, paste-back, safety checker"
    )
    encode: float | None = Field(default=None, description="Picture files and their figures")
    store: float | None = None
    total: float | None = Field(
        default=None, description="From the request until a worker ended it"
    )


class Inputs(BaseModel):
    """SHA-256 of the files as they were received, hexadecimal; null for one that was not sent."""

    init_image_sha256: str | None
    mask_image_sha256: str | None


class ReceiptAnswer(BaseModel):
    """What made the pictures."""

    model: Model
    versions: dict[str, str]
    inputs: Inputs | None


class JobAnswer(JobSummary):
    """A job in full."""

    position: int | None = Field(description="1 is next; null for a job that does not wait")
    eta_s: float | None = Field(
        description="Estimated seconds until it ends; null once it has ended"
    )
    deadline_at: datetime | None = Field(
        description="A job that still waits then fails; null without a deadline"
    )
    timings_ms: Timings
    mask: Mask | None
    warnings: list[WarningAnswer] = Field(
        description="What was not applied, or read in another way than may have been meant"
    )
    outputs: list[Output]
    params: dict[str, Any] = Field(description="As used, with everything that was left open")
    receipt: ReceiptAnswer | None = Field(description="What made a finished job's pictures")
    replay: Replay | None = Field(description="The comparison, for a job that replays another")


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobEntry]
    next_before: int | None = Field(description="The next page's `before`; null on the last page")


class Outcome(StrEnum):
    """The outcome of a webhook call, as far as a client may see it.

    If answers distinguished denied, unknown, closed and silent addresses, clients could map our
    network (SSRF). Durations without an answer are left out for the same reason.
    """

    ANSWERED = "answered"
    NO_ANSWER = "no answer"


class AttemptAnswer(BaseModel):
    """One attempt of a webhook call."""

    attempt: int
    started_at: datetime
    duration_ms: int | None = Field(description="null where there was no answer")
    status: int | None = Field(description="HTTP status; null where there was no answer")
    outcome: Outcome


class DeliveryAnswer(BaseModel):
    """A webhook call and its attempts."""

    webhook_id: str = Field(description="The same on every attempt: header `webhook-id`")
    job_id: int
    url: str
    state: DeliveryState
    is_held: bool = Field(
        description="The receiver's circuit breaker is open, so it is called less often"
    )
    next_attempt_at: datetime | None
    attempts: list[AttemptAnswer] = Field(description=f"The last {LISTED_ATTEMPTS} attempts")
    attempts_total: int = Field(description="Attempts so far, one in progress included")


class DeliveryList(BaseModel):
    """Webhook calls, newest job first."""

    deliveries: list[DeliveryAnswer]
    next_before: int | None = Field(description="The next page's `before`; null on the last page")


class PingAnswer(BaseModel):
    """The answer of a receiver to a ping."""

    webhook_id: str
    is_received: bool = Field(description="The receiver answered 2xx")
    status: int | None = Field(description="HTTP status; null where there was no answer")
    outcome: Outcome
    duration_ms: int | None = Field(description="null where there was no answer")


def moment(seconds: float | None) -> datetime | None:
    """Seconds since the epoch as a time in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def known_moment(seconds: float) -> datetime:
    """Seconds that are never None as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def write_entry(job: Job, base_url: str) -> JobEntry:
    """A job in a list."""
    pictures = write_pictures(job, base_url)
    return JobEntry(**summary_values(job), prompt=job.params.prompt, outputs=pictures)


def write_pictures(job: Job, base_url: str) -> list[Picture]:
    """Where the pictures of a finished job are; none once they have expired."""
    names = job.output_names if job.has_pictures else []
    return [
        Picture(
            url=f"{base_url}/{OUTPUT_FOLDER}/{name}",
            thumbnail_url=f"{base_url}/{THUMBNAIL_PATH}/{name}.webp",
        )
        for name in names
    ]


def summary_values(job: Job) -> dict[str, Any]:
    """The fields of `JobSummary`."""
    return {
        "id": job.id,
        "state": job.state,
        "created_at": known_moment(job.created_at),
        "started_at": moment(job.started_at),
        "finished_at": moment(job.finished_at),
        "expired_at": moment(job.expired_at),
        "progress": Progress(step=job.step, total_steps=job.total_steps),
        "attempts": job.attempt,
        "samples": job.params.samples,
        "error": write_error(job),
        "track_id": job.track_id,
    }


def write_error(job: Job) -> JobError | None:
    """Why a job failed; None for all others."""
    if job.error is None:
        return None
    return JobError(code=Failure.of(job.error), message=job.error)


@dataclass(frozen=True, slots=True)
class JobDetails:
    """What a job's answer needs besides its row.

    receipt: of a finished job. position: None unless it waits. eta_s: None once it has ended.
    replay: None for a job that is no replay.
    """

    receipt: Receipt | None = None
    position: int | None = None
    eta_s: float | None = None
    replay: Replay | None = None


def write_job(job: Job, details: JobDetails, base_url: str) -> JobAnswer:
    """A job in full."""
    intake, receipt = job.request.intake, details.receipt
    return JobAnswer(
        **summary_values(job),
        position=details.position,
        eta_s=details.eta_s,
        deadline_at=moment(job.deadline_at),
        timings_ms=write_timings(job, intake, receipt),
        mask=write_mask(intake, receipt),
        warnings=[
            WarningAnswer(code=notice, message=notice.sentence)
            for notice in job.request.warnings_at(receipt.coverage if receipt else None)
        ],
        outputs=write_outputs(job, receipt, base_url),
        params=job.params.to_json(),
        receipt=write_receipt(receipt, intake) if receipt else None,
        replay=details.replay,
    )


def write_mask(intake: Intake | None, receipt: Receipt | None) -> Mask | None:
    """The facts about the mask that are known so far."""
    if intake is None and receipt is None:
        return None
    return Mask(
        read_as=intake.mask_read_as if intake else None,
        coverage=receipt.coverage if receipt else None,
        box=receipt.box if receipt else None,
    )


def write_receipt(receipt: Receipt, intake: Intake | None) -> ReceiptAnswer:
    """What made the pictures."""
    inputs = None
    if intake is not None:
        inputs = Inputs(
            init_image_sha256=intake.init_image_sha256, mask_image_sha256=intake.mask_image_sha256
        )
    return ReceiptAnswer(model=receipt.model, versions=receipt.versions, inputs=inputs)


def write_outputs(job: Job, receipt: Receipt | None, base_url: str) -> list[Output]:
    """The pictures of a finished job; none once they have expired."""
    places = write_pictures(job, base_url)
    pictures = receipt.pictures if receipt and places else [None] * len(places)
    return [
        Output(
            **place.model_dump(),
            seed=job.params.sample_seed(index),
            sha256=picture.sha256 if picture else None,
            is_flagged=picture.is_flagged if picture else None,
            changed_outside=picture.changed_outside if picture else None,
            largest_difference_outside=picture.largest_difference_outside if picture else None,
        )
        for index, (place, picture) in enumerate(zip(places, pictures, strict=True))
    ]


def write_timings(job: Job, intake: Intake | None, receipt: Receipt | None) -> Timings:
    """The timings of the stages so far."""
    stages: dict[str, float | None] = {}
    intake_ms = 0.0
    if intake is not None:
        stages |= {"fetch": intake.fetch_ms, "decode_images": intake.decode_ms}
        intake_ms = intake.fetch_ms + intake.decode_ms
    if receipt is not None:
        times = receipt.times
        stages |= {
            "prepare": times.prepare_ms,
            "denoise": times.denoise_ms,
            "decode": times.decode_ms,
            "encode": times.encode_ms,
            "store": times.store_ms,
        }
    if job.queued_s is not None:
        stages["queued"] = round(job.queued_s * 1000, 1)
        if job.run_s is not None:
            stages["total"] = round(intake_ms + (job.queued_s + job.run_s) * 1000, 1)
    return Timings(**stages)


def write_webhook(job: Job) -> dict[str, Any]:
    """The webhook body of a job that has ended: its summary and the URLs of its pictures."""
    summary = JobSummary(**summary_values(job)).model_dump(mode="json")
    outputs = [each.url for each in write_pictures(job, job.request.base_url)]
    return {"type": f"job.{job.state}", **summary, "outputs": outputs}


def write_delivery(status: DeliveryStatus, open_hosts: Sequence[str]) -> DeliveryAnswer:
    """A webhook call and its attempts. open_hosts: hosts whose circuit breaker is open."""
    is_pending = status.state is DeliveryState.PENDING
    return DeliveryAnswer(
        webhook_id=status.id,
        job_id=status.job_id,
        url=status.url,
        state=status.state,
        is_held=is_pending and status.host in open_hosts,
        next_attempt_at=moment(status.due_at) if is_pending else None,
        attempts=[write_attempt(number, each) for number, each in status.attempts],
        attempts_total=status.attempts_total,
    )


def write_attempt(number: int, attempt: Attempt) -> AttemptAnswer:
    """One attempt. number: from 1; attempts of a process that died are missing."""
    return AttemptAnswer(
        attempt=number,
        started_at=known_moment(attempt.started_at),
        status=attempt.status,
        outcome=outcome_of(attempt),
        duration_ms=duration_ms_of(attempt),
    )


def write_ping(webhook_id: str, attempt: Attempt) -> PingAnswer:
    """The answer of a receiver to a ping."""
    return PingAnswer(
        webhook_id=webhook_id,
        is_received=attempt.is_success,
        status=attempt.status,
        outcome=outcome_of(attempt),
        duration_ms=duration_ms_of(attempt),
    )


def outcome_of(attempt: Attempt) -> Outcome:
    """Whether the receiver answered."""
    return Outcome.NO_ANSWER if attempt.status is None else Outcome.ANSWERED


def duration_ms_of(attempt: Attempt) -> int | None:
    """Milliseconds until the answer; None without an answer."""
    return None if attempt.status is None else round(attempt.duration_s * 1000)

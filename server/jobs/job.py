"""Types of a job: its states, a submitted job, a job row, its files, and why a job failed.

`store.py` reads the rows and changes the states.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from models.params import CHUNK_TOKENS, MAX_PROMPT_CHUNKS, InpaintParams, OutputFormat
from server.core.notices import Notice
from server.jobs.receipts import Intake

INPUT_FOLDER = "inputs"
"""First part of the storage key of a job's init image and mask."""

OUTPUT_FOLDER = "generations"
"""First part of a picture's storage key, and of its public path."""

THUMBNAIL_PATH = "thumbnails"
"""First part of the public path of a picture's thumbnail, which is made when it is asked for."""

PREVIEW_FOLDER = "previews"
"""First part of a preview's storage key."""

UPLOAD_FOLDER = "uploads"
"""First part of the storage key of a picture that a client uploaded before its job, and of the
picture's public path."""

SUFFIXES = "|".join(re.escape(each.suffix) for each in OutputFormat)

UPLOAD_NAME = rf"[0-9a-f-]{{36}}(?:{SUFFIXES})"
"""Regular expression of the names of uploads."""

STEM = r"[0-9a-f-]{36}-[0-9](?:-[0-9]{1,9})?"

OUTPUT_NAME = rf"{STEM}(?:(?:{SUFFIXES})(?:\.base64)?|\.base64)"
"""Regular expression of the names under which pictures are asked for: those of `output_names_of`,
and those of their base64 texts, see `stored_name_of`."""


THUMBNAIL_NAME = rf"{STEM}(?:{SUFFIXES})\.webp"
"""Regular expression of the names of thumbnails: that of the picture's file, and `.webp`."""


class JobState(StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    """Accepted and durable, waits for a worker."""
    RUNNING = "running"
    """A worker holds the lease."""
    FINISHED = "finished"
    """Its pictures are stored."""
    FAILED = "failed"
    """It ended without pictures; `error` says why."""
    CANCELLED = "cancelled"
    """A client cancelled it."""

    @property
    def is_terminal(self) -> bool:
        """True where no later state can follow."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class QueueShare:
    """A key's share of the queue.

    max_waiting: how many of its jobs may wait at a time; None means the store's limit per key.
    priority: jobs of a higher priority go first.
    """

    max_waiting: int | None = None
    priority: int = 0


USUAL_SHARE = QueueShare()


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a job's row keeps of its request besides the parameters.

    base_url: of the URLs in answers. init_image, mask_image: a URL as it was sent, or the kind and
        size of an inline image. previews: the worker shows the job while it runs.
    intake: how the images came in; None in rows of earlier versions.
    own: facts of the job's dialect alone, JSON values, for which it has a frozen type.
    """

    base_url: str = ""
    init_image: str = ""
    mask_image: str = ""
    previews: bool = False
    warnings: tuple[Notice, ...] = ()
    intake: Intake | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a job row; `from_json` is the way back."""
        return {
            **self.own,
            "base_url": self.base_url,
            "init_image": self.init_image,
            "mask_image": self.mask_image,
            "previews": self.previews,
            "warnings": [*self.warnings],
            "intake": None if self.intake is None else self.intake.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RequestFacts":
        """Reads rows of earlier versions, which lack fields; ignores codes of later versions."""
        codes, intake = values.get("warnings", ()), values.get("intake")
        return cls(
            base_url=values.get("base_url", ""),
            init_image=values.get("init_image", ""),
            mask_image=values.get("mask_image", ""),
            previews=values.get("previews", False),
            warnings=tuple(notice for notice in Notice if notice in codes),
            intake=None if intake is None else Intake.from_json(intake),
            own={name: value for name, value in values.items() if name not in SHARED_FACTS},
        )

    def warnings_at(self, coverage: float | None) -> list[Notice]:
        """The warnings of a finished job, because a mask may also have shrunk to nothing.

        coverage: the share of the picture that was repainted; None for a job that is not finished.
        """
        is_empty = coverage == 0 and Notice.MASK_IS_EMPTY not in self.warnings
        return [*([Notice.MASK_IS_EMPTY] if is_empty else []), *self.warnings]


SHARED_FACTS = {each.name for each in fields(RequestFacts)} - {"own"}


@dataclass(frozen=True, slots=True)
class NewJob:
    """What is submitted.

    key_id: whose job it is. share: of that key.
    file_prefix: uuid4; names the job's files.
    work: size of the job in pixel steps, for estimates of time.
    track_id: any JSON scalar, given back as it came.
    deadline_s: seconds from the submission after which it is not started; None for no limit.
    traceparent: of the span that submits it; None where nothing is traced.
    """

    dialect: str
    request: RequestFacts
    params: InpaintParams
    key_id: str
    file_prefix: str
    work: float
    webhook: str | None = None
    track_id: Any = None
    share: QueueShare = USUAL_SHARE
    deadline_s: float | None = None
    traceparent: str | None = None

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)


@dataclass(frozen=True, slots=True)
class Job:
    """A row, as read.

    priority, turn: its place among waiting jobs, see `fair_queue.py`.
    attempt: how often it was claimed, but for claims that were released.
    fencing_token: number of the latest claim; see `leases.py`.
    step, total_steps: denoising steps done and to do, over all samples; 0 of 0 before it began.
    preview_step: how many were done in the latest preview of the latest attempt; None without one.
    queued_s: seconds from submission to the latest claim, by a clock that both processes share.
    run_s: seconds from claim to end by the worker's steady clock; None where no worker ended it.
    flagged: the safety checker's verdict per picture; None for a job that is not finished.
    expired_at: when the pictures of a finished job were removed; None while they are there.
    deadline_at: no worker starts it from then on, by a clock that all processes share; None for no
        limit.
    traceparent: as in `NewJob`.
    claimed_s: when it was claimed, by the steady clock of the process that did; None in any other.
    """

    id: int
    state: JobState
    key_id: str
    dialect: str
    request: RequestFacts
    params: InpaintParams
    file_prefix: str
    work: float
    webhook: str | None
    track_id: Any
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    worker_id: str | None
    step: int
    total_steps: int
    run_s: float | None
    flagged: list[bool | None] | None = field(repr=False)
    error: str | None
    priority: int = 0
    turn: int = 0
    fencing_token: int = 0
    expired_at: float | None = None
    preview_step: int | None = None
    queued_s: float | None = None
    deadline_at: float | None = None
    traceparent: str | None = None
    claimed_s: float | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Job":
        """A whole row of the table `jobs`, by column name."""
        values = {**row}
        del values["heartbeat_at"], values["submitted_s"]
        values["state"] = JobState(values["state"])
        values["request"] = RequestFacts.from_json(values["request"])
        values["params"] = InpaintParams.from_json(values["params"])
        return cls(**values)

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)

    @property
    def output_names(self) -> list[str]:
        """File names of the pictures, in sample order."""
        params = self.params
        return output_names_of(
            self.file_prefix, params.samples, self.fencing_token, params.output_format
        )

    @property
    def output_keys(self) -> list[str]:
        """Storage keys of the pictures, in sample order."""
        return [f"{OUTPUT_FOLDER}/{name}" for name in self.output_names]

    @property
    def has_pictures(self) -> bool:
        """It is finished, and its pictures have not expired."""
        return self.state is JobState.FINISHED and self.expired_at is None

    @property
    def wants_previews(self) -> bool:
        """Whether the worker stores previews while the job runs."""
        return self.request.previews

    @property
    def preview_key(self) -> str:
        """Storage key of the preview; the file exists only while the job runs."""
        return f"{PREVIEW_FOLDER}/{self.file_prefix}.png"


@dataclass(frozen=True, slots=True)
class Submitted:
    """The result of a submit. is_new: False for the earlier job of its idempotency key."""

    job: Job
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is, in short.

    position: 1 is next; None for one that does not wait. preview_step: as in `Job`.
    """

    state: JobState
    attempt: int
    step: int
    total_steps: int
    position: int | None
    preview_step: int | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's heartbeat for a job whose lease it holds; the numbers are as in `Job`."""

    job: Job
    step: int
    total_steps: int
    preview_step: int | None = None


def input_key_of(file_prefix: str) -> str:
    """Storage key of a job's init image and mask."""
    return f"{INPUT_FOLDER}/{file_prefix}.npy"


def output_names_of(
    file_prefix: str, samples: int, fencing_token: int, output_format: str = OutputFormat.PNG
) -> list[str]:
    """File names of a job's pictures, in sample order.

    output_format: value of an `OutputFormat`.
    Every claim has its own names, because a worker that lost its lease may still write, and must
    not change the files of its successor.
    """
    claim = f"-{fencing_token}" if fencing_token > 1 else ""
    suffix = OutputFormat(output_format).suffix
    return [f"{file_prefix}-{index}{claim}{suffix}" for index in range(samples)]


def output_keys_of(
    file_prefix: str, samples: int, fencing_token: int, output_format: str = OutputFormat.PNG
) -> list[str]:
    """Storage keys of a job's pictures, in sample order; arguments as of `output_names_of`."""
    names = output_names_of(file_prefix, samples, fencing_token, output_format)
    return [f"{OUTPUT_FOLDER}/{name}" for name in names]


def stored_name_of(name: str) -> str:
    """The file name of the picture that is asked for as `name`, which matches `OUTPUT_NAME`.

    The base64 text of `x-0.jpg` is `x-0.jpg.base64`; that of a PNG has a name without ".png" too.
    """
    stored = name.removesuffix(".base64")
    return stored if "." in stored else f"{stored}{OutputFormat.PNG.suffix}"


class Failure(StrEnum):
    """Why a job failed: a code for programs. The job row keeps `sentence`, for people."""

    WORKER_LOST = "worker_lost"
    """Its worker died or hung at every attempt."""
    INPUT_LOST = "input_lost"
    """The stored init image and mask are missing or damaged."""
    INPUT_OF_ANOTHER_VERSION = "input_of_another_version"
    """A later version of the server stored the init image and mask in its own format."""
    MODEL_UNAVAILABLE = "model_unavailable"
    """The model asked for cannot be loaded."""
    NO_SAFETY_CHECKER = "no_safety_checker"
    """The checker is forced, and the model asked for has none."""
    PROMPT_TOO_LONG = "prompt_too_long"
    CLIP_SKIP_TOO_LARGE = "clip_skip_too_large"
    NO_SUCH_NOISE_SPACING = "no_such_noise_spacing"
    """The model's own scheduler does not know the noise spacing asked for."""
    OUT_OF_MEMORY = "out_of_memory"
    UNUSABLE_PICTURE = "unusable_picture"
    NOT_STORED = "not_stored"
    """The file store did not take the pictures."""
    DEADLINE_EXCEEDED = "deadline_exceeded"
    """No worker could start it before its deadline."""
    UNKNOWN = "unknown"

    @property
    def sentence(self) -> str:
        return SENTENCES[self]

    @classmethod
    def of(cls, sentence: str) -> "Failure":
        """The failure with this sentence; `UNKNOWN` for a sentence of another version."""
        codes = {text: code for code, text in SENTENCES.items()}
        return codes.get(sentence, cls.UNKNOWN)


SENTENCES = {
    Failure.WORKER_LOST: "The worker was lost too often while making this picture",
    Failure.INPUT_LOST: "The stored images are gone",
    Failure.INPUT_OF_ANOTHER_VERSION: (
        "The stored images are in the format of another version of this server"
    ),
    Failure.MODEL_UNAVAILABLE: "The model cannot be loaded now",
    Failure.NO_SAFETY_CHECKER: "This model has no safety checker, and pictures must be checked",
    Failure.PROMPT_TOO_LONG: "The prompt or the negative prompt needs more than "
    f"{MAX_PROMPT_CHUNKS} chunks of {CHUNK_TOKENS} tokens",
    Failure.CLIP_SKIP_TOO_LARGE: "This model has fewer text encoder layers than clip_skip skips",
    Failure.NO_SUCH_NOISE_SPACING: (
        "This model's own scheduler does not know the noise spacing; name a scheduler that does"
    ),
    Failure.OUT_OF_MEMORY: "The picture is too large for this server's memory",
    Failure.UNUSABLE_PICTURE: "The model could not make this picture",
    Failure.NOT_STORED: "The pictures could not be stored",
    Failure.DEADLINE_EXCEEDED: "The deadline passed while the job was waiting",
    Failure.UNKNOWN: "Something went wrong while making this picture",
}

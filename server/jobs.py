"""Jobs as the server speaks of them: their states, what a dialect hands in, what a row tells.

No database and no change of state here; that is `job_store.py`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from models.params import InpaintParams

INPUT_FOLDER = "inputs"
"""First part of the storage key of a job's init image and mask."""

OUTPUT_FOLDER = "generations"
"""First part of a picture's storage key, and of its public path."""

PREVIEW_FOLDER = "previews"
"""First part of the storage key of how a running job looks."""

OUTPUT_STEM = r"[0-9a-f-]{36}-[0-9](?:-[0-9]{1,9})?"
"""What `output_names_of` makes, as a regular expression, without the suffix."""


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    """Accepted and durable, waits for a worker."""
    RUNNING = "running"
    """A worker holds the lease."""
    FINISHED = "finished"
    """Its pictures are stored."""
    FAILED = "failed"
    """It ended without pictures; `error` says why."""
    CANCELLED = "cancelled"
    """Somebody took it back."""

    @property
    def is_terminal(self) -> bool:
        """True where no later state can follow."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class QueueShare:
    """What a key may have of the queue.

    max_waiting: its jobs that may wait at a time; None means the store's limit per key.
    priority: jobs of a higher one go first.
    """

    max_waiting: int | None = None
    priority: int = 0


USUAL_SHARE = QueueShare()


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a dialect hands in.

    request: what the dialect needs to write its answers later, JSON values; and `previews`, true
        where the worker is to show the job while it runs.
    key_id: whose job it is. share: what that key may have of the queue.
    file_prefix: uuid4; names the job's files.
    work: size of the job in pixel steps, for estimates of time.
    track_id: any JSON scalar, given back as it came.
    """

    dialect: str
    request: dict[str, Any]
    params: InpaintParams
    key_id: str
    file_prefix: str
    work: float
    webhook: str | None = None
    track_id: Any = None
    share: QueueShare = USUAL_SHARE

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)


@dataclass(frozen=True, slots=True)
class Job:
    """A row, as read.

    priority, turn: its place among waiting jobs, see `turns.py`.
    attempt: how often it was claimed, but for claims that were released.
    claim: number of the latest claim; the fencing token.
    step, total_steps: denoising steps done and to do, over all samples; 0 of 0 before it began.
    preview_step: how many were done in the latest preview of the latest attempt; None without one.
    queued_s: seconds from submission to the latest claim, by a clock that both processes share.
    run_s: seconds from claim to end by the worker's steady clock; None where no worker ended it.
    flagged: the safety checker's verdict per picture; None for a job that is not finished.
    expired_at: when the pictures of a finished job were removed; None while they are there.
    claimed_s: when it was claimed, by the steady clock of the process that did; None in any other.
    """

    id: int
    state: JobState
    key_id: str
    dialect: str
    request: dict[str, Any]
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
    claim: int = 0
    expired_at: float | None = None
    preview_step: int | None = None
    queued_s: float | None = None
    claimed_s: float | None = field(default=None, compare=False, repr=False)

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)

    @property
    def output_names(self) -> list[str]:
        """File names of the pictures, in sample order."""
        return output_names_of(self.file_prefix, self.params.samples, self.claim)

    @property
    def output_keys(self) -> list[str]:
        """Storage keys of the pictures, in sample order."""
        return output_keys_of(self.file_prefix, self.params.samples, self.claim)

    @property
    def has_pictures(self) -> bool:
        """It is finished, and its pictures were not removed since."""
        return self.state is JobState.FINISHED and self.expired_at is None

    @property
    def wants_previews(self) -> bool:
        """Whether the worker is to show the job while it runs."""
        return bool(self.request.get("previews"))

    @property
    def preview_key(self) -> str:
        """Storage key of how the job looks; there is a file while it runs only."""
        return f"{PREVIEW_FOLDER}/{self.file_prefix}.png"


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a `NewJob`. is_new: False for the earlier job of its idempotency key."""

    job: Job
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class Standing:
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
class Beat:
    """What a worker tells of a job it holds; the numbers are as in `Job`."""

    job: Job
    step: int
    total_steps: int
    preview_step: int | None = None


def input_key_of(file_prefix: str) -> str:
    """Storage key of a job's init image and mask."""
    return f"{INPUT_FOLDER}/{file_prefix}.npy"


def output_names_of(file_prefix: str, samples: int, claim: int) -> list[str]:
    """File names of a job's pictures, in sample order.

    Every claim has its own: one that was given up may still write, and must not change what its
    successor has finished.
    """
    suffix = f"-{claim}" if claim > 1 else ""
    return [f"{file_prefix}-{index}{suffix}.png" for index in range(samples)]


def output_keys_of(file_prefix: str, samples: int, claim: int) -> list[str]:
    """Storage keys of a job's pictures, in sample order."""
    return [f"{OUTPUT_FOLDER}/{name}" for name in output_names_of(file_prefix, samples, claim)]

"""`WorkerFigures`: Prometheus metrics of one worker.

A worker has no port. It writes these figures beside its status, and every API process adds them to
its own `/metrics`, with the label `worker`. So the workers of all machines are seen wherever one
scrapes. Labels are sizes, stages, dialects and codes of ours, never a client's text.
"""

import bisect
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict

import torch
from prometheus_client import Counter, Gauge, Histogram, Summary, generate_latest

from models.engine import StepTime
from server.core.metrics import new_registry
from server.jobs.job import Failure, Job
from server.jobs.receipts import Receipt

WAIT_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1_800, 3_600)

STAGE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

ROWS = (1, 2, 4, 8, 16, 32)
"""Upper bounds of the rows of a UNet call."""

SIDES = (256, 384, 512, 640, 768, 1_024, 1_536, 2_048)
"""Upper bounds of sizes: the sides of squares of as many pixels."""

FINISHED = "finished"


class WorkerFigures:
    """The counters of one worker. Safe to use from several threads.

    device: its own; the memory of a GPU is reported once torch uses it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        registry = self._registry = new_registry()
        self._steps = Summary(
            "inpaint_step_seconds",
            "UNet calls: the device's time, by size of the picture and rows of the call",
            ["size", "rows"],
            registry=registry,
        )
        self._rows = Histogram(
            "inpaint_batch_rows", "Rows of UNet calls", buckets=ROWS, registry=registry
        )
        self._waits = Histogram(
            "inpaint_job_wait_seconds",
            "From a job's submission to its first claim",
            buckets=WAIT_BUCKETS_S,
            registry=registry,
        )
        self._stages = Histogram(
            "inpaint_stage_seconds",
            "Stages of finished jobs in the worker",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=registry,
        )
        self._jobs = Counter(
            "inpaint_worker_jobs",
            "Jobs ended, by dialect; outcome is finished, or why one failed",
            ["dialect", "outcome"],
            registry=registry,
        )
        self._pictures = Counter("inpaint_pictures", "Pictures stored", registry=registry)
        self._changed_outside = Counter(
            "inpaint_pixels_changed_outside",
            "Pixels of pictures that differ from the init image outside the mask",
            registry=registry,
        )
        self._memory = Gauge(
            "inpaint_gpu_memory_bytes",
            "Of the GPU: total and free; of this worker: reserved, and in use by tensors",
            ["kind"],
            registry=registry,
        )

    def observe_steps(self, times: Iterable[StepTime]) -> None:
        """Count UNet calls."""
        for time in times:
            size = bound_of(time.pixels, [side * side for side in SIDES], SIDES)
            rows = bound_of(time.rows, ROWS, ROWS)
            self._steps.labels(size, rows).observe(time.seconds)
            self._rows.observe(time.rows)

    def observe_claim(self, job: Job) -> None:
        """Count how long a job has waited. A later claim of it would count its first run too."""
        if job.fencing_token == 1 and job.queued_s is not None:
            self._waits.observe(job.queued_s)

    def count_finished(self, job: Job, receipt: Receipt) -> None:
        """Count a job whose pictures are stored."""
        self._jobs.labels(job.dialect, FINISHED).inc()
        self._pictures.inc(len(receipt.pictures))
        self._changed_outside.inc(sum(each.changed_outside or 0 for each in receipt.pictures))
        for name, length_ms in asdict(receipt.times).items():
            self._stages.labels(name.removesuffix("_ms")).observe(length_ms / 1000)

    def count_failed(self, job: Job, failure: Failure) -> None:
        """Count a job that has ended without pictures."""
        self._jobs.labels(job.dialect, failure).inc()

    def text(self) -> str:
        """All figures in Prometheus' text format."""
        if self._device != "cpu":
            for kind, size in gpu_memory().items():
                self._memory.labels(kind).set(size)
        return generate_latest(self._registry).decode()


def bound_of(value: float, bounds: Sequence[float], names: Sequence[int]) -> str:
    """The name of the first bound that is not below a value; "more" beyond the last."""
    index = bisect.bisect_left(bounds, value)
    return str(names[index]) if index < len(names) else "more"


def gpu_memory() -> dict[str, int]:
    """Bytes by kind; empty for a worker without a GPU, or while its GPU does not answer."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):  # the next call of a model reports a lost device
            free, total = torch.cuda.mem_get_info()
            return {
                "total": total,
                "free": free,
                "reserved": torch.cuda.memory_reserved(),
                "tensors": torch.cuda.memory_allocated(),
            }
    return {}

"""The worker's spans of a job that has ended, below the `accept` span that its row names."""

import time
from dataclasses import asdict

from server.core import tracing
from server.jobs.job import Failure, Job
from server.jobs.receipts import Receipt


def trace_finished(job: Job, receipt: Receipt) -> None:
    """The wait in the queue, and the run with its stages."""
    now = time.time()
    stages_s = {
        name.removesuffix("_ms"): length_ms / 1000
        for name, length_ms in asdict(receipt.times).items()
    }
    left_s = sum(stages_s.values())
    run = trace_run(job, left_s, now)
    for stage, seconds in stages_s.items():
        left_s -= seconds
        tracing.record(stage, seconds, run, ended_at=now - left_s)


def trace_failed(job: Job, failure: Failure) -> None:
    """The wait in the queue, and the run."""
    run_s = 0.0 if job.claimed_s is None else time.monotonic() - job.claimed_s
    trace_run(job, run_s, time.time(), failure)


def trace_run(job: Job, run_s: float, ended_at: float, failure: str = "") -> str | None:
    """The run, and the wait before it; the run's `traceparent`."""
    run = tracing.record(
        "run",
        run_s,
        job.traceparent,
        ended_at=ended_at,
        failure=failure,
        job_id=job.id,
        dialect=job.dialect,
        attempt=job.attempt,
        worker_id=job.worker_id,
        width=job.params.width,
        height=job.params.height,
        samples=job.params.samples,
        steps=job.params.num_inference_steps,
    )
    if job.queued_s is not None:
        # A row of an earlier version names no span: its trace begins with the run.
        parent = job.traceparent or run
        tracing.record("wait", job.queued_s, parent, ended_at=ended_at - run_s, job_id=job.id)
    return run

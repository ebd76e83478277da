"""The native dialect, writing: the server's status. The models come first, as in `writing.py`."""

from datetime import datetime
from importlib.metadata import version

from pydantic import BaseModel, Field

from server.api.dialects.native.writing import JobError, Progress, known_moment
from server.api.monitoring.last_hour import Percentiles, Period
from server.api.monitoring.status import Disk, ServerStatus, WorkerLoad
from server.core.settings import Settings
from server.jobs.job import Failure


class WorkerAnswer(BaseModel):
    """A worker with a recent report, or one that has failed and was not started again since."""

    name: str = Field(description="The end of its id, without the machine's name")
    device: str
    model: str
    state: str = Field(description="`loading`, `ready` or `failed`; the log says why it failed")
    loading: str | None = Field(description="How far it has loaded; null in other states")
    jobs: int = Field(description="Jobs that it runs now")
    progress: Progress = Field(description="Of all these jobs together")


class QueueAnswer(BaseModel):
    """The jobs that have not ended."""

    waiting: int
    running: int
    oldest_s: float | None = Field(description="Seconds since the oldest waiting job was submitted")
    wait_s: float = Field(description="Estimated seconds until a job sent now would start")


class PercentilesAnswer(BaseModel):
    """Seconds that half of the jobs, and 95 % of them, did not exceed."""

    p50: float
    p95: float


class PeriodAnswer(BaseModel):
    """The jobs that ended in a period. Seconds are of finished jobs; null where there are none."""

    starts_at: datetime
    finished: int
    failed: int
    cancelled: int
    latency_s: PercentilesAnswer | None = Field(description="From the submission to the end")
    wait_s: PercentilesAnswer | None = Field(description="Until the latest attempt began")
    run_s: PercentilesAnswer | None = Field(description="Of the latest attempt")


class FailureCount(JobError):
    """How many jobs failed for one reason."""

    count: int


class LastHourAnswer(PeriodAnswer):
    """The last 60 minutes. On a very busy server they cover a shorter time, see `starts_at`."""

    minutes: list[PeriodAnswer] = Field(description="The last one is not over yet")
    failures: list[FailureCount] = Field(description="The most frequent reason first")


class WebhooksAnswer(BaseModel):
    """Webhook calls. Counting stops at 10,000, but for `delivered`."""

    delivered: int = Field(description="Of the jobs that ended within the last hour")
    untried: int = Field(description="Wait for their first attempt")
    retrying: int = Field(description="Failed at least once, and will be tried again")
    dead: int = Field(description="Given up, and not removed yet")


class DiskAnswer(BaseModel):
    """The disk that holds the data folder of the machine that answers."""

    total_bytes: int
    free_bytes: int


class StatusAnswer(BaseModel):
    """The server as its operator sees it."""

    version: str
    at: datetime
    model: str = Field(description="The model of requests that name none")
    models: list[str]
    workers: list[WorkerAnswer]
    queue: QueueAnswer
    last_hour: LastHourAnswer
    webhooks: WebhooksAnswer
    disk: DiskAnswer | None


def write_status(found: ServerStatus, settings: Settings) -> StatusAnswer:
    queue, calls = found.queue, found.webhooks
    return StatusAnswer(
        version=version("inpaint-server"),
        at=known_moment(found.at),
        model=settings.model,
        models=[*settings.offered_models],
        workers=[write_worker(each) for each in found.workers],
        queue=QueueAnswer(
            waiting=queue.waiting,
            running=queue.running,
            oldest_s=None if queue.oldest_s is None else round(queue.oldest_s, 1),
            wait_s=round(queue.wait_s, 1),
        ),
        last_hour=write_last_hour(found),
        webhooks=WebhooksAnswer(
            delivered=found.last_hour.delivered,
            untried=calls.untried,
            retrying=calls.retrying,
            dead=calls.dead,
        ),
        disk=write_disk(found.disk),
    )


def write_worker(load: WorkerLoad) -> WorkerAnswer:
    """A worker. Why it failed is left out, because that names paths and libraries."""
    worker = load.status
    return WorkerAnswer(
        name=worker.name,
        device=worker.device,
        model=worker.model,
        state=worker.state,
        loading=worker.detail if worker.state == "loading" else None,
        jobs=load.jobs,
        progress=Progress(step=load.step, total_steps=load.total_steps),
    )


def write_last_hour(found: ServerStatus) -> LastHourAnswer:
    hour = found.last_hour
    return LastHourAnswer(
        **write_period(hour.whole).model_dump(),
        minutes=[write_period(each) for each in hour.minutes],
        failures=[
            FailureCount(code=Failure(reason), message=Failure(reason).sentence, count=count)
            for reason, count in sorted(hour.failures.items(), key=lambda item: -item[1])
        ],
    )


def write_period(period: Period) -> PeriodAnswer:
    return PeriodAnswer(
        starts_at=known_moment(period.starts_at),
        finished=period.finished,
        failed=period.failed,
        cancelled=period.cancelled,
        latency_s=write_percentiles(period.latency),
        wait_s=write_percentiles(period.wait),
        run_s=write_percentiles(period.run),
    )


def write_percentiles(found: Percentiles | None) -> PercentilesAnswer | None:
    """In milliseconds' precision."""
    if found is None:
        return None
    return PercentilesAnswer(p50=round(found.p50, 3), p95=round(found.p95, 3))


def write_disk(disk: Disk | None) -> DiskAnswer | None:
    return None if disk is None else DiskAnswer(total_bytes=disk.total, free_bytes=disk.free)

"""`JobStore`: jobs as rows, and every change of their state as one guarded statement.

    queued ──claim──> running ──finish──> finished
      ^                 │ ├────fail────> failed
      └──requeue────────┘ └──(third lost attempt)──> failed
    queued or running ──cancel──> cancelled

A claim gives a lease and an attempt number. The attempt number is the fencing token: `beat`,
`finish` and `fail` name it, and have no effect once the job was given to somebody else.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    case,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from models.params import InpaintParams
from server.database import ChangeSignal, jobs, read_only, workers
from server.deliveries import queue_delivery
from server.errors import QueueFull

LEASE_S = 45.0
MAX_ATTEMPTS = 3
WORKER_LOST = "The worker was lost too often while making this picture"
RECENT_JOBS = 20
"""How many of the last finished jobs tell the speed."""

GUESSED_SPEED = 1_000_000.0
"""Pixel steps per second of a worker nothing is known of: about 5 s for 20 steps at 512×512."""

WORKER_SEEN_S = 30.0
"""A worker not heard of for so long is not counted."""

OUTPUT_FOLDER = "generations"
"""First part of a picture's storage key, and of its public path."""


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
class NewJob:
    """What a dialect hands in.

    request: what the dialect needs to write its answers later, JSON values.
    key_id: whose job it is.
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

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)


@dataclass(frozen=True, slots=True)
class Job:
    """A row, as read.

    attempt: how often it was claimed; the fencing token of the present claim.
    step, total_steps: denoising steps done and to do, over all samples; 0 of 0 before it began.
    run_s: seconds from claim to finish.
    flagged: the safety checker's verdict per picture; None for a job that is not finished.
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

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)

    @property
    def output_names(self) -> list[str]:
        """File names of the pictures, in sample order.

        Every attempt has its own: one that was given up may still write, and must not change what
        its successor has finished.
        """
        suffix = f"-{self.attempt}" if self.attempt > 1 else ""
        return [f"{self.file_prefix}-{index}{suffix}.png" for index in range(self.params.samples)]

    @property
    def output_keys(self) -> list[str]:
        """Storage keys of the pictures, in sample order."""
        return [f"{OUTPUT_FOLDER}/{name}" for name in self.output_names]

    @property
    def work_left(self) -> float:
        """Pixel steps still to do."""
        return self.work * (1 - self.step / max(self.total_steps, 1))


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """The queue, as a whole or in front of one job.

    waiting, running: jobs. ahead: their pixel steps not yet done.
    speed: pixel steps per second of all workers together; a guess before the first job has ended.
    """

    waiting: int
    running: int
    ahead: float
    speed: float

    @property
    def wait_s(self) -> float:
        """Seconds until a new job would start."""
        return self.ahead / self.speed

    def eta_s(self, job: Job) -> float:
        """Seconds until a job behind these probably ends."""
        return round((self.ahead + job.work_left) / self.speed, 1)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker last said of itself. state: loading, ready or failed."""

    id: str
    device: str
    model: str
    state: str
    detail: str
    seen_at: float


def input_key_of(file_prefix: str) -> str:
    """Storage key of a job's init image and mask."""
    return f"inputs/{file_prefix}.npy"


class JobStore:
    """All access to job rows. Synchronous; safe to call from several threads and processes.

    clock: seconds since the epoch.
    """

    def __init__(
        self, engine: Engine, *, max_waiting: int = 1_000, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._clock = clock

    def change_signal(self) -> ChangeSignal:
        """For one thread that waits for others' commits."""
        return ChangeSignal(self._engine)

    def submit(self, new: NewJob) -> Job:
        """Make a job durable; when this returns it survives the death of every process.

        Raises: QueueFull.
        """
        with self._engine.begin() as connection:
            if self._count_waiting(connection) >= self._max_waiting:
                raise QueueFull(self._max_waiting)
            row = connection.execute(
                insert(jobs)
                .values(
                    state=JobState.QUEUED,
                    key_id=new.key_id,
                    dialect=new.dialect,
                    request=new.request,
                    params=new.params.to_json(),
                    file_prefix=new.file_prefix,
                    work=new.work,
                    webhook=new.webhook,
                    track_id=new.track_id,
                    created_at=self._clock(),
                )
                .returning(jobs)
            ).one()
        return _to_job(row)

    def refuse_when_full(self) -> None:
        """Before anything is fetched for a job that `submit` would refuse. Raises: QueueFull."""
        with read_only(self._engine) as connection:
            if self._count_waiting(connection) >= self._max_waiting:
                raise QueueFull(self._max_waiting)

    def get(self, job_id: int) -> Job | None:
        """The job, None where there is none."""
        with read_only(self._engine) as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()
        return None if row is None else _to_job(row)

    def ended(self, job_ids: Sequence[int]) -> list[Job]:
        """Those of the jobs that are in a terminal state."""
        terminal = [state for state in JobState if state.is_terminal]
        query = select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.state.in_(terminal))
        with read_only(self._engine) as connection:
            return [_to_job(row) for row in connection.execute(query)]

    def claim(self, worker_id: str, limit: int, *, is_idle: bool = True) -> list[Job]:
        """Take up to `limit` queued jobs, oldest first, each with a new attempt number.

        A job whose worker was lost may be what killed it: it is given out alone, and only to a
        worker without any other, so that it cannot take neighbours down.
        is_idle: whether the worker holds no job.
        """
        now = self._clock()
        oldest = (
            select(jobs.c.id, jobs.c.attempt)
            .where(jobs.c.state == JobState.QUEUED)
            .order_by(jobs.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._engine.begin() as connection:
            chosen = _claimable(connection.execute(oldest).all(), is_idle)
            if not chosen:
                return []
            rows = connection.execute(
                update(jobs)
                .where(jobs.c.id.in_(chosen), jobs.c.state == JobState.QUEUED)
                .values(
                    state=JobState.RUNNING,
                    worker_id=worker_id,
                    lease_until=now + LEASE_S,
                    started_at=now,
                    attempt=jobs.c.attempt + 1,
                )
                .returning(jobs)
            ).all()
        return sorted((_to_job(row) for row in rows), key=lambda job: job.id)

    def release(self, job: Job) -> bool:
        """Running to queued through no fault of the job: the attempt does not count."""
        with self._engine.begin() as connection:
            changed = self._change(
                connection,
                _is_held(job),
                state=JobState.QUEUED,
                attempt=jobs.c.attempt - 1,
                worker_id=None,
                lease_until=None,
                step=0,
                total_steps=0,
            )
        return changed == 1

    def beat(self, job: Job, step: int, total_steps: int) -> bool:
        """Renew the lease and note the progress; False when the job is no longer ours."""
        return not self.beat_all([(job, step, total_steps)])

    def beat_all(self, held: Sequence[tuple[Job, int, int]]) -> list[Job]:
        """`beat` for many, with one commit: job, step, total steps. Gives those no longer ours."""
        lease_until = self._clock() + LEASE_S
        with self._engine.begin() as connection:
            return [
                job
                for job, step, total_steps in held
                if not self._change(
                    connection,
                    _is_held(job),
                    lease_until=lease_until,
                    step=step,
                    total_steps=total_steps,
                )
            ]

    def finish(self, job: Job, flagged: Sequence[bool | None]) -> bool:
        """Running to finished, after the pictures are stored; False when no longer ours."""
        now = self._clock()
        return self._end(
            _is_held(job),
            JobState.FINISHED,
            run_s=now - (job.started_at or now),
            flagged=list(flagged),
            step=jobs.c.total_steps,
        )

    def fail(self, job: Job, error: str) -> bool:
        """Running to failed; error is for the client. False when the job is no longer ours."""
        return self._end(_is_held(job), JobState.FAILED, error=error)

    def cancel(self, job_id: int) -> bool:
        """Queued or running to cancelled; False when it had ended already."""
        is_live = jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING])
        return self._end((jobs.c.id == job_id) & is_live, JobState.CANCELLED)

    def requeue_expired(self) -> int:
        """Give back the jobs whose lease has run out; how many there were."""
        return self._requeue(jobs.c.lease_until < self._clock())

    def requeue_of(self, worker_id: str) -> int:
        """Give back all jobs of a worker known to be dead; how many there were."""
        return self._requeue(jobs.c.worker_id == worker_id)

    def figures(self, before_id: int | None = None) -> QueueFigures:
        """The queue as a whole, or as the job `before_id` sees it in front of itself."""
        is_live = jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING])
        in_front = is_live if before_id is None else is_live & (jobs.c.id < before_id)
        left = jobs.c.work * (
            1 - 1.0 * jobs.c.step / case((jobs.c.total_steps == 0, 1), else_=jobs.c.total_steps)
        )
        with read_only(self._engine) as connection:
            speed = self._speed(connection)
            waiting, running, ahead = connection.execute(
                select(
                    func.count().filter(jobs.c.state == JobState.QUEUED),
                    func.count().filter(jobs.c.state == JobState.RUNNING),
                    func.coalesce(func.sum(left), 0.0),
                ).where(in_front)
            ).one()
        return QueueFigures(waiting, running, ahead, speed)

    def report_worker(self, status: WorkerStatus) -> None:
        """Write a worker's word of itself, in place of its earlier one."""
        values = {each.name: getattr(status, each.name) for each in fields(status)}
        is_sqlite = self._engine.dialect.name == "sqlite"
        upsert = (sqlite_insert if is_sqlite else postgresql_insert)(workers).values(values)
        with self._engine.begin() as connection:
            connection.execute(upsert.on_conflict_do_update(index_elements=["id"], set_=values))

    def forget_worker(self, worker_id: str) -> None:
        """A worker has ended."""
        with self._engine.begin() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker_id))

    def workers_seen(self) -> list[WorkerStatus]:
        """The workers heard of lately."""
        query = select(workers).where(workers.c.seen_at > self._clock() - WORKER_SEEN_S)
        with read_only(self._engine) as connection:
            return [WorkerStatus(**row._mapping) for row in connection.execute(query)]

    def _speed(self, connection: Connection) -> float:
        """Pixel steps per second of the last finished jobs, or a guess before there are any."""
        recent = connection.execute(
            select(jobs.c.work, jobs.c.started_at, jobs.c.finished_at)
            .where(jobs.c.state == JobState.FINISHED)
            .order_by(jobs.c.id.desc())
            .limit(RECENT_JOBS)
        ).all()
        busy_s = covered_s([(row.started_at, row.finished_at) for row in recent])
        if busy_s > 0:
            return float(sum(row.work for row in recent) / busy_s)
        seen = workers.c.seen_at > self._clock() - WORKER_SEEN_S
        count = connection.execute(select(func.count()).where(seen)).scalar_one()
        return GUESSED_SPEED * max(count, 1)

    def _requeue(self, which: ColumnElement[bool]) -> int:
        """Running to queued, or to failed where the attempts are used up."""
        is_last = jobs.c.attempt >= MAX_ATTEMPTS
        with self._engine.begin() as connection:
            return self._change(
                connection,
                (jobs.c.state == JobState.RUNNING) & which,
                state=case((is_last, JobState.FAILED), else_=JobState.QUEUED),
                error=case((is_last, WORKER_LOST), else_=None),
                finished_at=case((is_last, self._clock()), else_=None),
                worker_id=None,
                lease_until=None,
                step=0,
                total_steps=0,
            )

    def _end(self, which: ColumnElement[bool], state: JobState, **values: Any) -> bool:
        """Bring a job to its terminal state; False where there was none to bring."""
        with self._engine.begin() as connection:
            changed = self._change(
                connection,
                which,
                state=state,
                finished_at=self._clock(),
                worker_id=None,
                lease_until=None,
                **values,
            )
        return changed == 1

    def _change(self, connection: Connection, which: ColumnElement[bool], **values: Any) -> int:
        """Change jobs; those that end so get their webhook call in the same transaction."""
        rows = connection.execute(
            update(jobs)
            .where(which)
            .values(values)
            .returning(jobs.c.id, jobs.c.state, jobs.c.webhook)
        ).all()
        for row in rows:
            if row.webhook is not None and JobState(row.state).is_terminal:
                queue_delivery(connection, row.id, row.webhook, self._clock())
        return len(rows)

    @staticmethod
    def _count_waiting(connection: Connection) -> int:
        query: Select[int] = select(func.count()).where(jobs.c.state == JobState.QUEUED)
        return int(connection.execute(query).scalar_one())


def _claimable(queued: Sequence[Row[int, int]], is_idle: bool) -> list[int]:
    """Of queued jobs (id, attempt) in order, those to give out together."""
    if queued and queued[0].attempt > 0:
        return [queued[0].id] if is_idle else []
    return [row.id for row in itertools.takewhile(lambda row: row.attempt == 0, queued)]


def _is_held(job: Job) -> ColumnElement[bool]:
    """The job runs and the caller's claim of it is still the present one."""
    return (
        (jobs.c.id == job.id) & (jobs.c.state == JobState.RUNNING) & (jobs.c.attempt == job.attempt)
    )


def covered_s(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds in at least one of the intervals: jobs run side by side, and pauses do not count."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _to_job(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    del values["lease_until"]
    values["state"] = JobState(values["state"])
    values["params"] = InpaintParams.from_json(values["params"])
    return Job(**values)

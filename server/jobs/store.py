"""`JobStore`: jobs as rows, and every change of their state as one guarded statement.

    queued ──claim──> running ──finish──> finished
      ^                 │ ├────fail────> failed
      └──requeue────────┘ └──(third lost attempt)──> failed
    queued or running ──cancel──> cancelled

A claim gives a lease and a fencing token. `heartbeat`, `finish`, `fail` and `release` name the
token, and have no effect once the job was given to another worker. The token only ever grows,
unlike the count of attempts, of which a released one is taken back.

A lease runs out when its holder has sent no heartbeat for `LEASE_S`, as the process that looks has
seen by its own steady clock (`silence.py`). No time of a row is compared with any clock for that.

Times of rows are the wall clock's and are for people: that clock may jump. Durations come from the
steady clock of the process that measured them, and are stored as such.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Float,
    Row,
    bindparam,
    case,
    func,
    insert,
    select,
    tuple_,
    update,
)

from server.jobs.estimates import Forecast, read_forecast
from server.jobs.fair_queue import IS_WAITING, ORDER
from server.jobs.idempotency import Idempotency
from server.jobs.job import (
    USUAL_SHARE,
    Failure,
    Heartbeat,
    Job,
    JobProgress,
    JobState,
    NewJob,
    QueueShare,
)
from server.jobs.leases import HeartbeatMonitor
from server.jobs.outbox import queue_delivery
from server.jobs.receipts import Receipt
from server.jobs.submissions import QueueLimits, Submissions
from server.jobs.workers import WorkerRegistry
from server.storage.clock import DatabaseClock
from server.storage.database import Topic, check_file, notify, read_only
from server.storage.notify import ChangeSignal
from server.storage.tables import jobs, receipts

LEASE_S = 35.0
"""It takes two looks more until a lost job is queued again: 45 s in all."""

MAX_ATTEMPTS = 3
WORKER_LOST = Failure.WORKER_LOST.sentence
OVER_SHARE_S = 0.25
"""Other workers that have room claim a job sooner than that."""

COUNTED = 1_000
"""Waiting jobs, for a worker's share. With more all workers are full."""

# What every job needs is built once: building costs more than running.
GET = select(jobs).where(jobs.c.id == bindparam("job_id"))
IS_LIVE: ColumnElement[bool] = jobs.c.state.in_(
    [state for state in JobState if not state.is_terminal]
)
LIVE = select(jobs.c.id).where(IS_LIVE)
PROGRESS = (
    select(
        jobs.c.id,
        jobs.c.state,
        jobs.c.attempt,
        jobs.c.step,
        jobs.c.total_steps,
        jobs.c.preview_step,
    )
    .where(IS_LIVE)
    .order_by(*ORDER)
)
WAITING = select(func.count()).select_from(
    select(jobs.c.id).where(IS_WAITING).limit(COUNTED).subquery()
)
HELD_BY_WORKERS = (
    select(jobs.c.worker_id, func.count().label("jobs"))
    .where(jobs.c.state == JobState.RUNNING)
    .group_by(jobs.c.worker_id)
)
FIRST = (
    select(jobs.c.id, jobs.c.attempt, jobs.c.created_at)
    .where(IS_WAITING)
    .order_by(*ORDER)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
QUEUED_S = bindparam("shared_now", type_=Float) - jobs.c.submitted_s
"""Below 0 where the two processes' clocks are a moment apart."""

CLAIM = (
    update(jobs)
    .where(
        jobs.c.id.in_(bindparam("chosen", expanding=True)),
        jobs.c.state == JobState.QUEUED,
    )
    .values(
        state=JobState.RUNNING,
        worker_id=bindparam("claimed_by"),
        heartbeat_at=bindparam("now"),
        started_at=bindparam("now"),
        queued_s=case((QUEUED_S < 0, 0.0), else_=QUEUED_S),
        attempt=jobs.c.attempt + 1,
        fencing_token=jobs.c.fencing_token + 1,
        preview_step=None,
    )
    .returning(jobs)
)

CHANGED = (jobs.c.id, jobs.c.state, jobs.c.key_id, jobs.c.webhook)
"""What `JobStore._run` asks of each job that it changes."""


def is_held(job_id: Any, fencing_token: Any) -> ColumnElement[bool]:
    """The job runs and this claim of it is still the present one."""
    is_claim: ColumnElement[bool] = (jobs.c.id == job_id) & (jobs.c.fencing_token == fencing_token)
    return is_claim & (jobs.c.state == JobState.RUNNING)


HELD = is_held(bindparam("held_id"), bindparam("held_token"))
"""With parameters; `_held` gives them."""

HEARTBEAT = (
    update(jobs)
    .where(HELD)
    .values(
        heartbeat_at=bindparam("now"),
        step=bindparam("done"),
        total_steps=bindparam("in_all"),
        preview_step=bindparam("shown"),
    )
    .returning(*CHANGED)
)
FINISH = (
    update(jobs)
    .where(HELD)
    .values(
        state=JobState.FINISHED,
        finished_at=bindparam("now"),
        worker_id=None,
        heartbeat_at=None,
        run_s=bindparam("took_s"),
        flagged=bindparam("verdicts", type_=jobs.c.flagged.type),
        step=jobs.c.total_steps,
    )
    .returning(*CHANGED)
)
KEEP = insert(receipts)


class JobStore:
    """All access to job rows. Synchronous; safe to call from several threads and processes.

    max_waiting: jobs that may wait at a time; max_waiting_per_key: of one key, unless its share
    says otherwise. clock: seconds since the epoch, for people. steady_clock: monotonic seconds.
    shared_clock: for what another process compares with its own; a `DatabaseClock` if None.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 1_000,
        max_waiting_per_key: int = 100,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
        shared_clock: Callable[[], float] | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._steady_clock = steady_clock
        self._shared_clock = shared_clock or DatabaseClock(engine, clock, steady_clock)
        limits = QueueLimits(max_waiting, max_waiting_per_key)
        self._submissions = Submissions(engine, limits, clock, self._shared_clock)
        self._claims = HeartbeatMonitor[tuple[int, int]](steady_clock)
        self.workers = WorkerRegistry(engine, clock, steady_clock)

    def change_signal(self, *topics: Topic) -> ChangeSignal:
        """For one thread that waits for others' commits. topics: all where none is named."""
        return ChangeSignal(self._engine, topics or tuple(Topic))

    def check_file(self) -> None:
        """As `database.check_file`. Raises: DatabaseFileGone."""
        check_file(self._engine)

    def submit(self, new: NewJob, once: Idempotency | None = None) -> Job:
        """Make a job durable: the row is fsynced when this returns, by a group commit.

        once: where it came with an idempotency key. The job of an earlier request with the same
            key and body is given instead; its file prefix tells.
        Raises: QueueFull, Conflict; sqlalchemy.exc.SQLAlchemyError.
        """
        return self._submissions.submit(new, once)

    def replayed(self, key_id: str, once: Idempotency) -> Job | None:
        """The job that an earlier request with this idempotency key made. Raises: Conflict."""
        return self._submissions.replayed(key_id, once)

    def check_room(self, key_id: str, share: QueueShare = USUAL_SHARE) -> None:
        """Whether `submit` would take a job of a key now. Raises: QueueFull."""
        self._submissions.check_room(key_id, share)

    def get(self, job_id: int) -> Job | None:
        """The job, None where there is none."""
        with read_only(self._engine) as connection:
            row = connection.execute(GET, {"job_id": job_id}).one_or_none()
        return None if row is None else Job.from_row(row._asdict())

    def list_of(
        self, key_id: str, *, state: JobState | None, limit: int, before_id: int | None
    ) -> list[Job]:
        """A key's jobs, newest first. before_id: older ones than this only."""
        query = select(jobs).where(jobs.c.key_id == key_id)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if before_id is not None:
            query = query.where(jobs.c.id < before_id)
        query = query.order_by(jobs.c.id.desc()).limit(limit)
        with read_only(self._engine) as connection:
            return [Job.from_row(row._asdict()) for row in connection.execute(query)]

    def progress_of(self, job_ids: Collection[int]) -> dict[int, JobProgress]:
        """How far those of the jobs are that there are."""
        with read_only(self._engine) as connection:
            live = connection.execute(PROGRESS).all()
            ended = _rows_of(connection, {*job_ids} - {row.id for row in live})
        waiting = (row.id for row in live if row.state == JobState.QUEUED)
        positions = {job_id: place for place, job_id in enumerate(waiting, 1)}
        return {
            row.id: JobProgress(
                JobState(row.state),
                row.attempt,
                row.step,
                row.total_steps,
                positions.get(row.id),
                row.preview_step,
            )
            for row in (*live, *ended)
            if row.id in job_ids
        }

    def receipt_of(self, job_id: int) -> Receipt | None:
        """How a finished job's pictures were made; None for all others."""
        query = select(receipts.c.receipt).where(receipts.c.job_id == job_id)
        with read_only(self._engine) as connection:
            values = connection.execute(query).scalar_one_or_none()
        return None if values is None else Receipt.from_json(values)

    def ended(self, job_ids: Collection[int]) -> list[Job]:
        """Those of the jobs that are in a terminal state."""
        with read_only(self._engine) as connection:
            live = {*connection.scalars(LIVE)}
            return [Job.from_row(row._asdict()) for row in _rows_of(connection, {*job_ids} - live)]

    def claim(self, worker_id: str, limit: int, *, is_idle: bool = True) -> list[Job]:
        """Take up to `limit` queued jobs, first to last, each with a new claim.

        While other workers are ready, no more than a worker's share of all live jobs, so that a
        burst does not go to whoever looks first. Shares are equal, whatever places the workers
        have: a job that has waited for `OVER_SHARE_S` is not left to the others any longer, who are
        full or gone, and goes out alone.

        A job whose worker was lost may be what killed it: it is given out alone, and only to a
        worker without any other, so that it cannot take neighbours down.
        is_idle: whether the worker holds no job.
        """
        with self._engine.begin() as connection:
            count = connection.scalar(WAITING)
            if not count:
                connection.rollback()  # idle workers look often, and a commit costs PostgreSQL more
                return []
            now = self._clock()  # not before: a job may be written while we wait for our turn
            share = min(limit, self._share(connection, worker_id, count))
            waiting = connection.execute(FIRST, {"limit": max(share, 1)}).all()
            if share < 1 and waiting and 0 <= now - waiting[0].created_at < OVER_SHARE_S:
                return []
            chosen = _claimable(waiting, is_idle)
            if not chosen:
                return []
            values = {
                "chosen": chosen,
                "claimed_by": worker_id,
                "now": now,
                "shared_now": self._shared_clock(),
            }
            rows = connection.execute(CLAIM, values).all()
            notify(connection, Topic.PROGRESS)
            if len(chosen) < len(waiting):
                # Other claims have passed over what was locked here.
                notify(connection, Topic.QUEUED)
        claimed_s = self._steady_clock()
        claimed = [replace(Job.from_row(row._asdict()), claimed_s=claimed_s) for row in rows]
        return sorted(claimed, key=lambda job: chosen.index(job.id))

    def _share(self, connection: Connection, worker_id: str, waiting: int) -> int:
        """How many more jobs a worker may take until it has its share. waiting: of the jobs."""
        ready = {each.id for each in self.workers.ready_in(connection)}
        held: dict[str, int] = {
            row.worker_id: row.jobs for row in connection.execute(HELD_BY_WORKERS)
        }
        whole = waiting + sum(held.values())
        return math.ceil(whole / len(ready | {worker_id})) - held.get(worker_id, 0)

    def release(self, job: Job) -> bool:
        """Running to queued through no fault of the job: the attempt does not count."""
        with self._engine.begin() as connection:
            changed = self._change(
                connection,
                is_held(job.id, job.fencing_token),
                state=JobState.QUEUED,
                attempt=jobs.c.attempt - 1,
                worker_id=None,
                heartbeat_at=None,
                step=0,
                total_steps=0,
            )
        return changed == 1

    def heartbeat(self, job: Job, step: int, total_steps: int) -> bool:
        """Renew the lease and note the progress; False when the job is no longer ours."""
        return not self.heartbeat_all([Heartbeat(job, step, total_steps)])

    def heartbeat_all(self, heartbeats: Sequence[Heartbeat]) -> list[Job]:
        """`heartbeat` for many, with one commit. Gives those no longer ours."""
        now = self._clock()
        with self._engine.begin() as connection:
            lost = [
                each.job
                for each in heartbeats
                if not self._run(
                    connection,
                    HEARTBEAT,
                    {
                        **_held(each.job),
                        "now": now,
                        "done": each.step,
                        "in_all": each.total_steps,
                        "shown": each.preview_step,
                    },
                )
            ]
            if len(lost) < len(heartbeats):
                notify(connection, Topic.PROGRESS)
        return lost

    def finish(
        self, job: Job, flagged: Sequence[bool | None], receipt: Receipt | None = None
    ) -> bool:
        """Running to finished, after the pictures are stored; False when no longer ours.

        job: as `claim` of this store gave it.
        """
        now = self._clock()
        with self._engine.begin() as connection:
            values = {"now": now, "took_s": self._run_s(job), "verdicts": [*flagged]}
            is_ours = self._run(connection, FINISH, {**_held(job), **values}) == 1
            if is_ours and receipt is not None:
                connection.execute(KEEP, {"job_id": job.id, "receipt": receipt.to_json()})
        return is_ours

    def fail(self, job: Job, error: str) -> bool:
        """Running to failed; error is for the client. False when the job is no longer ours."""
        which = is_held(job.id, job.fencing_token)
        return self._end(which, JobState.FAILED, error=error, run_s=self._run_s(job))

    def cancel(self, job_id: int) -> bool:
        """Queued or running to cancelled; False when it had ended already."""
        return self._end((jobs.c.id == job_id) & IS_LIVE, JobState.CANCELLED)

    def requeue_expired(self) -> int:
        """Give back the jobs whose lease has run out; how many there were.

        To be called every `silence.LOOK_S`: what was not seen to be silent has not run out.
        """
        heartbeats = select(jobs.c.id, jobs.c.fencing_token, jobs.c.heartbeat_at)
        with read_only(self._engine) as connection:
            rows = connection.execute(heartbeats.where(jobs.c.state == JobState.RUNNING)).all()
        silent_s = self._claims.look(
            {(row.id, row.fencing_token): row.heartbeat_at for row in rows}
        )
        lost = [tuple(row) for row in rows if silent_s[row.id, row.fencing_token] > LEASE_S]
        # One that has beaten since the look is spared.
        return self._requeue(tuple_(*heartbeats.selected_columns).in_(lost)) if lost else 0

    def requeue_of(self, worker_id: str) -> int:
        """Give back all jobs of a worker known to be dead; how many there were."""
        return self._requeue(jobs.c.worker_id == worker_id)

    def forecast(self, places_on: Callable[[str], int]) -> Forecast:
        """When all jobs will end. places_on: jobs side by side in a worker, by its device."""
        with read_only(self._engine) as connection:
            ready = self.workers.ready_in(connection)
            devices = [each.device for each in ready]
            return read_forecast(connection, devices, places_on, self._clock())

    def _run_s(self, job: Job) -> float | None:
        return None if job.claimed_s is None else max(0.0, self._steady_clock() - job.claimed_s)

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
                heartbeat_at=None,
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
                heartbeat_at=None,
                **values,
            )
        return changed == 1

    def _change(self, connection: Connection, which: ColumnElement[bool], **values: Any) -> int:
        """`_run` for a change that is not made all the time."""
        return self._run(connection, update(jobs).where(which).values(values).returning(*CHANGED))

    def _run(
        self, connection: Connection, change: Executable, values: Mapping[str, Any] | None = None
    ) -> int:
        """Change jobs; those that end so get their webhook call in the same transaction.

        change: gives back `CHANGED` of each. The result is how many there were.
        """
        rows = connection.execute(change, values).all()
        states = {JobState(row.state) for row in rows}
        if JobState.QUEUED in states:
            notify(connection, Topic.QUEUED)
        if any(state.is_terminal for state in states):
            notify(connection, Topic.ENDED)
        for row in rows:
            if row.webhook is not None and JobState(row.state).is_terminal:
                queue_delivery(connection, row.id, row.key_id, row.webhook, self._shared_clock())
        return len(rows)


def _rows_of(connection: Connection, job_ids: Iterable[int]) -> list[Row[*tuple[Any, ...]]]:
    """The rows of those of the jobs that there are.

    One by one, because drivers keep a statement for each length of a list of ids.
    """
    found = (connection.execute(GET, {"job_id": each}).one_or_none() for each in sorted(job_ids))
    return [row for row in found if row is not None]


def _claimable(queued: Sequence[Row[int, int, float]], is_idle: bool) -> list[int]:
    """Of queued jobs (id, attempt) in order, those to give out together."""
    if queued and queued[0].attempt > 0:
        return [queued[0].id] if is_idle else []
    return [row.id for row in itertools.takewhile(lambda row: row.attempt == 0, queued)]


def _held(job: Job) -> dict[str, int]:
    """The parameters of `HELD`."""
    return {"held_id": job.id, "held_token": job.fencing_token}

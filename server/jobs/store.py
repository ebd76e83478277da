"""`JobStore`: jobs as rows, and every change of their state as one guarded statement.

    queued ──claim──> running ──finish──> finished
      ^                 │ ├────fail────> failed
      └──requeue────────┘ └──(third lost attempt)──> failed
    queued or running ──cancel──> cancelled

A claim gives a lease and a fencing token (`leases.py`). `heartbeat`, `finish`, `fail` and `release`
name the token, and have no effect once another worker has claimed the job. The token only grows,
while `release` takes back an attempt.

Times in rows come from the wall clock, which may jump, and are for people. Durations come from the
steady clock of the process that measured them.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Row,
    bindparam,
    case,
    func,
    insert,
    select,
    tuple_,
    update,
)

from server.core.settings.sections import QueueSettings
from server.jobs.estimates import Candidate, Forecast, read_forecast
from server.jobs.fair_queue import IS_OVERDUE, ORDER, next_position
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
    input_key_of,
)
from server.jobs.leases import (
    CHANGED,
    CLAIM,
    COUNT_HELD,
    COUNT_WAITING,
    FINISH,
    FIRST_WAITING,
    HEARTBEAT,
    LEASE_S,
    LOCK_NEXT,
    RUNNING,
    HeartbeatMonitor,
    held,
    is_held,
)
from server.jobs.outbox import queue_delivery
from server.jobs.receipts import Receipt
from server.jobs.submissions import QueueLimits, Submissions
from server.jobs.workers import WorkerRegistry
from server.storage.clock import DatabaseClock
from server.storage.database import Topic, check_file, notify, read_only
from server.storage.notify import ChangeSignal
from server.storage.tables import jobs, receipts

MAX_ATTEMPTS = 3
QUEUE = QueueSettings()
"""The limits of a store that is given none: most only claim or read."""
WORKER_LOST = Failure.WORKER_LOST.sentence

GET = select(jobs).where(jobs.c.id == bindparam("job_id"))
IS_LIVE: ColumnElement[bool] = jobs.c.state.in_(
    [state for state in JobState if not state.is_terminal]
)
LIVE_IDS = select(jobs.c.id).where(IS_LIVE)
LIVE_PROGRESS = (
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
INSERT_RECEIPT = insert(receipts)
ANY_OVERDUE = select(jobs.c.id).where(IS_OVERDUE).limit(1)

DEMAND = (
    select(jobs.c.state, func.count().label("jobs"), func.min(jobs.c.submitted_s).label("first_s"))
    .where(IS_LIVE)
    .group_by(jobs.c.state)
)


@dataclass(frozen=True, slots=True)
class Demand:
    """How many jobs wait and run.

    oldest_wait_s: since the oldest waiting job was submitted; None where none waits.
    """

    queued: int
    running: int
    oldest_wait_s: float | None


class JobStore:
    """Every change of a job's state; `retention` removes rows.

    Synchronous; safe to call from several threads and processes.

    max_waiting: jobs that may wait at a time. max_waiting_per_key: the same for each key whose
    `QueueShare` sets no limit. clock: seconds since the epoch, for people.
    steady_clock: monotonic seconds. shared_clock: for times that other processes compare; a
    `DatabaseClock` if None.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = QUEUE.max_waiting,
        max_waiting_per_key: int = QUEUE.max_waiting_per_key,
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
        self._leases = HeartbeatMonitor[tuple[int, int]](steady_clock)
        self.workers = WorkerRegistry(engine, clock, steady_clock)

    def change_signal(self, topic: Topic) -> ChangeSignal:
        """A change signal for one thread."""
        return ChangeSignal(self._engine, topic)

    def check_file(self) -> None:
        """As `database.check_file`. Raises: DatabaseFileGone."""
        check_file(self._engine)

    def submit(self, new: NewJob, once: Idempotency | None = None) -> Job:
        """Make a job durable: the row is fsynced when this returns, by a group commit.

        once: the request's idempotency key, if it has one. The result is the job of an earlier
            request with the same key and body, if there is one. Such a job has another file prefix.
        Raises: QueueFull, Conflict; sqlalchemy.exc.SQLAlchemyError.
        """
        return self._submissions.submit(new, once)

    def replayed(self, key_id: str, once: Idempotency) -> Job | None:
        """The job of an earlier request with this idempotency key. Raises: Conflict."""
        return self._submissions.replayed(key_id, once)

    def check_room(self, key_id: str, share: QueueShare = USUAL_SHARE) -> None:
        """Back-pressure: raise QueueFull if `submit` would refuse a job of this key now."""
        self._submissions.check_room(key_id, share)

    def get(self, job_id: int) -> Job | None:
        """The job, None for an unknown id."""
        with read_only(self._engine) as connection:
            row = connection.execute(GET, {"job_id": job_id}).one_or_none()
        return None if row is None else Job.from_row(row._asdict())

    def list_of(
        self,
        key_id: str,
        *,
        state: JobState | None = None,
        limit: int,
        before_id: int | None = None,
        after_id: int | None = None,
    ) -> list[Job]:
        """A key's jobs, newest first.

        before_id: only jobs older than this one. after_id: only jobs newer than this one; the
        limit leaves the oldest of them.
        """
        query = select(jobs).where(jobs.c.key_id == key_id)
        if state is not None:
            query = query.where(jobs.c.state == state)
        if before_id is not None:
            query = query.where(jobs.c.id < before_id)
        if after_id is not None:
            query = query.where(jobs.c.id > after_id)
        order = jobs.c.id.desc() if after_id is None else jobs.c.id.asc()
        with read_only(self._engine) as connection:
            rows = connection.execute(query.order_by(order).limit(limit))
            found = [Job.from_row(row._asdict()) for row in rows]
        return sorted(found, key=lambda job: job.id, reverse=True)

    def progress_of(self, job_ids: Collection[int]) -> dict[int, JobProgress]:
        """The progress of each job that exists."""
        with read_only(self._engine) as connection:
            live = connection.execute(LIVE_PROGRESS).all()
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
        """The receipt of a finished job; None for all others."""
        query = select(receipts.c.receipt).where(receipts.c.job_id == job_id)
        with read_only(self._engine) as connection:
            values = connection.execute(query).scalar_one_or_none()
        return None if values is None else Receipt.from_json(values)

    def ended(self, job_ids: Collection[int]) -> list[Job]:
        """The jobs among these that are in a terminal state."""
        with read_only(self._engine) as connection:
            live = {*connection.scalars(LIVE_IDS)}
            return [Job.from_row(row._asdict()) for row in _rows_of(connection, {*job_ids} - live)]

    def claim(self, worker_id: str, limit: int, *, is_idle: bool = True) -> list[Job]:
        """Claim up to `limit` queued jobs in queue order, each with a lease and a fencing token.

        While other workers are ready, a worker gets at most its share of all live jobs, so that
        the first worker to poll does not take a whole burst. Shares are equal, although workers
        may have different capacities. After `FAIR_SHARE_S` the other workers are taken to be full
        or dead, and a worker above its share claims one job.

        A poison job may kill its worker. A job whose worker was lost is therefore claimed alone,
        and only by an idle worker, so that it cannot take other jobs down.
        is_idle: the worker holds no job.

        A job whose deadline has passed is never claimed; `fail_overdue` ends it.
        """
        with self._engine.begin() as connection:
            count = connection.scalar(COUNT_WAITING)
            if not count:
                connection.rollback()  # idle workers poll often, and a commit costs PostgreSQL more
                return []
            # After BEGIN, because a job may be written while this call waits for the lock.
            now = self._clock()
            shared_now = self._shared_clock()
            share = self._share(connection, worker_id, count)
            # Without a lock, because concurrent claims skip locked rows and would find nothing.
            first = connection.execute(FIRST_WAITING, {"shared_now": shared_now}).one_or_none()
            if first is None or _is_for_others(first, share, is_idle):
                return []
            lock = {"limit": min(limit, max(share, 1)), "shared_now": shared_now}
            locked = connection.execute(LOCK_NEXT, lock).all()
            chosen = _claimable(locked, is_idle)
            if len(chosen) < len(locked):
                # Concurrent claims have skipped the rows that were locked here and stay queued.
                notify(connection, Topic.QUEUED)
            if not chosen:
                return []
            values = {
                "chosen": chosen,
                "claimed_by": worker_id,
                "now": now,
                "shared_now": shared_now,
            }
            rows = connection.execute(CLAIM, values).all()
        claimed_s = self._steady_clock()
        claimed = [replace(Job.from_row(row._asdict()), claimed_s=claimed_s) for row in rows]
        return sorted(claimed, key=lambda job: chosen.index(job.id))

    def _share(self, connection: Connection, worker_id: str, waiting: int) -> int:
        """How many more jobs a worker may claim within its share. waiting: jobs in the queue."""
        ready = {each.id for each in self.workers.ready_in(connection)}
        counts: dict[str, int] = {row.worker_id: row.jobs for row in connection.execute(COUNT_HELD)}
        live = waiting + sum(counts.values())
        return math.ceil(live / len(ready | {worker_id})) - counts.get(worker_id, 0)

    def release(self, job: Job) -> bool:
        """Running to queued; the attempt does not count. False when the lease is lost."""
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
        """Renew the lease and record the progress; False when the lease is lost."""
        return not self.heartbeat_all([Heartbeat(job, step, total_steps)])

    def heartbeat_all(self, heartbeats: Sequence[Heartbeat]) -> list[Job]:
        """`heartbeat` for many jobs in one commit; returns the jobs whose lease is lost."""
        now = self._clock()
        with self._engine.begin() as connection:
            return [
                each.job
                for each in heartbeats
                if not self._run(
                    connection,
                    HEARTBEAT,
                    {
                        **held(each.job),
                        "now": now,
                        "done": each.step,
                        "in_all": each.total_steps,
                        "shown": each.preview_step,
                    },
                )
            ]

    def finish(
        self, job: Job, flagged: Sequence[bool | None], receipt: Receipt | None = None
    ) -> bool:
        """Running to finished, after the pictures are stored; False when the lease is lost.

        job: as returned by `claim` of this store.
        """
        now = self._clock()
        with self._engine.begin() as connection:
            values = {"now": now, "took_s": self._run_s(job), "verdicts": [*flagged]}
            is_changed = self._run(connection, FINISH, {**held(job), **values}) == 1
            if is_changed and receipt is not None:
                connection.execute(INSERT_RECEIPT, {"job_id": job.id, "receipt": receipt.to_json()})
        return is_changed

    def fail(self, job: Job, error: str) -> bool:
        """Running to failed; False when the lease is lost. error: a sentence for the client."""
        which = is_held(job.id, job.fencing_token)
        return self._end(which, JobState.FAILED, error=error, run_s=self._run_s(job))

    def cancel(self, job_id: int) -> bool:
        """Queued or running to cancelled; False when it had ended already."""
        return self._end((jobs.c.id == job_id) & IS_LIVE, JobState.CANCELLED)

    def requeue_expired(self) -> int:
        """Queue the jobs with an expired lease again; how many there were.

        Call it every `leases.CHECK_INTERVAL_S`, because only observed silence counts.
        """
        with read_only(self._engine) as connection:
            rows = connection.execute(RUNNING).all()
        silent_s = self._leases.silent_s(
            {(row.id, row.fencing_token): row.heartbeat_at for row in rows}
        )
        lost = [tuple(row) for row in rows if silent_s[row.id, row.fencing_token] > LEASE_S]
        # The heartbeat is compared too, so that a job with a newer one keeps its lease.
        return self._requeue(tuple_(*RUNNING.selected_columns).in_(lost)) if lost else 0

    def requeue_of(self, worker_id: str) -> int:
        """Queue all jobs of a dead worker again; how many there were."""
        return self._requeue(jobs.c.worker_id == worker_id)

    def fail_overdue(self) -> list[str]:
        """Fail the waiting jobs whose deadline has passed; the storage keys of their inputs."""
        now = {"shared_now": self._shared_clock()}
        with read_only(self._engine) as connection:
            if connection.scalar(ANY_OVERDUE, now) is None:
                return []
        failing = (
            update(jobs)
            .where(IS_OVERDUE)
            .values(
                state=JobState.FAILED,
                error=Failure.DEADLINE_EXCEEDED.sentence,
                finished_at=self._clock(),
            )
        )
        with self._engine.begin() as connection:
            rows = self._changed_rows(connection, failing.returning(*CHANGED), now)
        return [input_key_of(row.file_prefix) for row in rows]

    def forecast(self, places_on: Callable[[str], int], new: NewJob | None = None) -> Forecast:
        """When all jobs will end. places_on: how many jobs a worker runs at a time, by device.

        new: a job that the forecast has as if it were submitted now.
        """
        with read_only(self._engine) as connection:
            ready = self.workers.ready_in(connection)
            devices = [each.device for each in ready]
            candidate = None if new is None else _candidate_of(connection, new)
            return read_forecast(connection, devices, places_on, self._clock(), candidate)

    def demand(self) -> Demand:
        """The jobs that workers are needed for."""
        with read_only(self._engine) as connection:
            found = {row.state: row for row in connection.execute(DEMAND)}
        jobs_in = {state: row.jobs for state, row in found.items()}
        first_s = found[JobState.QUEUED].first_s if JobState.QUEUED in found else None
        return Demand(
            queued=jobs_in.get(JobState.QUEUED, 0),
            running=jobs_in.get(JobState.RUNNING, 0),
            # Below 0 where the clocks of two processes differ a little.
            oldest_wait_s=None if first_s is None else max(0.0, self._shared_clock() - first_s),
        )

    def _run_s(self, job: Job) -> float | None:
        return None if job.claimed_s is None else max(0.0, self._steady_clock() - job.claimed_s)

    def _requeue(self, which: ColumnElement[bool]) -> int:
        """Running to queued, or to failed after the last attempt."""
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
        """Change a job to a terminal state; False when no job matches."""
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
        """`_run` for a statement that is rare enough to build each time."""
        return self._run(connection, update(jobs).where(which).values(values).returning(*CHANGED))

    def _run(
        self, connection: Connection, change: Executable, values: Mapping[str, Any] | None = None
    ) -> int:
        """Change jobs as `_changed_rows` does; the number of changed jobs."""
        return len(self._changed_rows(connection, change, values))

    def _changed_rows(
        self, connection: Connection, change: Executable, values: Mapping[str, Any] | None = None
    ) -> Sequence[Row[*tuple[Any, ...]]]:
        """Change jobs. Jobs that end get their outbox row in the same transaction.

        change: a statement that returns `CHANGED`.
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
        return rows


def _rows_of(connection: Connection, job_ids: Iterable[int]) -> list[Row[*tuple[Any, ...]]]:
    """The rows of the jobs that exist.

    One query per id, because drivers cache a statement for each length of a list of ids.
    """
    found = (connection.execute(GET, {"job_id": each}).one_or_none() for each in sorted(job_ids))
    return [row for row in found if row is not None]


def _candidate_of(connection: Connection, new: NewJob) -> Candidate:
    """A job that may be submitted, with the place that it would get in the queue."""
    params, priority = new.params, new.share.priority
    turn = next_position(connection, new.key_id, priority).turn
    return Candidate(params.samples * params.width * params.height, new.work, priority, turn)


def _is_for_others(first: Row[int, bool], share: int, is_idle: bool) -> bool:
    """Whether this worker must leave the next job to other workers."""
    return (first.is_reserved and share < 1) or (first.attempt > 0 and not is_idle)


def _claimable(queued: Sequence[Row[int, int]], is_idle: bool) -> list[int]:
    """Ids of the jobs that may be claimed together. queued: in queue order."""
    if queued and queued[0].attempt > 0:
        return [queued[0].id] if is_idle else []
    return [row.id for row in itertools.takewhile(lambda row: row.attempt == 0, queued)]

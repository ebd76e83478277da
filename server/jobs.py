"""`JobStore`: jobs as rows, and every change of their state as one guarded statement.

    queued ──claim──> running ──finish──> finished
      ^                 │ ├────fail────> failed
      └──requeue────────┘ └──(third lost attempt)──> failed
    queued or running ──cancel──> cancelled

A claim gives a lease and an attempt number. The attempt number is the fencing token: `beat`,
`finish` and `fail` name it, and have no effect once the job was given to somebody else.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
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
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from models.params import InpaintParams
from server.commits import GroupCommit
from server.database import ChangeSignal, jobs, read_only, receipts, workers
from server.deliveries import queue_delivery
from server.errors import QueueFull, StorageUnavailable
from server.failures import Failure
from server.idempotency import Idempotency, find, reserve
from server.receipts import Receipt
from server.turns import IS_WAITING, ORDER, Arrival, Place, goes_before, look_at

LEASE_S = 45.0
MAX_ATTEMPTS = 3
WORKER_LOST = Failure.WORKER_LOST.sentence
RECENT_JOBS = 20
"""How many of the last finished jobs tell the speed."""

GUESSED_SPEED = 1_000_000.0
"""Pixel steps per second of a worker nothing is known of: about 5 s for 20 steps at 512×512."""

WORKER_SEEN_S = 30.0
"""A worker not heard of for so long is not counted."""

SUBMIT_LOCK = 0x1_4E_9A_15
"""An advisory lock's number: any, but the same for all processes of this server."""

INPUT_FOLDER = "inputs"
"""First part of the storage key of a job's init image and mask."""

OUTPUT_FOLDER = "generations"
"""First part of a picture's storage key, and of its public path."""

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


# What every job needs is built once: building costs more than running.
INSERT = insert(jobs).returning(jobs)
GET = select(jobs).where(jobs.c.id == bindparam("job_id"))
ENDED = select(jobs).where(
    jobs.c.id.in_(bindparam("job_ids", expanding=True)),
    jobs.c.state.in_([state for state in JobState if state.is_terminal]),
)
FIRST = (
    select(jobs.c.id, jobs.c.attempt)
    .where(IS_WAITING)
    .order_by(*ORDER)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
CLAIM = (
    update(jobs)
    .where(
        jobs.c.id.in_(bindparam("chosen", expanding=True)),
        jobs.c.state == JobState.QUEUED,
    )
    .values(
        state=JobState.RUNNING,
        worker_id=bindparam("claimed_by"),
        lease_until=bindparam("leased_until"),
        started_at=bindparam("now"),
        attempt=jobs.c.attempt + 1,
    )
    .returning(jobs)
)

CHANGED = (jobs.c.id, jobs.c.state, jobs.c.webhook)
"""What `JobStore._run` asks of each job that it changes."""


def is_held(job_id: Any, attempt: Any) -> ColumnElement[bool]:
    """The job runs and this claim of it is still the present one."""
    is_claim: ColumnElement[bool] = (jobs.c.id == job_id) & (jobs.c.attempt == attempt)
    return is_claim & (jobs.c.state == JobState.RUNNING)


HELD = is_held(bindparam("held_id"), bindparam("held_attempt"))
"""With parameters; `_held` gives them."""

BEAT = (
    update(jobs)
    .where(HELD)
    .values(
        lease_until=bindparam("until"),
        step=bindparam("done"),
        total_steps=bindparam("in_all"),
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
        lease_until=None,
        run_s=bindparam("took_s"),
        flagged=bindparam("verdicts", type_=jobs.c.flagged.type),
        step=jobs.c.total_steps,
    )
    .returning(*CHANGED)
)
KEEP = insert(receipts)


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a dialect hands in.

    request: what the dialect needs to write its answers later, JSON values.
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
    share: QueueShare = QueueShare()

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)


@dataclass(frozen=True, slots=True)
class Job:
    """A row, as read.

    priority, turn: its place among waiting jobs, see `turns.py`.
    attempt: how often it was claimed; the fencing token of the present claim.
    step, total_steps: denoising steps done and to do, over all samples; 0 of 0 before it began.
    run_s: seconds from claim to finish.
    flagged: the safety checker's verdict per picture; None for a job that is not finished.
    expired_at: when the pictures of a finished job were removed; None while they are there.
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
    expired_at: float | None = None

    @property
    def input_key(self) -> str:
        """Storage key of the init image and mask."""
        return input_key_of(self.file_prefix)

    @property
    def output_names(self) -> list[str]:
        """File names of the pictures, in sample order."""
        return output_names_of(self.file_prefix, self.params.samples, self.attempt)

    @property
    def output_keys(self) -> list[str]:
        """Storage keys of the pictures, in sample order."""
        return output_keys_of(self.file_prefix, self.params.samples, self.attempt)

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
class Standing:
    """How far a job is, in short. position: 1 is next; None for one that does not wait."""

    state: JobState
    attempt: int
    step: int
    total_steps: int
    position: int | None


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
    return f"{INPUT_FOLDER}/{file_prefix}.npy"


def output_names_of(file_prefix: str, samples: int, attempt: int) -> list[str]:
    """File names of a job's pictures, in sample order.

    Every attempt has its own: one that was given up may still write, and must not change what its
    successor has finished.
    """
    suffix = f"-{attempt}" if attempt > 1 else ""
    return [f"{file_prefix}-{index}{suffix}.png" for index in range(samples)]


def output_keys_of(file_prefix: str, samples: int, attempt: int) -> list[str]:
    """Storage keys of a job's pictures, in sample order."""
    return [f"{OUTPUT_FOLDER}/{name}" for name in output_names_of(file_prefix, samples, attempt)]


class JobStore:
    """All access to job rows. Synchronous; safe to call from several threads and processes.

    max_waiting: jobs that may wait at a time; max_waiting_per_key: of one key, unless its share
    says otherwise. clock: seconds since the epoch.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 1_000,
        max_waiting_per_key: int = 100,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._max_waiting_per_key = max_waiting_per_key
        self._clock = clock
        self._commits = GroupCommit(engine)

    def change_signal(self) -> ChangeSignal:
        """For one thread that waits for others' commits."""
        return ChangeSignal(self._engine)

    def submit(self, new: NewJob, once: Idempotency | None = None) -> Job:
        """Make a job durable; when this returns it survives the death of every process.

        once: where it came with an idempotency key. The job of an earlier request with the same
            key and body is given instead; its file prefix tells.
        Raises: QueueFull, Conflict, StorageUnavailable.
        """
        return self._commits.run(functools.partial(self._insert, new, once))

    def _insert(self, new: NewJob, once: Idempotency | None, connection: Connection) -> Job:
        if once is not None and (row := self._find_replayed(connection, new.key_id, once)):
            return _to_job(row)
        self._lock_queue(connection)
        arrival = look_at(connection, new.key_id, new.share.priority)
        self._refuse_when_full_at(arrival, new.share)
        if once is not None and not reserve(
            connection, new.key_id, once, new.file_prefix, self._clock()
        ):
            # On PostgreSQL another request may have taken the key since the look above.
            row = self._find_replayed(connection, new.key_id, once)
            if row is None:
                raise StorageUnavailable  # and its job is gone again already
            return _to_job(row)
        values = {
            "state": JobState.QUEUED,
            "key_id": new.key_id,
            "dialect": new.dialect,
            "request": new.request,
            "params": new.params.to_json(),
            "file_prefix": new.file_prefix,
            "work": new.work,
            "priority": new.share.priority,
            "turn": arrival.turn,
            "webhook": new.webhook,
            "track_id": new.track_id,
            "created_at": self._clock(),
        }
        return _to_job(connection.execute(INSERT, values).one())

    def replayed(self, key_id: str, once: Idempotency) -> Job | None:
        """The job that an earlier request with this idempotency key made. Raises: Conflict."""
        with read_only(self._engine) as connection:
            row = self._find_replayed(connection, key_id, once)
        return None if row is None else _to_job(row)

    def refuse_when_full(self, key_id: str, share: QueueShare = QueueShare()) -> None:
        """Before anything is fetched for a job that `submit` would refuse. Raises: QueueFull."""
        with read_only(self._engine) as connection:
            self._refuse_when_full_at(look_at(connection, key_id, share.priority), share)

    def _refuse_when_full_at(self, arrival: Arrival, share: QueueShare) -> None:
        if arrival.waiting >= self._max_waiting:
            raise QueueFull(self._max_waiting)
        limit = self._max_waiting_per_key if share.max_waiting is None else share.max_waiting
        if arrival.waiting_of_key >= limit:
            raise QueueFull(limit)

    def get(self, job_id: int) -> Job | None:
        """The job, None where there is none."""
        with read_only(self._engine) as connection:
            row = connection.execute(GET, {"job_id": job_id}).one_or_none()
        return None if row is None else _to_job(row)

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
            return [_to_job(row) for row in connection.execute(query)]

    def standings(self, job_ids: Sequence[int]) -> dict[int, Standing]:
        """How far those of the jobs are that there are, in one look."""
        columns = (jobs.c.id, jobs.c.state, jobs.c.attempt, jobs.c.step, jobs.c.total_steps)
        queue = select(jobs.c.id).where(IS_WAITING).order_by(*ORDER)
        with read_only(self._engine) as connection:
            rows = connection.execute(select(*columns).where(jobs.c.id.in_(job_ids))).all()
            is_queued = any(row.state == JobState.QUEUED for row in rows)
            waiting = connection.scalars(queue).all() if is_queued else []
        positions = {job_id: place for place, job_id in enumerate(waiting, 1)}
        return {
            row.id: Standing(
                JobState(row.state), row.attempt, row.step, row.total_steps, positions.get(row.id)
            )
            for row in rows
        }

    def receipt_of(self, job_id: int) -> Receipt | None:
        """How a finished job's pictures were made; None for all others."""
        query = select(receipts.c.receipt).where(receipts.c.job_id == job_id)
        with read_only(self._engine) as connection:
            values = connection.execute(query).scalar_one_or_none()
        return None if values is None else Receipt.from_json(values)

    def ended(self, job_ids: Sequence[int]) -> list[Job]:
        """Those of the jobs that are in a terminal state."""
        with read_only(self._engine) as connection:
            found = connection.execute(ENDED, {"job_ids": job_ids})
            return [_to_job(row) for row in found]

    def claim(self, worker_id: str, limit: int, *, is_idle: bool = True) -> list[Job]:
        """Take up to `limit` queued jobs, first to last, each with a new attempt number.

        A job whose worker was lost may be what killed it: it is given out alone, and only to a
        worker without any other, so that it cannot take neighbours down.
        is_idle: whether the worker holds no job.
        """
        now = self._clock()
        with self._engine.begin() as connection:
            waiting = connection.execute(FIRST, {"limit": limit}).all()
            chosen = _claimable(waiting, is_idle)
            if not chosen:
                return []
            values = {
                "chosen": chosen,
                "claimed_by": worker_id,
                "leased_until": now + LEASE_S,
                "now": now,
            }
            rows = connection.execute(CLAIM, values).all()
        return sorted((_to_job(row) for row in rows), key=lambda job: chosen.index(job.id))

    def release(self, job: Job) -> bool:
        """Running to queued through no fault of the job: the attempt does not count."""
        with self._engine.begin() as connection:
            changed = self._change(
                connection,
                is_held(job.id, job.attempt),
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
                if not self._run(
                    connection,
                    BEAT,
                    {**_held(job), "until": lease_until, "done": step, "in_all": total_steps},
                )
            ]

    def finish(
        self, job: Job, flagged: Sequence[bool | None], receipt: Receipt | None = None
    ) -> bool:
        """Running to finished, after the pictures are stored; False when no longer ours."""
        now = self._clock()
        with self._engine.begin() as connection:
            values = {"now": now, "took_s": now - (job.started_at or now), "verdicts": [*flagged]}
            is_ours = self._run(connection, FINISH, {**_held(job), **values}) == 1
            if is_ours and receipt is not None:
                connection.execute(KEEP, {"job_id": job.id, "receipt": receipt.to_json()})
        return is_ours

    def fail(self, job: Job, error: str) -> bool:
        """Running to failed; error is for the client. False when the job is no longer ours."""
        return self._end(is_held(job.id, job.attempt), JobState.FAILED, error=error)

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

    def position(self, job_id: int) -> int | None:
        """How many waiting jobs go before this one; None for a job that does not wait."""
        with read_only(self._engine) as connection:
            place = self._place(connection, job_id)
            if place is None:
                return None
            query = select(func.count()).where(IS_WAITING, goes_before(place))
            return int(connection.execute(query).scalar_one())

    def figures(self, before_id: int | None = None) -> QueueFigures:
        """The queue as a whole, or as the job `before_id` sees it in front of itself.

        A job that comes later may yet go before it, when it is the turn of its key.
        """
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
                ).where(self._in_front(connection, before_id))
            ).one()
        return QueueFigures(waiting, running, ahead, speed)

    def _in_front(self, connection: Connection, before_id: int | None) -> ColumnElement[bool]:
        is_running = jobs.c.state == JobState.RUNNING
        if before_id is None:
            return is_running | IS_WAITING
        place = self._place(connection, before_id)
        if place is None:  # it runs itself, beside those that began before it
            return is_running & (jobs.c.id < before_id)
        return is_running | IS_WAITING & goes_before(place)

    @staticmethod
    def _place(connection: Connection, job_id: int) -> Place | None:
        """Where a waiting job stands, None for any other."""
        query = select(jobs.c.priority, jobs.c.turn, jobs.c.id)
        row = connection.execute(query.where(jobs.c.id == job_id, IS_WAITING)).one_or_none()
        return None if row is None else Place(*row)

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

    def worker(self, worker_id: str) -> WorkerStatus | None:
        """A worker's last word, however old; None before its first."""
        query = select(workers).where(workers.c.id == worker_id)
        with read_only(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else WorkerStatus(**row._mapping)

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

    def _find_replayed(
        self, connection: Connection, key_id: str, once: Idempotency
    ) -> Row[Any] | None:
        """Raises: Conflict."""
        file_prefix = find(connection, key_id, once, self._clock())
        if file_prefix is None:
            return None
        return connection.execute(select(jobs).where(jobs.c.file_prefix == file_prefix)).one()

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
        for row in rows:
            if row.webhook is not None and JobState(row.state).is_terminal:
                queue_delivery(connection, row.id, row.webhook, self._clock())
        return len(rows)

    @staticmethod
    def _lock_queue(connection: Connection) -> None:
        """Nobody else submits until the transaction's end: what was counted stays true."""
        if connection.dialect.name != "sqlite":  # there every write transaction is alone
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SUBMIT_LOCK})")


def _claimable(queued: Sequence[Row[int, int]], is_idle: bool) -> list[int]:
    """Of queued jobs (id, attempt) in order, those to give out together."""
    if queued and queued[0].attempt > 0:
        return [queued[0].id] if is_idle else []
    return [row.id for row in itertools.takewhile(lambda row: row.attempt == 0, queued)]


def _held(job: Job) -> dict[str, int]:
    """The parameters of `HELD`."""
    return {"held_id": job.id, "held_attempt": job.attempt}


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

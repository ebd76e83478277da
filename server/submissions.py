"""`Submissions`: how jobs come into the queue, many with one statement and one commit.

Each is counted against the limits as if it came alone, behind those that came with it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select

from server.commits import GroupCommit
from server.database import Topic, jobs, notify, read_only
from server.errors import ApiError, QueueFull
from server.idempotency import Idempotency, find, reserve
from server.job_rows import to_job
from server.jobs import Job, JobState, NewJob, QueueShare, Submitted
from server.turns import Arrival, Line

SUBMIT_LOCK = 0x1_4E_9A_15
"""An advisory lock's number: any, but the same for all processes of this server."""

INSERT = insert(jobs).returning(jobs.c.id, sort_by_parameter_order=True)

Submission = tuple[NewJob, Idempotency | None]
Taken = tuple[NewJob, Arrival]


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Jobs that may wait at a time: in all, and of a key whose share says nothing else."""

    max_waiting: int = 1_000
    max_waiting_per_key: int = 100

    def room_at(self, arrival: Arrival, share: QueueShare) -> int:
        """How many more jobs of a key there is room for, at least one. Raises: QueueFull."""
        if arrival.waiting >= self.max_waiting:
            raise QueueFull(self.max_waiting)
        of_key = self.max_waiting_per_key if share.max_waiting is None else share.max_waiting
        if arrival.waiting_of_key >= of_key:
            raise QueueFull(of_key)
        return min(self.max_waiting - arrival.waiting, of_key - arrival.waiting_of_key)


class Submissions:
    """Of one process. clock: seconds since the epoch. shared_clock: `SharedClock`."""

    def __init__(
        self,
        engine: Engine,
        limits: QueueLimits,
        clock: Callable[[], float],
        shared_clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._shared_clock = shared_clock
        self._commits = GroupCommit(engine, self._insert_all, "submit")

    def begin(self, new: NewJob, once: Idempotency | None) -> Future[Submitted]:
        """As `JobStore.begin_submit`."""
        return self._commits.begin((new, once))

    def room_for(self, key_id: str, share: QueueShare) -> int:
        """As `JobStore.room_for`."""
        owner = key_id, share.priority
        with read_only(self._engine) as connection:
            return self._limits.room_at(Line(connection, [owner]).look(*owner), share)

    def replayed(self, key_id: str, once: Idempotency) -> Job | None:
        """As `JobStore.replayed`."""
        with read_only(self._engine) as connection:
            row = self._find_replayed(connection, key_id, once)
        return None if row is None else to_job(row)

    def _insert_all(
        self, connection: Connection, group: Sequence[Submission]
    ) -> list[Submitted | ApiError]:
        if connection.dialect.name != "sqlite":  # there every write transaction is alone
            # What is counted stays true until the transaction's end.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SUBMIT_LOCK})")
        outcomes: list[Submitted | ApiError] = []
        for is_plain, some in itertools.groupby(group, lambda submission: submission[1] is None):
            if is_plain:
                outcomes += self._insert_together(connection, [new for new, _ in some])
            else:  # one by one, as two of them may have the same key
                outcomes += [self._insert_once(connection, *each) for each in with_keys(some)]
        return outcomes

    def _insert_once(
        self, connection: Connection, new: NewJob, once: Idempotency
    ) -> Submitted | ApiError:
        try:
            earlier = self._find_replayed(connection, new.key_id, once)
        except ApiError as error:
            return error
        if earlier is not None:
            return Submitted(to_job(earlier), is_new=False)
        (outcome,) = self._insert_together(connection, [new])
        if isinstance(outcome, Submitted):
            reserve(connection, new.key_id, once, new.file_prefix, self._shared_clock())
        return outcome

    def _insert_together(
        self, connection: Connection, group: Sequence[NewJob]
    ) -> list[Submitted | ApiError]:
        line = Line(connection, {owner_of(new): None for new in group})
        judged = [self._judge(line, new) for new in group]
        taken = [each for each in judged if not isinstance(each, ApiError)]
        values = [self._values_of(*each) for each in taken]
        ids = connection.scalars(INSERT, values).all() if values else []
        if ids:
            notify(connection, Topic.QUEUED)
        made = iter(
            [
                Submitted(job_of(new, arrival, job_id, row["created_at"]))
                for (new, arrival), job_id, row in zip(taken, ids, values, strict=True)
            ]
        )
        return [each if isinstance(each, ApiError) else next(made) for each in judged]

    def _judge(self, line: Line, new: NewJob) -> Taken | ApiError:
        try:
            self._limits.room_at(line.look(*owner_of(new)), new.share)
        except QueueFull as error:
            return error
        return new, line.join(*owner_of(new))

    def _values_of(self, new: NewJob, arrival: Arrival) -> dict[str, Any]:
        return {
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
            "submitted_s": self._shared_clock(),
        }

    def _find_replayed(
        self, connection: Connection, key_id: str, once: Idempotency
    ) -> Row[Any] | None:
        """Raises: Conflict."""
        file_prefix = find(connection, key_id, once, self._shared_clock())
        if file_prefix is None:
            return None
        return connection.execute(select(jobs).where(jobs.c.file_prefix == file_prefix)).one()


def with_keys(some: Iterable[Submission]) -> Iterator[tuple[NewJob, Idempotency]]:
    """Those that came with an idempotency key."""
    return ((new, once) for new, once in some if once is not None)


def owner_of(new: NewJob) -> tuple[str, int]:
    """Whose turn it will be: key and priority."""
    return new.key_id, new.share.priority


def job_of(new: NewJob, arrival: Arrival, job_id: int, created_at: float) -> Job:
    """The row that was written, as it would be read."""
    return Job(
        id=job_id,
        state=JobState.QUEUED,
        key_id=new.key_id,
        dialect=new.dialect,
        request=new.request,
        params=new.params,
        file_prefix=new.file_prefix,
        work=new.work,
        webhook=new.webhook,
        track_id=new.track_id,
        created_at=created_at,
        started_at=None,
        finished_at=None,
        attempt=0,
        worker_id=None,
        step=0,
        total_steps=0,
        run_s=None,
        flagged=None,
        error=None,
        priority=new.share.priority,
        turn=arrival.turn,
    )

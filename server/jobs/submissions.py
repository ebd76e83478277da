"""`Submissions`: writes new jobs, within the queue's limits and once per idempotency key."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select

from server.core.errors import QueueFull
from server.jobs.fair_queue import QueuePosition, count_waiting, next_position
from server.jobs.idempotency import Idempotency, find, reserve
from server.jobs.job import Job, JobState, NewJob, QueueShare
from server.storage.database import Topic, notify, read_only
from server.storage.group_commit import GroupCommit
from server.storage.tables import jobs

SUBMIT_LOCK = 0x1_4E_9A_15
"""Number of an advisory lock: arbitrary, but the same for all processes of this server."""

INSERT = insert(jobs).returning(jobs)

Submission = tuple[NewJob, Idempotency | None]


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Jobs that may wait at a time: in all, and of a key whose `QueueShare` sets no limit."""

    max_waiting: int
    max_waiting_per_key: int

    def check(self, waiting: int, waiting_of_key: int, share: QueueShare) -> None:
        """Back-pressure: a full queue takes no more. Raises: QueueFull."""
        if waiting >= self.max_waiting:
            raise QueueFull(self.max_waiting)
        of_key = self.max_waiting_per_key if share.max_waiting is None else share.max_waiting
        if waiting_of_key >= of_key:
            raise QueueFull(of_key)


class Submissions:
    """Submits for one process. clock: seconds since the epoch. shared_clock: `DatabaseClock`."""

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
        self._commits = GroupCommit(engine, self._write)

    def submit(self, new: NewJob, once: Idempotency | None) -> Job:
        """As `JobStore.submit`."""
        return self._commits.run((new, once))

    def check_room(self, key_id: str, share: QueueShare) -> None:
        """As `JobStore.check_room`."""
        with read_only(self._engine) as connection:
            self._limits.check(*count_waiting(connection, key_id), share)

    def replayed(self, key_id: str, once: Idempotency) -> Job | None:
        """As `JobStore.replayed`."""
        with read_only(self._engine) as connection:
            row = self._find_replayed(connection, key_id, once)
        return None if row is None else Job.from_row(row._asdict())

    def _write(self, connection: Connection, submission: Submission) -> Job:
        new, once = submission
        if connection.dialect.name != "sqlite":  # SQLite runs one write transaction at a time
            # With the lock, the counts stay true until the transaction's end.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({SUBMIT_LOCK})")
        if once is not None:
            earlier = self._find_replayed(connection, new.key_id, once)
            if earlier is not None:
                return Job.from_row(earlier._asdict())
        position = next_position(connection, new.key_id, new.share.priority)
        self._limits.check(position.waiting, position.waiting_of_key, new.share)
        if once is not None:
            reserve(connection, new.key_id, once, new.file_prefix, self._shared_clock())
        row = connection.execute(INSERT, self._values_of(new, position)).one()
        notify(connection, Topic.QUEUED)
        return Job.from_row(row._asdict())

    def _values_of(self, new: NewJob, position: QueuePosition) -> dict[str, Any]:
        now = self._shared_clock()
        return {
            "state": JobState.QUEUED,
            "key_id": new.key_id,
            "dialect": new.dialect,
            "request": new.request.to_json(),
            "params": new.params.to_json(),
            "file_prefix": new.file_prefix,
            "work": new.work,
            "priority": new.share.priority,
            "turn": position.turn,
            "webhook": new.webhook,
            "track_id": new.track_id,
            "created_at": self._clock(),
            "submitted_s": now,
            "deadline_at": None if new.deadline_s is None else now + new.deadline_s,
            "traceparent": new.traceparent,
        }

    def _find_replayed(
        self, connection: Connection, key_id: str, once: Idempotency
    ) -> Row[Any] | None:
        """Raises: Conflict."""
        file_prefix = find(connection, key_id, once, self._shared_clock())
        if file_prefix is None:
            return None
        return connection.execute(select(jobs).where(jobs.c.file_prefix == file_prefix)).one()

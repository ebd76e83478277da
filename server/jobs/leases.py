"""Leases on running jobs: claim, heartbeat, fencing token, and when a lease expires.

A claim gives a worker a lease and the job's next fencing token. Every later statement of the worker
names that token, and has no effect once a newer claim exists. The worker renews the lease by a
heartbeat, and a lease without heartbeats for `LEASE_S` expires.

A heartbeat is a time that the worker writes into a row. Other processes never compare it with a
clock, because clocks of machines differ and may jump by days. They compare it with the heartbeat
before: `HeartbeatMonitor` counts, by the observer's own steady clock, for how long it has not
changed. `JobStore` runs the statements below.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, bindparam, case, func, select, update

from server.jobs.fair_queue import IS_WAITING, ORDER, SHARED_NOW
from server.jobs.job import Job, JobState
from server.storage.tables import jobs

K = TypeVar("K")

LEASE_S = 35.0
"""A lease expires after so long without a new heartbeat. Checks every 5 s add up to 10 s, so a lost
job is queued again within 45 s."""

CHECK_INTERVAL_S = 5.0
"""Between two checks of the heartbeats."""

MAX_GAP_S = 2 * CHECK_INTERVAL_S
"""A longer time between two checks counts as so much. The database may have been unreachable, or
the machine suspended. No worker could write a heartbeat then, and all would seem dead."""

CHANGED = (jobs.c.id, jobs.c.state, jobs.c.key_id, jobs.c.webhook, jobs.c.file_prefix)
"""What every statement that changes jobs returns, for notifications and the outbox."""

# Statements that every job needs are built once, because building one costs more than running it.

# Claim: choose waiting jobs, then give each a lease and a fencing token.

MAX_COUNTED = 1_000
"""Waiting jobs counted for a worker's share. With more, all workers are full anyway."""

COUNT_WAITING = select(func.count()).select_from(
    select(jobs.c.id).where(IS_WAITING).limit(MAX_COUNTED).subquery()
)
COUNT_HELD = (
    select(jobs.c.worker_id, func.count().label("jobs"))
    .where(jobs.c.state == JobState.RUNNING)
    .group_by(jobs.c.worker_id)
)
MAY_START: ColumnElement[bool] = jobs.c.deadline_at.is_(None) | (jobs.c.deadline_at > SHARED_NOW)
"""The job has no deadline, or its deadline has not passed."""

QUEUED_S = SHARED_NOW - jobs.c.submitted_s
"""Below 0 where the clocks of the two processes differ a little."""

FAIR_SHARE_S = 0.25
"""How long a waiting job is reserved for workers below their share. Those claim it sooner."""

MAY_BE_CLAIMED = IS_WAITING & MAY_START
FIRST_WAITING = (
    select(jobs.c.attempt, (func.abs(QUEUED_S) < FAIR_SHARE_S).label("is_reserved"))
    .where(MAY_BE_CLAIMED)
    .order_by(*ORDER)
    .limit(1)
)
LOCK_NEXT = (
    select(jobs.c.id, jobs.c.attempt)
    .where(MAY_BE_CLAIMED)
    .order_by(*ORDER)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
CLAIM = (
    update(jobs)
    .where(
        jobs.c.id.in_(bindparam("chosen", expanding=True)),
        jobs.c.state == JobState.QUEUED,
        MAY_START,
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

# Changes by the holder of the lease, each guarded by the fencing token.


def is_held(job_id: Any, fencing_token: Any) -> ColumnElement[bool]:
    """The job runs, and this fencing token is its latest."""
    is_claim: ColumnElement[bool] = (jobs.c.id == job_id) & (jobs.c.fencing_token == fencing_token)
    return is_claim & (jobs.c.state == JobState.RUNNING)


HELD = is_held(bindparam("held_id"), bindparam("held_token"))


def held(job: Job) -> dict[str, int]:
    """The parameters of `HELD`."""
    return {"held_id": job.id, "held_token": job.fencing_token}


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

# Expiry: heartbeats of all running jobs, for a `HeartbeatMonitor`.

RUNNING = select(jobs.c.id, jobs.c.fencing_token, jobs.c.heartbeat_at).where(
    jobs.c.state == JobState.RUNNING
)


class HeartbeatMonitor(Generic[K]):
    """For how long heartbeats have not changed. Safe for several threads. clock: steady seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._checked_at = clock()
        self._last: dict[K, tuple[float, float]] = {}

    def silent_s(
        self,
        heartbeats: Mapping[K, float],
        initial_s: Callable[[float], float] = lambda heartbeat: 0.0,
    ) -> dict[K, float]:
        """Seconds since each heartbeat changed, as far as this process has observed.

        heartbeats: the latest one of every sender. A sender that is missing is removed.
        initial_s: by a heartbeat, the seconds to start with for a sender that is new.
        """
        with self._lock:
            now = self._clock()
            gap_s = min(now - self._checked_at, MAX_GAP_S)
            self._checked_at = now
            current = {}
            for sender, heartbeat in heartbeats.items():
                last, silent_s = self._last.get(sender, (None, 0.0))
                if last is None:
                    current[sender] = (heartbeat, initial_s(heartbeat))
                else:
                    current[sender] = (heartbeat, silent_s + gap_s if heartbeat == last else 0.0)
            self._last = current
            return {sender: silent_s for sender, (_, silent_s) in current.items()}

"""`DeliveryStore`: webhook calls as rows of the outbox, claimed by lease like jobs.

    pending ──2xx──> delivered
      │ └──failure──> pending, due at the next time of the schedule
      └──410, or the schedule is used up──> dead

`jobs/outbox` writes the row in the transaction that ends the job. A claim is a lease: it moves the
due time past the longest possible call. So two senders never make the same call at once, and
another sender makes a call whose sender has died.

Due times are compared with a `DatabaseClock`. First tries are always due. A due time beyond the
longest delay means that a clock has jumped: the call is due now.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    Row,
    Select,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    true,
    update,
)

from server.core.errors import Conflict, ConflictKind
from server.jobs.outbox import AT_ONCE, JITTER, MAX_AGE_S, RETRY_DELAYS_S, DeliveryState, key_of
from server.storage.clock import DatabaseClock
from server.storage.database import read_only
from server.storage.tables import deliveries, delivery_attempts, jobs

MAX_RETRY_AFTER_S = 86_400.0

LONGEST_DELAY_S = max(RETRY_DELAYS_S[-1] * (1 + JITTER), MAX_RETRY_AFTER_S)

LISTED_ATTEMPTS = 20
"""Limit of the tries in a `DeliveryStatus`; the last ones are listed."""

KEPT_ATTEMPTS = 100
"""Limit of a call's rows of tries, because clients may redeliver a call again and again."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A claimed webhook call.

    id: the same on every try, so that receivers recognise repeats. attempt: number of this try,
    from 1. host: key and host for the limit of calls and the circuit breaker, see `host_of`.
    """

    id: str
    job_id: int
    url: str
    host: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """The result of a try.

    status: HTTP status, None without a response. outcome: in a word or two, for operators.
    retry_after_s: from the response.
    """

    started_at: float
    duration_s: float
    status: int | None
    outcome: str
    retry_after_s: float | None = None

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_host_failure(self) -> bool:
        """Whether the try counts for the circuit breaker: the host fails or limits its rate."""
        return self.status is None or self.status >= 500 or self.status == 429

    @property
    def is_final(self) -> bool:
        """Whether later tries are useless, because the receiver answered 410 Gone."""
        return self.status == 410


@dataclass(frozen=True, slots=True)
class DeliveryStatus:
    """A webhook call as an owner or operator sees it.

    due_at: time of the next try of a pending call. attempts: the last tries, each with its number,
    in order. attempts_total: tries begun, including those whose sender died before recording them.
    """

    id: str
    job_id: int
    url: str
    host: str
    state: DeliveryState
    due_at: float
    attempts: tuple[tuple[int, Attempt], ...]
    attempts_total: int


class DeliveryStore:
    """All access to delivery rows. Synchronous; safe to call from several threads and processes.

    lease_s: longer than any call takes. clock: seconds since the epoch; a `DatabaseClock` if None.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        lease_s: float = 60.0,
        clock: Callable[[], float] | None = None,
        jitter: random.Random | None = None,
    ) -> None:
        self._engine = engine
        self._lease_s = lease_s
        self._clock = clock or DatabaseClock(engine)
        self._jitter = jitter or random.Random()

    def claim_due(
        self,
        limit: int,
        skipped_hosts: Sequence[str] = (),
        per_host: int = 4,
        under_way: Mapping[str, int] | None = None,
    ) -> list[Delivery]:
        """Claim up to `limit` due calls. Keys take turns; each key's oldest jobs go first.

        The key with the fewest calls under way has the next turn, so that one whose hosts hold
        every call for long leaves the places that get free to others. Skipped hosts get none, and
        every other host as many as bring its calls to `per_host`.
        under_way: the sender's present calls by host.
        """
        is_wanted = deliveries.c.host.not_in(skipped_hosts)
        return self._claim(is_wanted, limit, per_host, under_way or {})

    def claim_probes(self, hosts: Sequence[str]) -> list[Delivery]:
        """Claim one due call for each of these hosts."""
        return self._claim(deliveries.c.host.in_(hosts), len(hosts), 1, {})

    def mark_old_dead(self, host: str) -> int:
        """Mark a host's pending calls above the age limit as dead; returns their number."""
        with self._engine.begin() as connection:
            changed = connection.execute(
                update(deliveries)
                .where(
                    deliveries.c.host == host,
                    deliveries.c.state == DeliveryState.PENDING,
                    deliveries.c.created_at < self._clock() - MAX_AGE_S,
                )
                .values(state=DeliveryState.DEAD)
            )
        return changed.rowcount

    def redeliver(self, job_id: int) -> None:
        """Make a job's call due now, under the same id.

        A dead or delivered call gets one more try, and a pending call its next try now. A call that
        a sender is making at this moment is left alone. The age of the call does not change.
        Raises: Conflict where the job has no call, or its pictures have been removed. The body of a
        repeated call must be the same, and it could not name the pictures any more.
        """
        now = self._clock()
        is_recorded = exists().where(
            delivery_attempts.c.delivery_id == deliveries.c.id,
            delivery_attempts.c.attempt == deliveries.c.attempt,
        )
        is_under_way = (
            (deliveries.c.state == DeliveryState.PENDING)
            & (deliveries.c.attempt > 0)
            & (deliveries.c.due_at > now)
            & ~is_recorded
        )
        with self._engine.begin() as connection:
            expired_at = connection.scalar(select(jobs.c.expired_at).where(jobs.c.id == job_id))
            if expired_at is not None:
                raise Conflict(ConflictKind.PICTURES_EXPIRED)
            changed = connection.execute(
                update(deliveries)
                .where(deliveries.c.job_id == job_id)
                .values(
                    state=DeliveryState.PENDING,
                    due_at=case((is_under_way, deliveries.c.due_at), else_=AT_ONCE),
                )
            )
            if not changed.rowcount:
                raise Conflict(ConflictKind.NO_DELIVERY)

    def of_job(self, job_id: int) -> list[DeliveryStatus]:
        """A job's webhook calls: one at most, and none before the job has ended."""
        return self._statuses(deliveries.c.job_id == job_id, limit=1)

    def list_of(
        self,
        key_id: str | None,
        *,
        state: DeliveryState | None,
        limit: int,
        before_job_id: int | None = None,
    ) -> list[DeliveryStatus]:
        """The calls of a key's jobs, or of all jobs where it is None; newest job first."""
        which: ColumnElement[bool] = true()
        if key_id is not None:
            which &= deliveries.c.job_id.in_(select(jobs.c.id).where(jobs.c.key_id == key_id))
        if state is not None:
            which &= deliveries.c.state == state
        if before_job_id is not None:
            which &= deliveries.c.job_id < before_job_id
        return self._statuses(which, limit)

    def _statuses(self, which: ColumnElement[bool], limit: int) -> list[DeliveryStatus]:
        call = (
            select(deliveries).where(which).order_by(deliveries.c.job_id.desc()).limit(limit).cte()
        )
        each_try = delivery_attempts.c
        newness = func.row_number().over(
            partition_by=each_try.delivery_id, order_by=each_try.attempt.desc()
        )
        # Joined here too, so that only the tries of these calls are ranked.
        ranked = (
            select(delivery_attempts, newness.label("newness"))
            .join(call, call.c.id == each_try.delivery_id)
            .subquery()
        )
        is_listed = (ranked.c.delivery_id == call.c.id) & (ranked.c.newness <= LISTED_ATTEMPTS)
        query = (
            select(
                call,
                ranked.c.attempt.label("number"),
                ranked.c.started_at,
                ranked.c.duration_s,
                ranked.c.status,
                ranked.c.outcome,
            )
            .outerjoin(ranked, is_listed)
            .order_by(call.c.job_id.desc(), call.c.id, ranked.c.attempt)
        )
        with read_only(self._engine) as connection:
            rows = connection.execute(query).all()
        by_call = itertools.groupby(rows, key=lambda row: row.id)
        now = self._clock()
        return [to_status(list(tries), now) for _, tries in by_call]

    def _claim(
        self,
        which: ColumnElement[bool],
        limit: int,
        per_host: int,
        under_way: Mapping[str, int],
    ) -> list[Delivery]:
        now = self._clock()
        is_pending: ColumnElement[bool] = deliveries.c.state == DeliveryState.PENDING
        is_due = is_pending & (deliveries.c.due_at <= now) & which
        is_beyond_schedule = is_pending & (deliveries.c.due_at > now + LONGEST_DELAY_S)
        # Most polls find nothing, and a read does not take SQLite's write lock.
        with read_only(self._engine) as connection:
            query = select(exists().where(is_due), exists().where(is_beyond_schedule))
            has_due, has_beyond_schedule = connection.execute(query).one()
        if has_beyond_schedule:
            with self._engine.begin() as connection:
                connection.execute(update(deliveries).where(is_beyond_schedule).values(due_at=now))
        elif not has_due:
            return []
        chosen = next_calls(is_due, limit, per_host, under_way)
        with self._engine.begin() as connection:
            rows = connection.execute(
                update(deliveries)
                .where(deliveries.c.id.in_(chosen), is_due)
                .values(due_at=now + self._lease_s, attempt=deliveries.c.attempt + 1)
                .returning(
                    deliveries.c.id,
                    deliveries.c.job_id,
                    deliveries.c.url,
                    deliveries.c.host,
                    deliveries.c.attempt,
                )
            ).all()
        return [Delivery(*row) for row in rows]

    def record(self, delivery: Delivery, attempt: Attempt) -> DeliveryState:
        """Record a try of a claimed call, and set its state and due time.

        A call that was claimed again since keeps its state and due time. A call that was marked
        dead since stays dead, unless this try has delivered it.
        """
        state = self._state_after(delivery, attempt)
        is_open = true() if attempt.is_success else deliveries.c.state == DeliveryState.PENDING
        with self._engine.begin() as connection:
            connection.execute(
                insert(delivery_attempts).values(
                    delivery_id=delivery.id,
                    attempt=delivery.attempt,
                    started_at=attempt.started_at,
                    duration_s=attempt.duration_s,
                    status=attempt.status,
                    outcome=attempt.outcome,
                )
            )
            connection.execute(
                delete(delivery_attempts).where(
                    delivery_attempts.c.delivery_id == delivery.id,
                    delivery_attempts.c.attempt <= delivery.attempt - KEPT_ATTEMPTS,
                )
            )
            connection.execute(
                update(deliveries)
                .where(
                    deliveries.c.id == delivery.id,
                    deliveries.c.attempt == delivery.attempt,
                    is_open,
                )
                .values(state=state, due_at=self._clock() + self._delay_s(delivery, attempt))
            )
        return state

    def _state_after(self, delivery: Delivery, attempt: Attempt) -> DeliveryState:
        if attempt.is_success:
            return DeliveryState.DELIVERED
        is_used_up = delivery.attempt > len(RETRY_DELAYS_S)
        return DeliveryState.DEAD if attempt.is_final or is_used_up else DeliveryState.PENDING

    def _delay_s(self, delivery: Delivery, attempt: Attempt) -> float:
        """Seconds to the next try, by the schedule or a longer Retry-After."""
        index = min(delivery.attempt, len(RETRY_DELAYS_S)) - 1
        scheduled = RETRY_DELAYS_S[index] * self._jitter.uniform(1 - JITTER, 1 + JITTER)
        return max(scheduled, min(attempt.retry_after_s or 0.0, MAX_RETRY_AFTER_S))


def next_calls(
    is_due: ColumnElement[bool], limit: int, per_host: int, under_way: Mapping[str, int]
) -> Select[tuple[str]]:
    """The ids of the calls that `DeliveryStore.claim_due` claims."""
    # Ordered by job and not by due time, because untried calls have the due time `AT_ONCE`.
    within_host = func.row_number().over(
        partition_by=deliveries.c.host, order_by=deliveries.c.job_id
    )
    columns = (deliveries.c.id, deliveries.c.job_id, deliveries.c.host)
    due = select(*columns, within_host.label("place")).where(is_due).subquery()
    room = by_value(due.c.host, {host: per_host - n for host, n in under_way.items()}, per_host)
    within_key = func.row_number().over(partition_by=jobs.c.key_id, order_by=due.c.job_id)
    calls_of_key = Counter[str]()
    for host, n in under_way.items():
        calls_of_key[key_of(host)] += n
    turn = within_key + by_value(jobs.c.key_id, calls_of_key, 0)
    return (
        select(due.c.id)
        .join(jobs, jobs.c.id == due.c.job_id)
        .where(due.c.place <= room)
        .order_by(turn, due.c.job_id)
        .limit(limit)
    )


def by_value(
    column: ColumnElement[str], values: Mapping[str, int], otherwise: int
) -> ColumnElement[int]:
    """The number that belongs to a column's value."""
    return case(values, value=column, else_=otherwise) if values else literal(otherwise)


def to_status(rows: Sequence[Row[Any]], now: float) -> DeliveryStatus:
    """A call from its rows, one per listed try; a call without tries has one row with NULLs."""
    call = rows[0]
    return DeliveryStatus(
        id=call.id,
        job_id=call.job_id,
        url=call.url,
        host=call.host,
        state=DeliveryState(call.state),
        due_at=call.due_at or now,
        attempts=tuple(
            (row.number, Attempt(row.started_at, row.duration_s, row.status, row.outcome))
            for row in rows
            if row.number is not None
        ),
        attempts_total=call.attempt,
    )

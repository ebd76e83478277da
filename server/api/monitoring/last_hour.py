"""What ended within the last hour, minute by minute: jobs, their latencies, why they failed.

Durations of the wait and the run come from steady clocks. The latency is the difference of two wall
clocks, as is the minute in which a job ended; they are for people.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, select

from server.api.monitoring.metrics import by_reason
from server.jobs.job import JobState
from server.jobs.outbox import DeliveryState
from server.storage.tables import deliveries, jobs

MINUTE_S = 60.0
MINUTES = 60

MAX_JOBS = 10_000
"""The most jobs that one look reads, the newest ones. Where more have ended, the figures cover less
than an hour, so that a busy server's look costs no more."""

MAX_AHEAD_S = 60.0
"""How far another machine's clock may be ahead. Its jobs count for the present minute."""

# By the index `jobs_by_end`. A job has one webhook call at most, so no job is there twice.
ENDED = (
    select(
        jobs.c.state,
        jobs.c.error,
        jobs.c.finished_at,
        (jobs.c.finished_at - jobs.c.created_at).label("latency_s"),
        jobs.c.queued_s,
        jobs.c.run_s,
        deliveries.c.state.label("webhook"),
    )
    .outerjoin(deliveries, deliveries.c.job_id == jobs.c.id)
    .where(jobs.c.finished_at >= bindparam("since"), jobs.c.finished_at <= bindparam("until"))
    .order_by(jobs.c.finished_at.desc())
    .limit(bindparam("limit"))
)


class EndedJob(NamedTuple):
    """A row of `ENDED`. Its attributes are read several times as fast as those of SQLAlchemy."""

    state: str
    error: str | None
    finished_at: float
    latency_s: float
    queued_s: float | None
    run_s: float | None
    webhook: str | None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds that half of the jobs, and 95 % of them, did not exceed."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Period:
    """Jobs that ended from `starts_at` on, for a minute or for the whole hour.

    starts_at: seconds since the epoch. latency: from submission to end. wait: until the last
    attempt began. run: of that attempt. They are of finished jobs alone, None where there are none.
    """

    starts_at: float
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    latency: Percentiles | None = None
    wait: Percentiles | None = None
    run: Percentiles | None = None


@dataclass(frozen=True, slots=True)
class LastHour:
    """minutes: 60, or less where `MAX_JOBS` ended in less time; the last one is not over yet.

    failures: how many jobs failed, by `Failure`; no zeros. delivered: webhook calls for these jobs
    that their receivers have taken.
    """

    whole: Period
    minutes: Sequence[Period]
    failures: Mapping[str, int]
    delivered: int


def read_last_hour(connection: Connection, now: float, limit: int = MAX_JOBS) -> LastHour:
    """now: seconds since the epoch. limit: as `MAX_JOBS`."""
    present = math.floor(now / MINUTE_S)
    first = present - MINUTES + 1
    values = {"since": first * MINUTE_S, "until": now + MAX_AHEAD_S, "limit": limit}
    rows = [EndedJob._make(row) for row in connection.execute(ENDED, values)]
    by_minute: defaultdict[int, list[EndedJob]] = defaultdict(list)
    for row in rows:
        by_minute[min(math.floor(row.finished_at / MINUTE_S), present)].append(row)
    if len(rows) == limit and len(by_minute) > 1:
        # Some jobs of the earliest minute may be left out.
        first = min(by_minute) + 1
    kept = [row for minute in range(first, present + 1) for row in by_minute[minute]]
    errors = Counter(row.error for row in kept if row.error is not None)
    return LastHour(
        whole=to_period(first, kept),
        minutes=[to_period(minute, by_minute[minute]) for minute in range(first, present + 1)],
        failures={reason: n for reason, n in by_reason(errors.items()) if n},
        delivered=sum(row.webhook == DeliveryState.DELIVERED for row in kept),
    )


def to_period(minute: int, rows: Sequence[EndedJob]) -> Period:
    """minute: number of the first minute since the epoch. rows: of `ENDED`."""
    states = Counter(row.state for row in rows)
    finished = [row for row in rows if row.state == JobState.FINISHED]
    return Period(
        minute * MINUTE_S,
        states[JobState.FINISHED],
        states[JobState.FAILED],
        states[JobState.CANCELLED],
        percentiles_of(row.latency_s for row in finished),
        percentiles_of(row.queued_s for row in finished),
        percentiles_of(row.run_s for row in finished),
    )


def percentiles_of(durations_s: Iterable[float | None]) -> Percentiles | None:
    """By nearest rank, so that each is a duration that occurred. None where no duration is known.

    A duration below 0 comes from clocks that differ, and counts as 0.
    """
    ordered = sorted(max(each, 0.0) for each in durations_s if each is not None)
    if not ordered:
        return None
    p50, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    return Percentiles(p50, p95)

"""Prometheus metrics read from the database: queue, jobs, workers, webhooks.

What a scrape must see at once is read at each scrape. Counts of whole tables are kept for a while
when they take long, because each API process is scraped and the tables hold a month of jobs.
"""

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily as Metric
from prometheus_client.registry import Collector
from sqlalchemy import Column, ColumnElement, Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from server.jobs.estimates import Estimator
from server.jobs.job import Failure, JobState
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.storage.database import read_only
from server.storage.tables import deliveries, delivery_attempts, jobs

QUICK_S = 0.2
"""A count of whole tables that takes no longer is made at each scrape."""

COST_FACTOR = 100.0
"""A slower count is kept for this many times the time it took, so that a process has the database
count at most a hundredth of the time."""

LIVE = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class TableCounts:
    """Rows by a column. ended: jobs by terminal state. failures: failed jobs by their error."""

    ended: Sequence[tuple[str, int]]
    failures: Sequence[tuple[str, int]]
    calls: Sequence[tuple[str, int]]
    attempts: Sequence[tuple[str, int]]


class StoredFigures(Collector):
    """The collector of these metrics. clock: monotonic seconds."""

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        estimator: Estimator,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._store = store
        self._estimator = estimator
        self._clock = clock
        self._counts: TableCounts | None = None
        self._count_at = clock()

    def describe(self) -> Iterable[Metric]:
        """Nothing. Without this method the registry would call `collect` when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The present values; only `inpaint_database_up` 0 when the database does not answer."""
        try:
            found = list(self._read())
        except SQLAlchemyError:
            found = []
        yield Metric("inpaint_database_up", "Whether it answers", float(bool(found)))
        yield from found

    def _read(self) -> Iterator[Metric]:
        wait_s = self._estimator.forecast().wait_s
        seen = self._store.workers.alive()
        with read_only(self._engine) as connection:
            counts = self._count_tables(connection)
            live = count_by(connection, jobs.c.state, jobs.c.state.in_(LIVE))
        in_state = {**dict(counts.ended), **dict(live)}
        states = [(state, in_state.get(state, 0)) for state in JobState]
        yield gauge("inpaint_jobs", "Jobs by state; queued ones wait", "state", states)
        yield gauge(
            "inpaint_failed_jobs", "Failed jobs by reason", "reason", by_reason(counts.failures)
        )
        yield Metric("inpaint_queue_wait_seconds", "Until a new job would start", wait_s)
        yield gauge("inpaint_webhooks", "Webhook calls by state", "state", counts.calls)
        yield gauge("inpaint_webhook_attempts", "Attempts by outcome", "outcome", counts.attempts)
        workers = by_worker_state(seen)
        yield gauge("inpaint_workers", "Workers with a recent report", "state", workers)

    def _count_tables(self, connection: Connection) -> TableCounts:
        """The counts of now, or the last ones while they would take long."""
        started = self._clock()
        if self._counts is None or started >= self._count_at:
            has_failed = jobs.c.state == JobState.FAILED
            self._counts = TableCounts(
                ended=count_by(connection, jobs.c.state, jobs.c.state.not_in(LIVE)),
                failures=count_by(connection, jobs.c.error, has_failed),
                calls=count_by(connection, deliveries.c.state),
                attempts=count_by(connection, delivery_attempts.c.outcome),
            )
            took_s = self._clock() - started
            self._count_at = started + (COST_FACTOR * took_s if took_s > QUICK_S else 0.0)
        return self._counts


def by_worker_state(seen: Sequence[WorkerStatus]) -> list[tuple[str, int]]:
    """The number of workers in each state."""
    states = [worker.state for worker in seen]
    return [(state, states.count(state)) for state in ("loading", "ready", "failed")]


def by_reason(sentences: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The number of failed jobs by reason. sentences: the errors in their rows, counted."""
    counts = Counts(dict.fromkeys(Failure, 0))
    for sentence, count in sentences:
        counts[Failure.of(sentence)] += count
    return [*counts.items()]


def count_by(
    connection: Connection, column: Column[str], *where: ColumnElement[bool]
) -> list[tuple[str, int]]:
    """The number of rows for each value of a column."""
    rows = connection.execute(select(column, func.count()).where(*where).group_by(column))
    return [(value, count) for value, count in rows]


def gauge(name: str, text: str, label: str, values: Iterable[tuple[str, int]]) -> Metric:
    """A gauge with one label."""
    family = Metric(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family

"""Prometheus metrics that are read at each scrape, from the database and from parts of the process.

Queue, jobs and webhooks are counted in their tables. Workers report their own figures, see
`worker/figures`, which are given on with one label more. What a scrape must see at once is read at
each scrape. Counts of whole tables are kept for a while when they take long, because each API
process is scraped and the tables hold a month of jobs.
"""

import shutil
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from sqlalchemy import Column, ColumnElement, Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from server.core.logs import get_logger
from server.jobs.estimates import Estimator
from server.jobs.job import Failure, JobState
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.storage.database import read_only
from server.storage.tables import deliveries, delivery_attempts, jobs
from server.webhooks.sender import WebhookSender

logger = get_logger(__name__)

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


class ProcessFigures(Collector):
    """What parts of this process have counted. data_dir: the folder whose disk is reported."""

    def __init__(self, webhooks: WebhookSender, data_dir: Path) -> None:
        self._webhooks = webhooks
        self._data_dir = data_dir

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        calls = CounterMetricFamily(
            "inpaint_webhook_calls", "Webhook calls made", labels=["outcome"]
        )
        for outcome, count in self._webhooks.outcomes.items():
            calls.add_metric([outcome], count)
        yield calls
        with suppress(OSError):
            disk = shutil.disk_usage(self._data_dir)
            sizes = [("total", disk.total), ("free", disk.free)]
            yield gauge("inpaint_disk_bytes", "Of the data folder's disk", "kind", sizes)


class StoredFigures(Collector):
    """What the database knows. max_waiting: jobs in a full queue. clock: monotonic seconds."""

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        estimator: Estimator,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._store = store
        self._estimator = estimator
        self._max_waiting = max_waiting
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
        yield GaugeMetricFamily("inpaint_database_up", "Whether it answers", float(bool(found)))
        yield from found

    def _read(self) -> Iterator[Metric]:
        wait_s = self._estimator.forecast().wait_s
        oldest_s = self._store.demand().oldest_wait_s or 0.0
        seen = self._store.workers.seen()
        # What a failed worker counted in its earlier runs no longer changes.
        counting = [worker.id for worker in seen if worker.state != "failed"]
        reports = self._store.workers.figures_of(counting)
        with read_only(self._engine) as connection:
            counts = self._count_tables(connection)
            live = count_by(connection, jobs.c.state, jobs.c.state.in_(LIVE))
        in_state = {**dict(counts.ended), **dict(live)}
        states = [(state, in_state.get(state, 0)) for state in JobState]
        yield gauge("inpaint_jobs", "Jobs by state; queued ones wait", "state", states)
        yield gauge(
            "inpaint_failed_jobs", "Failed jobs by reason", "reason", by_reason(counts.failures)
        )
        yield GaugeMetricFamily("inpaint_queue_wait_seconds", "Until a new job would start", wait_s)
        yield GaugeMetricFamily(
            "inpaint_queue_oldest_seconds", "How long the oldest job has waited", oldest_s
        )
        yield GaugeMetricFamily("inpaint_queue_limit", "Jobs that may wait", self._max_waiting)
        yield gauge("inpaint_webhooks", "Webhook calls by state", "state", counts.calls)
        yield gauge("inpaint_webhook_attempts", "Attempts by outcome", "outcome", counts.attempts)
        workers = by_worker_state(seen)
        yield gauge(
            "inpaint_workers",
            "Workers by state, failed ones until their next run",
            "state",
            workers,
        )
        yield from figures_by_worker(reports)

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


def figures_by_worker(reports: Mapping[str, str]) -> list[Metric]:
    """The figures of all workers, with the label `worker`. reports: in text format, by worker."""
    merged: dict[str, Metric] = {}
    for worker_id, report in reports.items():
        try:
            families = [*text_string_to_metric_families(report)]
        except ValueError:  # of a worker of another version, which must not hide the others
            logger.warning("figures of a worker cannot be read", worker_id=worker_id)
            continue
        for family in families:
            whole = Metric(family.name, family.documentation, family.type)
            merged.setdefault(family.name, whole).samples += [
                sample._replace(labels={"worker": worker_id, **sample.labels})
                for sample in family.samples
            ]
    return [*merged.values()]


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
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family

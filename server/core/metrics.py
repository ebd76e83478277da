"""Figures of a running server for Prometheus, and the second port that tells them.

No text of a client is ever a label: labels come from routes, enums and our own tables. What many
processes take part in is read from the database at the moment somebody asks.
"""

from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily as Metric
from prometheus_client.registry import Collector
from sqlalchemy import Column, Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from server.jobs.estimates import Estimator
from server.jobs.failures import Failure
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.storage.database import deliveries, delivery_attempts, jobs, read_only

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN_ROUTE = "unknown"
ESTIMATE_BUCKETS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10)
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one API process. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "inpaint_requests", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "inpaint_request_seconds",
            "From the head of a request to the end of its answer",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.refusals = Counter(
            "inpaint_refusals", "Requests refused, by class", ["reason"], registry=self.registry
        )
        self.image_problems = Counter(
            "inpaint_image_problems",
            "Init and mask images that could not be fetched or decoded",
            ["problem"],
            registry=self.registry,
        )
        self.decodes = Counter(
            "inpaint_decodes", "Pairs of pictures decoded", ["outcome"], registry=self.registry
        )
        self.estimates = Histogram(
            "inpaint_estimate_ratio",
            "Seconds a client was first told until its job's end, over the true ones",
            buckets=ESTIMATE_BUCKETS,
            registry=self.registry,
        )
        self.connections = Gauge("inpaint_connections", "Open connections", registry=self.registry)
        self.connections_cut = Gauge(
            "inpaint_connections_cut",
            "Closed for want of room since the start",
            registry=self.registry,
        )

    def observe_estimate(self, ratio: float | None) -> None:
        """How an estimate compares with the truth, once that is known."""
        if ratio is not None:
            self.estimates.observe(ratio)

    def text(self) -> bytes:
        """All figures in Prometheus' text format. May read the database: call it in a thread."""
        return generate_latest(self.registry)


class StoredFigures(Collector):
    """The figures that are rows: queue, jobs, webhooks, workers."""

    def __init__(self, engine: Engine, store: JobStore, estimator: Estimator) -> None:
        self._engine = engine
        self._store = store
        self._estimator = estimator

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would read the database to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """As they stand now; without a database only that there is none."""
        try:
            found = list(self._read())
        except SQLAlchemyError:
            found = []
        yield Metric("inpaint_database_up", "Whether it answers", float(bool(found)))
        yield from found

    def _read(self) -> Iterator[Metric]:
        wait_s = self._estimator.forecast().wait_s
        seen = self._store.workers.seen()
        with read_only(self._engine) as connection:
            in_state = dict(count_by(connection, jobs.c.state))
            sentences = count_by(connection, jobs.c.error)
            calls = count_by(connection, deliveries.c.state)
            attempts = count_by(connection, delivery_attempts.c.outcome)
        states = [(state, in_state.get(state, 0)) for state in JobState]
        yield gauge("inpaint_jobs", "Jobs by state; queued ones wait", "state", states)
        yield gauge("inpaint_failed_jobs", "Failed jobs by reason", "reason", by_reason(sentences))
        yield Metric("inpaint_queue_wait_seconds", "Until a new job would start", wait_s)
        yield gauge("inpaint_webhooks", "Webhook calls by state", "state", calls)
        yield gauge("inpaint_webhook_attempts", "Attempts by outcome", "outcome", attempts)
        yield gauge("inpaint_workers", "Workers heard of lately", "state", by_worker_state(seen))


def by_worker_state(seen: Sequence[WorkerStatus]) -> list[tuple[str, int]]:
    """How many workers are in each state."""
    states = [worker.state for worker in seen]
    return [(state, states.count(state)) for state in ("loading", "ready", "failed")]


def by_reason(sentences: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """How many jobs have failed of each reason. sentences: what stands in their rows."""
    counts = Counts(dict.fromkeys(Failure, 0))
    for sentence, count in sentences:
        counts[Failure.of(sentence)] += count
    return [*counts.items()]


def count_by(connection: Connection, column: Column[str]) -> list[tuple[str, int]]:
    """How many rows there are of each value."""
    present = column.is_not(None)
    rows = connection.execute(select(column, func.count()).where(present).group_by(column))
    return [(value, count) for value, count in rows]


def gauge(name: str, text: str, label: str, values: Iterable[tuple[str, int]]) -> Metric:
    """A gauge with one label."""
    family = Metric(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family

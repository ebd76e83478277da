"""Prometheus metrics read from the database at each scrape: queue, jobs, workers, webhooks."""

from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily as Metric
from prometheus_client.registry import Collector
from sqlalchemy import Column, Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from server.jobs.estimates import Estimator
from server.jobs.job import Failure, JobState
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.storage.database import read_only
from server.storage.tables import deliveries, delivery_attempts, jobs


class StoredFigures(Collector):
    """The collector of these metrics."""

    def __init__(self, engine: Engine, store: JobStore, estimator: Estimator) -> None:
        self._engine = engine
        self._store = store
        self._estimator = estimator

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
        workers = by_worker_state(seen)
        yield gauge("inpaint_workers", "Workers with a recent report", "state", workers)


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


def count_by(connection: Connection, column: Column[str]) -> list[tuple[str, int]]:
    """The number of rows for each value of a column; NULL is left out."""
    present = column.is_not(None)
    rows = connection.execute(select(column, func.count()).where(present).group_by(column))
    return [(value, count) for value, count in rows]


def gauge(name: str, text: str, label: str, values: Iterable[tuple[str, int]]) -> Metric:
    """A gauge with one label."""
    family = Metric(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family

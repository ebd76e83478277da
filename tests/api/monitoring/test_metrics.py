"""Counts of whole tables are not made at each scrape once they take long."""

import functools

import pytest
from sqlalchemy import Engine, event

from server.api.monitoring.metrics import COST_FACTOR, QUICK_S, StoredFigures
from server.jobs.estimates import Estimator
from server.jobs.store import JobStore
from tests.support.clocks import Clock
from tests.support.jobs import new_job


class SlowCounts:
    """Makes each count of the attempts take `took_s` on the collector's clock; counts them."""

    def __init__(self, engine: Engine, clock: Clock, took_s: float) -> None:
        self.made = 0
        self._clock, self._took_s = clock, took_s
        event.listen(engine, "before_cursor_execute", self._see)

    def _see(self, _connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "FROM delivery_attempts" in statement:
            self.made += 1
            self._clock.now += self._took_s


@pytest.fixture
def figures(engine: Engine, clock: Clock) -> StoredFigures:
    store = JobStore(engine)
    estimator = Estimator(functools.partial(store.forecast, lambda _device: 1))
    return StoredFigures(engine, store, estimator, max_waiting=1_000, clock=clock)


def states(figures: StoredFigures) -> dict[str, float]:
    (family,) = [each for each in figures.collect() if each.name == "inpaint_jobs"]
    return {sample.labels["state"]: sample.value for sample in family.samples}


def test_slow_counts_are_kept_for_a_while(
    figures: StoredFigures, engine: Engine, clock: Clock
) -> None:
    store = JobStore(engine)
    counts = SlowCounts(engine, clock, took_s=0.5)
    assert states(figures)["finished"] == 0
    store.submit(new_job())
    (job,) = store.claim("w", 1)
    store.finish(job, [False])
    store.submit(new_job(file_prefix="1" * 36))

    soon = states(figures)

    assert counts.made == 1
    assert soon["queued"] == 1, "what waits is counted at each scrape"
    assert soon["finished"] == 0
    clock.now += COST_FACTOR * 0.5
    assert states(figures)["finished"] == 1
    assert counts.made == 2


def test_quick_counts_are_made_at_each_scrape(
    figures: StoredFigures, engine: Engine, clock: Clock
) -> None:
    counts = SlowCounts(engine, clock, took_s=QUICK_S / 2)
    for _ in range(3):
        states(figures)
    assert counts.made == 3

"""Jobs that are submitted in one group commit: each meets the queue as if it came alone."""

import functools
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from server.core.errors import Conflict, QueueFull
from server.jobs.idempotency import KEPT_S, Idempotency
from server.jobs.job import Job, NewJob
from server.jobs.store import JobStore
from server.jobs.submissions import QueueLimits, Submissions
from server.storage.database import open_engine
from tests.support.clocks import Clock
from tests.support.databases import migrated_sqlite
from tests.support.jobs import new_job, waiting_in

LIMITS = QueueLimits(max_waiting=12, max_waiting_per_key=5)
NOW = 1_000.0


def submission(
    key_id: str = "a", once: Idempotency | None = None
) -> tuple[NewJob, Idempotency | None]:
    return replace(new_job(key_id=key_id), file_prefix=str(uuid.uuid4())), once


def submit_together(
    engine: Engine, group: Sequence[tuple[NewJob, Idempotency | None]]
) -> list[Job | BaseException]:
    """In one transaction, as the members of one group commit."""
    submissions = Submissions(engine, LIMITS, lambda: NOW, lambda: NOW)
    members = [(each, Future[Job]()) for each in group]
    submissions._commits._commit(members)
    return [outcome.exception() or outcome.result() for _, outcome in members]


def test_room_runs_out_within_a_group(engine: Engine) -> None:
    outcomes = submit_together(engine, [submission("a") for _ in range(7)])
    assert [type(each) for each in outcomes] == [Job] * 5 + [QueueFull] * 2
    outcomes = submit_together(engine, [submission(key) for key in "bbbbbcccc"])
    assert [type(each) for each in outcomes] == [Job] * 7 + [QueueFull] * 2
    assert waiting_in(JobStore(engine)) == LIMITS.max_waiting


def test_same_idempotency_key_twice_in_a_group(engine: Engine) -> None:
    asked, other = Idempotency("word", "body"), Idempotency("word", "another body")
    group = [submission(once=asked), submission(once=asked), submission(once=other)]
    _, first, second, third = submit_together(engine, [submission(), *group])
    assert isinstance(first, Job)
    assert second == first
    assert isinstance(third, Conflict)
    assert waiting_in(JobStore(engine)) == 2


def test_one_that_cannot_be_written_costs_its_neighbours_nothing(engine: Engine) -> None:
    taken = submission()
    JobStore(engine).submit(*taken)
    group = [submission("b"), taken, submission("c")]  # a file prefix is unique
    good, twice, late = submit_together(engine, group)
    assert isinstance(twice, IntegrityError)
    assert isinstance(good, Job)
    assert isinstance(late, Job)
    store = JobStore(engine)
    assert waiting_in(store) == 3
    assert [store.get(job.id) for job in (good, late)] == [good, late]


@pytest.mark.parametrize("days", [3, -3])
def test_idempotency_key_survives_a_jump_of_the_clock(days: int, tmp_path: Path) -> None:
    """With SQLite; PostgreSQL has a clock of its own."""
    engine = open_engine(migrated_sqlite(tmp_path))
    wall, steady = Clock(), Clock()
    store = JobStore(engine, clock=wall, steady_clock=steady)
    once, other = Idempotency("x", "one"), Idempotency("y", "one")
    first = store.submit(new_job(), once)

    wall.now += days * 86_400
    store.submit(new_job(), other)  # removes the keys that are too old
    there = store.submit(new_job(), once)
    wall.now -= days * 86_400
    back = store.submit(new_job(), once)

    assert (there.id, back.id) == (first.id, first.id)
    steady.now += KEPT_S
    assert store.submit(new_job(), once).id != first.id, "a day by the steady clock ends it"
    engine.dispose()


def test_idempotency_key_does_not_age_by_the_wall_clock(engine: Engine) -> None:
    """Also of processes whose clocks differ; the shared one is the database server's, or ours."""
    shared, once = Clock(), Idempotency("x", "one")
    stores = [
        JobStore(engine, clock=functools.partial(float, days * 86_400), shared_clock=shared)
        for days in (0, 3, -3)
    ]
    assert len({store.submit(new_job(), once).id for store in stores}) == 1
    shared.now += KEPT_S
    assert stores[0].submit(new_job(), once).id != 1

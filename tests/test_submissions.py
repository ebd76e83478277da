"""Jobs that are submitted together: they meet the queue as if they came one after the other."""

import functools
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event

from server.database import idempotency_keys, jobs, open_engine
from server.errors import ApiError, Conflict, QueueFull
from server.idempotency import KEPT_S, Idempotency
from server.job_store import JobStore
from server.jobs import Job, NewJob, QueueShare, Submitted
from server.submissions import QueueLimits, Submission, Submissions
from tests.conftest import migrated_sqlite
from tests.test_job_store import Clock, new_job, waiting_in

LIMITS = QueueLimits(max_waiting=12, max_waiting_per_key=5)
NOW = 1_000.0

Told = tuple[str, int, bool] | type[ApiError]
"""Of a submission: whose job, its turn and whether it is new; or the error."""


def submission(
    key_id: str = "a", priority: int = 0, work: float = 1.0, once: Idempotency | None = None
) -> Submission:
    new = new_job(key_id=key_id, share=QueueShare(priority=priority), work=work)
    return replace(new, file_prefix=str(uuid.uuid4())), once


def submit_together(engine: Engine, group: Sequence[Submission]) -> list[Submitted | ApiError]:
    submissions = Submissions(engine, LIMITS, lambda: NOW, lambda: NOW)
    with engine.begin() as connection:
        return submissions._insert_all(connection, group)


def empty(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(delete(idempotency_keys))
        connection.execute(delete(jobs))


@dataclass(frozen=True)
class Kind:
    """Of a submission in an example. word: of its idempotency key; body: what it asks for."""

    key_id: str
    priority: int
    work: float
    word: str | None
    body: str

    def make(self) -> Submission:
        once = None if self.word is None else Idempotency(self.word, self.body)
        return submission(self.key_id, self.priority, self.work, once)


KINDS = st.builds(
    Kind,
    key_id=st.sampled_from("abc"),
    priority=st.sampled_from([0, 0, 1]),
    work=st.sampled_from([1.0, 2.0, 5.0]),
    word=st.sampled_from([None, None, None, "x", "y"]),
    body=st.sampled_from(["one", "one", "two"]),
)


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One database for all examples of a property."""
    engine = open_engine(migrated_sqlite(tmp_path_factory.mktemp("submissions")))
    yield engine
    engine.dispose()


@given(
    before=st.lists(KINDS, max_size=8),
    claimed=st.integers(0, 4),
    group=st.lists(KINDS, min_size=1, max_size=14),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_group_is_treated_as_if_each_came_alone(
    before: list[Kind], claimed: int, group: list[Kind], shared_engine: Engine
) -> None:
    told: list[list[Told]] = []
    for is_together in (False, True):
        empty(shared_engine)
        store = JobStore(shared_engine)
        for kind in before:
            submit_together(shared_engine, [kind.make()])
        store.claim("w", claimed)
        made = [kind.make() for kind in group]
        if is_together:
            outcomes = submit_together(shared_engine, made)
        else:
            outcomes = [submit_together(shared_engine, [each])[0] for each in made]
        told.append([tell(outcome) for outcome in outcomes])
        ids = [each.job.id for each in outcomes if isinstance(each, Submitted) and each.is_new]
        assert ids == sorted(ids)
        for outcome in outcomes:
            if isinstance(outcome, Submitted):
                assert store.get(outcome.job.id) == outcome.job
    assert told[0] == told[1]


def tell(outcome: Submitted | ApiError) -> Told:
    if isinstance(outcome, ApiError):
        return type(outcome)
    return outcome.job.key_id, outcome.job.turn, outcome.is_new


def test_room_runs_out_within_a_group(engine: Engine) -> None:
    outcomes = submit_together(engine, [submission("a") for _ in range(7)])
    assert [type(each) for each in outcomes] == [Submitted] * 5 + [QueueFull] * 2
    outcomes = submit_together(engine, [submission(key) for key in "bbbbbcccc"])
    assert [type(each) for each in outcomes] == [Submitted] * 7 + [QueueFull] * 2
    assert waiting_in(JobStore(engine)) == LIMITS.max_waiting


def test_same_idempotency_key_twice_in_a_group(engine: Engine) -> None:
    asked, other = Idempotency("word", "body"), Idempotency("word", "another body")
    group = [submission(once=asked), submission(once=asked), submission(once=other)]
    first, second, third = submit_together(engine, [submission(), *group])[1:]
    assert isinstance(first, Submitted)
    assert isinstance(second, Submitted)
    assert (first.is_new, second.is_new) == (True, False)
    assert second.job == first.job
    assert isinstance(third, Conflict)
    assert waiting_in(JobStore(engine)) == 2


def test_one_that_cannot_be_written_costs_its_neighbours_nothing(engine: Engine) -> None:
    store = JobStore(engine)
    taken: NewJob = submission()[0]
    store.submit(taken)
    good = [store.begin_submit(submission()[0]) for _ in range(3)]
    twice = store.begin_submit(taken)  # the same file prefix, which is unique
    good += [store.begin_submit(submission()[0]) for _ in range(3)]
    kept: list[Job] = [each.result(20).job for each in good]
    assert twice.exception(20) is not None
    assert waiting_in(store) == 7
    assert all(store.get(job.id) == job for job in kept)


def test_jobs_that_come_together_take_one_statement(engine: Engine) -> None:
    """Whose ids stand in the order of arrival, and belong to their own jobs."""
    group = [submission(key_id=key_id) for key_id in "abcab"]
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    outcomes = submit_together(engine, group)
    event.remove(engine, "before_cursor_execute", note)
    assert sum(each.startswith("INSERT INTO jobs") for each in statements) == 1
    told = [each.job for each in outcomes if isinstance(each, Submitted)]
    assert [job.id for job in told] == sorted(job.id for job in told)
    store = JobStore(engine)
    assert [store.get(job.id) for job in told] == told
    assert [job.file_prefix for job in told] == [new.file_prefix for new, _ in group]


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

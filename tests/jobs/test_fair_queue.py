"""The order of waiting jobs: keys take turns, priorities go first, and looking costs little."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, insert, text

from server.core.errors import QueueFull
from server.jobs.job import QueueShare
from server.jobs.store import JobStore
from server.storage.database import open_engine
from server.storage.tables import jobs
from tests.support.databases import migrated_sqlite
from tests.support.jobs import PARAMS, new_job

MANY = 10_000


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine, max_waiting=5_000, max_waiting_per_key=1_000)


def submit(store: JobStore, key_id: str, count: int = 1, priority: int = 0) -> list[int]:
    share = QueueShare(priority=priority)
    return [store.submit(new_job(key_id=key_id, share=share)).id for _ in range(count)]


def claim(store: JobStore, limit: int = 1) -> list[int]:
    return [job.id for job in store.claim("w", limit)]


def test_one_keys_jobs_keep_their_order(store: JobStore) -> None:
    ids = submit(store, "a", 5)
    assert claim(store, 3) + claim(store, 9) == ids


def test_single_job_waits_for_one_of_a_long_queue(store: JobStore) -> None:
    many = submit(store, "many", 50)
    assert claim(store, 10) == many[:10]
    (single,) = submit(store, "single")
    assert claim(store, 3) == [many[10], single, many[11]]


def test_keys_take_turns(store: JobStore) -> None:
    a, b, c = submit(store, "a", 4), submit(store, "b", 2), submit(store, "c", 3)
    assert claim(store, 9) == [a[0], b[0], c[0], a[1], b[1], c[1], a[2], c[2], a[3]]


def test_key_that_always_comes_back_does_not_starve_the_others(store: JobStore) -> None:
    many = submit(store, "many", 6)
    (eager,) = submit(store, "eager")
    order = []
    for _ in range(8):
        (claimed,) = claim(store)
        order.append(claimed)
        if claimed == eager:
            (eager,) = submit(store, "eager")
    assert [job_id for job_id in order if job_id in many] == many[:4]


def test_key_has_no_gain_from_staying_away(store: JobStore) -> None:
    claim(store, len(submit(store, "regular", 20)))
    newcomer = submit(store, "newcomer", 20)
    (regular,) = submit(store, "regular")
    assert claim(store, 3) == [newcomer[0], newcomer[1], regular]


def test_key_pays_nothing_for_what_it_took_back(store: JobStore) -> None:
    taken_back = submit(store, "a", 20)
    other = submit(store, "b", 20)
    for job_id in taken_back:
        store.cancel(job_id)
    (single,) = submit(store, "a")
    assert claim(store, 2) == [other[0], single]


def test_lost_job_gives_later_ones_no_early_turn(store: JobStore) -> None:
    old = submit(store, "old", 20)
    store.claim("dead", 1)
    claim(store, 10)
    store.requeue_of("dead")
    submit(store, "new", 20)
    assert positions(store, [old[0], old[12]]) == [1, 4], (
        "behind the lost one, its forerunner, and one new one"
    )


def test_higher_priority_goes_first(store: JobStore) -> None:
    plain, high = submit(store, "plain", 3), submit(store, "high", 2, priority=5)
    low = submit(store, "low", 1, priority=-1)
    assert claim(store, 9) == [*high, *plain, *low]


def test_classes_have_turns_of_their_own(store: JobStore) -> None:
    claim(store, len(submit(store, "high", 30, priority=1)))
    plain = submit(store, "plain", 10)
    (single,) = submit(store, "single")
    assert claim(store, 2) == [plain[0], single]


def positions(store: JobStore, job_ids: list[int]) -> list[int | None]:
    progress = store.progress_of(job_ids)
    return [progress[job_id].position for job_id in job_ids]


def test_position_counts_the_jobs_that_go_before(store: JobStore) -> None:
    a, b = submit(store, "a", 3), submit(store, "b", 2)
    (high,) = submit(store, "high", priority=1)
    order = [high, a[0], b[0], a[1], b[1], a[2]]
    assert positions(store, order) == [1, 2, 3, 4, 5, 6]
    claim(store, 2)
    assert positions(store, order) == [None, None, 1, 2, 3, 4]
    assert store.progress_of([99]) == {}


class TestLimits:
    def test_key_has_a_limit_of_its_own(self, engine: Engine) -> None:
        store = JobStore(engine, max_waiting=10, max_waiting_per_key=2)
        submit(store, "a", 2)
        for refused in (
            lambda: store.submit(new_job(key_id="a")),
            lambda: store.check_room("a"),
        ):
            with pytest.raises(QueueFull) as full:
                refused()
            assert full.value.limit == 2
        store.check_room("b")
        claim(store)
        submit(store, "a")

    def test_share_says_otherwise(self, engine: Engine) -> None:
        store = JobStore(engine, max_waiting=10, max_waiting_per_key=2)
        for limit in (1, 3):
            share = QueueShare(max_waiting=limit)
            for _ in range(limit):
                store.check_room(f"k{limit}", share)
                store.submit(new_job(key_id=f"k{limit}", share=share))
            with pytest.raises(QueueFull):
                store.submit(new_job(key_id=f"k{limit}", share=share))
            with pytest.raises(QueueFull):
                store.check_room(f"k{limit}", share)

    def test_whole_queue_has_a_limit(self, engine: Engine) -> None:
        store = JobStore(engine, max_waiting=3, max_waiting_per_key=2)
        for key_id in "abc":
            submit(store, key_id)
        with pytest.raises(QueueFull) as full:
            store.submit(new_job(key_id="d"))
        assert full.value.limit == 3


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One database for all examples of a property."""
    engine = open_engine(migrated_sqlite(tmp_path_factory.mktemp("turns")))
    yield engine
    engine.dispose()


@given(arrivals=st.lists(st.sampled_from("abc") | st.integers(1, 3), min_size=1, max_size=40))
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_no_key_is_passed_over_for_long(arrivals: list[str | int], shared_engine: Engine) -> None:
    """While a key has a waiting job, no other key is served more than twice."""
    with shared_engine.begin() as connection:
        connection.execute(delete(jobs))
    store = JobStore(shared_engine)
    waiting = dict.fromkeys("abc", 0)
    passed_over = {key: dict.fromkeys("abc", 0) for key in "abc"}
    for arrival in [*arrivals, len(arrivals)]:
        if isinstance(arrival, str):
            submit(store, arrival)
            waiting[arrival] += 1
            continue
        for job in (job for _ in range(arrival) for job in store.claim("w", 1)):
            waiting[job.key_id] -= 1
            passed_over[job.key_id] = dict.fromkeys("abc", 0)
            for other in set("abc") - {job.key_id}:
                passed_over[other][job.key_id] += waiting[other] > 0
                assert passed_over[other][job.key_id] <= 2
    assert not any(waiting.values())


def insert_many(engine: Engine) -> None:
    """A queue much longer than the limits let it become, of a hundred keys."""
    rows = [
        {
            "state": "queued",
            "key_id": f"key{index % 100}",
            "dialect": "v3",
            "request": {},
            "params": PARAMS.to_json(),
            "file_prefix": str(index),
            "work": 1.0,
            "turn": index // 100,
            "created_at": 0.0,
        }
        for index in range(MANY)
    ]
    with engine.begin() as connection:
        connection.execute(insert(jobs), rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def plans_of(engine: Engine, act: Callable[[], object]) -> list[str]:
    """How the database would look up each SELECT that `act` sends."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        is_about_jobs = "advisory" not in statement and "clock_timestamp" not in statement
        if statement.startswith("SELECT") and is_about_jobs:
            sent.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    act()
    event.remove(engine, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with engine.connect() as connection:
        return [
            "\n".join(str(row) for row in connection.exec_driver_sql(explain + query, parameters))
            for query, parameters in sent
        ]


class TestLongQueue:
    def test_next_jobs_are_read_from_an_index(self, store: JobStore, engine: Engine) -> None:
        insert_many(engine)
        *_for_the_share, first, several = plans_of(engine, lambda: claim(store, 8))
        for plan in (first, several):
            assert "jobs_in_order" in plan
            assert "SORT" not in plan.upper().replace("PRESORTED", "")
            assert "B-TREE" not in plan.upper()
            assert "SEQ SCAN" not in plan.upper()

    def test_new_job_finds_its_turn_in_an_index(self, engine: Engine) -> None:
        insert_many(engine)
        store = JobStore(engine, max_waiting=2 * MANY, max_waiting_per_key=MANY)
        (plan,) = plans_of(engine, lambda: store.submit(new_job(key_id="key7")))
        # PostgreSQL finds either index good for the third question while all jobs wait.
        third = {"jobs_in_order"} if engine.dialect.name == "sqlite" else set()
        assert {"jobs_by_turn", "jobs_by_turn_of_key"} | third <= {*re.split(r"\W", plan)}
        assert "B-TREE" not in plan.upper()
        assert "SORT" not in plan.upper()

    def test_turns_go_round_all_keys(self, store: JobStore, engine: Engine) -> None:
        insert_many(engine)
        assert claim(store, 150) == [*range(1, 151)]
        assert store.progress_of([MANY])[MANY].position == MANY - 150

"""The job table: every verb with its guards, under several claimers and kills."""

import itertools
import math
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, delete, event, insert, text, update
from sqlalchemy.exc import IntegrityError

from server.core.errors import QueueFull
from server.jobs.estimates import GUESSED_SPEED, RECENT_JOBS, START_S
from server.jobs.job import Heartbeat, Job, JobState
from server.jobs.leases import CHECK_INTERVAL_S, FAIR_SHARE_S, LEASE_S
from server.jobs.store import MAX_ATTEMPTS, WORKER_LOST, JobStore
from server.jobs.workers import ALIVE_S, ROW_KEPT_S
from server.storage.database import Topic, open_engine
from server.storage.tables import jobs, workers
from tests.support.clocks import Clock
from tests.support.jobs import (
    PARAMS,
    ROW,
    claim_one,
    get,
    new_job,
    state_of,
    waiting_in,
    worker_status,
)
from tests.support.postgres import PostgresServer

PLACES, LARGE = 3, 10_000_000.0
HOUR_S = 3_600.0


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock=clock, steady_clock=clock)


def pass_time(store: JobStore, clock: Clock, seconds: float) -> int:
    """Let it pass, while the leases are looked at as always; how many ran out."""
    lost = store.requeue_expired()
    while seconds > 0:
        clock.now += min(seconds, CHECK_INTERVAL_S)
        seconds -= CHECK_INTERVAL_S
        lost += store.requeue_expired()
    return lost


def test_submitted_job_comes_back_as_it_went_in(store: JobStore) -> None:
    new = new_job(webhook="http://x/hook", track_id="t")
    job = store.submit(new)
    assert get(store, job.id) == job
    kept = asdict(new)
    assert kept.pop("share") == {"max_waiting": None, "priority": 0}
    assert kept.pop("deadline_s") is None
    assert kept.items() <= asdict(job).items()
    assert (job.state, job.attempt, job.created_at) == (JobState.QUEUED, 0, 1_000.0)


@pytest.mark.parametrize("track_id", [7, "7", "", 1.0, 0.5, True, False, None, 2**63, "žluť\x00"])
def test_track_id_keeps_its_type(track_id: object, store: JobStore) -> None:
    kept = get(store, store.submit(new_job(track_id=track_id)).id).track_id
    assert kept == track_id
    assert type(kept) is type(track_id)


def test_unknown_job_is_none(store: JobStore) -> None:
    assert store.get(1) is None


def test_names_of_files_follow_from_the_prefix(store: JobStore) -> None:
    job = store.submit(new_job(file_prefix="abc"))
    assert job.input_key == "inputs/abc.npy"
    assert job.output_keys == ["generations/abc-0.png", "generations/abc-1.png"]


def test_claim_takes_the_oldest_first_and_skips_leased_jobs(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(4)]
    assert store.claim("a", 0) == []
    assert [job.id for job in store.claim("a", 2)] == ids[:2]
    assert [job.id for job in store.claim("b", 5)] == ids[2:]
    assert store.claim("b", 5) == []


def test_job_is_not_claimed_before_it_was_written(engine: Engine) -> None:
    """Where a claim waits for the database, what it then finds may be younger than its question."""
    seen: list[str] = []
    JobStore(engine).submit(new_job())
    event.listen(engine, "begin", lambda _connection: seen.append("begin"))

    def look() -> float:
        seen.append("clock")
        return 1_000.0

    store = JobStore(engine, clock=look)
    seen.clear()
    store.claim("w", 1)
    assert seen[:2] == ["begin", "clock"], "the shared clock may look for itself later"


def test_claim_names_worker_attempt_and_start(store: JobStore, clock: Clock) -> None:
    store.submit(new_job())
    clock.now = 1_010.0
    job = claim_one(store, "a")
    assert (job.state, job.worker_id, job.attempt, job.started_at) == ("running", "a", 1, 1_010.0)


def test_finish_ends_the_job_once(store: JobStore, clock: Clock) -> None:
    store.submit(new_job())
    job = claim_one(store)
    store.heartbeat(job, 3, 40)
    clock.now += 2.5
    assert store.finish(job, [False, None])
    ended = get(store, job.id)
    assert (ended.state, ended.run_s, ended.flagged) == (JobState.FINISHED, 2.5, [False, None])
    assert (ended.step, ended.total_steps) == (40, 40)
    assert not store.finish(job, [True, True])
    assert not store.fail(job, "late")
    assert not store.heartbeat(job, 5, 40)
    assert not store.cancel(job.id)
    assert get(store, job.id) == ended


@pytest.mark.parametrize("verb", ["finish", "fail"])
@pytest.mark.parametrize("jump_s", [30 * HOUR_S, -24 * HOUR_S])
def test_duration_is_that_of_the_steady_clock(jump_s: float, verb: str, engine: Engine) -> None:
    wall, steady = Clock(), Clock()
    store = JobStore(engine, clock=wall, steady_clock=steady)
    store.submit(new_job())
    job = claim_one(store)
    steady.now += 2.5
    wall.now += jump_s

    assert store.finish(job, [False, None]) if verb == "finish" else store.fail(job, "no")

    ended = get(store, job.id)
    assert (ended.run_s, ended.finished_at) == (2.5, 1_000.0 + jump_s)


@pytest.mark.parametrize("jump_s", [30 * HOUR_S, -24 * HOUR_S])
def test_time_in_the_queue_is_that_of_the_shared_clock(jump_s: float, engine: Engine) -> None:
    wall, shared = Clock(), Clock()
    server, worker = (JobStore(engine, clock=wall, shared_clock=shared) for _ in range(2))
    server.submit(new_job())
    wall.now += jump_s
    shared.now += 7

    job = claim_one(worker)

    assert (job.queued_s, job.started_at) == (7, 1_000.0 + jump_s)
    worker.release(job)
    shared.now -= 8
    assert claim_one(worker).queued_s == 0, "another process's clock may be behind"


def test_list_goes_on_from_a_job_in_both_directions(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(5)]

    def listed(before_id: int | None = None, after_id: int | None = None) -> list[int]:
        found = store.list_of("somebody", limit=2, before_id=before_id, after_id=after_id)
        return [job.id for job in found]

    assert listed() == [ids[4], ids[3]]
    assert listed(before_id=ids[3]) == [ids[2], ids[1]]
    assert listed(after_id=ids[1]) == [ids[3], ids[2]]
    assert listed(after_id=ids[4]) == []


def test_fail_ends_the_job_with_its_reason(store: JobStore) -> None:
    store.submit(new_job())
    job = claim_one(store)
    assert store.fail(job, "The picture is too large")
    assert not store.finish(job, [])
    ended = get(store, job.id)
    assert (ended.state, ended.error) == (JobState.FAILED, "The picture is too large")


@pytest.mark.parametrize("is_claimed", [False, True])
def test_cancel_ends_a_job_that_has_not_ended(is_claimed: bool, store: JobStore) -> None:
    queued = store.submit(new_job())
    job = claim_one(store) if is_claimed else queued
    assert store.cancel(job.id)
    assert not store.cancel(job.id)
    assert not store.finish(job, [])
    assert state_of(store, job.id) is JobState.CANCELLED
    assert store.claim("w", 1) == []


def test_cancel_of_an_unknown_job_does_nothing(store: JobStore) -> None:
    assert not store.cancel(99)


def test_job_is_given_back_when_its_lease_has_run_out(store: JobStore, clock: Clock) -> None:
    job_id = store.submit(new_job()).id
    claim_one(store)
    assert pass_time(store, clock, LEASE_S) == 0
    assert pass_time(store, clock, 0.1) == 1
    assert state_of(store, job_id) is JobState.QUEUED


@pytest.mark.parametrize("days", [3, -3])
def test_jump_of_the_clock_ends_no_lease_and_delays_none(
    days: float, engine: Engine, clock: Clock
) -> None:
    """Neither that of the watching process, nor that of the worker's."""
    wall, steady = clock, Clock()
    store = JobStore(engine, clock=wall, steady_clock=steady)
    for _ in range(2):
        store.submit(new_job())
    kept, lost = store.claim("w", 2)
    assert pass_time(store, steady, LEASE_S / 2) == 0
    wall.now += days * 86_400
    assert store.heartbeat(kept, 1, 20)
    assert pass_time(store, steady, LEASE_S / 2) == 0
    assert pass_time(store, steady, CHECK_INTERVAL_S) == 1
    assert [state_of(store, job.id) for job in (kept, lost)] == ["running", "queued"]


def test_node_whose_clock_is_ahead_takes_nobodys_lease(engine: Engine, clock: Clock) -> None:
    ahead = Clock()
    ahead.now = clock.now + 60
    here = JobStore(engine, clock=clock, steady_clock=clock)
    there = JobStore(engine, clock=ahead, steady_clock=ahead)
    here.submit(new_job())
    job = claim_one(here)
    for _ in range(20):
        clock.now += CHECK_INTERVAL_S
        assert here.heartbeat(job, 1, 20)
        assert pass_time(there, ahead, CHECK_INTERVAL_S) == 0
    assert pass_time(there, ahead, LEASE_S + CHECK_INTERVAL_S) == 1


def test_time_in_which_nobody_looked_takes_no_lease(store: JobStore, clock: Clock) -> None:
    """The machine slept, or the database was away: the worker could not beat either."""
    store.submit(new_job())
    job = claim_one(store)
    store.requeue_expired()
    clock.now += 3_600
    assert store.requeue_expired() == 0
    assert store.heartbeat(job, 1, 20)


def test_beat_after_the_look_saves_the_lease(store: JobStore, clock: Clock, engine: Engine) -> None:
    store.submit(new_job())
    job = claim_one(store)
    assert pass_time(store, clock, LEASE_S) == 0
    clock.now += CHECK_INTERVAL_S

    def heartbeat(*_arguments: Any) -> None:
        assert JobStore(engine).heartbeat(job, 1, 20)

    event.listen(engine, "rollback", heartbeat, once=True)  # the end of the look
    assert store.requeue_expired() == 0
    assert state_of(store, job.id) is JobState.RUNNING


def test_beat_renews_the_lease(store: JobStore, clock: Clock) -> None:
    store.submit(new_job())
    job = claim_one(store)
    assert pass_time(store, clock, LEASE_S - 1) == 0
    assert store.heartbeat(job, 5, 20)
    assert pass_time(store, clock, LEASE_S - 1) == 0
    assert (get(store, job.id).step, get(store, job.id).total_steps) == (5, 20)


def test_beat_tells_of_a_preview_until_another_worker_begins(store: JobStore) -> None:
    job_id = store.submit(new_job()).id
    job = claim_one(store)
    assert store.progress_of([job_id])[job_id].preview_step is None
    assert store.heartbeat_all([Heartbeat(job, 5, 20, preview_step=4)]) == []
    assert store.progress_of([job_id])[job_id].preview_step == 4
    store.requeue_of("w")
    claim_one(store)
    assert store.progress_of([job_id])[job_id].preview_step is None


def test_jobs_of_a_dead_worker_are_given_back_at_once(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(3)]
    store.claim("dead", 2)
    claim_one(store, "alive")
    assert store.requeue_of("dead") == 2
    assert [state_of(store, job_id) for job_id in ids] == ["queued", "queued", "running"]


def test_given_back_job_starts_anew_and_keeps_its_place(store: JobStore) -> None:
    first, _ = store.submit(new_job()), store.submit(new_job())
    store.heartbeat(claim_one(store), 5, 20)
    store.requeue_of("w")
    again = claim_one(store)
    assert (again.id, again.attempt, again.step, again.total_steps) == (first.id, 2, 0, 0)


def test_late_worker_has_no_say(store: JobStore) -> None:
    """The same worker id does not help: the claim's number is the fence."""
    store.submit(new_job())
    old = claim_one(store, "w")
    store.requeue_of("w")
    new = claim_one(store, "w")
    assert not store.heartbeat(old, 1, 20)
    assert not store.finish(old, [])
    assert not store.fail(old, "late")
    assert store.finish(new, [False, False])


@pytest.mark.parametrize("verb", ["lose", "release"])
def test_each_claim_has_files_of_its_own(verb: str, store: JobStore) -> None:
    store.submit(new_job(file_prefix="abc"))
    late = claim_one(store, "late")
    assert store.release(late) if verb == "release" else store.requeue_of("late")

    quick = claim_one(store, "quick")
    assert quick.output_keys == ["generations/abc-0-2.png", "generations/abc-1-2.png"]
    assert not {*quick.output_keys} & {*late.output_keys}


def test_third_lost_attempt_fails_the_job(store: JobStore) -> None:
    job_id = store.submit(new_job()).id
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert claim_one(store).attempt == attempt
        assert store.requeue_of("w") == 1
    ended = get(store, job_id)
    assert (ended.state, ended.error, ended.finished_at) == ("failed", WORKER_LOST, 1_000.0)
    assert store.claim("w", 1) == []


def test_ended_lists_the_ended_ones_of_those_asked_for(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(5)]
    finished, failed = store.claim("w", 2)
    store.finish(finished, [])
    store.fail(failed, "reason")
    store.cancel(ids[2])
    assert {job.id for job in store.ended(ids)} == set(ids[:3])
    assert [job.id for job in store.ended(ids[1:2])] == ids[1:2]
    assert store.ended([]) == []


def test_ended_ones_are_found_among_hundreds(engine: Engine) -> None:
    store = JobStore(engine, max_waiting=1_000, max_waiting_per_key=1_000)
    ids = [store.submit(new_job()).id for _ in range(300)]
    ended = {ids[0], ids[256], ids[-1]}
    for job_id in ended:
        store.cancel(job_id)

    assert {job.id for job in store.ended([*ids, 999_999])} == ended
    assert store.progress_of(ids).keys() == {*ids}


def test_queue_has_an_end(engine: Engine) -> None:
    store = JobStore(engine, max_waiting=2)
    store.submit(new_job())
    store.check_room("somebody")
    store.submit(new_job())
    with pytest.raises(QueueFull) as refused:
        store.submit(new_job())
    assert refused.value.limit == 2
    with pytest.raises(QueueFull):
        store.check_room("somebody")
    claim_one(store)  # a running job waits no longer
    store.submit(new_job())


def test_ids_are_not_given_twice(store: JobStore, engine: Engine) -> None:
    ids = [store.submit(new_job()).id for _ in range(3)]
    with engine.begin() as connection:
        connection.execute(delete(jobs))
    assert store.submit(new_job()).id > max(ids)


RUNNING = {"state": "running", "worker_id": "w", "heartbeat_at": 1.0}


@pytest.mark.parametrize(
    "values",
    [
        {"state": "lost"},
        {"state": None},
        {"state": "running"},
        RUNNING | {"worker_id": None},
        RUNNING | {"heartbeat_at": None},
        RUNNING | {"state": "finished"},
        RUNNING | {"state": "queued"},
        RUNNING | {"error": "reason"},
        {"state": "failed"},
        {"error": "reason"},
        {"state": "finished", "error": "reason"},
        {"file_prefix": "taken"},
        {"key_id": None},
    ],
    ids=str,
)
def test_schema_has_no_room_for_illegal_states(values: dict[str, Any], engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(jobs).values(ROW | {"file_prefix": "taken"}))
    with engine.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(insert(jobs).values(ROW | values))


def test_schema_holds_against_raw_sql(store: JobStore, engine: Engine) -> None:
    store.submit(new_job())
    for change in ("state = 'running'", "state = 'failed'", "state = 'done'", "error = 'x'"):
        with engine.connect() as connection, pytest.raises(IntegrityError):
            connection.execute(text(f"UPDATE jobs SET {change}"))


class TestForecast:
    """What the store knows of the queue, as `estimates.play` is given it."""

    @pytest.fixture(autouse=True)
    def worker(self, store: JobStore, clock: Clock) -> None:
        store.workers.report(worker_status("a", clock()))

    @pytest.fixture
    def make_together(self, store: JobStore, clock: Clock) -> Callable[..., list[Job]]:
        """Let so many jobs of 1,000 pixel steps begin and end together."""

        def make(count: int, seconds: float) -> list[Job]:
            for _ in range(count):
                store.submit(new_job(work=1_000.0))
            claimed = store.claim("a", count)
            clock.now += seconds
            for job in claimed:
                store.finish(job, [])
            return [get(store, job.id) for job in claimed]

        return make

    def test_empty_queue(self, store: JobStore) -> None:
        forecast = store.forecast(places)
        assert (forecast.waiting, forecast.running, forecast.wait_s) == (0, 0, 0)
        assert forecast.ends_s == forecast.positions == {}

    @pytest.mark.parametrize("state", ["loading", "failed", None])
    def test_without_a_ready_worker_nothing_starts_at_once(
        self, state: str | None, store: JobStore, clock: Clock
    ) -> None:
        if state:
            store.workers.report(worker_status("a", clock(), state))
        else:
            store.workers.remove("a")
        job = store.submit(new_job(work=2 * GUESSED_SPEED))
        assert store.forecast(places).ends_s[job.id] > START_S + 2
        assert store.forecast(places).wait_s == START_S

    def test_running_jobs_go_first_and_have_what_is_left(self, store: JobStore) -> None:
        jobs = [store.submit(new_job(work=LARGE)) for _ in range(PLACES + 2)]
        for job in store.claim("a", PLACES):
            store.heartbeat(job, 19, 20)
        forecast = store.forecast(places)
        assert (forecast.waiting, forecast.running) == (2, PLACES)
        assert forecast.positions == {jobs[-2].id: 1, jobs[-1].id: 2}
        ends = [forecast.ends_s[job.id] for job in jobs]
        assert ends == sorted(ends)
        assert ends[PLACES - 1] < ends[PLACES] / 5
        assert forecast.wait_s > 0

    def test_order_is_that_of_turns(self, store: JobStore) -> None:
        many = [store.submit(new_job(key_id="many", work=LARGE)) for _ in range(3)]
        single = store.submit(new_job(key_id="single", work=LARGE))
        order = [many[0], single, many[1], many[2]]
        forecast = store.forecast(places)
        assert forecast.positions == {job.id: place for place, job in enumerate(order, 1)}

    def test_speed_is_that_of_the_last_jobs(
        self, store: JobStore, make_together: Callable[..., list[Job]]
    ) -> None:
        make_together(4, 4.0)
        job = store.submit(new_job(work=1_000.0))
        quick = store.forecast(places).ends_s[job.id]
        store.cancel(job.id)
        make_together(RECENT_JOBS, 400.0)
        job = store.submit(new_job(work=1_000.0))
        assert store.forecast(places).ends_s[job.id] > 10 * quick

    def test_workers_add_up_while_they_are_seen(self, store: JobStore, clock: Clock) -> None:
        store.workers.report(worker_status("b", clock()))
        job = store.submit(new_job(work=LARGE))
        of_two = store.forecast(places).ends_s[job.id]
        hear_nothing(store, clock, ALIVE_S)
        store.workers.report(worker_status("a", clock()))
        assert store.forecast(places).ends_s[job.id] == pytest.approx(2 * of_two)

    @pytest.mark.parametrize("jump_s", [30 * HOUR_S, -24 * HOUR_S])
    def test_jump_of_the_clock_changes_no_estimate(self, jump_s: float, engine: Engine) -> None:
        wall, steady = Clock(), Clock()
        store = JobStore(engine, clock=wall, steady_clock=steady)
        store.workers.report(worker_status("a", wall()))

        def make_together(count: int, jump_s: float = 0.0) -> list[Job]:
            for _ in range(count):
                store.submit(new_job(work=1_000.0))
            claimed = store.claim("a", count)
            wall.now += 4 + jump_s
            steady.now += 4
            for job in claimed:
                store.finish(job, [])
            return [get(store, job.id) for job in claimed]

        def estimate() -> float:
            job = store.submit(new_job(work=1_000.0))
            seconds = store.forecast(places).ends_s[job.id]
            store.cancel(job.id)
            return seconds

        make_together(4)
        before_s = estimate()
        across = make_together(4, jump_s)
        after_s = estimate()
        assert {job.run_s for job in across} == {4.0}
        assert across[0].finished_at == wall.now, "what people read is the wall clock's"
        assert before_s / 2 <= after_s <= before_s * 2

    def test_rows_without_a_good_duration_tell_no_speed(
        self, store: JobStore, engine: Engine, clock: Clock
    ) -> None:
        """Earlier versions took it from the wall clock, or had none."""
        job = store.submit(new_job(work=1_000.0))
        guess = store.forecast(places).ends_s[job.id]
        store.cancel(job.id)
        for run_s in (None, -86_399.2, 0.0):
            store.submit(new_job(work=1_000.0))
            job = claim_one(store)
            clock.now += 1
            store.finish(job, [])
            with engine.begin() as connection:
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(run_s=run_s))
        job = store.submit(new_job(work=1_000.0))
        assert store.forecast(places).ends_s[job.id] == guess


def hear_nothing(store: JobStore, clock: Clock, seconds: float) -> None:
    """Let the time pass, while the workers are looked at as always."""
    for _ in range(math.ceil(seconds / CHECK_INTERVAL_S)):
        clock.now += CHECK_INTERVAL_S
        store.workers.remove_dead()


@pytest.mark.parametrize("shift_s", [0, 60, -60, 3 * 86_400, -3 * 86_400])
def test_worker_is_seen_while_it_speaks_whatever_its_clock(
    shift_s: float, store: JobStore, clock: Clock
) -> None:
    for _ in range(3):
        clock.now += CHECK_INTERVAL_S
        store.workers.report(worker_status("a", clock() + shift_s))
        seen = store.workers.alive()
    assert [worker.id for worker in seen] == ["a"]
    hear_nothing(store, clock, ALIVE_S)
    assert store.workers.alive() == []


def test_failed_worker_is_seen_until_its_next_run(store: JobStore, clock: Clock) -> None:
    failed = worker_status("a", clock(), "failed")
    store.workers.report(failed)
    store.workers.report(worker_status("b", clock()))
    hear_nothing(store, clock, ROW_KEPT_S)
    assert (store.workers.alive(), store.workers.seen()) == ([], [failed])
    again = worker_status("a", clock(), "loading")
    store.workers.report(again)
    assert store.workers.alive() == store.workers.seen() == [again]


def test_failed_worker_that_is_not_started_again_is_forgotten(
    store: JobStore, clock: Clock
) -> None:
    store.workers.report(worker_status("a", clock(), "failed"))
    hear_nothing(store, clock, ROW_KEPT_S + CHECK_INTERVAL_S)
    assert store.workers.seen() == []


def test_first_look_takes_no_old_word_for_a_living_worker(engine: Engine, clock: Clock) -> None:
    JobStore(engine).workers.report(worker_status("dead", clock() - ALIVE_S))
    JobStore(engine).workers.report(worker_status("alive", clock() - ALIVE_S + 1))
    begun = JobStore(engine, clock=clock, steady_clock=clock)
    assert [worker.id for worker in begun.workers.alive()] == ["alive"]


def test_row_of_a_dead_worker_is_removed(store: JobStore, clock: Clock) -> None:
    store.workers.report(worker_status("dead", clock()))
    hear_nothing(store, clock, ROW_KEPT_S)
    store.workers.report(worker_status("alive", clock()))
    assert store.workers.get("dead")
    hear_nothing(store, clock, CHECK_INTERVAL_S)
    assert (store.workers.get("dead"), store.workers.get("alive")) == (
        None,
        worker_status("alive", clock() - CHECK_INTERVAL_S),
    )


def test_workers_last_word_counts(store: JobStore, clock: Clock) -> None:
    store.workers.report(worker_status("a", clock(), "loading"))
    store.workers.report(worker_status("a", clock(), "ready"))
    store.workers.report(worker_status("b", clock() - ALIVE_S))
    assert store.workers.alive() == [worker_status("a", clock())]
    store.workers.remove("a")
    assert store.workers.alive() == []


def test_worker_states_are_a_closed_list(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(IntegrityError):
        connection.execute(insert(workers).values(asdict(worker_status("a", 0, "tired"))))


def insert_jobs(engine: Engine, count: int) -> None:
    rows = [ROW | {"file_prefix": str(index), "params": PARAMS.to_json()} for index in range(count)]
    with engine.begin() as connection:
        connection.execute(insert(jobs), rows)


def claim_all(store: JobStore, worker_id: str, limit: int) -> list[int]:
    claimed: list[int] = []
    while batch := store.claim(worker_id, limit):
        claimed += [job.id for job in batch]
    return claimed


def test_threads_never_share_a_job(store: JobStore, engine: Engine) -> None:
    insert_jobs(engine, 300)
    with ThreadPoolExecutor(6) as threads:
        claims = list(threads.map(lambda n: claim_all(store, f"w{n}", 1 + n), range(6)))
    assert sorted(itertools.chain(*claims)) == list(range(1, 301))


def _claim_in_process(url: str, worker_id: str, start: Any, results: Any) -> None:
    engine = open_engine(url)
    start.wait()
    results.put(claim_all(JobStore(engine), worker_id, 3))
    engine.dispose()


@pytest.mark.process
def test_processes_never_share_a_job(engine: Engine, url: str) -> None:
    insert_jobs(engine, 300)
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=_claim_in_process, args=(url, f"w{n}", start, results))
        for n in range(2)
    ]
    for process in processes:
        process.start()
    claims = [results.get() for _ in processes]
    for process in processes:
        process.join()
    results.close()
    assert sorted(itertools.chain(*claims)) == list(range(1, 301))


def test_two_writers_never_overfill_the_queue(engine: Engine) -> None:
    store = JobStore(engine, max_waiting=20)

    def submit(_: int) -> bool:
        try:
            store.submit(new_job())
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(submit, range(40))) == 20
    assert waiting_in(store) == 20


WRITER = """
import sys
from server.storage.database import open_engine
from server.jobs.store import JobStore
from tests.jobs.test_store import new_job
store = JobStore(open_engine(sys.argv[1]))
while True:
    print(store.submit(new_job()).id, flush=True)
"""


@pytest.mark.process
@pytest.mark.parametrize("acknowledged", [1, 7, 40])
def test_acknowledged_jobs_survive_kill_9(
    acknowledged: int, store: JobStore, engine: Engine, url: str
) -> None:
    command = [sys.executable, "-c", WRITER, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        ids = [int(line) for line in itertools.islice(writer.stdout, acknowledged)]
        writer.send_signal(signal.SIGKILL)
        ids += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert len(ids) >= acknowledged
    assert {job_id for job_id in ids if store.get(job_id) is None} == set()
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"


def test_job_that_was_lost_before_goes_out_alone_and_last(store: JobStore) -> None:
    lost, second, third = (store.submit(new_job()).id for _ in range(3))
    store.claim("dead", 1)
    store.requeue_of("dead")
    assert store.claim("busy", 8, is_idle=False) == [], "it must not join others"
    assert [job.id for job in store.claim("a", 8)] == [lost]
    assert [job.id for job in store.claim("b", 8)] == [second, third]


def test_released_job_keeps_its_attempts(store: JobStore) -> None:
    store.submit(new_job())
    for _ in range(MAX_ATTEMPTS + 1):
        (job,) = store.claim("stopping", 1)
        assert job.attempt == 1
        assert store.release(job)
        assert not store.release(job)
    assert get(store, job.id).state is JobState.QUEUED


def test_release_that_comes_twice_does_not_disturb_the_next_claim(store: JobStore) -> None:
    """As when the first one's answer was lost."""
    store.submit(new_job())
    first = claim_one(store)
    assert store.release(first)
    second = claim_one(store)
    assert not store.release(first)
    assert store.finish(second, [False, False])
    assert not {*first.output_keys} & {*second.output_keys}


@pytest.fixture
def postgres_engine(postgres_server: PostgresServer) -> Iterator[Engine]:
    name = postgres_server.create_migrated()
    engine = open_engine(str(postgres_server.url(name)))
    yield engine
    engine.dispose()
    postgres_server.drop(name)


class TestConcurrentClaims:
    """On PostgreSQL, where a claim skips the rows that another one has locked."""

    pytestmark = pytest.mark.postgres

    @pytest.fixture
    def busy(self, postgres_engine: Engine, clock: Clock) -> JobStore:
        """The store of a worker that holds its share of two jobs; another worker is idle."""
        store = JobStore(postgres_engine, clock=clock, steady_clock=clock)
        store.submit(new_job())
        store.claim("busy", 1)
        for name in ("busy", "idle"):
            store.workers.report(worker_status(name, clock.now))
        return store

    def test_reserved_job_is_not_locked(self, busy: JobStore, postgres_engine: Engine) -> None:
        new = busy.submit(new_job())
        with claims_before_the_end(postgres_engine, "idle") as claimed:
            assert busy.claim("busy", 16, is_idle=False) == []
        assert claimed == [new.id]

    def test_job_for_an_idle_worker_is_not_locked(
        self, busy: JobStore, postgres_engine: Engine
    ) -> None:
        lost = busy.submit(new_job())
        busy.claim("dead", 1)
        busy.requeue_of("dead")
        busy.submit(new_job())
        with claims_before_the_end(postgres_engine, "idle") as claimed:
            assert busy.claim("busy", 16, is_idle=False) == []
        assert claimed == [lost.id]

    def test_no_more_jobs_are_locked_than_claimed(
        self, busy: JobStore, postgres_engine: Engine
    ) -> None:
        waiting = [busy.submit(new_job()).id for _ in range(3)]
        with claims_before_the_end(postgres_engine, "idle") as claimed:
            taken = busy.claim("busy", 16, is_idle=False)
        assert [job.id for job in taken] == waiting[:1]
        assert claimed == waiting[1:]

    def test_job_that_was_locked_in_vain_is_told(
        self, busy: JobStore, postgres_engine: Engine
    ) -> None:
        """Another worker claims the first job between the read and the lock."""
        for _ in range(2):
            busy.submit(new_job())
        first = claim_one(busy, "stopping")
        claim_one(busy, "dead")
        busy.release(first)
        busy.requeue_of("dead")
        other = open_engine(postgres_engine.url.render_as_string(hide_password=False))
        taken: list[Job] = []

        def take_first(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if "SKIP LOCKED" in statement and not taken:
                taken.extend(JobStore(other).claim("idle", 1))

        event.listen(postgres_engine, "before_cursor_execute", take_first)
        told = told_of(postgres_engine, lambda: busy.claim("busy", 16, is_idle=False))
        other.dispose()
        assert [job.id for job in taken] == [first.id]
        assert told == {Topic.QUEUED}


@contextmanager
def claims_before_the_end(engine: Engine, worker_id: str) -> Iterator[list[int]]:
    """Another worker's claim just before this engine's next transaction ends; what it got."""
    other = open_engine(engine.url.render_as_string(hide_password=False))
    claimed: list[int] = []

    def claim(_connection: Any) -> None:
        claimed.extend(job.id for job in JobStore(other).claim(worker_id, 16))

    for end in ("commit", "rollback"):
        event.listen(engine, end, claim)
    yield claimed
    for end in ("commit", "rollback"):
        event.remove(engine, end, claim)
    other.dispose()


class TestShares:
    """A burst goes to all workers that are ready."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def stores(self, engine: Engine, clock: Clock) -> list[JobStore]:
        """Of three workers, which say that they are ready."""
        stores = [JobStore(engine, clock=clock, steady_clock=clock) for _ in "abc"]
        for name, store in zip("abc", stores, strict=True):
            store.workers.report(worker_status(name, clock.now))
        return stores

    def claims(self, stores: list[JobStore]) -> list[int]:
        return [len(store.claim(name, 16)) for name, store in zip("abc", stores, strict=True)]

    def test_eight_jobs_go_to_three_workers(self, stores: list[JobStore]) -> None:
        for _ in range(8):
            stores[0].submit(new_job())
        assert self.claims(stores) == [3, 3, 2]

    def test_who_has_its_share_leaves_the_rest_to_others(self, stores: list[JobStore]) -> None:
        first, second, _ = stores
        for _ in range(8):
            first.submit(new_job())
        assert [len(first.claim("a", 16)), len(first.claim("a", 16, is_idle=False))] == [3, 0]
        assert len(second.claim("b", 2)) == 2, "it has no more places"

    def test_what_others_have_no_room_for_is_taken(
        self, stores: list[JobStore], clock: Clock
    ) -> None:
        first, *_ = stores
        for _ in range(8):
            first.submit(new_job())
        first.claim("a", 16)
        clock.now += FAIR_SHARE_S
        taken = [len(first.claim("a", 16, is_idle=False)) for _ in range(6)]
        assert taken == [1, 1, 1, 1, 1, 0]

    @pytest.mark.parametrize("skew_s", [30 * HOUR_S, 1.0, -1.0, -24 * HOUR_S])
    def test_share_is_kept_whatever_the_wall_clocks(self, skew_s: float, engine: Engine) -> None:
        wall, steady, shared = Clock(), Clock(), Clock()
        server = JobStore(engine, clock=wall, shared_clock=shared)
        worker = JobStore(
            engine,
            clock=Clock(wall.now + skew_s),
            steady_clock=steady,
            shared_clock=shared,
        )
        self.let_b_be_ready(worker, steady)
        server.submit(new_job())
        server.submit(new_job())
        assert len(worker.claim("a", 16)) == 1
        assert worker.claim("a", 16, is_idle=False) == []
        shared.now -= 0.01
        assert worker.claim("a", 16, is_idle=False) == [], "clocks differ a little"
        shared.now += 0.01 + FAIR_SHARE_S
        assert len(worker.claim("a", 16, is_idle=False)) == 1

    def let_b_be_ready(self, store: JobStore, steady: Clock) -> None:
        """Two reports, because the first one is compared with the wall clock."""
        for seen_at in (0.0, 1.0):
            store.workers.report(worker_status("b", seen_at))
            store.workers.alive()
            steady.now += 1

    def test_single_job_goes_to_whoever_looks(self, stores: list[JobStore]) -> None:
        stores[0].submit(new_job())
        assert self.claims(stores) == [1, 0, 0]

    def test_silent_worker_has_no_share(self, stores: list[JobStore], clock: Clock) -> None:
        first, *_ = stores
        assert len(first.workers.alive()) == 3
        for _ in range(int(ALIVE_S / CHECK_INTERVAL_S) + 1):
            clock.now += CHECK_INTERVAL_S
            first.workers.report(worker_status("a", clock.now))
            first.workers.alive()
        for _ in range(8):
            first.submit(new_job())
        assert len(first.claim("a", 16)) == 8

    def test_worker_that_loads_has_no_share(self, stores: list[JobStore], clock: Clock) -> None:
        first, *_ = stores
        first.workers.report(replace(worker_status("b", clock.now), state="loading"))
        for _ in range(8):
            first.submit(new_job())
        assert len(first.claim("a", 16)) == 4


class TestTopics:
    """What PostgreSQL tells listeners of: every listener looks at the database for each word."""

    VERBS: dict[str, tuple[Callable[[JobStore, Job], object], set[Topic]]] = {
        "submit": (lambda store, _: store.submit(new_job()), {Topic.QUEUED}),
        "release": (lambda store, job: store.release(job), {Topic.QUEUED}),
        "worker lost": (lambda store, _: store.requeue_of("w"), {Topic.QUEUED}),
        "finish": (lambda store, job: store.finish(job, []), {Topic.ENDED}),
        "fail": (lambda store, job: store.fail(job, "reason"), {Topic.ENDED}),
        "cancel": (lambda store, job: store.cancel(job.id), {Topic.ENDED}),
        "beat": (lambda store, job: store.heartbeat(job, 1, 2), set()),
        "late finish": (lambda store, job: store.finish(replace(job, fencing_token=0), []), set()),
        "empty claim": (lambda store, _: store.claim("w", 5), set()),
        "report": (lambda store, _: store.workers.report(worker_status("w", 0)), set()),
        "nothing expired": (lambda store, _: store.requeue_expired(), set()),
    }

    pytestmark = pytest.mark.postgres

    @pytest.mark.parametrize("verb", VERBS)
    def test_only_what_has_changed_is_told(self, verb: str, postgres_engine: Engine) -> None:
        store = JobStore(postgres_engine)
        store.submit(new_job())
        job = claim_one(store)
        act, expected = self.VERBS[verb]
        assert told_of(postgres_engine, lambda: act(store, job)) == expected

    def test_claim_of_all_jobs_tells_nobody(self, postgres_engine: Engine) -> None:
        store = JobStore(postgres_engine)
        store.submit(new_job())
        assert told_of(postgres_engine, lambda: store.claim("w", 5)) == set()

    def test_claim_that_leaves_jobs_tells_others(self, postgres_engine: Engine) -> None:
        """They have passed over the rows that it had locked."""
        store = JobStore(postgres_engine)
        store.submit(new_job())
        claim_one(store)
        store.requeue_of("w")  # a job that was lost is given out alone
        store.submit(new_job())
        told = told_of(postgres_engine, lambda: store.claim("w", 5))
        assert told == {Topic.QUEUED}


def told_of(engine: Engine, act: Callable[[], object]) -> set[Topic]:
    """The topics of what is committed by the call."""
    args, options = engine.dialect.create_connect_args(engine.url)
    with psycopg.connect(*args, autocommit=True, **options) as listener:
        for topic in (*Topic, "last"):
            listener.execute(f"LISTEN {topic}".encode())
        act()
        with engine.begin() as connection:
            connection.exec_driver_sql("NOTIFY last")
        # In the order of their commits: what comes after the last word was not told before it.
        heard = [each.channel for each in listener.notifies(timeout=60, stop_after=1)]
        while heard[-1] != "last":
            heard += [each.channel for each in listener.notifies(timeout=60, stop_after=1)]
    return {Topic(channel) for channel in heard[:-1]}


def places(_device: str) -> int:
    """Jobs side by side in a worker."""
    return PLACES

"""Jobs with a deadline: estimated before they are written, and never started late."""

import pytest
from sqlalchemy import Engine, select

from server.core.errors import DeadlineUnmeetable
from server.jobs.estimates import CANDIDATE_ID, Estimator
from server.jobs.job import Failure, JobState, QueueShare
from server.jobs.store import JobStore
from server.storage.database import read_only
from server.storage.tables import deliveries
from tests.support.clocks import Clock
from tests.support.jobs import claim_one, get, new_job, state_of, worker_status

WORK = 1_000_000.0
RUN_S = 10.0


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock=clock, steady_clock=clock, shared_clock=clock)


def one_at_a_time(_device: str) -> int:
    return 1


class TestEnd:
    def test_deadline_is_kept_in_the_row(self, store: JobStore, clock: Clock) -> None:
        job = store.submit(new_job(deadline_s=60.5))
        assert get(store, job.id).deadline_at == clock() + 60.5
        assert store.submit(new_job()).deadline_at is None

    def test_overdue_job_is_never_claimed(self, store: JobStore, clock: Clock) -> None:
        late = store.submit(new_job(deadline_s=10.0))
        free = store.submit(new_job())
        in_time = store.submit(new_job(deadline_s=10.1))
        clock.now += 10.0
        assert [job.id for job in store.claim("w", 5)] == [free.id, in_time.id]
        assert state_of(store, late.id) is JobState.QUEUED
        assert store.claim("w", 5) == []

    def test_overdue_job_is_failed_with_its_webhook(
        self, store: JobStore, clock: Clock, engine: Engine
    ) -> None:
        late = store.submit(new_job(deadline_s=10.0, webhook="http://x/hook"))
        others = [store.submit(new_job(deadline_s=11.0)), store.submit(new_job())]
        assert store.fail_overdue() == []
        clock.now += 10.0
        assert store.fail_overdue() == [late.input_key]
        failed = get(store, late.id)
        assert (failed.state, failed.finished_at) == (JobState.FAILED, clock())
        assert failed.error is not None
        assert Failure.of(failed.error) is Failure.DEADLINE_EXCEEDED
        with read_only(engine) as connection:
            assert [*connection.scalars(select(deliveries.c.job_id))] == [late.id]
        assert store.fail_overdue() == []
        assert {state_of(store, job.id) for job in others} == {JobState.QUEUED}

    def test_job_that_has_begun_goes_on(self, store: JobStore, clock: Clock) -> None:
        store.submit(new_job(deadline_s=10.0))
        job = claim_one(store)
        clock.now += 100.0
        assert store.fail_overdue() == []
        assert store.finish(job, [])

    def test_lost_job_is_not_started_again_after_its_deadline(
        self, store: JobStore, clock: Clock
    ) -> None:
        store.submit(new_job(deadline_s=10.0))
        job = claim_one(store)
        clock.now += 20.0
        store.requeue_of("w")
        assert store.claim("w", 1) == []
        assert store.fail_overdue() == [job.input_key]

    def test_ended_job_keeps_its_end(self, store: JobStore, clock: Clock) -> None:
        job = store.submit(new_job(deadline_s=10.0))
        store.cancel(job.id)
        clock.now += 20.0
        assert store.fail_overdue() == []
        assert state_of(store, job.id) is JobState.CANCELLED


class TestEstimate:
    """A worker makes one job of `WORK` in `RUN_S`."""

    @pytest.fixture(autouse=True)
    def measured(self, store: JobStore, clock: Clock) -> None:
        store.workers.report(worker_status("w", clock()))
        store.submit(new_job(work=WORK))
        job = claim_one(store)
        clock.now += RUN_S
        store.finish(job, [])

    @pytest.fixture
    def estimator(self, store: JobStore, clock: Clock) -> Estimator:
        return Estimator(lambda new: store.forecast(one_at_a_time, new), clock)

    def test_job_that_can_be_in_time_is_let_through(self, estimator: Estimator) -> None:
        estimator.check_deadline(new_job(work=WORK))
        estimator.check_deadline(new_job(work=WORK, deadline_s=1.01 * RUN_S))

    def test_job_that_takes_too_long_is_refused(self, estimator: Estimator) -> None:
        with pytest.raises(DeadlineUnmeetable) as refused:
            estimator.check_deadline(new_job(work=WORK, deadline_s=0.9 * RUN_S))
        assert RUN_S < refused.value.eta_s < 1.5 * RUN_S

    def test_jobs_before_it_count(self, estimator: Estimator, store: JobStore) -> None:
        for _ in range(3):
            store.submit(new_job(work=WORK))
        with pytest.raises(DeadlineUnmeetable) as refused:
            estimator.check_deadline(new_job(work=WORK, deadline_s=3.9 * RUN_S))
        assert refused.value.eta_s > 4 * RUN_S
        estimator.check_deadline(new_job(work=WORK, deadline_s=4.1 * RUN_S))

    def test_place_is_that_of_its_key_and_priority(
        self, estimator: Estimator, store: JobStore
    ) -> None:
        for _ in range(4):
            store.submit(new_job(work=WORK))
        estimator.check_deadline(new_job(key_id="another", work=WORK, deadline_s=2.1 * RUN_S))
        first = QueueShare(priority=1)
        estimator.check_deadline(new_job(work=WORK, share=first, deadline_s=1.1 * RUN_S))

    def test_estimate_is_that_of_the_same_job_once_it_waits(self, store: JobStore) -> None:
        for key in ("a", "b", "b", "b"):
            store.submit(new_job(key_id=key, work=WORK))
        new = new_job(key_id="a", work=WORK / 2)
        before = store.forecast(one_at_a_time, new)
        job = store.submit(new)
        after = store.forecast(one_at_a_time)
        assert before.ends_s[CANDIDATE_ID] == pytest.approx(after.ends_s[job.id])
        assert before.position(CANDIDATE_ID) == after.position(job.id) < 5

    def test_guess_refuses_nothing(
        self, estimator: Estimator, store: JobStore, clock: Clock
    ) -> None:
        store.workers.report(worker_status("w", clock(), "loading"))
        assert not store.forecast(one_at_a_time).is_measured
        estimator.check_deadline(new_job(work=WORK, deadline_s=0.1))


def test_nothing_is_known_before_the_first_job_has_ended(store: JobStore, clock: Clock) -> None:
    store.workers.report(worker_status("w", clock()))
    estimator = Estimator(lambda new: store.forecast(one_at_a_time, new), clock)
    estimator.check_deadline(new_job(work=1e12, deadline_s=0.1))

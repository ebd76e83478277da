"""Clients that wait for a job or follow it: who is woken, when, and by what."""

import asyncio
import math
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from server.jobs.job import Job, JobProgress, JobState
from server.jobs.store import JobStore
from server.jobs.watcher import JobWatcher
from server.storage.database import Topic, open_engine
from server.storage.notify import ChangeSignal
from tests.support.jobs import LONG_S, claim_one, new_job, run_with

KEY = "a holder"


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)


async def wait_while(
    watcher: JobWatcher, job_ids: list[int], act: Callable[[], object]
) -> list[Job | None]:
    """Start waiting for each job, then act; what the waiters got."""
    tasks = [asyncio.create_task(watcher.wait(job_id, LONG_S)) for job_id in job_ids]
    await asyncio.sleep(0)  # each task has begun to wait
    act()
    return await asyncio.gather(*tasks)


@pytest.mark.parametrize("verb", ["finish", "fail", "cancel"])
def test_end_of_a_job_wakes_its_waiter(verb: str, store: JobStore) -> None:
    store.submit(new_job())
    job = claim_one(store)
    verbs: dict[str, tuple[Callable[[], bool], JobState]] = {
        "finish": (lambda: store.finish(job, []), JobState.FINISHED),
        "fail": (lambda: store.fail(job, "reason"), JobState.FAILED),
        "cancel": (lambda: store.cancel(job.id), JobState.CANCELLED),
    }
    act, state = verbs[verb]
    (ended,) = run_with(store, lambda watcher: wait_while(watcher, [job.id], act))
    assert ended is not None
    assert (ended.id, ended.state) == (job.id, state)


def test_every_waiter_gets_its_own_job(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(20)]

    def finish_all() -> None:
        for job in store.claim("w", len(ids)):
            store.finish(job, [])

    ended = run_with(store, lambda watcher: wait_while(watcher, [*ids, *ids], finish_all))
    assert [job and job.id for job in ended] == [*ids, *ids]


def test_end_in_another_connection_pool_is_seen(store: JobStore, url: str) -> None:
    """As a worker's is, which is another process."""
    job_id = store.submit(new_job()).id
    other = open_engine(url)
    (ended,) = run_with(
        store, lambda watcher: wait_while(watcher, [job_id], lambda: JobStore(other).cancel(job_id))
    )
    other.dispose()
    assert ended is not None


def test_job_that_has_ended_before_is_seen(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(2)]
    for job_id in ids:
        store.cancel(job_id)

    async def one_after_the_other(watcher: JobWatcher) -> list[Job | None]:
        return [await watcher.wait(job_id, LONG_S) for job_id in ids]

    assert None not in run_with(store, one_after_the_other)


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_wait_ends_after_its_time(timeout_s: float, store: JobStore) -> None:
    job_id = store.submit(new_job()).id
    assert run_with(store, lambda watcher: watcher.wait(job_id, timeout_s)) is None


def test_release_lets_everybody_go(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(3)]

    async def body(watcher: JobWatcher) -> list[Job | None]:
        return await wait_while(watcher, ids, watcher.release_all)

    assert run_with(store, body) == [None, None, None]


def test_who_comes_after_the_release_does_not_wait(store: JobStore) -> None:
    job_id = store.submit(new_job()).id

    async def body(watcher: JobWatcher) -> Job | None:
        watcher.release_all()
        return await watcher.wait(job_id, LONG_S)

    assert run_with(store, body) is None


async def test_leaving_lets_everybody_go(store: JobStore) -> None:
    job_id = store.submit(new_job()).id
    async with JobWatcher(store, max_streams_per_key=100) as watcher:
        task = asyncio.create_task(watcher.wait(job_id, LONG_S))
        await asyncio.sleep(0)
    assert await task is None


def test_client_that_has_gone_leaves_the_others_waiting(store: JobStore) -> None:
    job_id = store.submit(new_job()).id

    async def body(watcher: JobWatcher) -> Job | None:
        gone, patient = (asyncio.create_task(watcher.wait(job_id, LONG_S)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        store.cancel(job_id)
        return await patient

    assert run_with(store, body) is not None


def test_who_comes_after_the_first_was_woken_is_woken_too(store: JobStore) -> None:
    """Nothing changes any more that would make anybody look."""
    job_id = store.submit(new_job()).id
    store.cancel(job_id)

    async def twice(watcher: JobWatcher) -> list[Job | None]:
        return [await watcher.wait(job_id, LONG_S) for _ in range(2)]

    assert None not in run_with(store, twice)


def test_any_error_of_a_look_is_survived(store: JobStore, engine: Engine) -> None:
    job_id = store.submit(new_job()).id
    store.cancel(job_id)
    with statements_fail(engine, 2):
        assert run_with(store, lambda watcher: watcher.wait(job_id, LONG_S)) is not None


@contextmanager
def statements_fail(engine: Engine, count: int) -> Iterator[None]:
    """The next ones, with an error that nobody foresaw."""
    left = [KeyError("unforeseen")] * count

    def fail(*_arguments: Any) -> None:
        if left:
            raise left.pop()

    event.listen(engine, "before_cursor_execute", fail)
    yield
    event.remove(engine, "before_cursor_execute", fail)
    assert not left


class WatchedStore(JobStore):
    """Tells when the ended jobs could not be looked up."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.failed_look = threading.Event()

    def ended(self, job_ids: Collection[int]) -> list[Job]:
        """As the base class."""
        try:
            return super().ended(job_ids)
        except SQLAlchemyError:
            self.failed_look.set()
            raise


def test_database_that_fails_for_a_while_loses_no_waiter(engine: Engine) -> None:
    store = WatchedStore(engine)
    job_id = store.submit(new_job()).id

    def rename(old: str, new: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))

    async def body(watcher: JobWatcher) -> Job | None:
        rename("jobs", "gone")
        task = asyncio.create_task(watcher.wait(job_id, LONG_S))
        assert await asyncio.to_thread(store.failed_look.wait, LONG_S)
        rename("gone", "jobs")
        store.cancel(job_id)
        return await task

    assert run_with(store, body) is not None


class QuietStore(JobStore):
    """Its change signals report only what they are notified of."""

    def change_signal(self, topic: Topic) -> ChangeSignal:
        """Without the report of every second."""
        return ChangeSignal(self._engine, topic, refresh_s=math.inf)


class TestSubscribing:
    def test_present_state_comes_first_then_each_change(self, store: JobStore) -> None:
        store.submit(new_job())
        job = store.submit(new_job())

        async def body(watcher: JobWatcher) -> list[JobProgress | None]:
            with watcher.subscribe(job.id, KEY) as subscription:
                seen = [await subscription.next(LONG_S)]
                held = {each.id: each for each in await asyncio.to_thread(store.claim, "w", 2)}
                seen.append(await subscription.next(LONG_S))
                await asyncio.to_thread(store.heartbeat, held[job.id], 3, 14)
                seen.append(await subscription.next(LONG_S))
                await asyncio.to_thread(store.cancel, job.id)
                seen.append(await subscription.next(LONG_S))
            return seen

        assert run_with(store, body) == [
            JobProgress(JobState.QUEUED, 0, 0, 0, position=2),
            JobProgress(JobState.RUNNING, 1, 0, 0, None),
            JobProgress(JobState.RUNNING, 1, 3, 14, None),
            JobProgress(JobState.CANCELLED, 1, 3, 14, None),
        ]

    def test_progress_is_read_although_no_signal_reports_it(self, engine: Engine) -> None:
        store = QuietStore(engine)
        store.submit(new_job())
        job = claim_one(store)

        async def body(watcher: JobWatcher) -> list[int]:
            steps = []
            with watcher.subscribe(job.id, KEY) as subscription:
                assert await subscription.next(LONG_S)
                for step in (1, 2):
                    await asyncio.to_thread(store.heartbeat, job, step, 14)
                    progress = await subscription.next(LONG_S)
                    assert progress is not None
                    steps.append(progress.step)
            return steps

        assert run_with(store, body) == [1, 2]

    def test_latecomer_and_others_get_the_present_state(self, store: JobStore) -> None:
        ids = [store.submit(new_job()).id for _ in range(3)]

        async def body(watcher: JobWatcher) -> list[int | None]:
            seen = []
            with ExitStack() as stack:
                for job_id in [*ids, *ids]:
                    subscription = stack.enter_context(watcher.subscribe(job_id, KEY))
                    progress = await subscription.next(LONG_S)
                    assert progress is not None
                    seen.append(progress.position)
            return seen

        assert run_with(store, body) == [1, 2, 3, 1, 2, 3]

    def test_nobody_is_told_without_a_change_of_its_job(self, store: JobStore) -> None:
        quiet, *busy = (store.submit(new_job()).id for _ in range(3))

        async def body(watcher: JobWatcher) -> JobProgress | None:
            with watcher.subscribe(quiet, KEY) as idle:
                assert await idle.next(LONG_S)
                # News goes out in order: what the first change had for `idle` comes before the
                # second's.
                for job_id in busy:
                    with watcher.subscribe(job_id, KEY) as subscription:
                        assert await subscription.next(LONG_S)
                        await asyncio.to_thread(store.cancel, job_id)
                        assert await subscription.next(LONG_S)
                return await idle.next(0)

        assert run_with(store, body) is None

    def test_stopping_ends_every_view_and_later_ones(self, store: JobStore) -> None:
        job_id = store.submit(new_job()).id

        async def body(watcher: JobWatcher) -> list[bool]:
            with watcher.subscribe(job_id, KEY) as early:
                await early.next(LONG_S)
                watcher.release_all()
                assert await early.next(LONG_S) is None
                with watcher.subscribe(job_id, KEY) as late:
                    assert await late.next(LONG_S) is None
                    return [early.is_over, late.is_over]

        assert run_with(store, body) == [True, True]

    def test_what_was_read_before_the_end_does_not_undo_it(self, store: JobStore) -> None:
        job_id = store.submit(new_job()).id

        async def body(watcher: JobWatcher) -> JobProgress | None:
            with watcher.subscribe(job_id, KEY) as subscription:
                progress = await subscription.next(LONG_S)
                assert progress is not None
                subscription.end()
                subscription.publish(replace(progress, step=1))
                assert subscription.is_over
                return await subscription.next(LONG_S)

        assert run_with(store, body) is None

    def test_any_error_of_a_look_is_survived(self, store: JobStore, engine: Engine) -> None:
        job_id = store.submit(new_job()).id

        async def body(watcher: JobWatcher) -> JobProgress | None:
            with watcher.subscribe(job_id, KEY) as subscription:
                return await subscription.next(LONG_S)

        with statements_fail(engine, 2):
            assert run_with(store, body) is not None

    def test_job_that_is_gone_ends_the_view(self, store: JobStore) -> None:
        async def body(watcher: JobWatcher) -> bool:
            with watcher.subscribe(999, KEY) as subscription:
                assert await subscription.next(LONG_S) is None
                return subscription.is_over

        assert run_with(store, body)

    def test_nothing_stays_behind(self, store: JobStore) -> None:
        job_id = store.submit(new_job()).id

        async def body(watcher: JobWatcher) -> int:
            with watcher.subscribe(job_id, KEY), watcher.subscribe(job_id, KEY):
                assert len(watcher) == 2
            return len(watcher)

        assert run_with(store, body) == 0

    def test_database_that_comes_back_is_looked_at_again(self, store: JobStore, url: str) -> None:
        job_id = store.submit(new_job()).id
        other = open_engine(url)

        def rename(old: str, new: str) -> None:
            with other.begin() as connection:
                connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))

        async def body(watcher: JobWatcher) -> JobProgress | None:
            await asyncio.to_thread(rename, "jobs", "away")
            with watcher.subscribe(job_id, KEY) as subscription:
                assert await subscription.next(0.3) is None
                await asyncio.to_thread(rename, "away", "jobs")
                return await subscription.next(LONG_S)

        assert run_with(store, body) is not None
        other.dispose()

"""Requests that wait: who is woken, when, and by what."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import SQLAlchemyError

from server.database import open_engine
from server.job_store import JobStore
from server.jobs import Job, JobState
from server.waiters import Waiters
from tests.test_job_store import claim_one, new_job

LONG_S = 60
"""Longer than any test: who waits so long was not woken."""

R = TypeVar("R")


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)


def run_with(store: JobStore, body: Callable[[Waiters], Awaitable[R]]) -> R:
    """Run `body` on an event loop beside waiters; it must end well before `LONG_S`."""

    async def run() -> R:
        with Waiters(store) as waiters:
            async with asyncio.timeout(LONG_S / 2):
                return await body(waiters)

    return asyncio.run(run())


async def wait_while(
    waiters: Waiters, job_ids: list[int], act: Callable[[], object]
) -> list[Job | None]:
    """Start waiting for each job, then act; what the waiters got."""
    tasks = [asyncio.create_task(waiters.wait(job_id, LONG_S)) for job_id in job_ids]
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
    (ended,) = run_with(store, lambda waiters: wait_while(waiters, [job.id], act))
    assert ended is not None
    assert (ended.id, ended.state) == (job.id, state)


def test_every_waiter_gets_its_own_job(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(20)]

    def finish_all() -> None:
        for job in store.claim("w", len(ids)):
            store.finish(job, [])

    ended = run_with(store, lambda waiters: wait_while(waiters, [*ids, *ids], finish_all))
    assert [job and job.id for job in ended] == [*ids, *ids]


def test_end_in_another_connection_pool_is_seen(store: JobStore, url: str) -> None:
    """As a worker's is, which is another process."""
    job_id = store.submit(new_job()).id
    other = open_engine(url)
    (ended,) = run_with(
        store, lambda waiters: wait_while(waiters, [job_id], lambda: JobStore(other).cancel(job_id))
    )
    other.dispose()
    assert ended is not None


def test_job_that_has_ended_before_is_seen(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(2)]
    for job_id in ids:
        store.cancel(job_id)

    async def one_after_the_other(waiters: Waiters) -> list[Job | None]:
        return [await waiters.wait(job_id, LONG_S) for job_id in ids]

    assert None not in run_with(store, one_after_the_other)


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_wait_ends_after_its_time(timeout_s: float, store: JobStore) -> None:
    job_id = store.submit(new_job()).id
    assert run_with(store, lambda waiters: waiters.wait(job_id, timeout_s)) is None


def test_release_lets_everybody_go(store: JobStore) -> None:
    ids = [store.submit(new_job()).id for _ in range(3)]

    async def body(waiters: Waiters) -> list[Job | None]:
        return await wait_while(waiters, ids, waiters.release_all)

    assert run_with(store, body) == [None, None, None]


def test_who_comes_after_the_release_does_not_wait(store: JobStore) -> None:
    job_id = store.submit(new_job()).id

    async def body(waiters: Waiters) -> Job | None:
        waiters.release_all()
        return await waiters.wait(job_id, LONG_S)

    assert run_with(store, body) is None


def test_leaving_lets_everybody_go(store: JobStore) -> None:
    job_id = store.submit(new_job()).id

    async def run() -> Job | None:
        with Waiters(store) as waiters:
            task = asyncio.create_task(waiters.wait(job_id, LONG_S))
            await asyncio.sleep(0)
        return await task

    assert asyncio.run(run()) is None


def test_client_that_has_gone_leaves_the_others_waiting(store: JobStore) -> None:
    job_id = store.submit(new_job()).id

    async def body(waiters: Waiters) -> Job | None:
        gone, patient = (asyncio.create_task(waiters.wait(job_id, LONG_S)) for _ in range(2))
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

    async def twice(waiters: Waiters) -> list[Job | None]:
        return [await waiters.wait(job_id, LONG_S) for _ in range(2)]

    assert None not in run_with(store, twice)


def test_any_error_of_a_look_is_survived(store: JobStore, engine: Engine) -> None:
    job_id = store.submit(new_job()).id
    store.cancel(job_id)
    with statements_fail(engine, 2):
        assert run_with(store, lambda waiters: waiters.wait(job_id, LONG_S)) is not None


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


def test_waiter_whose_loop_has_ended_does_not_keep_the_others_waiting(store: JobStore) -> None:
    job_id = store.submit(new_job()).id

    async def body(waiters: Waiters) -> Job | None:
        def begin_and_end() -> asyncio.Task[Job | None]:
            loop = asyncio.new_event_loop()
            task = loop.create_task(waiters.wait(job_id, LONG_S))
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()
            return task

        gone = await asyncio.to_thread(begin_and_end)
        task = asyncio.create_task(waiters.wait(job_id, LONG_S))
        await asyncio.sleep(0)
        store.cancel(job_id)
        ended = await task
        gone.get_coro().close()
        return ended

    assert run_with(store, body) is not None


class WatchedStore(JobStore):
    """Tells when the ended jobs could not be looked up."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.failed_look = threading.Event()

    def ended(self, job_ids: Sequence[int]) -> list[Job]:
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

    async def body(waiters: Waiters) -> Job | None:
        rename("jobs", "gone")
        task = asyncio.create_task(waiters.wait(job_id, LONG_S))
        assert await asyncio.to_thread(store.failed_look.wait, LONG_S)
        rename("gone", "jobs")
        store.cancel(job_id)
        return await task

    assert run_with(store, body) is not None

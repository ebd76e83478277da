"""Calls in threads: results, errors, context, and what cancelling leaves."""

import asyncio
import contextvars
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from server.threads import Threads, all_of, settled

WAIT_S = 60
NAME = contextvars.ContextVar("NAME", default="nobody")


def test_result_error_and_context_come_and_go() -> None:
    async def call() -> tuple[str, int]:
        NAME.set("caller")
        with Threads(1, "test") as threads:
            with pytest.raises(ValueError, match="x"):
                await threads.call(int, "x")
            return await threads.call(NAME.get), await threads.call(int, "ff", base=16)

    assert asyncio.run(call()) == ("caller", 255)


def test_so_many_at_a_time() -> None:
    both = threading.Barrier(2, timeout=WAIT_S)

    async def call() -> list[int]:
        with Threads(2, "test") as threads:
            return sorted(await asyncio.gather(*(threads.call(both.wait) for _ in range(2))))

    assert asyncio.run(call()) == [0, 1]


def test_leaving_waits_for_what_has_begun_though_its_caller_is_gone() -> None:
    has_begun, may_end, done = threading.Event(), threading.Event(), []

    def work() -> None:
        has_begun.set()
        assert may_end.wait(WAIT_S)
        done.append("work")

    async def call() -> None:
        with Threads(1, "test") as threads:
            task = asyncio.create_task(threads.call(work))
            late = asyncio.create_task(threads.call(done.append, "late"))
            await asyncio.to_thread(has_begun.wait, WAIT_S)
            for each in (task, late):
                each.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await each
            may_end.set()
        assert done == ["work"]

    asyncio.run(call())


def test_settled_waits_for_all_and_raises_nothing() -> None:
    async def wait() -> list[str]:
        order: list[str] = []
        futures: list[Future[None]] = [Future() for _ in range(3)]
        waiting = asyncio.create_task(settled(*futures, first=lambda: order.append("first")))
        with ThreadPoolExecutor(1) as thread:
            for number, future in enumerate(futures):
                await asyncio.sleep(0)
                assert not waiting.done()
                end = future.set_exception if number == 1 else future.set_result
                await asyncio.wrap_future(
                    thread.submit(end, KeyError() if number == 1 else None)  # type: ignore[arg-type]
                )
            await waiting
        return [*order, "then"]

    assert asyncio.run(wait()) == ["first", "then"]


def test_settled_asks_for_more_once_the_first_are_there() -> None:
    async def wait() -> None:
        first: Future[None] = Future()
        later: list[Future[None]] = []
        waiting = asyncio.create_task(settled(first, more=lambda: later))
        later.append(Future())
        await asyncio.sleep(0)
        first.set_exception(KeyError())
        await asyncio.sleep(0)
        assert not waiting.done()
        later[0].set_result(None)
        await waiting
        await settled(first, more=list)

    asyncio.run(wait())


def test_what_comes_first_is_done_though_the_caller_is_gone() -> None:
    async def give_up() -> None:
        future: Future[None] = Future()
        is_done = asyncio.Event()
        waiting = asyncio.create_task(settled(future, first=is_done.set))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not is_done.is_set()
        future.set_result(None)
        async with asyncio.timeout(WAIT_S):
            await is_done.wait()

    asyncio.run(give_up())


def test_results_of_a_loop_that_has_ended_are_dropped() -> None:
    future: Future[None] = Future()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await settled(future)

    asyncio.run(give_up())
    future.set_result(None)
    assert future.done()


@pytest.mark.parametrize("is_failing", [False, True])
def test_all_of_waits_for_more_and_tells_of_its_failure(is_failing: bool) -> None:
    first: Future[None] = Future()
    later: list[Future[None]] = []
    together = all_of([first], more=lambda: later)
    later.append(Future())
    first.set_result(None)
    assert not together.done()
    if is_failing:
        later[0].set_exception(KeyError("later"))
        assert isinstance(together.exception(0), KeyError)
    else:
        later[0].set_result(None)
        assert together.result(0) is None


def test_all_of_is_there_with_the_last_and_tells_of_a_failure() -> None:
    first, second, third = (Future[None]() for _ in range(3))
    together = all_of([first, second, third])
    third.set_exception(KeyError("third"))
    first.set_result(None)
    assert not together.done()
    second.set_result(None)
    assert isinstance(together.exception(0), KeyError)
    assert all_of([first, second]).result(0) is None

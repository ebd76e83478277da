"""Calls in threads: results, errors, context, and what cancelling leaves."""

import asyncio
import contextvars
import threading

import pytest

from server.threads import Threads

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

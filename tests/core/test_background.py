"""Tasks beside the server: started again, named while they fail, stopped at the end."""

import asyncio
from collections.abc import Callable

import pytest

from server.core.background import STEADY_S, Background
from tests.support.clocks import Clock

WAIT_S = 20
AT_ONCE = (0.0, 0.0)


def run_failing(times: int, fail: Callable[[], None]) -> tuple[int, list[str], list[str]]:
    """Calls of a task that fails so often and then stays; who was failing then, and who later."""

    async def body() -> tuple[int, list[str], list[str]]:
        calls = 0
        clock = Clock()
        is_steady = asyncio.Event()

        async def task() -> None:
            nonlocal calls
            calls += 1
            if calls <= times:
                fail()
                return
            is_steady.set()
            await asyncio.Event().wait()

        async with asyncio.timeout(WAIT_S), Background(AT_ONCE, clock) as background:
            background.start("webhooks", task)
            await is_steady.wait()
            failing = background.failing()
            clock.now += STEADY_S
            return calls, failing, background.failing()

    return asyncio.run(body())


def refuse() -> None:
    raise KeyError("no such thing")


def end() -> None:
    """Returning is as bad: the task is to stay."""


@pytest.mark.parametrize("fail", [refuse, end])
def test_task_that_ends_is_started_again_and_told_of(
    fail: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    assert run_failing(2, fail) == (3, ["webhooks"], [])
    assert caplog.text.count("background task") == 2
    assert "webhooks" in caplog.text


def test_task_that_stays_is_not_told_of() -> None:
    assert run_failing(0, end) == (1, [], [])


def test_leaving_cancels_and_waits() -> None:
    has_cleaned_up = False

    async def body() -> None:
        started = asyncio.Event()

        async def task() -> None:
            nonlocal has_cleaned_up
            try:
                started.set()
                await asyncio.Event().wait()
            finally:
                has_cleaned_up = True

        async with Background() as background:
            background.start("sender", task)
            await started.wait()

    asyncio.run(body())
    assert has_cleaned_up


async def test_pauses_grow_up_to_the_longest() -> None:
    """Ten failures with pauses of 0.01, 0.02 and then 0.02 s take at least their sum."""
    loop = asyncio.get_running_loop()
    times: list[float] = []
    is_done = asyncio.Event()

    async def task() -> None:
        times.append(loop.time())
        if len(times) == 10:
            is_done.set()
            await asyncio.Event().wait()

    async with asyncio.timeout(WAIT_S), Background((0.01, 0.02)) as background:
        background.start("sender", task)
        await is_done.wait()
    assert (times[-1] - times[0]) >= 0.01 + 8 * 0.02 - 0.01

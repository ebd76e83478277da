"""Slots that are shared out in turn."""

import asyncio
import threading
from collections import Counter
from functools import partial

import pytest

from server.core.fairness import FairSemaphore, KeyedCounter, NoSlot


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Crowd:
    """Tasks that hold a slot until they are let go. held: who has one, in order."""

    def __init__(self, slots: FairSemaphore) -> None:
        self._slots = slots
        self.held: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._leave = asyncio.Semaphore(0)

    def join(self, owner: str) -> asyncio.Task[None]:
        async def hold() -> None:
            async with self._slots.held_by(owner):
                self.held.append(owner)
                await self._leave.acquire()

        self.tasks.append(asyncio.create_task(hold()))
        return self.tasks[-1]

    async def let_go(self, count: int = 1) -> None:
        """The ones that came in first leave."""
        for _ in range(count):
            self._leave.release()
        await settle()


async def test_one_owner_cannot_take_all_slots() -> None:
    crowd = Crowd(FairSemaphore(4, 3))
    for owner in ["greedy"] * 10 + ["modest"]:
        crowd.join(owner)
    await settle()
    assert Counter(crowd.held) == {"greedy": 3, "modest": 1}
    await crowd.let_go(11)
    assert Counter(crowd.held) == {"greedy": 10, "modest": 1}


async def test_nobody_overtakes_those_who_wait() -> None:
    crowd = Crowd(FairSemaphore(2, 1))
    for owner in "abc":
        crowd.join(owner)
    await settle()
    crowd.tasks[0].cancel()
    await asyncio.sleep(0)  # a's slot is c's now, and c has not run yet
    crowd.join("d")
    await settle()
    assert crowd.held == ["a", "b", "c"]
    await crowd.let_go()
    assert crowd.held == ["a", "b", "c", "d"]


async def test_released_slots_go_round() -> None:
    crowd = Crowd(FairSemaphore(1, 1))
    for owner in "aaaabbc":
        crowd.join(owner)
    await settle()
    await crowd.let_go(7)
    # The first takes the free slot; then a is first in line, and from there on they take turns.
    assert crowd.held == list("aabcaba")


async def test_slots_of_who_gives_up_are_free_again() -> None:
    crowd = Crowd(FairSemaphore(1, 1))
    holder, waiting = crowd.join("a"), crowd.join("a")
    await settle()
    waiting.cancel()
    holder.cancel()
    await settle()
    crowd.join("b")
    await settle()
    assert [task.cancelled() for task in (holder, waiting)] == [True, True]
    await crowd.let_go()
    assert crowd.held == ["a", "b"]


async def test_slot_handed_to_who_is_just_cancelled_is_not_lost() -> None:
    crowd = Crowd(FairSemaphore(1, 1))
    crowd.join("a")
    unlucky = crowd.join("b")
    await settle()
    crowd.tasks[0].cancel()
    await asyncio.sleep(0)  # a's slot is b's now, and b has not run yet
    unlucky.cancel()
    await settle()
    crowd.join("c")
    await settle()
    await crowd.let_go()
    assert crowd.held[-1] == "c"


async def test_timeout_ends_and_the_slot_goes_to_the_next() -> None:
    slots = FairSemaphore(1, 1)
    await slots.acquire("a", timeout_s=60)
    with pytest.raises(NoSlot):
        await slots.acquire("b", timeout_s=0)
    waiting = asyncio.create_task(slots.acquire("c", timeout_s=60))
    await settle()
    assert not waiting.done()
    slots.release("a")
    await waiting
    with pytest.raises(NoSlot):
        await slots.acquire("b", timeout_s=0)
    slots.release("c")
    await slots.acquire("b", timeout_s=0)


async def test_slot_is_not_handed_to_who_gives_up_at_the_same_moment() -> None:
    crowd = Crowd(FairSemaphore(1, 1))
    holder, waiting = crowd.join("a"), crowd.join("b")
    crowd.join("c")
    await settle()
    holder.cancel()
    waiting.cancel()
    await settle()
    await crowd.let_go()
    assert [task.cancelled() for task in crowd.tasks] == [True, True, False]
    assert crowd.held == ["a", "c"]


@pytest.mark.parametrize("count", [1, 3])
async def test_failing_holder_releases_its_slot(count: int) -> None:
    slots = FairSemaphore(count, count)
    for _ in range(10):
        with pytest.raises(ValueError, match="x"):
            async with asyncio.timeout(60), slots.held_by("a"):
                raise ValueError("x")


async def test_slot_of_a_thread_is_held_until_the_thread_is_free() -> None:
    is_over = threading.Event()
    slots = FairSemaphore(1, 1)
    await slots.acquire("a")
    lost = asyncio.create_task(slots.use_in_thread("a", partial(is_over.wait, 60)))
    await settle()
    lost.cancel()
    taking = asyncio.create_task(slots.acquire("b"))
    await settle()
    assert lost.cancelled()
    assert not taking.done()
    is_over.set()
    async with asyncio.timeout(60):
        await taking


async def test_slot_of_a_thread_is_released_once() -> None:
    slots = FairSemaphore(1, 1)
    await slots.acquire("a")
    result = await slots.use_in_thread("a", lambda: 2)
    await slots.acquire("a")
    another = asyncio.create_task(slots.acquire("b"))
    await settle()
    assert not another.done()
    another.cancel()
    assert result == 2


def test_count_of_each_owner_is_limited() -> None:
    inside = KeyedCounter()
    with inside.held_by("a", 2), inside.held_by("a", 2):
        with pytest.raises(NoSlot), inside.held_by("a", 2):
            raise AssertionError
        with inside.held_by("b", 1):
            pass
        with inside.held_by("a", 3):
            pass
    with inside.held_by("a", 1), pytest.raises(NoSlot), inside.held_by("a", 1):
        raise AssertionError

"""Places that are shared out in turn."""

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from server.slots import Headcount, NoPlace, Slots


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


class Crowd:
    """Tasks that hold a place until they are let go. held: who has one, in order."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.held: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._leave = asyncio.Semaphore(0)

    def join(self, owner: str) -> asyncio.Task[None]:
        async def hold() -> None:
            async with self._slots.taken_by(owner):
                self.held.append(owner)
                await self._leave.acquire()

        self.tasks.append(asyncio.create_task(hold()))
        return self.tasks[-1]

    async def let_go(self, count: int = 1) -> None:
        """The ones that came in first leave."""
        for _ in range(count):
            self._leave.release()
        await settle()


def test_one_owner_cannot_take_all_places() -> None:
    async def run() -> None:
        crowd = Crowd(Slots(4, 3))
        for owner in ["greedy"] * 10 + ["modest"]:
            crowd.join(owner)
        await settle()
        assert Counter(crowd.held) == {"greedy": 3, "modest": 1}
        await crowd.let_go(11)
        assert Counter(crowd.held) == {"greedy": 10, "modest": 1}

    asyncio.run(run())


def test_nobody_overtakes_those_who_wait() -> None:
    async def run() -> None:
        slots = Slots(2, 1)
        assert slots.take_at_once("a")
        assert not slots.take_at_once("a"), "has its share"
        waiting = asyncio.create_task(slots.take("a"))
        await settle()
        assert not slots.take_at_once("b")
        slots.give_back("a")
        await waiting
        assert slots.take_at_once("b")
        assert not slots.take_at_once("c"), "none is left"

    asyncio.run(run())


def test_freed_places_go_round() -> None:
    async def run() -> list[str]:
        crowd = Crowd(Slots(1, 1))
        for owner in "aaaabbc":
            crowd.join(owner)
        await settle()
        await crowd.let_go(7)
        return crowd.held

    # The first takes the free place; then a is first in line, and from there on they take turns.
    assert asyncio.run(run()) == list("aabcaba")


def test_places_of_who_gives_up_are_free_again() -> None:
    async def run() -> list[str]:
        crowd = Crowd(Slots(1, 1))
        holder, waiting = crowd.join("a"), crowd.join("a")
        await settle()
        waiting.cancel()
        holder.cancel()
        await settle()
        crowd.join("b")
        await settle()
        assert [task.cancelled() for task in (holder, waiting)] == [True, True]
        await crowd.let_go()
        return crowd.held

    assert asyncio.run(run()) == ["a", "b"]


def test_place_handed_to_who_is_just_cancelled_is_not_lost() -> None:
    async def run() -> list[str]:
        crowd = Crowd(Slots(1, 1))
        crowd.join("a")
        unlucky = crowd.join("b")
        await settle()
        crowd.tasks[0].cancel()
        await asyncio.sleep(0)  # a's place is b's now, and b has not run yet
        unlucky.cancel()
        await settle()
        crowd.join("c")
        await settle()
        await crowd.let_go()
        return crowd.held

    assert asyncio.run(run())[-1] == "c"


def test_patience_ends_and_the_place_goes_to_the_next() -> None:
    async def run() -> None:
        slots = Slots(1, 1)
        await slots.take("a", patience_s=60)
        with pytest.raises(NoPlace):
            await slots.take("b", patience_s=0)
        waiting = asyncio.create_task(slots.take("c", patience_s=60))
        await settle()
        assert not waiting.done()
        slots.give_back("a")
        await waiting
        assert not slots.take_at_once("b")
        slots.give_back("c")
        assert slots.take_at_once("b")

    asyncio.run(run())


def test_place_is_not_handed_to_who_gives_up_at_the_same_moment() -> None:
    async def run() -> list[str]:
        crowd = Crowd(Slots(1, 1))
        holder, waiting = crowd.join("a"), crowd.join("b")
        crowd.join("c")
        await settle()
        holder.cancel()
        waiting.cancel()
        await settle()
        await crowd.let_go()
        assert [task.cancelled() for task in crowd.tasks] == [True, True, False]
        return crowd.held

    assert asyncio.run(run()) == ["a", "c"]


@pytest.mark.parametrize("places", [1, 3])
def test_failing_holder_gives_its_place_back(places: int) -> None:
    async def run() -> None:
        slots = Slots(places, places)
        for _ in range(10):
            with pytest.raises(ValueError, match="x"):
                async with asyncio.timeout(60), slots.taken_by("a"):
                    raise ValueError("x")

    asyncio.run(run())


def test_place_of_a_thread_is_held_until_the_thread_is_free() -> None:
    is_over = threading.Event()

    async def run() -> None:
        slots = Slots(1, 1)
        with ThreadPoolExecutor(1) as threads:
            await slots.take("a")
            lost = asyncio.create_task(slots.use_in_thread("a", threads, partial(is_over.wait, 60)))
            await settle()
            lost.cancel()
            taking = asyncio.create_task(slots.take("b"))
            await settle()
            assert lost.cancelled()
            assert not taking.done()
            is_over.set()
            async with asyncio.timeout(60):
                await taking

    asyncio.run(run())


def test_place_of_a_thread_is_given_back_once() -> None:
    async def run() -> int:
        slots = Slots(1, 1)
        with ThreadPoolExecutor(1) as threads:
            await slots.take("a")
            result = await slots.use_in_thread("a", threads, lambda: 2)
            await slots.take("a")
            another = asyncio.create_task(slots.take("b"))
            await settle()
            assert not another.done()
            another.cancel()
        return result

    assert asyncio.run(run()) == 2


def test_headcount_of_each_owner_is_limited() -> None:
    inside = Headcount()
    with inside.entered_by("a", 2), inside.entered_by("a", 2):
        with pytest.raises(NoPlace), inside.entered_by("a", 2):
            raise AssertionError
        with inside.entered_by("b", 1):
            pass
        with inside.entered_by("a", 3):
            pass
    with inside.entered_by("a", 1), pytest.raises(NoPlace), inside.entered_by("a", 1):
        raise AssertionError

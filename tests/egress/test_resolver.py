"""Names to addresses: what slow ones cost, and whom."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from server.egress.resolver import THREADS, THREADS_PER_OWNER, NameResolver, numeric_addresses

BOUND_S = 60


class SlowNames:
    """A resolver that knows every name, and answers those of slow.example when it is let."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._is_let = threading.Event()

    def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked[host] += 1
        if host.endswith("slow.example"):
            self._is_let.wait(BOUND_S)
        return ["8.8.8.8"]

    def let(self) -> None:
        self._is_let.set()


@contextmanager
def slow_names() -> Iterator[tuple[SlowNames, NameResolver]]:
    resolver = SlowNames()
    lookups = NameResolver(resolver)
    try:
        yield resolver, lookups
    finally:
        resolver.let()


async def give_up_on(lookups: NameResolver, owner: str, count: int) -> None:
    """Ask for slow names, and stop waiting for them."""
    finds = [
        asyncio.create_task(lookups.resolve(f"{number}.slow.example", 80, owner))
        for number in range(count)
    ]
    for _ in range(5):
        await asyncio.sleep(0)
    for each in finds:
        each.cancel()
    await asyncio.gather(*finds, return_exceptions=True)


async def test_slow_names_of_one_owner_hold_up_no_other() -> None:
    with slow_names() as (resolver, lookups):
        await give_up_on(lookups, "greedy", 4 * THREADS)
        async with asyncio.timeout(BOUND_S):
            assert await lookups.resolve("quick.example", 80, "modest") == ["8.8.8.8"]
            # Threads that are slow to begin have not asked yet.
            while resolver.asked.total() <= THREADS_PER_OWNER:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert resolver.asked.total() == THREADS_PER_OWNER + 1


async def test_place_is_held_until_its_thread_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.egress.resolver.TIMEOUT_S", 0.05)
    with slow_names() as (resolver, lookups):
        await give_up_on(lookups, "greedy", THREADS_PER_OWNER)
        with pytest.raises(TimeoutError):
            await lookups.resolve("quick.example", 80, "greedy")
        assert resolver.asked["quick.example"] == 0
        resolver.let()
        monkeypatch.setattr("server.egress.resolver.TIMEOUT_S", BOUND_S)
        assert await lookups.resolve("quick.example", 80, "greedy") == ["8.8.8.8"]


async def test_slow_name_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.egress.resolver.TIMEOUT_S", 0.05)
    with slow_names() as (_, lookups), pytest.raises(TimeoutError):
        await lookups.resolve("slow.example", 80, "k")


@pytest.mark.parametrize("error", [OSError, UnicodeError])
async def test_failure_is_told(error: type[Exception]) -> None:
    def fail(_host: str, _port: int) -> Sequence[str]:
        raise error

    lookups = NameResolver(fail)
    for _ in range(2 * THREADS_PER_OWNER):
        with pytest.raises(error):
            await lookups.resolve("a.example", 80, "k")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f000001", "::1", "::ffff:1.2.3.4"])
async def test_numbers_are_read_without_a_lookup(host: str) -> None:
    assert len(numeric_addresses(host, 80)) == 1
    with slow_names() as (resolver, lookups):
        assert await lookups.resolve(host, 80, "k") == numeric_addresses(host, 80)
        assert not resolver.asked


@pytest.mark.parametrize("host", ["localhost", "a.example", "1.2.3.4.example", "", "a" * 300])
def test_names_are_no_numbers(host: str) -> None:
    assert numeric_addresses(host, 80) == [] or host == ""

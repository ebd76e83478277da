"""A limited number of slots, shared out fairly among their owners, such as API keys."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import anyio
import anyio.to_thread

R = TypeVar("R")


class NoSlot(Exception):
    """There is none for this owner now."""


class FairSemaphore:
    """At most `total` slots, and at most `per_owner` of them one owner's.

    A released slot goes to the owners in turn (round robin), not to whoever has queued most. For
    one event loop.
    """

    def __init__(self, total: int, per_owner: int) -> None:
        self._free = total
        self._per_owner = per_owner
        self._held: Counter[str] = Counter()
        # In the order of their turns.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def held_by(self, owner: str) -> AsyncIterator[None]:
        """A slot for the length of the block; waits for one."""
        await self.acquire(owner)
        try:
            yield
        finally:
            self.release(owner)

    async def acquire(self, owner: str, timeout_s: float | None = None) -> None:
        """Wait for a slot. Raises: NoSlot after the timeout."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._hand_out()
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except (TimeoutError, asyncio.CancelledError) as error:
            if turn.cancelled():
                self._leave_queue(owner, turn)
                self._hand_out()
            else:  # the slot was handed over in the same turn of the event loop
                self.release(owner)
            if isinstance(error, TimeoutError):
                raise NoSlot from error
            raise

    def release(self, owner: str) -> None:
        """Give a slot of this owner's to the next."""
        self._free += 1
        decrement(self._held, owner)
        self._hand_out()

    async def use_in_thread(self, owner: str, function: Callable[[], R]) -> R:
        """Call a function in a thread, in a slot that was acquired.

        The slot is released when the thread is done: a caller that is cancelled earlier cannot stop
        the thread.
        """
        # The slots are the limit here. The default limiter is shared with everything else, and
        # threads that hang would use it up.
        limiter = anyio.CapacityLimiter(1)
        call = asyncio.create_task(anyio.to_thread.run_sync(function, limiter=limiter))
        call.add_done_callback(lambda _: self.release(owner))
        return await asyncio.shield(call)

    def _hand_out(self) -> None:
        for owner, turns in list(self._waiting.items()):
            if not self._free:
                return
            # One that was cancelled just now leaves by itself, and hands out again.
            if self._held[owner] < self._per_owner and not turns[0].cancelled():
                del self._waiting[owner]
                turn = turns.popleft()
                if turns:
                    self._waiting[owner] = turns  # last in line again
                self._free -= 1
                self._held[owner] += 1
                turn.set_result(None)

    def _leave_queue(self, owner: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[owner]
        turns.remove(turn)
        if not turns:
            del self._waiting[owner]


class KeyedCounter:
    """How many slots each owner holds, where nobody waits for one. For one event loop."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    @contextmanager
    def held_by(self, owner: str, limit: int) -> Iterator[None]:
        """A slot for the length of the block. Raises: NoSlot where the owner holds `limit`."""
        if self._held[owner] >= limit:
            raise NoSlot
        self._held[owner] += 1
        try:
            yield
        finally:
            decrement(self._held, owner)


def decrement(counts: Counter[str], owner: str) -> None:
    """Count one less; an owner at zero is removed, so that the counter cannot grow for ever."""
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]

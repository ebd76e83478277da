"""Fair sharing of a limited number of slots among owners, such as API keys."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import anyio
import anyio.to_thread

R = TypeVar("R")


class NoSlot(Exception):
    """No slot is free for this owner."""


class FairSemaphore:
    """A semaphore of `total` slots, of which one owner holds at most `per_owner`.

    A released slot goes to the waiting owners in turn (round robin), so that an owner with many
    waiting calls does not delay the others. For one event loop.
    """

    def __init__(self, total: int, per_owner: int) -> None:
        self._free = total
        self._per_owner = per_owner
        self._held: Counter[str] = Counter()
        # Owners in the order of their turns.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def held_by(self, owner: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it for the length of the block."""
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
            else:  # the slot was assigned in the same iteration of the event loop
                self.release(owner)
            if isinstance(error, TimeoutError):
                raise NoSlot from error
            raise

    def waiting(self, owner: str) -> int:
        """How many calls of this owner wait for a slot."""
        return len(self._waiting.get(owner, ()))

    def release(self, owner: str) -> None:
        """Release a slot of this owner, for the next waiting call."""
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
            # A call that was just cancelled removes itself, and hands out again.
            if self._held[owner] < self._per_owner and not turns[0].cancelled():
                del self._waiting[owner]
                turn = turns.popleft()
                if turns:
                    self._waiting[owner] = turns  # the owner goes to the end of the queue
                self._free -= 1
                self._held[owner] += 1
                turn.set_result(None)

    def _leave_queue(self, owner: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[owner]
        turns.remove(turn)
        if not turns:
            del self._waiting[owner]


class KeyedCounter:
    """A limit per owner that refuses at once instead of waiting. For one event loop."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    @contextmanager
    def held_by(self, owner: str, limit: int) -> Iterator[None]:
        """Hold a slot for the length of the block. Raises: NoSlot if the owner holds `limit`."""
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

"""A limited number of places, shared out fairly among those who ask."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

R = TypeVar("R")


class NoPlace(Exception):
    """There is none for this owner now."""


class Slots:
    """At most `total` places, and at most `per_owner` of them one owner's.

    A freed place goes to the owners in turn, not to whoever has queued most. For one event loop.
    """

    def __init__(self, total: int, per_owner: int) -> None:
        self._free = total
        self._threads = CapacityLimiter(total)
        self._per_owner = per_owner
        self._taken: Counter[str] = Counter()
        # In the order of their turns.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def taken_by(self, owner: str) -> AsyncIterator[None]:
        """A place for the length of the block; waits for one."""
        await self.take(owner)
        try:
            yield
        finally:
            self.give_back(owner)

    def take_at_once(self, owner: str) -> bool:
        """A place until it is given back, where there is one and nobody waits."""
        is_free = bool(self._free) and not self._waiting and self._taken[owner] < self._per_owner
        if is_free:
            self._free -= 1
            self._taken[owner] += 1
        return is_free

    async def take(self, owner: str, patience_s: float | None = None) -> None:
        """A place until it is given back; waits for one. Raises: NoPlace, when patience ends."""
        if self.take_at_once(owner):
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._hand_out()
        # By hand: for a call that finds its place soon, a timeout of asyncio's is half the work.
        timer = None if patience_s is None else loop.call_later(patience_s, self._end, owner, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(owner, turn)
                self._hand_out()
            else:
                self.give_back(owner)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _end(self, owner: str, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            self._forget(owner, turn)
            turn.set_exception(NoPlace())

    def give_back(self, owner: str) -> None:
        """A place of this owner's, for the next."""
        self._free += 1
        leave(self._taken, owner)
        self._hand_out()

    async def use_in_thread(self, owner: str, function: Callable[[], R]) -> R:
        """Call a function in a thread, in a place that was taken.

        The place is given back when the thread is done: a caller that gives up earlier cannot stop
        the thread.
        """

        def end(task: asyncio.Task[R]) -> None:
            self.give_back(owner)
            if not task.cancelled():
                task.exception()  # nobody may be there any longer to retrieve it

        # A task of its own, which goes on when the caller is cancelled.
        task = asyncio.create_task(to_thread.run_sync(function, limiter=self._threads))
        task.add_done_callback(end)
        return await asyncio.shield(task)

    def _hand_out(self) -> None:
        for owner, turns in list(self._waiting.items()):
            if not self._free:
                return
            # One that was cancelled just now leaves by itself, and hands out again.
            if self._taken[owner] < self._per_owner and not turns[0].cancelled():
                del self._waiting[owner]
                turn = turns.popleft()
                if turns:
                    self._waiting[owner] = turns  # last in line again
                self._free -= 1
                self._taken[owner] += 1
                turn.set_result(None)

    def _forget(self, owner: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[owner]
        turns.remove(turn)
        if not turns:
            del self._waiting[owner]


class Headcount:
    """How many of each owner are inside, where nobody waits at the door. For one event loop."""

    def __init__(self) -> None:
        self._inside: Counter[str] = Counter()

    @contextmanager
    def entered_by(self, owner: str, limit: int) -> Iterator[None]:
        """One more for the length of the block. Raises: NoPlace where the limit is reached."""
        if self._inside[owner] >= limit:
            raise NoPlace
        self._inside[owner] += 1
        try:
            yield
        finally:
            leave(self._inside, owner)


def leave(counts: Counter[str], owner: str) -> None:
    """One less; those with none are forgotten."""
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]

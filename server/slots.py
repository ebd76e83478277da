"""A limited number of places, shared out fairly among those who ask."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """At most `total` places, and at most `per_owner` of them one owner's.

    A freed place goes to the owners in turn, not to whoever has queued most. For one event loop.
    """

    def __init__(self, total: int, per_owner: int) -> None:
        self._free = total
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

    async def take(self, owner: str) -> None:
        """A place until it is given back; waits for one."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(owner, turn)
                self._hand_out()
            else:
                self.give_back(owner)
            raise

    def give_back(self, owner: str) -> None:
        """A place of this owner's, for the next."""
        self._free += 1
        self._taken -= Counter([owner])  # drops owners without places
        self._hand_out()

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

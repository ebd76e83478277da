"""Room in the queue, without asking the database for each request.

That there is room for more stays true for a moment. Whether a job is taken is not decided here:
`JobStore.submit` counts again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from server.job_store import JobStore
from server.jobs import QueueShare

ROOM_S = 0.1
"""How long the last look at the room in the queue counts, which others fill too."""


@dataclass(slots=True)
class Room:
    """How many more jobs of a key there was room for; it is counted down."""

    left: int
    until: float


class Outlook:
    """Of one API process. clock: monotonic seconds."""

    def __init__(self, store: JobStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._rooms: dict[str, Room] = {}

    def has_room(self, key_id: str) -> bool:
        """Whether there is known to be room for one more job of a key; it is taken to come.

        For the event loop: asks nobody.
        """
        room = self._rooms.get(key_id)
        if room is None or room.left < 1 or self._clock() > room.until:
            return False
        room.left -= 1
        return True

    def look_for_room(self, key_id: str, share: QueueShare) -> None:
        """Ask for a key's room, for one more job now. Raises: QueueFull."""
        until = self._clock() + ROOM_S
        self._rooms[key_id] = Room(self._store.room_for(key_id, share) - 1, until)

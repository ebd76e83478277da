"""Decodes hostile bytes for many requests at once, with a few children (`decoders.py`) for all."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from models.decoding import ImageLimits
from server.decoder import Wanted
from server.decoders import OWN, WALL_S, DecodedPair, Decoder
from server.errors import QueueFull
from server.slots import NoPlace, Slots
from server.talks import Talker

CHILDREN, CHILDREN_PER_KEY = 3, 2
"""Pairs of pictures decoded at a time. One child is left for others, whatever one key sends."""

PATIENCE_S = 30.0
"""A request that finds no child in this time is refused."""

MAX_WAITING_BYTES, MAX_WAITING_BYTES_PER_KEY = 256 * 2**20, 128 * 2**20
"""Files that may wait for a child; beyond, requests are refused."""

MAX_DECODED_BYTES = 128 * 2**20
"""Pixels that requests may hold while children decode for others; beyond, a request keeps its place
until it needs its pixels no longer."""


@dataclass(frozen=True, slots=True)
class Child:
    """A decoder, and who talks to it."""

    decoder: Decoder
    talker: Talker


class Sandbox:
    """The API process's decoders, driven by the event loop; threads are for what blocks.

    Use as a context manager in the event loop: leaving ends the children.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        children: int = CHILDREN,
        children_per_key: int = CHILDREN_PER_KEY,
        wall_s: float = WALL_S,
        patience_s: float = PATIENCE_S,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_waiting_bytes_per_key: int = MAX_WAITING_BYTES_PER_KEY,
        max_decoded_bytes: int = MAX_DECODED_BYTES,
    ) -> None:
        self._threads = ThreadPoolExecutor(children, thread_name_prefix="sandbox")
        self._children = [
            Child(Decoder(limits, wall_s), Talker(self._threads)) for _ in range(children)
        ]
        # The last one used comes first: with little to do, one warm child does it all.
        self._idle = [*self._children]
        self._places = Slots(children, children_per_key)
        self._patience_s = patience_s
        self._max_waiting_bytes = max_waiting_bytes
        self._max_waiting_bytes_per_key = max_waiting_bytes_per_key
        self._max_decoded_bytes = max_decoded_bytes
        self._waiting = 0
        self._waiting_bytes = 0
        self._waiting_bytes_of: Counter[str] = Counter()
        self._decoded_bytes = 0

    @asynccontextmanager
    async def decoded(
        self, images: Mapping[str, bytes], wanted: Wanted = OWN, key_id: str = "anybody"
    ) -> AsyncIterator[DecodedPair]:
        """What `Decoder.talk_of_pair` gives, for the length of the block.

        A caller that is cancelled leaves its child in order. key_id: children are handed round by
        it. Raises: ImageUnavailable, QueueFull, ApiError.
        """
        pair = await self._decode(images, wanted, key_id)
        size = pair.init_image.nbytes + pair.mask.nbytes
        keeps_place = self._decoded_bytes + size > self._max_decoded_bytes
        if not keeps_place:
            self._places.give_back(key_id)
        self._decoded_bytes += size
        try:
            yield pair
        finally:
            self._decoded_bytes -= size
            if keeps_place:
                self._places.give_back(key_id)

    async def _decode(
        self, images: Mapping[str, bytes], wanted: Wanted, key_id: str
    ) -> DecodedPair:
        """In a place that is still to be given back when this returns, and only then."""
        size = sum(map(len, images.values()))
        if (
            self._waiting_bytes + size > self._max_waiting_bytes
            or self._waiting_bytes_of[key_id] + size > self._max_waiting_bytes_per_key
        ):
            raise QueueFull(self._waiting)
        self._waiting += 1
        self._waiting_bytes += size
        self._waiting_bytes_of[key_id] += size
        try:
            await self._places.take(key_id, self._patience_s)
            return await self._use_child(images, wanted, key_id)
        except NoPlace as error:
            raise QueueFull(self._waiting) from error
        finally:
            self._waiting -= 1
            self._waiting_bytes -= size
            self._waiting_bytes_of[key_id] -= size
            if not self._waiting_bytes_of[key_id]:
                del self._waiting_bytes_of[key_id]

    async def _use_child(
        self, images: Mapping[str, bytes], wanted: Wanted, key_id: str
    ) -> DecodedPair:
        """In a place that was taken, and is given back where this fails."""
        child = self._idle.pop()

        def free(result: asyncio.Future[DecodedPair]) -> None:
            self._idle.append(child)
            if result.cancelled():  # by a caller who has gone
                self._places.give_back(key_id)

        result = child.talker.begin(child.decoder.talk_of_pair(images, wanted), free)
        try:
            return await result
        except BaseException:
            if not result.cancelled():
                self._places.give_back(key_id)
            raise

    def warm(self) -> None:
        """Start a child in the background for the first request; others start when it is busy."""
        owner = "warming"
        if not self._places.take_at_once(owner):
            return
        child = self._idle.pop()

        def free(_: asyncio.Future[None]) -> None:
            self._idle.append(child)
            self._places.give_back(owner)

        result = child.talker.begin(child.decoder.talk_of_start(), free)
        # Looked at, so that nobody complains: the first request meets the same error.
        result.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.talker.close()
            child.decoder.stop()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.decoder.close()

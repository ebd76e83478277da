"""Decodes hostile bytes for many requests at once, with a few children (`decoders.py`) for all."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from models.imaging.decoding import ImageLimits
from server.core.errors import ApiError, QueueFull
from server.core.fairness import FairSemaphore, NoSlot
from server.sandbox.child import Wanted
from server.sandbox.decoded import DecodedPair
from server.sandbox.process import OWN, WALL_S, Decoder

CHILDREN, CHILDREN_PER_KEY = 3, 2
"""Pairs of pictures decoded at a time. One child is left for others, whatever one key sends."""

PATIENCE_S = 30.0
"""A request that finds no child in this time is refused."""

MAX_WAITING_BYTES, MAX_WAITING_BYTES_PER_KEY = 256 * 2**20, 128 * 2**20
"""Files that may wait for a child; beyond, requests are refused."""

MAX_DECODED_BYTES = 128 * 2**20
"""Pixels that requests may hold while children decode for others; beyond, a request keeps its place
until it needs its pixels no longer."""


class DecoderPool:
    """The API process's pool of decoders.

    Use as an async context manager: leaving ends the children.
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
        self._decoders = [Decoder(limits, wall_s) for _ in range(children)]
        # The last one used comes first: with little to do, one warm child does it all.
        self._idle = [*self._decoders]
        self._slots = FairSemaphore(children, children_per_key)
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
        """What `Decoder.decode_pair` gives, for the length of the block.

        key_id: decoders are shared out fairly among keys. Raises: ImageUnavailable, QueueFull,
        ApiError.
        """
        pair = await self._decode(images, wanted, key_id)
        size = pair.init_image.nbytes + pair.mask.nbytes
        keeps_slot = self._decoded_bytes + size > self._max_decoded_bytes
        if not keeps_slot:
            self._slots.release(key_id)
        self._decoded_bytes += size
        try:
            yield pair
        finally:
            self._decoded_bytes -= size
            if keeps_slot:
                self._slots.release(key_id)

    async def _decode(
        self, images: Mapping[str, bytes], wanted: Wanted, key_id: str
    ) -> DecodedPair:
        """The caller releases the slot where this returns; where this raises, none is held."""
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
            await self._slots.acquire(key_id, self._patience_s)
            return await self._use_decoder(images, wanted, key_id)
        except NoSlot as error:
            raise QueueFull(self._waiting) from error
        finally:
            self._waiting -= 1
            self._waiting_bytes -= size
            self._waiting_bytes_of[key_id] -= size
            if not self._waiting_bytes_of[key_id]:
                del self._waiting_bytes_of[key_id]

    async def _use_decoder(
        self, images: Mapping[str, bytes], wanted: Wanted, key_id: str
    ) -> DecodedPair:
        """In a slot that was acquired, and is released where this fails."""
        decoder = self._idle.pop()
        try:
            return await decoder.decode_pair(images, wanted)
        except BaseException:
            self._slots.release(key_id)
            raise
        finally:
            self._idle.append(decoder)

    def warm(self) -> None:
        """Start a child in the background for the first request; others start when it is busy."""
        self._warming = asyncio.create_task(self._warm())

    async def _warm(self) -> None:
        with suppress(ApiError):  # the first request meets the same error
            await self._idle[-1].start()

    async def __aenter__(self) -> "DecoderPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for decoder in self._decoders:
            await decoder.close()

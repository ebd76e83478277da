"""`DecoderPool`: shares a few sandboxed child processes (`process`) fairly among keys."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from models.imaging.decoding import ImageLimits
from models.imaging.mask_reading import MaskRule
from server.core.errors import ApiError, QueueFull
from server.core.fairness import FairSemaphore, NoSlot
from server.sandbox.decoded import DecodedPair
from server.sandbox.process import OWN_SIZE, WALL_S, DecoderProcess
from server.sandbox.wire import TargetSize

CHILDREN, CHILDREN_PER_KEY = 3, 2
"""Pairs of pictures decoded at a time. One key cannot occupy all children."""

WAIT_TIMEOUT_S = 30.0
"""A request that gets no child within this time is refused."""

MAX_WAITING_BYTES, MAX_WAITING_BYTES_PER_KEY = 256 * 2**20, 128 * 2**20
"""Back-pressure: requests are refused while files of this size wait for a child."""

MAX_DECODED_BYTES = 128 * 2**20
"""Pixels that requests may hold after releasing their child. Above this limit a request keeps its
child until it has written its pixels, so that decoding slows down and memory stays bounded."""


Decode = Callable[[DecoderProcess], Awaitable[DecodedPair]]


class DecoderPool:
    """The API process's pool of child processes that decode pictures.

    Use as an async context manager, which kills the children on exit.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        children: int = CHILDREN,
        children_per_key: int = CHILDREN_PER_KEY,
        wall_s: float = WALL_S,
        wait_timeout_s: float = WAIT_TIMEOUT_S,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_waiting_bytes_per_key: int = MAX_WAITING_BYTES_PER_KEY,
        max_decoded_bytes: int = MAX_DECODED_BYTES,
    ) -> None:
        self._decoders = [DecoderProcess(limits, wall_s) for _ in range(children)]
        # Used as a stack, so that one warm child serves a light load.
        self._idle = [*self._decoders]
        self._slots = FairSemaphore(children, children_per_key)
        self._wait_timeout_s = wait_timeout_s
        self._max_waiting_bytes = max_waiting_bytes
        self._max_waiting_bytes_per_key = max_waiting_bytes_per_key
        self._max_decoded_bytes = max_decoded_bytes
        self._waiting = 0
        self._waiting_bytes = 0
        self._waiting_bytes_of: Counter[str] = Counter()
        self._decoded_bytes = 0

    @asynccontextmanager
    async def decoded(
        self,
        images: Mapping[str, bytes],
        target: TargetSize = OWN_SIZE,
        key_id: str = "anybody",
        rule: MaskRule = MaskRule.EVIDENT,
    ) -> AsyncIterator[DecodedPair]:
        """The result of `DecoderProcess.decode_pair`, whose memory is counted until the exit.

        key_id: children are shared fairly among keys.
        Raises: ImageUnavailable, QueueFull, ApiError.
        """
        pair = await self._decode(
            images, key_id, lambda decoder: decoder.decode_pair(images, target, rule)
        )
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
        self, images: Mapping[str, bytes], key_id: str, decode: Decode
    ) -> DecodedPair:
        """Acquires a slot, which the caller releases. After an error no slot is held."""
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
            await self._slots.acquire(key_id, self._wait_timeout_s)
            return await self._use_decoder(key_id, decode)
        except NoSlot as error:
            raise QueueFull(self._waiting) from error
        finally:
            self._waiting -= 1
            self._waiting_bytes -= size
            self._waiting_bytes_of[key_id] -= size
            if not self._waiting_bytes_of[key_id]:
                del self._waiting_bytes_of[key_id]

    async def _use_decoder(self, key_id: str, decode: Decode) -> DecodedPair:
        """Decode in a slot that the caller has acquired; releases it after an error."""
        decoder = self._idle.pop()
        try:
            return await decode(decoder)
        except BaseException:
            self._slots.release(key_id)
            raise
        finally:
            self._idle.append(decoder)

    def warm(self) -> None:
        """Start one child in the background, so that the first request need not wait for it."""
        self._warming = asyncio.create_task(self._warm())

    async def _warm(self) -> None:
        with suppress(ApiError):  # The first request will raise the same error.
            await self._idle[-1].start()

    async def __aenter__(self) -> "DecoderPool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for decoder in self._decoders:
            await decoder.close()

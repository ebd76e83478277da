"""Rate limits as token buckets, in bounded memory."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_NAMES = 10_000
"""Buckets kept at a time, about 2 MB. Beyond that the least recently used bucket is dropped."""


@dataclass(slots=True)
class Bucket:
    """tokens: left at `filled_at`, a monotonic time in seconds."""

    tokens: float
    filled_at: float


class TokenBuckets:
    """A token bucket per name. Each holds the tokens of one minute and refills steadily.

    Belongs to one thread. clock: monotonic seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, max_names: int = MAX_NAMES
    ) -> None:
        self._clock = clock
        self._max_names = max_names
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, name: str, per_minute: int, count: int = 1) -> int | None:
        """Take tokens. None on success, otherwise the seconds until there are so many.

        count: more than a bucket holds take a full bucket.
        """
        wait_s = self.wait_s(name, per_minute, count)
        if wait_s is None:
            self._buckets[name].tokens -= min(count, per_minute)
        return wait_s

    def wait_s(self, name: str, per_minute: int, count: int = 1) -> int | None:
        """What `take` would return, without taking a token."""
        bucket, wanted = self._fill(name, per_minute), min(count, per_minute)
        if bucket.tokens >= wanted:
            return None
        return max(1, math.ceil((wanted - bucket.tokens) * 60 / per_minute))

    def _fill(self, name: str, per_minute: int) -> Bucket:
        """The bucket, refilled for the time since its last use."""
        now = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(per_minute, now)
            if len(self._buckets) > self._max_names:
                self._buckets.popitem(last=False)
        refilled = bucket.tokens + (now - bucket.filled_at) * per_minute / 60
        bucket.tokens, bucket.filled_at = min(per_minute, refilled), now
        self._buckets.move_to_end(name)
        return bucket

"""Which samples share the next UNet call, and how many rows such a call should have.

Plain numbers in, plain numbers out: the engine asks, measures and tells.
"""

from dataclasses import dataclass, field

from models.pipeline import Sample

MEASUREMENTS = 3
"""Calls of one size that are timed before it is compared; the quickest of them counts."""

WORTHWHILE_GAIN = 1.03
"""Twice the rows must bring this factor in rows per second; below, more rows only add latency."""


@dataclass(frozen=True, slots=True)
class BatchKey:
    """All that samples must have in common to share a UNet call."""

    latent_height: int
    latent_width: int
    conditioning_tokens: int

    @classmethod
    def of(cls, sample: Sample) -> "BatchKey":
        """The key of a sample."""
        height, width = sample.latents.shape[-2:]
        return cls(height, width, sample.conditioning.shape[1])

    @property
    def area(self) -> int:
        """Latent pixels, which decide the cost of a row."""
        return self.latent_height * self.latent_width


@dataclass(slots=True)
class RowLimit:
    """The rows of a call for one latent area, found by doubling while that pays.

    rows: the limit now. is_settled: True once doubling did not pay, or memory was too small.
    """

    rows: int
    is_settled: bool = False
    _quickest_s: dict[int, float] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    def observe(self, rows: int, seconds: float, most: int) -> None:
        """Take note of how long a call at the limit took; may change it. most: never go beyond."""
        self._quickest_s[rows] = min(seconds, self._quickest_s.get(rows, seconds))
        self._counts[rows] = self._counts.get(rows, 0) + 1
        if self._counts[rows] < MEASUREMENTS:
            return
        smaller = rows // 2
        if smaller in self._quickest_s and not self._pays(smaller, rows):
            self.rows, self.is_settled = smaller, True
        elif rows * 2 <= most:
            self.rows = rows * 2
        else:
            self.is_settled = True

    def shrink(self, rows: int) -> None:
        """A call of so many rows did not fit into memory."""
        self.rows, self.is_settled = max(1, rows // 2), True

    def _pays(self, smaller: int, larger: int) -> bool:
        gain = (larger / self._quickest_s[larger]) / (smaller / self._quickest_s[smaller])
        return gain >= WORTHWHILE_GAIN


class RowBudget:
    """A `RowLimit` per latent area.

    first: rows of a call before anything was measured. most: rows that no call exceeds.
    """

    def __init__(self, first: int, most: int) -> None:
        self._first, self._most = first, most
        self._limits: dict[int, RowLimit] = {}

    def rows(self, key: BatchKey) -> int:
        """Rows the next call of this key may have."""
        return self._limit(key).rows

    def wants_measurement(self, key: BatchKey, rows: int) -> bool:
        """Whether timing a call of so many rows would help."""
        limit = self._limit(key)
        return not limit.is_settled and limit.rows == rows

    def observe(self, key: BatchKey, rows: int, seconds: float) -> None:
        """A call of so many rows took so long."""
        self._limit(key).observe(rows, seconds, self._most)

    def shrink(self, key: BatchKey, rows: int) -> None:
        """A call of so many rows ran out of memory."""
        self._limit(key).shrink(rows)

    def _limit(self, key: BatchKey) -> RowLimit:
        return self._limits.setdefault(key.area, RowLimit(self._first))

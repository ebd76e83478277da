"""Which samples share the next call of a model, and how large such a call should be.

Plain numbers in, plain numbers out: the engine asks, measures and tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite

from models.diffusion.pipeline import Sample
from models.variants import ModelVariant

MEASUREMENTS = 3
"""Calls of one size that are timed before it is compared; the quickest of them counts."""

WORTHWHILE_GAIN = 1.03
"""Twice the units must bring this factor in units per second; below, more only add latency."""

SHORTEST_S = 1e-6
"""Below what any call takes; a clock that stood still must not make one look free."""

KEPT_KINDS = 1_000
"""Kinds of calls that are remembered. LoRAs make a new model of every scale that a job asks for."""

STALL_STEPS = 2.0
"""Denoising steps that running samples wait, at most about, for a call of the VAE between two."""


@dataclass(frozen=True, slots=True)
class CallKind:
    """What decides how long a call takes, besides its number of rows or pictures.

    area: of one picture, in pixels.
    """

    model: ModelVariant
    area: int


@dataclass(frozen=True, slots=True)
class BatchKey:
    """All that samples must have in common to share a UNet call."""

    model: ModelVariant
    latent_height: int
    latent_width: int
    conditioning_tokens: int

    @classmethod
    def of(cls, sample: Sample, model: ModelVariant) -> "BatchKey":
        """The key of a sample of a model."""
        height, width = sample.latents.shape[-2:]
        return cls(model, height, width, sample.conditioning.shape[1])

    @property
    def picture(self) -> tuple[ModelVariant, int, int]:
        """Samples of equal value may be decoded in one call."""
        return self.model, self.latent_height, self.latent_width


@dataclass(slots=True)
class CallLimit:
    """The units (rows, pictures) of a call of one kind, found by doubling while that pays.

    units: the limit now. is_settled: True once doubling did not pay, or memory was too small.
    """

    units: int
    is_settled: bool = False
    _quickest_s: dict[int, float] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    def observe(self, units: int, seconds: float, most: int) -> None:
        """Take note of how long a call at the limit took; may change it. most: never go beyond."""
        seconds = max(seconds, SHORTEST_S)
        self._quickest_s[units] = min(seconds, self._quickest_s.get(units, seconds))
        self._counts[units] = self._counts.get(units, 0) + 1
        if self._counts[units] < MEASUREMENTS:
            return
        smaller = units // 2
        if smaller in self._quickest_s and not self._pays(smaller, units):
            self.units, self.is_settled = smaller, True
        elif units * 2 <= most:
            self.units = units * 2
        else:
            self.is_settled = True

    def shrink(self, units: int) -> None:
        """A call of so many units did not fit into memory."""
        self.units, self.is_settled = max(1, units // 2), True

    def unit_s(self) -> float | None:
        """Seconds per unit of the largest call within the limit that was timed."""
        timed = [units for units in self._quickest_s if units <= self.units]
        return self._quickest_s[max(timed)] / max(timed) if timed else None

    def _pays(self, smaller: int, larger: int) -> bool:
        gain = (larger / self._quickest_s[larger]) / (smaller / self._quickest_s[smaller])
        return gain >= WORTHWHILE_GAIN


class BatchSizer:
    """A `CallLimit` per kind of call.

    first: units of a call before anything was measured. most: units that no call exceeds.
    most_area: area that no call of several units exceeds.
    """

    def __init__(self, first: int, most: int, most_area: int | None = None) -> None:
        self._first, self._most, self._most_area = first, most, most_area
        self._limits: dict[CallKind, CallLimit] = {}

    def units(self, kind: CallKind) -> int:
        """Units the next call of this kind may have."""
        return self._limit(kind).units

    def units_within(self, kind: CallKind, seconds: float) -> int:
        """The same for a call that may last so long, which may be for ever; 1 at least."""
        limit = self._limit(kind)
        unit_s = limit.unit_s() or inf  # not timed yet: nothing is known to fit
        return max(1, int(min(seconds / unit_s, limit.units))) if isfinite(seconds) else limit.units

    def call_s(self, kind: CallKind, units: int) -> float | None:
        """Seconds of a call for so many units, or of one at the limit where these are more.

        By what was timed; None before.
        """
        limit = self._limit(kind)
        unit_s = limit.unit_s()
        return None if unit_s is None else unit_s * min(units, limit.units)

    def wants_measurement(self, kind: CallKind, units: int) -> bool:
        """Whether timing a call of so many units would help."""
        limit = self._limit(kind)
        return not limit.is_settled and limit.units == units

    def observe(self, kind: CallKind, units: int, seconds: float) -> None:
        """A call of so many units took so long."""
        most = self._most
        if self._most_area is not None:
            most = max(1, min(most, self._most_area // kind.area))
        self._limit(kind).observe(units, seconds, most)

    def shrink(self, kind: CallKind, units: int) -> None:
        """A call of so many units ran out of memory."""
        self._limit(kind).shrink(units)

    def _limit(self, kind: CallKind) -> CallLimit:
        if kind not in self._limits and len(self._limits) >= KEPT_KINDS:
            del self._limits[next(iter(self._limits))]
        return self._limits.setdefault(kind, CallLimit(self._first))


def stall_s(step_budget: BatchSizer, running: Mapping[CallKind, int]) -> float:
    """Seconds a call of the VAE may last beside running samples: `STALL_STEPS` of their quickest.

    running: rows of each kind. 0 while no step of one was timed, unlimited where none run.
    """
    steps_s = [step_budget.call_s(kind, rows) for kind, rows in running.items()]
    return STALL_STEPS * min((each or 0.0 for each in steps_s), default=inf)

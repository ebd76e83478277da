"""`InpaintEngine`: which samples run next, and who hears of it. Policy only.

No tensor mathematics (that is `InpaintPipeline`), no threads or I/O: the worker calls `step` in a
loop, and each call does one bounded piece of work: prepare one generation, take one denoising step
of a batch, or decode one picture.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch

from models.batching import BatchKey, RowBudget
from models.errors import DeviceLost, EngineError, OutOfMemory
from models.params import InpaintParams
from models.pipeline import InpaintPipeline, Picture, Sample, Source

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Generation:
    """A job as the engine sees it."""

    id: int
    params: InpaintParams
    source: Source


@dataclass(frozen=True, slots=True)
class Progress:
    """step of total_steps denoising steps are done, summed over the generation's samples."""

    generation_id: int
    step: int
    total_steps: int


@dataclass(frozen=True, slots=True)
class Finished:
    """All pictures of a generation, in sample order."""

    generation_id: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The generation ended without pictures; no other is affected."""

    generation_id: int
    error: Exception


Event: TypeAlias = Progress | Finished | Failed


@dataclass(slots=True, eq=False)
class Member:
    """A sample among those of its generation.

    last_turn: when it last took a step, in turns of the engine.
    picture: once it is decoded.
    """

    generation_id: int
    sample: Sample
    last_turn: int = 0
    picture: Picture | None = None

    @property
    def key(self) -> BatchKey:
        """What others must share to be in one UNet call with it."""
        return BatchKey.of(self.sample)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """max_generations: held at a time, waiting or running.

    first_rows, max_rows: of a UNet call before its best number of rows is known, and ever. A
        sample with guidance takes two.
    is_reproducible: every UNet call is for one sample, so that a picture does not depend on its
        neighbours to the last bit; otherwise it does not up to rounding.
    """

    max_generations: int = 8
    first_rows: int = 2
    max_rows: int = 32
    is_reproducible: bool = False


@dataclass(slots=True)
class InpaintEngine:
    """Runs generations step by step, many at a time."""

    pipeline: InpaintPipeline
    limits: EngineLimits = EngineLimits()
    _waiting: deque[Generation] = field(default_factory=deque)
    _running: dict[int, list[Member]] = field(default_factory=dict)
    _turn: int = 0
    _may_stall: bool = True
    _budget: RowBudget = field(init=False)

    def __post_init__(self) -> None:
        self._budget = RowBudget(self.limits.first_rows, self.limits.max_rows)

    @property
    def free_places(self) -> int:
        """How many generations `add` takes before the engine is full."""
        return self.limits.max_generations - len(self._waiting) - len(self._running)

    @property
    def is_idle(self) -> bool:
        """True when `step` has nothing to do."""
        return not self._waiting and not self._running

    def add(self, generation: Generation) -> None:
        """Queue a generation; it is prepared in a later `step`."""
        self._waiting.append(generation)

    def cancel(self, generation_id: int) -> None:
        """Forget a generation; takes effect before the next step. Unknown ids are ignored."""
        self._waiting = deque(each for each in self._waiting if each.id != generation_id)
        self._running.pop(generation_id, None)

    def step(self) -> list[Event]:
        """Do one piece of work and say what came of it.

        A piece of encoding or decoding stands between two denoising steps, never next to another
        while samples run, so that running samples wait for one of them at most. An error ends the
        generation it belongs to and no other.
        Raises: DeviceLost, after which the engine must not be used.
        """
        self._turn += 1
        members = [member for each in self._running.values() for member in each]
        denoised = [each for each in members if each.sample.is_denoised and each.picture is None]
        runnable = [each for each in members if not each.sample.is_denoised]
        if self._may_stall or not runnable:
            self._may_stall = False
            if denoised:
                return self._decode(denoised[0])
            if self._waiting and (not runnable or not self.limits.is_reproducible):
                return self._prepare(self._waiting.popleft())
        self._may_stall = True
        return self._denoise(self._select_batch(runnable)) if runnable else []

    def _select_batch(self, runnable: Sequence[Member]) -> list[Member]:
        """The next UNet call: the key, and of it the samples, that have waited for the most turns.

        So every size gets its turn, and a call of one size delays the others once.
        """
        key = min(runnable, key=lambda member: member.last_turn).key
        same = sorted(
            (member for member in runnable if member.key == key), key=lambda each: each.last_turn
        )
        if self.limits.is_reproducible:
            return same[:1]
        batch, rows = same[:1], same[0].sample.rows
        for member in same[1:]:
            rows += member.sample.rows
            if rows > self._budget.rows(key):
                break
            batch.append(member)
        return batch

    def _prepare(self, generation: Generation) -> list[Event]:
        try:
            samples = self._retried(
                lambda: self.pipeline.prepare(generation.params, generation.source)
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, this generation hears of it
            return [self._failed(generation.id, error)]
        self._running[generation.id] = [Member(generation.id, sample) for sample in samples]
        return [self._progress(generation.id)]

    def _denoise(self, batch: Sequence[Member]) -> list[Event]:
        """One step of a batch; one progress event for each of its generations that goes on."""
        failures = self._advance(batch)
        touched = dict.fromkeys(member.generation_id for member in batch)
        return [*failures, *(self._progress(each) for each in touched if each in self._running)]

    def _advance(self, batch: Sequence[Member]) -> list[Event]:
        """Take the step; where a shared call fails, smaller ones find out whose fault it is."""
        batch = [member for member in batch if member.generation_id in self._running]
        if not batch:
            return []
        try:
            predictions = self._predict(batch)
        except Exception as error:  # noqa: BLE001 - as above
            if len(batch) == 1 or isinstance(error, DeviceLost):
                return [self._failed(batch[0].generation_id, error)]
            return [event for part in self._split(batch, error) for event in self._advance(part)]
        failures: list[Event] = []
        for member, prediction in zip(batch, predictions, strict=True):
            if member.generation_id not in self._running:
                continue  # another sample of it has failed just now
            member.last_turn = self._turn
            try:
                self.pipeline.advance(member.sample, prediction)
            except Exception as error:  # noqa: BLE001 - as above
                failures += [self._failed(member.generation_id, error)]
        return failures

    def _split(self, batch: Sequence[Member], error: Exception) -> list[Sequence[Member]]:
        """What to try after a shared call failed: halves where memory was short, else singles."""
        if not isinstance(error, OutOfMemory):
            return [[member] for member in batch]
        self._budget.shrink(batch[0].key, sum(member.sample.rows for member in batch))
        self.pipeline.release_memory()
        return halves(batch)

    def _predict(self, batch: Sequence[Member]) -> list[torch.Tensor]:
        """The UNet call, timed where that helps to find the best number of rows."""
        samples = [member.sample for member in batch]
        key, rows = batch[0].key, sum(sample.rows for sample in samples)
        is_timed = self._budget.wants_measurement(key, rows)
        started_s = self.pipeline.device_time_s() if is_timed else 0.0
        predictions = (
            self.pipeline.denoise_step(samples)
            if len(batch) > 1
            else self._retried(lambda: self.pipeline.denoise_step(samples))
        )
        if is_timed:
            self._budget.observe(key, rows, self.pipeline.device_time_s() - started_s)
        return predictions

    def _decode(self, member: Member) -> list[Event]:
        try:
            (member.picture,) = self._retried(lambda: self.pipeline.decode([member.sample]))
        except Exception as error:  # noqa: BLE001 - as above
            return [self._failed(member.generation_id, error)]
        pictures = [each.picture for each in self._running[member.generation_id]]
        finished = tuple(picture for picture in pictures if picture is not None)
        if len(finished) < len(pictures):
            return []
        del self._running[member.generation_id]
        return [Finished(member.generation_id, finished)]

    def _retried(self, work: Callable[[], T]) -> T:
        """Work for a single sample, done once more after memory was given back.

        Raises: what the work raises.
        """
        try:
            return work()
        except OutOfMemory:
            logger.warning("out of memory, trying once more")
        self.pipeline.release_memory()
        return work()

    def _progress(self, generation_id: int) -> Progress:
        samples = [member.sample for member in self._running[generation_id]]
        return Progress(
            generation_id,
            step=sum(sample.step_index for sample in samples),
            total_steps=sum(sample.total_steps for sample in samples),
        )

    def _failed(self, generation_id: int, error: Exception) -> Failed:
        if isinstance(error, DeviceLost):
            raise error
        if not isinstance(error, EngineError):
            logger.exception("generation failed", exc_info=error)
        self._running.pop(generation_id, None)
        return Failed(generation_id, error)


def halves(batch: Sequence[Member]) -> list[Sequence[Member]]:
    """A batch of two or more, cut in two."""
    middle = len(batch) // 2
    return [batch[:middle], batch[middle:]]

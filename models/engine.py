"""`InpaintEngine`: which samples run next, and who hears of it. Policy only.

No tensor mathematics (that is `InpaintPipeline`), no threads or I/O: the worker calls `step` in a
loop, and each call does one bounded piece of work: prepare some generations, take one denoising
step of a batch, or decode some pictures.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from models.acceleration.moments import Moment
from models.batching import BatchKey, BatchSizer, CallKind, stall_s
from models.diffusion.pipeline import Picture, Sample, Source
from models.errors import DeviceLost, EngineError, OutOfMemory
from models.model_pool import ModelPool, Readiness
from models.params import InpaintParams

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

LATENT_SCALE = 8
"""Sides of a picture in sides of its latents."""

KEPT_CALLS = 1_000
"""UNet calls whose times are kept until somebody asks for them."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A job as the engine sees it. model: by the id that the engine's models know it by."""

    id: int
    model: str
    params: InpaintParams
    source: Source

    @property
    def picture_kind(self) -> CallKind:
        """The kind of VAE call for one of its pictures, which decides its duration."""
        return CallKind(self.model, self.params.width * self.params.height)


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
class RunningSample:
    """A sample among those of its generation.

    last_turn: when it last took a step, in turns of the engine.
    picture: once it is decoded.
    """

    generation: Generation
    sample: Sample
    last_turn: int = 0
    picture: Picture | None = None

    @property
    def generation_id(self) -> int:
        return self.generation.id

    @property
    def key(self) -> BatchKey:
        """Samples of equal key may share a UNet call."""
        return BatchKey.of(self.sample, self.generation.model)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """max_generations: held at a time, waiting or running.

    first_rows, max_rows: of a UNet call before its best number of rows is known, and ever. A
        sample with guidance takes two.
    first_pictures: the same for a call of the VAE.
    max_pixels: of the pictures that one call of the VAE encodes or decodes, if more than one.
    is_reproducible: every call of a model is for one sample, so that a picture does not depend on
        its neighbours to the last bit; otherwise it does not up to rounding.
    """

    max_generations: int = 8
    first_rows: int = 2
    max_rows: int = 32
    first_pictures: int = 1
    max_pixels: int = 4 * 1024 * 1024
    is_reproducible: bool = False


@dataclass(frozen=True, slots=True)
class UNetCall:
    """A UNet call that was started. area: of one row, in latent pixels."""

    area: int
    rows: int
    begin: Moment
    end: Moment


@dataclass(frozen=True, slots=True)
class StepTime:
    """A UNet call that is done. pixels: of one row's picture. seconds: on the device."""

    pixels: int
    rows: int
    seconds: float


@dataclass(slots=True)
class InpaintEngine:
    """Runs generations step by step, many at a time."""

    models: ModelPool
    limits: EngineLimits = EngineLimits()
    _waiting: deque[Generation] = field(default_factory=deque)
    _running: dict[int, list[RunningSample]] = field(default_factory=dict)
    _turn: int = 0
    _may_stall: bool = True
    _is_resting: bool = True
    _rows: BatchSizer = field(init=False)
    _pictures: BatchSizer = field(init=False)
    _calls: deque[UNetCall] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))

    def __post_init__(self) -> None:
        limits = self.limits
        self._rows = BatchSizer(limits.first_rows, limits.max_rows)
        self._pictures = BatchSizer(limits.first_pictures, limits.max_rows, limits.max_pixels)

    @property
    def free_places(self) -> int:
        """How many generations `add` takes before the engine is full."""
        return self.limits.max_generations - len(self._waiting) - len(self._running)

    @property
    def is_idle(self) -> bool:
        """True without any generation."""
        return not self._waiting and not self._running

    @property
    def is_resting(self) -> bool:
        """True if the last `step` found nothing to do: none is there, or models are loading."""
        return self._is_resting

    def add(self, generation: Generation) -> None:
        """Queue a generation; it is prepared in a later `step`."""
        self._waiting.append(generation)

    def cancel(self, generation_id: int) -> None:
        """Forget a generation; takes effect before the next step. Unknown ids are ignored."""
        self._waiting = deque(each for each in self._waiting if each.id != generation_id)
        self._running.pop(generation_id, None)
        self.models.forget_loads({each.model for each in self._waiting})

    def take_step_times(self) -> list[StepTime]:
        """The UNet calls that the device has done since this was last asked, oldest first."""
        found = []
        while self._calls:
            call = self._calls[0]
            seconds = call.begin.seconds_to(call.end)
            if seconds is None:
                break
            found.append(StepTime(call.area * LATENT_SCALE**2, call.rows, seconds))
            self._calls.popleft()
        return found

    def preview(self, generation_id: int) -> NDArray[np.uint8] | None:
        """How a generation's first picture comes along: see `InpaintPipeline.preview`.

        None also for a generation that does not run, and where no preview can be made.
        Raises: DeviceLost, as `step`.
        """
        members = self._running.get(generation_id)
        if members is None:
            return None
        try:
            pipeline = self.models.pipeline(members[0].generation.model)
            return pipeline.preview(members[0].sample)
        except DeviceLost:
            raise
        except Exception:  # whatever it is, it must not hurt the picture
            logger.warning("no preview could be made", exc_info=True)
            return None

    def step(self) -> list[Event]:
        """Do one piece of work and say what came of it.

        A piece of encoding or decoding stands between two denoising steps, never next to another
        while samples run, and is as large as lets these wait for about two steps at most. An error
        ends the generation it belongs to and no other.
        Raises: DeviceLost, after which the engine must not be used.
        """
        self._turn += 1
        self._is_resting = False
        members = [member for each in self._running.values() for member in each]
        denoised = [each for each in members if each.sample.is_denoised and each.picture is None]
        runnable = [each for each in members if not each.sample.is_denoised]
        if self._may_stall or not runnable:
            self._may_stall = False
            if denoised:
                return self._decode(self._select_pictures(denoised, runnable))
            if self._waiting:
                ready, failures = self._ask_for_models()
                prepared = self._prepare(self._select_waiting(ready, runnable)) if ready else []
                if failures or prepared:
                    return [*failures, *prepared]
        self._may_stall = True
        self._is_resting = not runnable
        return self._denoise(self._select_batch(runnable)) if runnable else []

    def _ask_for_models(self) -> tuple[list[Generation], list[Event]]:
        """The waiting generations whose models are there, and the ends of those of bad ones.

        Behind one whose model finds no room nobody begins, so that the running ones make room.
        """
        in_use = {members[0].generation.model for members in self._running.values()}
        ready: list[Generation] = []
        failures: list[Event] = []
        for generation in [*self._waiting]:
            try:
                readiness = self.models.request(generation.model, in_use)
            except Exception as error:  # noqa: BLE001 - whatever it is, this generation hears of it
                self._waiting = deque(each for each in self._waiting if each is not generation)
                failures.append(self._failed(generation.id, error))
                continue
            if readiness is Readiness.CROWDED:
                break
            if readiness is Readiness.READY:
                ready.append(generation)
                in_use.add(generation.model)
        return ready, failures

    def _select_batch(self, runnable: Sequence[RunningSample]) -> list[RunningSample]:
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
            if rows > self._rows.units(key.kind):
                break
            batch.append(member)
        return batch

    def _select_pictures(
        self, denoised: Sequence[RunningSample], runnable: Sequence[RunningSample]
    ) -> list[RunningSample]:
        """What to decode next: pictures of one size."""
        first = denoised[0]
        same = [member for member in denoised if member.key.picture == first.key.picture]
        return same[: self._pictures_per_call(first.generation, runnable)]

    def _select_waiting(
        self, ready: Sequence[Generation], runnable: Sequence[RunningSample]
    ) -> list[Generation]:
        """The first that is ready, and others of its model and size; no longer waiting.

        Two encodings take about as long as one decoding, which is what was measured.
        """
        first = ready[0]
        same = [each for each in ready if each.picture_kind == first.picture_kind]
        selected = same[: self._pictures_per_call(first, runnable)]
        taken = {each.id for each in selected}
        self._waiting = deque(each for each in self._waiting if each.id not in taken)
        return selected

    def _pictures_per_call(self, generation: Generation, runnable: Sequence[RunningSample]) -> int:
        if self.limits.is_reproducible:
            return 1
        running: Counter[CallKind] = Counter()
        for member in runnable:
            running[member.key.kind] += member.sample.rows
        patience_s = stall_s(self._rows, running)
        return self._pictures.units_within(generation.picture_kind, patience_s)

    def _prepare(self, generations: Sequence[Generation]) -> list[Event]:
        pipeline = self.models.pipeline(generations[0].model)

        def work(some: Sequence[Generation]) -> list[list[Sample]]:
            return pipeline.prepare_together([(each.params, each.source) for each in some])

        events: list[Event] = []
        shrink = partial(self._shrink_pictures, generations[0].picture_kind)
        for generation, samples in self._attempt(generations, work, shrink):
            if isinstance(samples, Exception):
                events.append(self._failed(generation.id, samples))
                continue
            self._running[generation.id] = [RunningSample(generation, sample) for sample in samples]
            events.append(self._progress(generation.id))
        return events

    def _denoise(self, batch: Sequence[RunningSample]) -> list[Event]:
        """One step of a batch; one progress event for each of its generations that goes on."""
        failures: list[Event] = []
        kind = batch[0].key.kind
        pipeline = self.models.pipeline(kind.model)
        shrink = partial(self._shrink_rows, kind)
        for member, prediction in self._attempt(batch, partial(self._predict, kind), shrink):
            if member.generation_id not in self._running:
                continue  # another sample of it has failed just now
            member.last_turn = self._turn
            try:
                if isinstance(prediction, Exception):
                    raise prediction
                pipeline.advance(member.sample, prediction)
            except Exception as error:  # noqa: BLE001 - whatever it is, this generation hears of it
                failures.append(self._failed(member.generation_id, error))
        touched = dict.fromkeys(member.generation_id for member in batch)
        return [*failures, *(self._progress(each) for each in touched if each in self._running)]

    def _predict(self, kind: CallKind, batch: Sequence[RunningSample]) -> list[torch.Tensor]:
        """The UNet call, timed where that helps to find the best number of rows."""
        samples = [member.sample for member in batch]
        rows = sum(sample.rows for sample in samples)
        pipeline = self.models.pipeline(kind.model)
        with self._timed(self._rows, kind, rows):
            begin = pipeline.mark()
            predictions = pipeline.denoise_step(samples)
            self._calls.append(UNetCall(kind.area, rows, begin, pipeline.mark()))
        return predictions

    def _shrink_rows(self, kind: CallKind, batch: Sequence[RunningSample]) -> None:
        self._rows.shrink(kind, sum(member.sample.rows for member in batch))

    def _shrink_pictures(self, kind: CallKind, batch: Sequence[Generation | RunningSample]) -> None:
        self._pictures.shrink(kind, len(batch))

    def _decode(self, members: Sequence[RunningSample]) -> list[Event]:
        kind = members[0].generation.picture_kind
        pipeline = self.models.pipeline(kind.model)

        def work(some: Sequence[RunningSample]) -> list[Picture]:
            with self._timed(self._pictures, kind, len(some)):
                return pipeline.decode([member.sample for member in some])

        events: list[Event] = []
        shrink = partial(self._shrink_pictures, kind)
        for member, picture in self._attempt(members, work, shrink):
            if member.generation_id not in self._running:
                continue  # as above
            if isinstance(picture, Exception):
                events.append(self._failed(member.generation_id, picture))
                continue
            member.picture = picture
            events += self._finish(member.generation_id)
        return events

    def _finish(self, generation_id: int) -> list[Event]:
        """Its end, if no picture is missing."""
        pictures = [member.picture for member in self._running[generation_id]]
        finished = tuple(picture for picture in pictures if picture is not None)
        if len(finished) < len(pictures):
            return []
        del self._running[generation_id]
        return [Finished(generation_id, finished)]

    def _attempt(
        self,
        batch: Sequence[T],
        work: Callable[[Sequence[T]], list[R]],
        shrink: Callable[[Sequence[T]], None],
    ) -> list[tuple[T, R | Exception]]:
        """What came of each member; where a shared call fails, smaller ones find out whose fault.

        work: gives one result per member. shrink: told of a batch that memory was too short for.
        Raises: DeviceLost.
        """
        try:
            results = work(batch) if len(batch) > 1 else self._retried(lambda: work(batch))
            return [*zip(batch, results, strict=True)]
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            if len(batch) == 1:
                return [(batch[0], error)]
            parts = [[member] for member in batch]
            if isinstance(error, OutOfMemory):
                shrink(batch)
                self.models.release_memory()
                parts = halves(batch)
        return [each for part in parts for each in self._attempt(part, work, shrink)]

    @contextmanager
    def _timed(self, budget: BatchSizer, kind: CallKind, units: int) -> Iterator[None]:
        """Tells the budget how long a call took, where that helps to find the best size."""
        if not budget.wants_measurement(kind, units):
            yield
            return
        pipeline = self.models.pipeline(kind.model)
        started_s = pipeline.device_time_s()
        yield
        budget.observe(kind, units, pipeline.device_time_s() - started_s)

    def _retried(self, work: Callable[[], T]) -> T:
        """Work for a single sample, done once more after memory was given back.

        Raises: what the work raises.
        """
        try:
            return work()
        except OutOfMemory:
            logger.warning("out of memory, trying once more")
        self.models.release_memory()
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


def halves(batch: Sequence[T]) -> list[list[T]]:
    """A batch of two or more, cut in two."""
    middle = len(batch) // 2
    return [[*batch[:middle]], [*batch[middle:]]]

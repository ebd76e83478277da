"""`InpaintEngine`: which samples run next, and who hears of it. Policy only.

No tensor mathematics (that is `InpaintPipeline`) and no I/O: the worker calls `step` in a loop, and
each call queues one bounded piece of work on the device: prepare some generations, take one
denoising step of a batch, or decode some pictures. It never waits for a piece, but for the device
when that has two UNet calls left to make. What a picture needs of the host before and after, such
as pasting, is done in the background.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from models.batching import BatchKey, BatchSizer, CallKind, stall_s
from models.diffusion.pipeline import Picture, Queued, Sample, Source, Unchecked
from models.errors import DeviceLost, EngineError, OutOfMemory
from models.executors import InlineExecutor
from models.model_pool import ModelPool, Readiness
from models.params import InpaintParams
from models.variants import ModelVariant

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

KEPT_STEP_TIMES = 1_000
"""UNet calls whose times are kept until somebody asks for them."""

QUEUED_CALLS = 2
"""UNet calls in the device's queue at most. With fewer the device may have to wait for the host;
behind more, new generations, cancellations and previews wait for the device."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A job as the engine sees it."""

    id: int
    model: ModelVariant
    params: InpaintParams
    source: Source

    @property
    def call_kind(self) -> CallKind:
        """The kind of its calls. The prompt's length hardly changes their cost and is left out."""
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


@dataclass(frozen=True, slots=True)
class Waiting:
    """A generation that is not begun. canvas: what its model is given, made in the background."""

    generation: Generation
    canvas: Future[Any]


@dataclass(frozen=True, slots=True)
class Preparing:
    """A generation whose samples the device prepares."""

    generation: Generation
    samples: Queued[list[Sample]]


@dataclass(slots=True, eq=False)
class Decoding:
    """A picture that the device decodes, and then checks where it is to be checked.

    made: what the background makes of the device's work. That begins when the device is done,
        because a thread that waited for the device would keep the canvases of new generations
        waiting too.
    """

    queued: Queued[Picture | Unchecked] | Queued[Picture]
    made: Future[Picture | Unchecked] | None = None


@dataclass(slots=True, eq=False)
class RunningSample:
    """A sample among those of its generation.

    last_turn: when it last took a step, in turns of the engine.
    decoding: its last piece of work.
    """

    generation: Generation
    sample: Sample
    last_turn: int = 0
    decoding: Decoding | None = None

    @property
    def generation_id(self) -> int:
        return self.generation.id

    @property
    def key(self) -> BatchKey:
        """Samples of equal key may share a UNet call."""
        return BatchKey.of(self.sample, self.generation.model)


@dataclass(frozen=True, slots=True)
class TimedCall:
    """A call that was started, between two marks in the device's queue.

    sizer: learns from its duration. units: rows of a UNet call, pictures of a call of the decoder.
    """

    sizer: BatchSizer
    kind: CallKind
    units: int
    began: Queued[None]
    ended: Queued[None]

    @property
    def is_wanted(self) -> bool:
        """Whether its duration helps the sizer to find the best size."""
        return self.sizer.wants_measurement(self.kind, self.units)


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
class StepTime:
    """A UNet call that is done. pixels: of one row's picture. seconds: on the device."""

    pixels: int
    rows: int
    seconds: float


@dataclass(slots=True)
class InpaintEngine:
    """Runs generations step by step, many at a time.

    background: makes what a picture needs of the host besides the device's work. By default that is
        done in between, which is as quick where the device is the host.
    """

    models: ModelPool
    limits: EngineLimits = EngineLimits()
    background: Executor = field(default_factory=InlineExecutor)
    _waiting: dict[int, Waiting] = field(default_factory=dict)
    _preparing: dict[int, Preparing] = field(default_factory=dict)
    _running: dict[int, list[RunningSample]] = field(default_factory=dict)
    _queued_calls: deque[Queued[None]] = field(default_factory=deque)
    _timed_calls: deque[TimedCall] = field(default_factory=deque)
    _step_times: deque[StepTime] = field(default_factory=lambda: deque(maxlen=KEPT_STEP_TIMES))
    _turn: int = 0
    _may_stall: bool = True
    _is_resting: bool = True
    _rows: BatchSizer = field(init=False)
    _pictures: BatchSizer = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        self._rows = BatchSizer(limits.first_rows, limits.max_rows)
        self._pictures = BatchSizer(limits.first_pictures, limits.max_rows, limits.max_pixels)

    @property
    def free_places(self) -> int:
        """How many generations `add` takes before the engine is full."""
        held = len(self._waiting) + len(self._preparing) + len(self._running)
        return self.limits.max_generations - held

    @property
    def is_idle(self) -> bool:
        """True without any generation."""
        return not (self._waiting or self._preparing or self._running)

    @property
    def is_resting(self) -> bool:
        """True if the last `step` found nothing to do: none is there, models are loading, or the
        background is at work, for which `wait` waits."""
        return self._is_resting

    def add(self, generation: Generation) -> None:
        """Queue a generation; it is prepared in a later `step`."""
        canvas = self.background.submit(generation.source.canvas, generation.params)
        self._waiting[generation.id] = Waiting(generation, canvas)

    def release_memory(self) -> None:
        """Release cached device memory of all models."""
        self.models.release_memory()

    def cancel(self, generation_id: int) -> None:
        """Forget a generation; takes effect before the next step. Unknown ids are ignored."""
        self._forget(generation_id)
        self.models.forget_loads({each.generation.model for each in self._waiting.values()})

    def wait(self, timeout_s: float) -> bool:
        """Wait until the background has done something; False if it has nothing to do."""
        pending = self._pending()
        wait(pending, timeout_s, FIRST_COMPLETED)
        return bool(pending)

    def take_step_times(self) -> list[StepTime]:
        """The UNet calls that the device has done since this was last asked, oldest first.

        Raises: DeviceLost, as `step`.
        """
        self._observe()
        found = [*self._step_times]
        self._step_times.clear()
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

    def warm_up(self, model: ModelVariant) -> None:
        """Make a model's first calls, and learn how large calls of its own size should be.

        Raises: UnusablePicture, OutOfMemory, DeviceLost.
        """
        pipeline = self.models.pipeline(model)
        pipeline.warm_up()
        if self.limits.is_reproducible:
            return
        params, source = pipeline.usual_job()
        (sample,) = pipeline.prepare(params, source)
        member = RunningSample(Generation(0, model, params, source), sample)
        kind = member.generation.call_kind
        prediction = self._learn(
            lambda: self._call_unet([member] * max(1, self._rows.units(kind) // sample.rows))
        )
        pipeline.advance(sample, prediction)
        self._learn(lambda: self._call_decoder([member] * self._pictures.units(kind)))

    def step(self) -> list[Event]:
        """Queue one piece of work, and say what came of earlier ones.

        A piece of encoding or decoding stands between two denoising steps, never next to another
        while samples run, and is as large as lets these wait for about two steps at most. An error
        ends the generation it belongs to and no other.
        Raises: DeviceLost, after which the engine must not be used.
        """
        self._turn += 1
        self._is_resting = False
        if events := self._settle():
            return events
        members = self._members()
        denoised = [each for each in members if each.sample.is_denoised and each.decoding is None]
        runnable = [each for each in members if not each.sample.is_denoised]
        if self._may_stall or not runnable:
            self._may_stall = False
            if denoised:
                return self._decode(self._select_pictures(denoised, runnable))
            ready, failures = self._ask_for_models()
            prepared = self._prepare(self._select_waiting(ready, runnable)) if ready else []
            if ready or failures:
                return [*failures, *prepared]
        self._may_stall = True
        return self._denoise(self._select_batch(runnable)) if runnable else self._rest()

    def _rest(self) -> list[Event]:
        """Nothing can be queued: wait for the device if it prepares a generation, or if it decodes
        or checks a picture while the background has nothing to do."""
        for preparing in self._preparing.values():
            return [self._begin(preparing)]
        if self._pending() or not (decodings := self._decodings()):
            self._is_resting = True
            return []
        decodings[0].queued.wait()
        return self._settle()

    def _settle(self) -> list[Event]:
        """What became of the pieces that the device and the background are done with."""
        self._observe()
        prepared = [each for each in self._preparing.values() if each.samples.is_done]
        ends = [self._end(*each) for each in [*self._running.items()]]
        return [*map(self._begin, prepared), *(event for event in ends if event is not None)]

    def _begin(self, preparing: Preparing) -> Event:
        """Have the samples run, once they are there."""
        generation = preparing.generation
        try:
            samples = self._retried(preparing.samples.result)
        except Exception as error:  # noqa: BLE001 - whatever it is, this generation hears of it
            return self._failed(generation.id, error)
        del self._preparing[generation.id]
        self._running[generation.id] = [RunningSample(generation, sample) for sample in samples]
        return self._progress(generation.id)

    def _end(self, generation_id: int, members: Sequence[RunningSample]) -> Event | None:
        """None while a picture is missing and none has failed."""
        try:
            found = [self._picture_of(each) for each in members]
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(generation_id, error)
        pictures = tuple(picture for picture in found if picture is not None)
        if len(pictures) < len(members):
            return None
        self._forget(generation_id)
        return Finished(generation_id, pictures)

    def _picture_of(self, member: RunningSample) -> Picture | None:
        """None while it is not there. What is to be checked goes to the device once more.

        Raises: what the check and the background raised; they lack memory twice at least.
        """
        while member.decoding and (made := self._made_of(member.decoding)):
            if isinstance(made, Picture):
                return made
            pipeline = self.models.pipeline(member.generation.model)
            member.decoding = Decoding(self._retried(partial(pipeline.check, made)))
        return None

    def _made_of(self, decoding: Decoding) -> Picture | Unchecked | None:
        """What the background made; it begins with what the device is done with."""
        if decoding.made is None and decoding.queued.is_done:
            decoding.made = self.background.submit(decoding.queued.result)
        if decoding.made is None or not decoding.made.done():
            return None
        if isinstance(decoding.made.exception(), OutOfMemory):
            decoding.made = InlineExecutor().submit(self._retried, decoding.queued.result)
        return decoding.made.result()

    def _forget(self, generation_id: int) -> None:
        if generation_id in self._waiting:
            self._waiting[generation_id].canvas.cancel()  # unless it is made already
        for stage in (self._waiting, self._preparing, self._running):
            stage.pop(generation_id, None)

    def _members(self) -> list[RunningSample]:
        return [member for each in self._running.values() for member in each]

    def _decodings(self) -> list[Decoding]:
        return [member.decoding for member in self._members() if member.decoding]

    def _pending(self) -> list[Future[Any]]:
        """What the background has to do."""
        canvases = [each.canvas for each in self._waiting.values()]
        pictures = [each.made for each in self._decodings() if each.made]
        return [future for future in [*canvases, *pictures] if not future.done()]

    def _ask_for_models(self) -> tuple[list[Waiting], list[Event]]:
        """The waiting generations that can begin, and the ends of those of bad models.

        Behind one whose model finds no room nobody begins, so that the running ones make room.
        """
        in_use = {member.generation.model for member in self._members()}
        in_use |= {each.generation.model for each in self._preparing.values()}
        ready: list[Waiting] = []
        failures: list[Event] = []
        for waiting in [*self._waiting.values()]:
            generation = waiting.generation
            try:
                readiness = self.models.request(generation.model, in_use)
            except Exception as error:  # noqa: BLE001 - as above
                failures.append(self._failed(generation.id, error))
                continue
            if readiness is Readiness.CROWDED:
                break
            if readiness is Readiness.READY and waiting.canvas.done():
                ready.append(waiting)
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
            if rows > self._rows.units(member.generation.call_kind):
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
        self, ready: Sequence[Waiting], runnable: Sequence[RunningSample]
    ) -> list[Waiting]:
        """The first that is ready, and others of its model and size.

        Two encodings take about as long as one decoding, which is what was measured.
        """
        first = ready[0].generation
        same = [each for each in ready if each.generation.call_kind == first.call_kind]
        return same[: self._pictures_per_call(first, runnable)]

    def _pictures_per_call(self, generation: Generation, runnable: Sequence[RunningSample]) -> int:
        if self.limits.is_reproducible:
            return 1
        running: Counter[CallKind] = Counter()
        for member in runnable:
            running[member.generation.call_kind] += member.sample.rows
        patience_s = stall_s(self._rows, running)
        return self._pictures.units_within(generation.call_kind, patience_s)

    def _prepare(self, batch: Sequence[Waiting]) -> list[Event]:
        first = batch[0].generation
        pipeline = self.models.pipeline(first.model)

        def work(some: Sequence[Waiting]) -> list[Queued[list[Sample]]]:
            return pipeline.prepare_together(
                [(each.generation.params, each.canvas.result()) for each in some]
            )

        failures: list[Event] = []
        shrink = partial(self._shrink_pictures, first.call_kind)
        for waiting, samples in self._attempt(batch, work, shrink):
            generation = waiting.generation
            if isinstance(samples, Exception):
                failures.append(self._failed(generation.id, samples))
                continue
            del self._waiting[generation.id]
            self._preparing[generation.id] = Preparing(generation, samples)
        return [*failures, *self._settle()]

    def _denoise(self, batch: Sequence[RunningSample]) -> list[Event]:
        """One step of a batch; one progress event for each of its generations that goes on."""
        while len(self._queued_calls) >= QUEUED_CALLS:
            self._queued_calls.popleft().result()
        failures: list[Event] = []
        pipeline = self.models.pipeline(batch[0].generation.model)
        for member, prediction in self._call_unet(batch):
            if member.generation_id not in self._running:
                continue  # another sample of it has failed just now
            member.last_turn = self._turn
            try:
                if isinstance(prediction, Exception):
                    raise prediction
                pipeline.advance(member.sample, prediction)
            except Exception as error:  # noqa: BLE001 - as above
                failures.append(self._failed(member.generation_id, error))
        self._queued_calls.append(pipeline.mark())
        touched = dict.fromkeys(member.generation_id for member in batch)
        return [*failures, *(self._progress(each) for each in touched if each in self._running)]

    def _call_unet(
        self, batch: Sequence[RunningSample]
    ) -> list[tuple[RunningSample, torch.Tensor | Exception]]:
        kind = batch[0].generation.call_kind
        pipeline = self.models.pipeline(kind.model)

        def work(some: Sequence[RunningSample]) -> list[torch.Tensor]:
            with self._timed(self._rows, kind, sum(member.sample.rows for member in some)):
                return pipeline.denoise_step([member.sample for member in some])

        return self._attempt(batch, work, partial(self._shrink_rows, kind))

    def _shrink_rows(self, kind: CallKind, batch: Sequence[RunningSample]) -> None:
        self._rows.shrink(kind, sum(member.sample.rows for member in batch))

    def _shrink_pictures(self, kind: CallKind, batch: Sequence[Waiting | RunningSample]) -> None:
        self._pictures.shrink(kind, len(batch))

    def _decode(self, batch: Sequence[RunningSample]) -> list[Event]:
        failures: list[Event] = []
        for member, queued in self._call_decoder(batch):
            if member.generation_id not in self._running:
                continue  # as above
            if isinstance(queued, Exception):
                failures.append(self._failed(member.generation_id, queued))
                continue
            member.decoding = Decoding(queued)
        return [*failures, *self._settle()]

    def _call_decoder(
        self, batch: Sequence[RunningSample]
    ) -> list[tuple[RunningSample, Queued[Picture | Unchecked] | Exception]]:
        kind = batch[0].generation.call_kind
        pipeline = self.models.pipeline(kind.model)

        def work(some: Sequence[RunningSample]) -> list[Queued[Picture | Unchecked]]:
            with self._timed(self._pictures, kind, len(some)):
                return pipeline.decode_together([member.sample for member in some])

        return self._attempt(batch, work, partial(self._shrink_pictures, kind))

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
    def _timed(self, sizer: BatchSizer, kind: CallKind, units: int) -> Iterator[None]:
        """Takes the time of a call, unless it fails."""
        pipeline = self.models.pipeline(kind.model)
        began = pipeline.mark()
        yield
        self._timed_calls.append(TimedCall(sizer, kind, units, began, pipeline.mark()))

    def _learn(self, call: Callable[[], list[tuple[RunningSample, R | Exception]]]) -> R:
        """Make a call as long as its duration helps to find the best size; what came of it at last.

        Raises: what making it raised.
        """
        while True:
            for _, result in (results := call()):
                if isinstance(result, Exception):
                    raise result
            last = self._timed_calls[-1]
            if not last.is_wanted:
                return cast(R, results[0][1])
            last.ended.result()
            self._observe()

    def _observe(self) -> None:
        """Take note of the times of the calls that the device has made."""
        while self._timed_calls and self._timed_calls[0].ended.is_done:
            call = self._timed_calls.popleft()
            seconds = call.ended.s_since(call.began)
            if call.is_wanted:
                call.sizer.observe(call.kind, call.units, seconds)
            if call.sizer is self._rows:
                self._step_times.append(StepTime(call.kind.area, call.units, seconds))

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
        self._forget(generation_id)
        return Failed(generation_id, error)


def halves(batch: Sequence[T]) -> list[list[T]]:
    """A batch of two or more, cut in two."""
    middle = len(batch) // 2
    return [[*batch[:middle]], [*batch[middle:]]]

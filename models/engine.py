"""`InpaintEngine`: which samples run next, and who hears of it. Policy only.

No tensor mathematics (that is `InpaintPipeline`), no threads, clocks or I/O: the worker calls
`step` in a loop, and each call does one bounded piece of work.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from models.errors import DeviceLost, EngineError
from models.params import InpaintParams
from models.pipeline import InpaintPipeline, Picture, Sample, Source

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class BatchKey:
    """All that samples must have in common to share a UNet call."""

    latent_height: int
    latent_width: int
    conditioning_tokens: int

    @classmethod
    def of(cls, sample: Sample) -> "BatchKey":
        height, width = sample.latents.shape[-2:]
        return cls(height, width, sample.conditioning.shape[1])


@dataclass(slots=True)
class Running:
    """A generation with its samples and the pictures that are done."""

    generation: Generation
    samples: list[Sample]
    pictures: dict[int, Picture] = field(default_factory=dict)

    def progress(self) -> Progress:
        return Progress(
            self.generation.id,
            step=sum(sample.step_index for sample in self.samples),
            total_steps=sum(sample.total_steps for sample in self.samples),
        )


Member: TypeAlias = tuple[Running, int]
"""A sample of a running generation, by its index there."""


class InpaintEngine:
    """Runs generations step by step.

    samples_per_call: the most samples that share one UNet call. 1 makes every picture independent
        of its neighbours to the last bit; more is faster and equal up to rounding.
    max_generations: the most generations held at a time, waiting or running.
    """

    def __init__(
        self, pipeline: InpaintPipeline, *, samples_per_call: int = 1, max_generations: int = 2
    ) -> None:
        self._pipeline = pipeline
        self._samples_per_call = samples_per_call
        self._max_generations = max_generations
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, Running] = {}

    @property
    def free_places(self) -> int:
        """How many generations `add` takes before the engine is full."""
        return self._max_generations - len(self._waiting) - len(self._running)

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

        Decoding comes before denoising, so that what is nearest its end ends first; a waiting
        generation is prepared as soon as the next UNet call has room for it. An error ends the
        generation it belongs to and no other.
        Raises: DeviceLost, after which the engine must not be used.
        """
        members = [
            (running, index)
            for running in self._running.values()
            for index in range(len(running.samples))
            if index not in running.pictures
        ]
        denoised = [member for member in members if sample_of(member).is_denoised]
        if denoised:
            return self._decode(denoised[0])
        batch = select_batch(members, self._samples_per_call)
        if self._waiting and len(batch) < self._samples_per_call:
            return self._prepare(self._waiting.popleft())
        if batch:
            return self._denoise(batch)
        return []

    def _prepare(self, generation: Generation) -> list[Event]:
        try:
            samples = self._pipeline.prepare(generation.params, generation.source)
        except Exception as error:  # noqa: BLE001 - whatever it is, this generation hears of it
            return [self._failed(generation.id, error)]
        running = Running(generation, samples)
        self._running[generation.id] = running
        return [running.progress()]

    def _denoise(self, batch: Sequence[Member]) -> list[Event]:
        """One step for all of a batch; when the shared call fails each member is tried alone."""
        try:
            predictions = self._pipeline.denoise_step([sample_of(member) for member in batch])
        except Exception as error:  # noqa: BLE001 - as above
            if len(batch) == 1 or isinstance(error, DeviceLost):
                return [self._failed(batch[0][0].generation.id, error)]
            return [
                event
                for member in batch
                if self._is_running(member)
                for event in self._denoise([member])
            ]
        failed: list[Event] = []
        for member, prediction in zip(batch, predictions, strict=True):
            if not self._is_running(member):
                continue
            try:
                self._pipeline.advance(sample_of(member), prediction)
            except Exception as error:  # noqa: BLE001 - as above
                failed.append(self._failed(member[0].generation.id, error))
        return [*failed, *self._progress_of(batch)]

    def _is_running(self, member: Member) -> bool:
        """False once another sample of the same generation has failed."""
        return member[0].generation.id in self._running

    def _progress_of(self, batch: Sequence[Member]) -> list[Event]:
        """One progress event per generation of a batch that still runs."""
        generations = dict.fromkeys(running.generation.id for running, _ in batch)
        return [self._running[each].progress() for each in generations if each in self._running]

    def _decode(self, member: Member) -> list[Event]:
        running, index = member
        try:
            running.pictures[index] = self._pipeline.decode([sample_of(member)])[0]
        except Exception as error:  # noqa: BLE001 - as above
            return [self._failed(running.generation.id, error)]
        if len(running.pictures) < len(running.samples):
            return []
        del self._running[running.generation.id]
        pictures = tuple(picture for _, picture in sorted(running.pictures.items()))
        return [Finished(running.generation.id, pictures)]

    def _failed(self, generation_id: int, error: Exception) -> Failed:
        if isinstance(error, DeviceLost):
            raise error
        if not isinstance(error, EngineError):
            logger.exception("generation failed", exc_info=error)
        self._running.pop(generation_id, None)
        return Failed(generation_id, error)


def sample_of(member: Member) -> Sample:
    """The sample a member stands for."""
    running, index = member
    return running.samples[index]


def select_batch(members: Sequence[Member], limit: int) -> list[Member]:
    """The samples of the next UNet call: the oldest, and others that may share its call."""
    if not members:
        return []
    key = BatchKey.of(sample_of(members[0]))
    return [member for member in members if BatchKey.of(sample_of(member)) == key][:limit]

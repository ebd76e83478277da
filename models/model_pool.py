"""`ModelPool`: a least recently used cache of loaded checkpoints, under a budget of memory.

A requested checkpoint that is not loaded is read in a thread, so that jobs of other models go on,
and is placed on the device between two steps. The least recently requested checkpoints are unloaded
when the budget is too small, but never one that is in use.

Each set of LoRAs and scales that jobs ask for makes another variant of a model. So at most
`MAX_VARIANTS` with LoRAs are loaded or being loaded, whatever the budget; the least recently
requested one is unloaded for the next.
"""

import gc
import logging
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum

import torch

from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline, translated_errors
from models.errors import ModelUnavailable, OutOfMemory
from models.variants import ModelVariant

logger = logging.getLogger(__name__)


MAX_VARIANTS = 4
"""Largest number of variants with LoRAs, each of which takes the memory of a whole model."""


class Readiness(Enum):
    """State of a requested model."""

    READY = "ready"
    LOADING = "loading"
    """A thread reads the checkpoint. Request the model again later."""
    CROWDED = "crowded"
    """Models in use leave no memory for it, or no place among the variants with LoRAs."""


@dataclass(slots=True)
class ModelPool:
    """The loaded models. Each is a `ModelVariant`, mostly one without LoRAs.

    load: reads a checkpoint into the host's memory; called in a thread.
        Raises: ModelUnavailable.
    place: places a checkpoint on the device.
    budget_bytes: limit of all models' parameters on the device; None sets no limit.
    """

    load: Callable[[ModelVariant], Components]
    place: Callable[[Components], InpaintPipeline]
    budget_bytes: int | None = None
    _resident: dict[ModelVariant, InpaintPipeline] = field(default_factory=dict)
    _sizes: dict[ModelVariant, int] = field(default_factory=dict)
    _loading: dict[ModelVariant, Future[Components]] = field(default_factory=dict)
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    @classmethod
    def of(cls, model: ModelVariant, pipeline: InpaintPipeline) -> "ModelPool":
        """A pool of one loaded model that loads no other."""

        def refuse(asked: ModelVariant) -> Components:
            raise ModelUnavailable(f"only '{model}' is served here")

        models = cls(refuse, InpaintPipeline)
        models._resident[model] = pipeline
        return models

    @property
    def resident(self) -> list[ModelVariant]:
        """The loaded models, the least recently requested one first."""
        return [*self._resident]

    def pipeline(self, model: ModelVariant) -> InpaintPipeline:
        """The pipeline of a model that is ready."""
        return self._resident[model]

    def request(self, model: ModelVariant, in_use: Set[ModelVariant] = frozenset()) -> Readiness:
        """State of a model; starts to load one that is not loaded, and never waits.

        in_use: models that must stay. A failed load may be tried again by the next call.
        Raises: ModelUnavailable, OutOfMemory, DeviceLost.
        """
        if model in self._resident:
            self._resident[model] = self._resident.pop(model)  # Now the most recent one.
            return Readiness.READY
        loading = self._loading.get(model)
        if loading is None:
            if model.loras and not self._make_room_for_variant(in_use):
                return Readiness.CROWDED
            self._loading[model] = self._reader.submit(self.load, model)
            return Readiness.LOADING
        if not loading.done():
            return Readiness.LOADING
        return self._settle(model, loading, in_use)

    def forget_loads(self, wanted: Set[ModelVariant]) -> None:
        """Drop the loads of models that nobody waits for any more, which would keep their memory.

        wanted: models that somebody waits for.
        """
        for model in self._loading.keys() - wanted:
            self._loading.pop(model).cancel()

    def wait_for(self, model: ModelVariant) -> InpaintPipeline:
        """Load a model while none is in use, and wait for it. Raises: as `request`."""
        while self.request(model) is not Readiness.READY:
            self._loading[model].exception()  # waits
        return self._resident[model]

    def release_memory(self) -> None:
        """Release cached device memory of all models."""
        for pipeline in self._resident.values():
            pipeline.release_memory()

    def close(self) -> None:
        """Cancel pending loads."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _settle(
        self, model: ModelVariant, loading: Future[Components], in_use: Set[ModelVariant]
    ) -> Readiness:
        """Place a model that was read on the device, if the budget allows."""
        if loading.exception() is not None:
            del self._loading[model]
        components = loading.result()
        if not self._make_room(model, components.size_bytes, in_use):
            return Readiness.CROWDED
        del self._loading[model]
        self._resident[model] = self._placed(components)
        self._sizes[model] = components.size_bytes
        return Readiness.READY

    def _placed(self, components: Components) -> InpaintPipeline:
        """Place on the device; out of memory, retry after releasing cached memory."""
        try:
            with translated_errors():
                return self.place(components)
        except OutOfMemory:
            logger.warning("out of memory for a model, trying once more")
        self.release_memory()
        with translated_errors():
            return self.place(components)

    def _make_room_for_variant(self, in_use: Set[ModelVariant]) -> bool:
        """Unload idle ones until one more may be loaded; False where too many are in use."""
        resident = [model for model in self._resident if model.loras]
        loading = sum(bool(model.loras) for model in self._loading)
        excess = len(resident) + loading + 1 - MAX_VARIANTS
        idle = [model for model in resident if model not in in_use]
        if excess > len(idle):
            return False
        for model in idle[: max(0, excess)]:
            self._unload(model)
        return True

    def _make_room(self, model: ModelVariant, size_bytes: int, in_use: Set[ModelVariant]) -> bool:
        """Unload idle models until the budget suffices; False, unloading none, where it cannot.

        Raises: ModelUnavailable for a model that never fits.
        """
        if self.budget_bytes is None:
            return True
        if size_bytes > self.budget_bytes:
            del self._loading[model]
            raise ModelUnavailable(
                f"model '{model}' needs {size_bytes / 1e9:.1f} GB; all models together may have "
                f"{self.budget_bytes / 1e9:.1f} GB"
            )
        excess = size_bytes + sum(self._sizes.values()) - self.budget_bytes
        leaving = []
        for resident in self._resident:
            if excess > 0 and resident not in in_use:
                leaving.append(resident)
                excess -= self._sizes.get(resident, 0)
        if excess > 0:
            return False
        for each in leaving:
            self._unload(each)
        return True

    def _unload(self, model: ModelVariant) -> None:
        logger.info("model %s unloaded", model)
        self._resident.pop(model).release_memory()
        del self._sizes[model]
        gc.collect()  # Frees reference cycles, which hold device memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

"""Which checkpoints are loaded at a time, under a budget of memory.

A checkpoint that is asked for and not there is read in a thread, so that jobs of other models go
on, and put onto the device between two steps. Where the budget does not hold it beside the others,
those asked for the longest time ago make room, but never one that is in use.
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

logger = logging.getLogger(__name__)


class Readiness(Enum):
    """How a model stands that was asked for."""

    READY = "ready"
    LOADING = "loading"
    """Ask again; meanwhile others may be asked for."""
    CROWDED = "crowded"
    """Read, but models in use take the room: it waits until they are not."""


@dataclass(slots=True)
class ModelPool:
    """The loaded models by id.

    load: reads a checkpoint into the host's memory; called in a thread.
        Raises: ModelUnavailable.
    place: puts it onto the device.
    budget_bytes: of parameters on the device, of all models; None sets no limit.
    """

    load: Callable[[str], Components]
    place: Callable[[Components], InpaintPipeline]
    budget_bytes: int | None = None
    _resident: dict[str, InpaintPipeline] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _loading: dict[str, Future[Components]] = field(default_factory=dict)
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    @classmethod
    def of(cls, model: str, pipeline: InpaintPipeline) -> "ModelPool":
        """One model that is always there, and no other."""

        def refuse(asked: str) -> Components:
            raise ModelUnavailable(f"only {model!r} is served here")

        models = cls(refuse, InpaintPipeline)
        models._resident[model] = pipeline
        return models

    @property
    def resident(self) -> list[str]:
        """Ids of the loaded models; the one asked for the longest time ago comes first."""
        return [*self._resident]

    def pipeline(self, model: str) -> InpaintPipeline:
        """A model that is ready."""
        return self._resident[model]

    def ask(self, model: str, in_use: Set[str] = frozenset()) -> Readiness:
        """How a model stands; begins to load it where need be, and never waits.

        in_use: models that must stay. A failed load may be tried again by the next call.
        Raises: ModelUnavailable, OutOfMemory, DeviceLost.
        """
        if model in self._resident:
            self._resident[model] = self._resident.pop(model)  # now the latest
            return Readiness.READY
        loading = self._loading.get(model)
        if loading is None:
            self._loading[model] = self._reader.submit(self.load, model)
            return Readiness.LOADING
        if not loading.done():
            return Readiness.LOADING
        return self._settle(model, loading, in_use)

    def wait_for(self, model: str) -> InpaintPipeline:
        """A model at a time when none is in use, loaded where need be. Raises: as `ask`."""
        while self.ask(model) is not Readiness.READY:
            self._loading[model].exception()  # waits
        return self._resident[model]

    def release_memory(self) -> None:
        """Give cached device memory of all models back."""
        for pipeline in self._resident.values():
            pipeline.release_memory()

    def close(self) -> None:
        """Load nothing more."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _settle(self, model: str, loading: Future[Components], in_use: Set[str]) -> Readiness:
        """Put a model that was read onto the device, if there is room."""
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
        """On the device, tried once more after what the other models keep was given back."""
        try:
            with translated_errors():
                return self.place(components)
        except OutOfMemory:
            logger.warning("out of memory for a model, trying once more")
        self.release_memory()
        with translated_errors():
            return self.place(components)

    def _make_room(self, model: str, size_bytes: int, in_use: Set[str]) -> bool:
        """Unload what has to go; nothing goes where that would not suffice.

        Raises: ModelUnavailable for a model that never fits.
        """
        if self.budget_bytes is None:
            return True
        if size_bytes > self.budget_bytes:
            del self._loading[model]
            raise ModelUnavailable(
                f"model {model!r} needs {size_bytes / 1e9:.1f} GB; all models together may have "
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

    def _unload(self, model: str) -> None:
        logger.info("model %s unloaded", model)
        self._resident.pop(model).release_memory()
        del self._sizes[model]
        gc.collect()  # what refers to itself in circles is not freed before
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

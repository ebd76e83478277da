"""The numbers a worker's model is made of."""

import pytest
import torch

from models.errors import EngineError, OutOfMemory, UnusablePicture
from models.variants import ModelVariant
from server.core.settings.sections import DtypeName
from server.worker.checkpoints import pick_dtype, warm_up

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("name", "on_cpu", "on_cuda"),
    [
        (DtypeName.AUTO, torch.float32, torch.float16),
        (DtypeName.FLOAT16, torch.float16, torch.float16),
        (DtypeName.BFLOAT16, torch.bfloat16, torch.bfloat16),
        (DtypeName.FLOAT32, torch.float32, torch.float32),
    ],
)
def test_dtype_is_the_settings_or_the_devices(
    name: DtypeName, on_cpu: torch.dtype, on_cuda: torch.dtype
) -> None:
    assert (pick_dtype(CPU, name), pick_dtype(CUDA, name)) == (on_cpu, on_cuda)


class Crowded:
    """An engine whose first calls fail."""

    def __init__(self, error: EngineError) -> None:
        self._error = error
        self.has_released = False

    def warm_up(self, model: ModelVariant) -> None:
        raise self._error

    def release_memory(self) -> None:
        self.has_released = True


@pytest.mark.parametrize("error", [OutOfMemory("none"), UnusablePicture("black")])
def test_worker_starts_without_a_warm_up(error: EngineError) -> None:
    """Smaller pictures may do."""
    engine = Crowded(error)
    warm_up(engine, ModelVariant("inpaint"))

    assert engine.has_released

"""The numbers a worker's model is made of."""

import pytest
import torch

from server.checkpoints import pick_dtype
from server.settings import DtypeName

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

"""The quickest attention kernel is chosen by what a UNet really calls, once for each size."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from models.acceleration.attention import (
    KERNELS,
    AttentionCalls,
    AttentionShape,
    MeasuredAttention,
    quickest_first,
)
from models.acceleration.unet import EagerUNet, UNetInputs
from models.checkpoints.registry import ModelSpec, load_components
from tests.support.tiny import save_tiny_checkpoint
from tests.support.unet_calls import make_shares

CUDNN, FLASH, EFFICIENT = KERNELS
SELF = AttentionShape(2, 8, 4096, 4096, 40, torch.float16)
CROSS = AttentionShape(2, 8, 4096, 77, 40, torch.float16)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({CUDNN: 3.0, FLASH: 2.0, EFFICIENT: 4.0}, FLASH),
        ({CUDNN: 1.0, FLASH: 2.0, EFFICIENT: 4.0}, CUDNN),
        ({FLASH: 2.0, EFFICIENT: 1.0}, EFFICIENT),  # older cards have no cuDNN kernel
    ],
)
def test_quickest_kernel_comes_first(times: dict[SDPBackend, float], expected: SDPBackend) -> None:
    order = quickest_first({SELF: 5}, lambda kernel, shape: times.get(kernel))

    assert order[0] == expected
    assert {*order[:-1]} == {*KERNELS}  # the others stay, for shapes that it does not take
    assert order[-1] == SDPBackend.MATH


def test_shapes_count_as_often_as_they_are_called() -> None:
    times = {(FLASH, SELF): 1.0, (FLASH, CROSS): 2.0, (CUDNN, SELF): 2.0, (CUDNN, CROSS): 0.5}

    def timer(kernel: SDPBackend, shape: AttentionShape) -> float:
        return times.get((kernel, shape), 9.0)

    assert quickest_first({SELF: 9, CROSS: 1}, timer)[0] == FLASH
    assert quickest_first({SELF: 1, CROSS: 9}, timer)[0] == CUDNN


def test_kernel_that_lacks_a_shape_pays_for_it() -> None:
    times = {(FLASH, SELF): 1.0, (CUDNN, SELF): 9.0, (CUDNN, CROSS): 9.0}
    times |= {(EFFICIENT, SELF): 2.0, (EFFICIENT, CROSS): 2.0}

    order = quickest_first({SELF: 1, CROSS: 1}, lambda *which: times.get(which))

    assert order == [EFFICIENT, CUDNN, FLASH, SDPBackend.MATH]


def test_nothing_is_chosen_where_no_kernel_fits() -> None:
    """As in float64: torch falls back to plain products."""
    assert quickest_first({SELF: 5}, lambda *_: None) == [*KERNELS, SDPBackend.MATH]


def test_each_size_is_measured_once_and_results_stay(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9)
    loaded = load_components(ModelSpec("tiny", str(folder)), torch.device("cpu"), torch.float32)
    asked: list[tuple[SDPBackend, AttentionShape]] = []

    def timer(kernel: SDPBackend, shape: AttentionShape) -> float:
        asked.append((kernel, shape))
        return 1.0

    plain = EagerUNet(loaded.unet)
    call = MeasuredAttention(plain, plain, timer)
    with torch.inference_mode():
        inputs = UNetInputs.gather(make_shares(loaded, [2, 1]))
        for _ in range(2):
            torch.testing.assert_close(call(inputs), plain(inputs))
        with AttentionCalls() as calls:
            plain(inputs)
        counts = Counter(shape for _, shape in asked)
        assert counts == dict.fromkeys(calls.counts, len(KERNELS))  # each shape once by each
        assert all(shape.rows == 3 for shape in counts)

        call(UNetInputs.gather(make_shares(loaded, [2, 1], height=16)))
        assert len(asked) > sum(counts.values())

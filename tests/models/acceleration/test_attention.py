"""The quickest attention kernel is chosen once for every shape that a UNet really calls."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from models.acceleration.attention import (
    KERNELS,
    AttentionCalls,
    AttentionShape,
    ChosenKernels,
    MeasuredAttention,
    in_order,
    quickest_first,
    random_arguments,
    timer_behind,
)
from models.acceleration.unet import EagerUNet, UNetInputs
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import Components, load_components
from tests.support.tiny import save_tiny_checkpoint
from tests.support.unet_calls import make_shares

CUDNN, FLASH, EFFICIENT = KERNELS
HEADS_SIDE_BY_SIDE = (4096 * 320, 40, 320, 1)
SELF = AttentionShape(
    *(2, 8, 4096, 4096, 40, torch.float16),
    query_strides=HEADS_SIDE_BY_SIDE,
    key_strides=HEADS_SIDE_BY_SIDE,
    value_strides=HEADS_SIDE_BY_SIDE,
)


@pytest.fixture
def components(tmp_path: Path) -> Components:
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9)
    return load_components(ModelSpec("tiny", str(folder)), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({CUDNN: 3.0, FLASH: 2.0, EFFICIENT: 4.0}, [FLASH, CUDNN, EFFICIENT]),
        ({CUDNN: 1.0, FLASH: 4.0, EFFICIENT: 2.0}, [CUDNN, EFFICIENT, FLASH]),
        ({FLASH: 2.0, EFFICIENT: 1.0}, [EFFICIENT, FLASH, CUDNN]),  # older cards have no cuDNN's
        ({}, [*KERNELS]),  # as in float64
    ],
)
def test_quickest_kernel_comes_first(
    times: dict[SDPBackend, float], expected: list[SDPBackend]
) -> None:
    order = quickest_first(SELF, lambda kernel, shape: times.get(kernel))

    assert [*order] == [*expected, SDPBackend.MATH]


@torch.inference_mode()
def test_each_shape_is_measured_once_and_results_stay(components: Components) -> None:
    asked: list[AttentionShape] = []

    def timer(kernel: SDPBackend, shape: AttentionShape) -> float:
        asked.append(shape)
        return 1.0

    plain = EagerUNet(components.unet)
    call = MeasuredAttention(plain, plain, timer)
    inputs = UNetInputs.gather(make_shares(components, [2, 1]))
    for _ in range(2):
        torch.testing.assert_close(call(inputs), plain(inputs))
    with AttentionCalls() as calls:
        plain(inputs)

    assert set(asked) == calls.shapes
    assert len(asked) == len(KERNELS) * len(calls.shapes)
    assert {shape.rows for shape in asked} == {3}


@torch.inference_mode()
def test_other_rows_and_sizes_are_measured_too(components: Components) -> None:
    """What is quickest for 16 rows need not be for 2."""
    asked: list[AttentionShape] = []

    def timer(kernel: SDPBackend, shape: AttentionShape) -> float:
        asked.append(shape)
        return 1.0

    plain = EagerUNet(components.unet)
    call = MeasuredAttention(plain, plain, timer)
    call(UNetInputs.gather(make_shares(components, [2, 2])))
    call(UNetInputs.gather(make_shares(components, [2])))
    assert {shape.rows for shape in asked} == {4, 2}

    asked.clear()
    call(UNetInputs.gather(make_shares(components, [2], height=16)))
    assert asked


def test_each_shape_gets_its_own_kernel() -> None:
    """Seen by the priority in force when torch makes the call."""
    found: list[list[int]] = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.nn.functional.scaled_dot_product_attention:
                found.append(torch._C._get_sdp_priority_order())
            return func(*args, **(kwargs or {}))

    wide, narrow = (torch.randn(1, 1, 4, width) for width in (16, 8))
    orders = {
        AttentionShape.of(wide, wide, wide): (EFFICIENT, CUDNN, FLASH, SDPBackend.MATH),
        AttentionShape.of(narrow, narrow, narrow): (FLASH, EFFICIENT, CUDNN, SDPBackend.MATH),
    }
    with Spy(), ChosenKernels(orders):
        for each in (wide, narrow, torch.randn(1, 1, 4, 24)):
            torch.nn.functional.scaled_dot_product_attention(each, each, each)

    usual = (*KERNELS, SDPBackend.MATH)
    assert [order[:3] for order in found] == [
        [each.value for each in order[:3]] for order in (*orders.values(), usual)
    ]


class Log(torch.overrides.TorchFunctionMode):
    """Notes attention calls, and has them fail where it is told how."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__()
        self.entries: list[str] = []
        self._fault = fault

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.entries.append("call")
            if self._fault is not None:
                raise self._fault
        return func(*args, **(kwargs or {}))


SMALL = AttentionShape(1, 1, 4, 4, 8, torch.float32, *[(32, 32, 8, 1)] * 3)


def test_timed_calls_are_queued_behind_other_work() -> None:
    """Or the events would measure how quickly the host starts small kernels."""
    with Log() as log:
        timer = timer_behind(lambda: log.entries.append("other work"), torch.device("cpu"))
        seconds = timer(FLASH, SMALL)

    assert seconds is not None
    assert seconds > 0
    assert log.entries == [*["call"] * 2, "other work", *["call"] * 10]


def test_kernel_that_does_not_take_a_shape_has_no_time() -> None:
    with Log(RuntimeError("No available kernel")):
        assert timer_behind(lambda: None, torch.device("cpu"))(FLASH, SMALL) is None


def test_lack_of_memory_is_no_verdict_on_a_kernel() -> None:
    """The kernel would be out of use for that shape until the process ends."""
    timer = timer_behind(lambda: None, torch.device("cpu"))
    with Log(torch.OutOfMemoryError("full")), pytest.raises(torch.OutOfMemoryError):
        timer(FLASH, SMALL)


def test_measured_tensors_lie_in_memory_as_the_unets_do() -> None:
    """Key and value are two tensors: as one they would be half the traffic."""
    query, key, value = random_arguments(SELF, torch.device("cpu"))

    assert AttentionShape.of(query, key, value) == SELF
    assert key.data_ptr() != value.data_ptr()
    assert query.isfinite().all()


@torch.inference_mode()
def test_unet_of_heads_side_by_side_is_seen_as_such(components: Components) -> None:
    with AttentionCalls() as calls:
        EagerUNet(components.unet)(UNetInputs.gather(make_shares(components, [2])))

    for shape in calls.shapes:
        assert shape.query_strides[1] == shape.width
        assert shape.query_strides[2] == shape.heads * shape.width


def test_order_in_force_ends_with_the_call() -> None:
    before = torch._C._get_sdp_priority_order()
    with in_order([FLASH, SDPBackend.MATH]):
        assert torch._C._get_sdp_priority_order() != before

    assert torch._C._get_sdp_priority_order() == before

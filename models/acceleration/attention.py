"""Which attention kernel each call gets on this device: the quickest, by measurement.

`torch.nn.functional.scaled_dot_product_attention` has several kernels; which is quickest depends on
the card, the head width, the number of rows and of latent pixels, and torch's own order of
preference does not look at any of them. On a CPU there is one kernel and nothing is measured.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from models.acceleration.transfers import mark
from models.acceleration.unet import CallSize, UNetCall, UNetInputs

logger = logging.getLogger(__name__)

KERNELS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
"""Kernels by default priority. Plain matrix products are no candidate and only the last resort,
because they need gigabytes at 1024×1024."""

Order: TypeAlias = tuple[SDPBackend, ...]

USUAL_ORDER: Order = (*KERNELS, SDPBackend.MATH)

MEASURED_CALLS = 10
"""Timed calls per kernel and shape, after two warm-up calls."""

BACKLOG_CYCLES = 4_000_000
"""What the device is occupied with while the host queues the timed calls: 2 ms at 2 GHz. To queue
them takes 0.3 ms."""

Strides: TypeAlias = tuple[int, ...]


class AttentionShape(NamedTuple):
    """An attention call: query `(rows, heads, tokens, width)`, key, value `(…, keys, …)`.

    A UNet's heads lie beside one another in memory, token by token. Kernels may be slower on that,
    so strides are part of what is measured.
    """

    rows: int
    heads: int
    tokens: int
    keys: int
    width: int
    dtype: torch.dtype
    query_strides: Strides
    key_strides: Strides
    value_strides: Strides

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> "AttentionShape":
        """The shape of the call with these arguments."""
        strides = (each.stride() for each in (query, key, value))
        rows, heads, tokens, width = query.shape
        return cls(rows, heads, tokens, key.shape[2], width, query.dtype, *strides)


Timer: TypeAlias = Callable[[SDPBackend, AttentionShape], float | None]
"""Seconds of a call by a kernel; None where it does not take the shape."""


class MeasuredAttention:
    """A UNet call whose attention calls each have the kernel that is quickest for their shape.

    Kernels are measured when a size first comes up with so many rows, and a shape keeps its kernel
    for the life of the process.
    plain: makes the call kernel by kernel, so that what it needs can be seen.
    """

    def __init__(self, call: UNetCall, plain: UNetCall, timer: Timer) -> None:
        self._call = call
        self._plain = plain
        self._timer = timer
        self._known: set[tuple[CallSize, int]] = set()
        self._orders: dict[AttentionShape, Order] = {}

    def __call__(self, inputs: UNetInputs) -> Tensor:
        kind = CallSize.of(inputs), inputs.rows
        if kind not in self._known:
            self._measure(inputs)
            self._known.add(kind)
        with ChosenKernels(self._orders):
            return self._call(inputs)

    def _measure(self, inputs: UNetInputs) -> None:
        with AttentionCalls() as calls:
            self._plain(inputs)
        for shape in calls.shapes - self._orders.keys():
            order = quickest_first(shape, self._timer)
            self._orders[shape] = order
            logger.info("attention of %s: %s", shape, ", ".join(each.name for each in order))


def in_order(kernels: Sequence[SDPBackend]) -> AbstractContextManager[Any]:
    """Inside, each attention call takes the first of these kernels that can do it."""
    context: AbstractContextManager[Any] = sdpa_kernel([*kernels], set_priority=True)
    return context


def quickest_first(shape: AttentionShape, timer: Timer) -> Order:
    """All kernels in the order of their times for a shape; those that do not take it come last."""
    times = {kernel: timer(kernel, shape) for kernel in KERNELS}
    timed = sorted((seconds, place) for place, seconds in enumerate(times.values()) if seconds)
    first = [KERNELS[place] for _, place in timed]
    return (*first, *(each for each in USUAL_ORDER if each not in first))


class ChosenKernels(TorchFunctionMode):
    """Inside, each attention call takes the kernels in the order that was found for its shape."""

    def __init__(self, orders: Mapping[AttentionShape, Order]) -> None:
        super().__init__()
        self._orders = orders

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with in_order(self._orders.get(AttentionShape.of(*args[:3]), USUAL_ORDER)):
            return func(*args, **(kwargs or {}))


class AttentionCalls(TorchFunctionMode):
    """Notes the shapes of the attention calls made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[AttentionShape] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.shapes.add(AttentionShape.of(*args[:3]))
        return func(*args, **(kwargs or {}))


def cuda_timer(device: torch.device) -> Timer:
    """Measures on the device, with nothing else running on it."""

    def occupy() -> None:
        with torch.cuda.device(device):
            torch.cuda._sleep(BACKLOG_CYCLES)  # type: ignore[no-untyped-call]

    return timer_behind(occupy, device)


def timer_behind(occupy: Callable[[], None], device: torch.device) -> Timer:
    """Measures calls that are all queued before the first of them begins.

    occupy: gives the device something to do meanwhile. Without that a kernel that is quicker than
    the host that starts it would be measured by the host's time, which a graph does not need.
    """

    def timer(kernel: SDPBackend, shape: AttentionShape) -> float | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a kernel that says why it cannot
            try:
                query, key, value = random_arguments(shape, device)
                with sdpa_kernel([kernel]):
                    for number in range(2 + MEASURED_CALLS):
                        if number == 2:
                            occupy()
                            began = mark(device)
                        torch.nn.functional.scaled_dot_product_attention(query, key, value)
                    ended = mark(device)
            except torch.OutOfMemoryError:  # which says nothing about the kernel
                raise
            except RuntimeError:  # not for this shape
                return None
            ended.wait()
            return ended.s_since(began) / MEASURED_CALLS

    return timer


def random_arguments(shape: AttentionShape, device: torch.device) -> Iterator[Tensor]:
    """Query, key and value, with the strides that the call's own have."""
    for tokens, strides in (
        (shape.tokens, shape.query_strides),
        (shape.keys, shape.key_strides),
        (shape.keys, shape.value_strides),
    ):
        size = (shape.rows, shape.heads, tokens, shape.width)
        last = sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))
        memory = torch.randn(last + 1, device=device, dtype=shape.dtype)
        yield memory.as_strided(size, strides)

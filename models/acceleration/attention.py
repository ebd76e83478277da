"""Which attention kernel a size of UNet call gets on this device: the quickest, by measurement.

`torch.nn.functional.scaled_dot_product_attention` has several kernels; which is quickest depends on
the card, the head width and the number of latent pixels, and torch's own order of preference does
not look at any of them. On a CPU there is one kernel and nothing is measured.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from models.acceleration.unet import CallSize, UNetCall, UNetInputs

logger = logging.getLogger(__name__)

KERNELS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
"""Kernels by default priority. Plain matrix products are no candidate and only the last resort,
because they need gigabytes at 1024×1024."""

USUAL_ORDER = [*KERNELS, SDPBackend.MATH]

MEASURED_CALLS = 10
"""Timed calls per kernel and shape, after two warm-up calls. All shapes of a UNet take some ms."""


class AttentionShape(NamedTuple):
    """An attention call: query `(rows, heads, tokens, width)`, key, value `(…, keys, …)`."""

    rows: int
    heads: int
    tokens: int
    keys: int
    width: int
    dtype: torch.dtype


Timer: TypeAlias = Callable[[SDPBackend, AttentionShape], float | None]
"""Seconds of a call by a kernel; None where it does not take the shape."""


class MeasuredAttention:
    """A UNet call with the attention kernels that are quickest for its size.

    They are measured at the first call of a size, and keep their place for the life of the process.
    plain: makes the call kernel by kernel, so that what it needs can be seen.
    """

    def __init__(self, call: UNetCall, plain: UNetCall, timer: Timer) -> None:
        self._call = call
        self._plain = plain
        self._timer = timer
        self._orders: dict[CallSize, list[SDPBackend]] = {}

    def __call__(self, inputs: UNetInputs) -> Tensor:
        size = CallSize.of(inputs)
        if size not in self._orders:
            self._orders[size] = self._measure(inputs)
        with in_order(self._orders.get(size, USUAL_ORDER)):
            return self._call(inputs)

    def _measure(self, inputs: UNetInputs) -> list[SDPBackend]:
        with AttentionCalls() as calls:
            self._plain(inputs)
        order = quickest_first(calls.counts, self._timer)
        size = CallSize.of(inputs)
        logger.info("attention of %s: %s", size, ", ".join(each.name for each in order))
        return order


def in_order(kernels: list[SDPBackend]) -> AbstractContextManager[Any]:
    """Inside, each attention call takes the first of these kernels that can do it."""
    context: AbstractContextManager[Any] = sdpa_kernel(kernels, set_priority=True)
    return context


def quickest_first(counts: Mapping[AttentionShape, int], timer: Timer) -> list[SDPBackend]:
    """All kernels, with the one in front that makes all these calls in the least time.

    counts: how often a UNet call needs each shape. For a shape that a kernel does not take it is
        charged with the slowest one that does.
    """
    totals = dict.fromkeys(KERNELS, 0.0)
    for shape, count in counts.items():
        times = {kernel: timer(kernel, shape) for kernel in KERNELS}
        slowest = max((each for each in times.values() if each is not None), default=0.0)
        for kernel, seconds in times.items():
            totals[kernel] += count * (slowest if seconds is None else seconds)
    first = min(KERNELS, key=lambda kernel: totals[kernel])
    return [first, *(each for each in USUAL_ORDER if each != first)]


class AttentionCalls(TorchFunctionMode):
    """Notes the shapes of the attention calls made inside. counts: how often each came up."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[AttentionShape] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            rows, heads, tokens, width = query.shape
            self.counts[AttentionShape(rows, heads, tokens, key.shape[2], width, query.dtype)] += 1
        return func(*args, **(kwargs or {}))


def cuda_timer(device: torch.device) -> Timer:
    """Measures on the device, with nothing else running on it."""

    def timer(kernel: SDPBackend, shape: AttentionShape) -> float | None:
        with torch.cuda.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a kernel that says why it cannot
            began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            try:
                query, key = random_pair(shape, device)
                with sdpa_kernel([kernel]):
                    for number in range(2 + MEASURED_CALLS):
                        if number == 2:
                            began.record()
                        torch.nn.functional.scaled_dot_product_attention(query, key, key)
                    ended.record()
            except RuntimeError:  # not for this shape
                return None
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1000 / MEASURED_CALLS

    return timer


def random_pair(shape: AttentionShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """A query, and a key that may be the value too."""
    query, key = (
        torch.randn(shape.rows, shape.heads, tokens, shape.width, device=device, dtype=shape.dtype)
        for tokens in (shape.tokens, shape.keys)
    )
    return query, key

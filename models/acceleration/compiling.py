"""A UNet compiled by torch.compile, in the background: plain calls until it is ready, then a swap.

Compiled code starts kernels of its own and is quicker, but differs from plain calls by rounding,
and takes minutes to make. It is made without CUDA graphs of its own: `graphs` records over it.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from models.acceleration.unet import CallSize, EagerUNet, UNetCall, UNetInputs

logger = logging.getLogger(__name__)

MOST_SHAPES = 8
"""Compiled for a UNet; torch.compile's own limit for one function. UNets of one class share that
one: where several are compiled, the last may get less, which ends as any failure does."""

Compiler: TypeAlias = Callable[[Any], Callable[..., Any]]
Shape: TypeAlias = tuple[CallSize, int]
"""Size and rows: each has code of its own."""


def for_fixed_shapes(unet: Any) -> Callable[..., Any]:
    """Compiled whole; what it cannot compile is an error, not a slow call.

    What was compiled before is found again in `TORCHINDUCTOR_CACHE_DIR`.
    """
    compiled: Callable[..., Any] = torch.compile(unet, fullgraph=True, dynamic=False)
    return compiled


class CompiledUNet:
    """A UNet call that gets quicker some minutes after a shape has first come up.

    Shape by shape is compiled by a thread beside, on numbers of its own; a shape is used from the
    moment it has run there. The first failure is the last attempt: plain calls go on.
    """

    def __init__(self, unet: Any, plain: UNetCall, compiler: Compiler = for_fixed_shapes) -> None:
        self._plain = plain
        self._compiled = EagerUNet(compiler(unet))
        self._ready: frozenset[Shape] = frozenset()
        self._asked: set[Shape] = set()
        self._is_compiling = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._has_failed = False

    @property
    def version(self) -> int:
        return self._plain.version + len(self._ready)

    @property
    def is_changing(self) -> bool:
        return self._plain.is_changing or any(each.is_alive() for each in self._threads)

    def __call__(self, inputs: UNetInputs) -> Tensor:
        shape = CallSize.of(inputs), inputs.rows
        if shape in self._ready:
            return self._compiled(inputs)
        if shape not in self._asked and len(self._asked) < MOST_SHAPES and not self._has_failed:
            self._asked.add(shape)
            # A daemon: the process need not live on until a compiler has finished.
            thread = threading.Thread(
                target=self._compile, args=(shape, zeros_like(inputs)), daemon=True
            )
            self._threads.append(thread)
            thread.start()
        return self._plain(inputs)

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for all that is being compiled."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _compile(self, shape: Shape, inputs: UNetInputs) -> None:
        with self._is_compiling:
            if self._has_failed:
                return
            try:
                with torch.inference_mode(), own_stream(inputs.latents.device):
                    self._compiled(inputs)
            except Exception:  # compilers fail in many ways
                self._has_failed = True
                logger.warning("the UNet cannot be compiled, plain calls go on", exc_info=True)
                return
            self._ready |= {shape}
        logger.info("UNet compiled for %s, %d rows", *shape)


def zeros_like(inputs: UNetInputs) -> UNetInputs:
    """Inputs of the same shapes."""
    return UNetInputs(
        torch.zeros_like(inputs.latents),
        torch.zeros_like(inputs.timesteps),
        torch.zeros_like(inputs.conditioning),
        {name: torch.zeros_like(each) for name, each in inputs.added.items()},
    )


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Inside, work is queued apart from the main thread's; at the end it is done."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()

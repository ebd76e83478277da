"""Random numbers that do not depend on the dtype they are asked for in.

torch before 2.13 draws other numbers in half precision than in float32: a seed would give another
picture on a GPU than on a CPU, and another one after an update.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

HALVES = (torch.float16, torch.bfloat16)


def rounded_noise(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside, noise of this dtype is drawn in float32 and rounded, as torch does from 2.13 on."""
    return RoundedNoise() if dtype in HALVES else nullcontext()


class RoundedNoise(TorchFunctionMode):
    """Draws in float32 what is asked for in half precision."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype") in HALVES:
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(kwargs["dtype"])
        return func(*args, **kwargs)

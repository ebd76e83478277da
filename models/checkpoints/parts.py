"""What loading a checkpoint is made of, whichever layout it has. Torch-free."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Part:
    """One component that is still on disk.

    path: where it lies, for messages. size: bytes, at least 1, for progress.
    load: the module, tokenizer or configuration; its errors are translated by the registry.
    """

    path: Path
    size: int
    load: Callable[[], Any]


def vae_dtype(vae_config: dict[str, Any], *, is_sdxl: bool, dtype: "torch.dtype") -> "torch.dtype":
    """The dtype a VAE lives in.

    SDXL's overflows in half precision unless it was fixed (`force_upcast` false), so it stays in
    float32 for good; diffusers casts it back and forth in each call. bfloat16 has float32's range.
    The configurations of older families leave `force_upcast` at its default, true, without need.
    """
    import torch

    overflows = is_sdxl and vae_config.get("force_upcast", True)
    return torch.float32 if overflows and dtype == torch.float16 else dtype

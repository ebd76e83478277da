"""LoRA files of random weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 2


def save_lora(path: Path, unet: Any, seed: int = 0) -> Path:
    """Write a LoRA file, in kohya's names, that changes every query of a UNet's attention."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in unet.named_modules():
        if name.endswith(".to_q"):
            height, width = module.weight.shape
            prefix = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{prefix}.lora_down.weight"] = torch.randn(RANK, width, generator=generator)
            tensors[f"{prefix}.lora_up.weight"] = torch.randn(height, RANK, generator=generator)
    assert tensors
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path

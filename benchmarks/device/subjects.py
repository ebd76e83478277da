"""The models that are measured: random weights, made in place on the device, nothing on a disk."""

import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import checkpoints
from benchmarks.device.bench import Bench
from models.acceleration.unet import UNetInputs
from models.checkpoints.registry import Components


def make_tiny_unet() -> Any:
    """Every kind of part that SD 1.5 has, in small."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
    )


def make_tiny_vae() -> Any:
    """With the factor of eight that all have."""
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def make_tiny_text_encoder() -> Any:
    """One layer."""
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            **checkpoints.token_ids(),
        )
    )


def make_text_encoder(is_tiny: bool) -> Any:
    """Of SD 1.5, or one of a layer."""
    return make_tiny_text_encoder() if is_tiny else CLIPTextModel(checkpoints.clip_l_config())


UNETS = {**checkpoints.UNETS, "tiny": make_tiny_unet}


def placed(bench: Bench, make: Callable[[], Any], dtype: torch.dtype | None = None) -> Any:
    """A model of random weights on the device, as a worker holds it but for the fusions."""
    checkpoints.quieten_libraries()
    torch.manual_seed(0)
    with bench.device:
        model = make()
    model.requires_grad_(False).eval()
    return model.to(dtype or bench.dtype).to(memory_format=torch.channels_last)


def inputs_of(bench: Bench, unet: Any, side_px: int, rows: int) -> UNetInputs:
    """Random arguments of a call."""
    config = unet.config
    side = side_px // 8
    added: dict[str, Tensor] = {}
    if config.addition_embed_type == "text_time":
        added = {"text_embeds": bench.random(rows, 1280), "time_ids": bench.random(rows, 6)}
    return UNetInputs(
        bench.random(rows, config.in_channels, side, side),
        torch.full((rows,), 500.0, device=bench.device),
        bench.random(rows, 77, config.cross_attention_dim),
        added,
    )


def components(bench: Bench, family: str = "sd15") -> Components:
    """A checkpoint in memory."""
    is_tiny = family == "tiny"
    with torch.device("cpu"):
        tokenizer = checkpoints.make_tokenizer()
        scheduler = checkpoints.make_scheduler(
            "DDIMScheduler", clip_sample=False, set_alpha_to_one=False
        )

    return Components(
        tokenizer=tokenizer,
        text_encoder=placed(bench, lambda: make_text_encoder(is_tiny)),
        vae=placed(bench, make_tiny_vae if is_tiny else lambda: checkpoints.make_vae(0.18215)),
        unet=placed(bench, UNETS[family]),
        scheduler_config={**scheduler.config, "_class_name": type(scheduler).__name__},
        safety_checker=None,
        feature_extractor=None,
    )


def kernels_are_interpreted() -> bool:
    """Whether Triton's kernels run on a CPU, which is slow and shows only that they do."""
    return os.environ.get("TRITON_INTERPRET") == "1"

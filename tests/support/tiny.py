"""Small checkpoints of real classes with random weights, in diffusers layout.

They make noise, not pictures, but every shape, file and code path is the real one.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.checkpoints.families import Family

TEXT_WIDTH = 32
SECOND_WIDTH = 24
PROJECTION_WIDTH = 20
TIME_WIDTH = 8

XL_UNET = {
    "cross_attention_dim": TEXT_WIDTH + SECOND_WIDTH,
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_WIDTH,
    "projection_class_embeddings_input_dim": 6 * TIME_WIDTH + PROJECTION_WIDTH,
}


def save_tiny_checkpoint(folder: Path, unet_channels: int, family: Family = Family.SD15) -> Path:
    """Write a checkpoint without a safety checker.

    unet_channels: 9 as in inpainting checkpoints, or 4 as in ordinary ones.
    """
    torch.manual_seed(0)
    is_sdxl = family is Family.SDXL
    save_tokenizer(folder / "tokenizer", "<|endoftext|>" if family is not Family.SD2 else "!")
    CLIPTextModel(text_config(family)).save_pretrained(folder / "text_encoder")
    if is_sdxl:
        save_tokenizer(folder / "tokenizer_2", "!")
        second = text_config(family, SECOND_WIDTH, PROJECTION_WIDTH)
        CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    AutoencoderKL(
        block_out_channels=(16, 16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.13025 if is_sdxl else 0.18215,
    ).save_pretrained(folder / "vae")
    extra = XL_UNET if is_sdxl else {"cross_attention_dim": TEXT_WIDTH}
    UNet2DConditionModel(
        sample_size=8,
        in_channels=unet_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        **extra,
    ).save_pretrained(folder / "unet")
    scheduler = scheduler_of(unet_channels, family)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index_of(family, scheduler)))
    return folder


def text_config(
    family: Family, width: int = TEXT_WIDTH, projection_width: int = TEXT_WIDTH
) -> CLIPTextConfig:
    """Of CLIP's own encoder, or of OpenCLIP's (which has another activation)."""
    is_open_clip = family is Family.SD2 or width == SECOND_WIDTH
    return CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=37,
        projection_dim=projection_width,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu" if is_open_clip else "quick_gelu",
        bos_token_id=vocabulary()["<|startoftext|>"],
        eos_token_id=vocabulary()["<|endoftext|>"],
        pad_token_id=vocabulary()["<|endoftext|>"],
    )


def scheduler_of(unet_channels: int, family: Family) -> Any:
    """The class such checkpoints ship; Stable Diffusion 2 predicts velocities here."""
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    if family is Family.SDXL:
        return EulerDiscreteScheduler(timestep_spacing="leading", **schedule)
    schedule["set_alpha_to_one"] = False
    if family is Family.SD2:
        schedule["prediction_type"] = "v_prediction"
    if unet_channels == 9:
        return DDIMScheduler(clip_sample=False, **schedule)
    return PNDMScheduler(skip_prk_steps=True, **schedule)


def index_of(family: Family, scheduler: Any) -> dict[str, Any]:
    """Contents of `model_index.json`."""
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": diffusers.__version__,
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    if family is Family.SDXL:
        index |= {
            "_class_name": "StableDiffusionXLInpaintPipeline",
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
            "requires_aesthetics_score": False,
        }
    return index


def vocabulary() -> dict[str, int]:
    """Single letters only: enough for a tokenizer that splits every word."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:()[]-!"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    return {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def save_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> None:
    """A CLIP tokenizer over `vocabulary()` without merges."""
    folder.mkdir(parents=True)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary(), merges=[], model_max_length=77, pad_token=pad_token
    )
    tokenizer.save_pretrained(folder)

"""Small checkpoints of real classes with random weights, in diffusers layout.

They make noise, not pictures, but every shape, file and code path is the real one.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 32


def save_tiny_checkpoint(folder: Path, unet_channels: int) -> Path:
    """Write a checkpoint without a safety checker.

    unet_channels: 9 as in inpainting checkpoints, or 4 as in ordinary ones.
    """
    torch.manual_seed(0)
    save_tokenizer(folder / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=vocabulary()["<|startoftext|>"],
        eos_token_id=vocabulary()["<|endoftext|>"],
        pad_token_id=vocabulary()["<|endoftext|>"],
    )
    CLIPTextModel(text_config).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        block_out_channels=(16, 16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=8,
        in_channels=unet_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    scheduler_class = DDIMScheduler if unet_channels == 9 else PNDMScheduler
    extra = {"clip_sample": False} if unet_channels == 9 else {"skip_prk_steps": True}
    scheduler_class(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        **extra,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": diffusers.__version__,
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", scheduler_class.__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def vocabulary() -> dict[str, int]:
    """Single letters only: enough for a tokenizer that splits every word."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:()[]-"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    return {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def save_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer over `vocabulary()` without merges."""
    folder.mkdir(parents=True)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary(), merges=[], model_max_length=77, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)

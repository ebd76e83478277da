"""Writes the trained parts as one diffusers folder, fp16, in place of an older one."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from models.builtin.training.networks.unet import build_scheduler

DIGESTS = "sha256.json"


@dataclass(frozen=True)
class Parts:
    """Everything that was trained; `safety_checker` and its processor come together."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    safety_checker: StableDiffusionSafetyChecker
    image_processor: CLIPImageProcessor


def assemble(parts: Parts) -> StableDiffusionInpaintPipeline:
    """The plain diffusers pipeline over the parts, as they are (no copy)."""
    return StableDiffusionInpaintPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=build_scheduler(),
        safety_checker=parts.safety_checker,
        feature_extractor=parts.image_processor,
    )


def export(parts: Parts, folder: Path) -> None:
    """Saves into a neighbouring folder first, so that `folder` is always complete.

    Turns the parts to half precision in place.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for module in (parts.vae, parts.unet, parts.text_encoder, parts.safety_checker):
        module.half()
    assemble(parts).save_pretrained(partial, safe_serialization=True)
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files only their owner can read
    forget_origins(partial)
    write_digests(partial)
    older = folder.with_name(folder.name + ".older")
    if folder.exists():
        os.replace(folder, older)
    os.replace(partial, folder)
    shutil.rmtree(older, ignore_errors=True)


def forget_origins(folder: Path) -> None:
    """Removes the folders of older weights, which configurations remember, from a model's files."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_digests(folder: Path) -> None:
    """What `registry` compares the files with before it loads them."""
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DIGESTS
    }
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

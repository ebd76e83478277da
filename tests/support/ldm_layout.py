"""Single files in the layout of the original latent-diffusion code, made from a diffusers folder.

The UNet's names are those of `models.checkpoints.ldm_names`; VAE and text encoders are renamed
here. The files are read back through diffusers' converters, so that each side checks the other.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoints.families import Family
from models.checkpoints.ldm_names import ldm_names

VAE_PARTS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_PARTS = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
    "mlp.mlp.": "mlp.",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


def save_single_file(
    folder: Path, path: Path, family: Family, metadata: dict[str, str] | None = None
) -> Path:
    """Write the checkpoint in a diffusers folder as one file."""
    tensors = ldm_tensors(read_tensors(folder), family)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


SGM_NAMES = {
    "cond_stage_model.transformer.": "conditioner.embedders.0.transformer.",
    "cond_stage_model.model.": "conditioner.embedders.0.model.",
}


def in_sgm_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of Stable Diffusion 1 or 2 with the names that the sgm code gives to its encoder."""
    renamed = tensors
    for old, new in SGM_NAMES.items():
        renamed = {name.replace(old, new): value for name, value in renamed.items()}
    return renamed


def read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Component to its tensors."""
    return {path.parent.name: load_file(path) for path in folder.glob("*/*.safetensors")}


def ldm_tensors(parts: dict[str, dict[str, Tensor]], family: Family) -> dict[str, Tensor]:
    """All components' tensors under their original names."""
    found = with_prefix("model.diffusion_model.", unet_tensors(parts["unet"]))
    found |= with_prefix("first_stage_model.", vae_tensors(parts["vae"]))
    text = {f"text_model.{bare(name)}": value for name, value in parts["text_encoder"].items()}
    if family is Family.SD15:
        return found | with_prefix("cond_stage_model.transformer.", text)
    if family is Family.SD2:
        original = open_clip_tensors(parts["text_encoder"])
        return found | with_prefix("cond_stage_model.model.", with_unused_layer(original))
    second = open_clip_tensors(parts["text_encoder_2"])
    found |= with_prefix("conditioner.embedders.0.transformer.", text)
    return found | with_prefix("conditioner.embedders.1.model.", second)


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def bare(name: str) -> str:
    return name.removeprefix("text_model.")


def unet_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = 1 + max(
        int(found[1]) for found in matches(r"down_blocks\.\d+\.resnets\.(\d+)", tensors)
    )
    names = ldm_names(tensors, layers)
    return {names[name]: value for name, value in tensors.items()}


def matches(pattern: str, names: dict[str, Tensor]) -> list[re.Match[str]]:
    return [found for name in names if (found := re.match(pattern, name))]


def vae_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = 1 + max(int(found[1]) for found in matches(r"encoder\.down_blocks\.(\d+)", tensors))
    renamed = {}
    for name, value in tensors.items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        # The original counts up blocks from the picture's side.
        new = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{blocks - 1 - int(found[1])}.", new)
        new = new.replace(".resnets.", ".block.") if ".up." in new else new
        new = new.replace("upsamplers.0", "upsample")
        for old, part in VAE_PARTS.items():
            new = new.replace(old, part)
        is_attention = "attn_1" in new and value.ndim == 2
        renamed[new] = value[:, :, None, None] if is_attention else value
    return renamed


def open_clip_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value are one matrix there, and the projection is transposed."""
    renamed = {}
    for name, value in tensors.items():
        new = bare(name)
        for old, part in OPEN_CLIP_PARTS.items():
            new = new.replace(old, part)
        renamed[new] = value.T if new == "text_projection" else value
    for name in [name for name in renamed if ".q_proj." in name]:
        kind = name.rpartition(".")[2]
        three = [renamed.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        renamed[name.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat(three)
    return renamed


def with_unused_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the last layer and the projection, which Stable Diffusion 2 files hold for nothing."""
    layers = [int(found[1]) for found in matches(r"transformer\.resblocks\.(\d+)", tensors)]
    last = f"resblocks.{max(layers)}."
    unused = {
        name.replace(last, f"resblocks.{max(layers) + 1}."): torch.zeros_like(value)
        for name, value in tensors.items()
        if last in name
    }
    return tensors | unused | {"text_projection": torch.zeros(4, 4)}

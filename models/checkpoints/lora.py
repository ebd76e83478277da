"""LoRA files fused into a model's weights at load: W + scale · alpha / rank · up · down.

Hu et al. 2021, section 4.1; alpha as in kohya's `networks/lora.py`. Understands the tensor names of
kohya's trainer, of diffusers, old and new, and of PEFT. Fused weights cost nothing per step, and no
PEFT is needed. What is no plain pair of matrices (DoRA, LoHa, LoKr, …) is refused, not left out.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoints.files.weights import read_header, read_json, refuse_quantized
from models.checkpoints.ldm_names import ldm_names
from models.errors import ModelUnavailable

PREFIXES = {
    "unet": ("unet", "lora_unet"),
    "text_encoder": ("text_encoder", "lora_te", "lora_te1"),
    "text_encoder_2": ("text_encoder_2", "lora_te2"),
}
"""Component to how names of its tensors begin: diffusers', then kohya's. Files of one component
only, as PEFT and diffusers' `save_attn_procs` write them, name none."""

PEFT_PREFIX = "base_model.model."
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
"""How PEFT's `save_pretrained` names tensors, the file, and the settings beside it."""

UNSUPPORTED = ("alpha_pattern", "use_rslora", "use_dora")
"""PEFT's settings by which a factor is another than alpha / rank."""

_MATRIX = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<newer>down|up|A|B)|[._]lora(?:_linear_layer)?\.(?P<older>down|up))"
    r"(?:\.default)?\.weight"
)
Adaptable: TypeAlias = torch.nn.Linear | torch.nn.Conv2d
SIDES = {"down": "down", "A": "down", "up": "up", "B": "up"}


@dataclass(slots=True)
class LowRank:
    """down: `(rank, in)` or `(rank, in, k, k)`; up: `(out, rank)` or `(out, rank, 1, 1)`."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


def fuse_lora(path: Path, scale: float, components: Mapping[str, Any]) -> None:
    """Change the components' weights by a LoRA file; all of it, or nothing.

    scale: 1 is what the file was trained for, 0 has no effect.
    Raises: ModelUnavailable.
    """
    header = read_header(path)
    refuse_quantized(path, header, (name for name in header.dtypes if _MATRIX.fullmatch(name)))
    default_alphas = _peft_alphas(_peft_settings(path, header.metadata))
    modules = dict(_named_modules(components))
    changes: list[tuple[Tensor, Tensor]] = []
    for name, low_rank in _read_pairs(path).items():
        module = modules.get(_flat(name))
        if module is None:
            raise ModelUnavailable(
                f"{path}: {name!r} is no part of this model; is it its family's?"
            )
        if low_rank.alpha is None:
            low_rank.alpha = default_alphas.get(name.split(".")[0], default_alphas.get(""))
        changes.append((module.weight, scale * _delta(path, name, low_rank, module.weight.shape)))
    with torch.no_grad():
        for weight, delta in changes:
            weight.copy_(weight.float() + delta.to(weight.device))


def lora_files(path: Path) -> list[Path]:
    """What is read for a LoRA file: itself, and PEFT's settings beside it."""
    beside = path.with_name(PEFT_CONFIG)
    return [path, beside] if path.name == PEFT_FILE and beside.is_file() else [path]


def _read_pairs(path: Path) -> dict[str, LowRank]:
    """Module name to its matrices. Raises: ModelUnavailable for tensors of any other kind."""
    pairs: dict[str, LowRank] = {}
    try:
        tensors = load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailable(f"{path} cannot be read: {error}") from error
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(PEFT_PREFIX)
        if name.endswith(".alpha") and tensor.numel() == 1:
            pair = pairs.setdefault(_module_name(name.removesuffix(".alpha")), LowRank())
            pair.alpha = float(tensor)
        elif match := _MATRIX.fullmatch(name):
            side = SIDES[match["newer"] or match["older"]]
            setattr(pairs.setdefault(_module_name(match["module"]), LowRank()), side, tensor)
        else:
            raise ModelUnavailable(
                f"{path}: {full_name!r} is no plain LoRA matrix; only those are read"
            )
    return pairs


def _module_name(name: str) -> str:
    """The module's name without the attention processor that old diffusers files insert."""
    plain = name.replace(".processor.", ".")
    return plain + ".0" if plain.endswith(".to_out") else plain


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _named_modules(components: Mapping[str, Any]) -> Iterator[tuple[str, Adaptable]]:
    """Every module that can take a LoRA, under each of the names files call it by."""
    for component, prefixes in PREFIXES.items():
        if components.get(component) is None:
            continue
        found = {
            name: module
            for name, module in components[component].named_modules()
            if isinstance(module, Adaptable)
        }
        originals = _original_names(component, components[component], found)
        for name, module in found.items():
            for known in {name, originals[name]}:
                for prefix in prefixes:
                    yield _flat(f"{prefix}.{known}"), module
                # With two text encoders nobody can tell which one is meant.
                if component == "unet" or components.get("text_encoder_2") is None:
                    yield _flat(known), module


def _original_names(component: str, model: Any, names: Collection[str]) -> dict[str, str]:
    """What a component's modules were called before diffusers and transformers renamed them."""
    if component != "unet":
        # transformers 5 has dropped the outer "text_model" of some encoders.
        return {name: f"text_model.{name}" for name in names}
    return {name: name for name in names} | ldm_names(names, model.config.layers_per_block)


def _delta(path: Path, name: str, low_rank: LowRank, shape: torch.Size) -> Tensor:
    """up · down, scaled by alpha / rank, in float32 and in the shape of the weight."""
    down, up = low_rank.down, low_rank.up
    if down is None or up is None:
        raise ModelUnavailable(f"{path}: {name!r} has only one of its two matrices")
    if min(down.ndim, up.ndim) < 2 or not (rank := down.shape[0]):
        raise ModelUnavailable(
            f"{path}: {name!r} has matrices of {tuple(down.shape)} and {tuple(up.shape)}; a LoRA "
            "needs a rank of 1 or more"
        )
    alpha = rank if low_rank.alpha is None else low_rank.alpha
    try:
        product = up.float().flatten(1) @ down.float().flatten(1)  # (out, in * k * k)
        return alpha / rank * product.reshape(shape)
    except RuntimeError as error:
        raise ModelUnavailable(
            f"{path}: {name!r} does not fit a weight of {tuple(shape)}; is it its family's?"
        ) from error


def _peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings by "component.key", or by "key" where the file is of one component.

    diffusers writes them into the header's metadata, PEFT into a file beside its own.
    Raises: ModelUnavailable.
    """
    _, *beside = lora_files(path)
    if beside:
        return read_json(beside[0])
    try:
        return dict(json.loads(metadata.get("lora_adapter_metadata", "{}")).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelUnavailable(f"lora_adapter_metadata cannot be read: {error}") from error


def _peft_alphas(settings: Mapping[str, Any]) -> dict[str, float]:
    """Component, or "" for the only one, to its `lora_alpha`. Raises: ModelUnavailable."""
    found = {key: key.rpartition(".") for key in settings}
    for key, (_, _, name) in found.items():
        if name in UNSUPPORTED and settings[key]:
            raise ModelUnavailable(f"PEFT's {name} is not supported")
    try:
        return {
            part: float(settings[key])
            for key, (part, _, name) in found.items()
            if name == "lora_alpha"
        }
    except (ValueError, TypeError) as error:
        raise ModelUnavailable(f"lora_alpha cannot be read: {error}") from error

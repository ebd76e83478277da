"""The families of Stable Diffusion checkpoints and their published configurations.

Torch-free. A diffusers folder brings its configuration along; a single file does not, so that of
its family is shipped in `configs/`, one JSON file each, as published with the original checkpoint.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

from models.checkpoints.files.weights import SUFFIX, read_header, read_json
from models.errors import ModelUnavailable

CONFIG_FOLDER = Path(__file__).parents[1] / "configs"

Configs: TypeAlias = dict[str, dict[str, Any]]
"""Component name to its configuration; "model_index" holds the pipeline's own switches."""

CONFIG_FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "text_encoder_2": "text_encoder_2/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "model_index": "model_index.json",
}


class Family(StrEnum):
    """What a checkpoint was built like; UNets of 4 and of 9 channels occur in each."""

    SD15 = "sd15"
    """Stable Diffusion 1.x: the text encoder of CLIP ViT-L/14."""
    SD2 = "sd2"
    """Stable Diffusion 2.x: the text encoder of OpenCLIP ViT-H/14 without its last layer."""
    SDXL = "sdxl"
    """Stable Diffusion XL base: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 side by side."""


INPAINTING_CHANNELS = 9
"""A UNet that sees the mask and the masked picture has 9 channels; others have 4."""

CONTEXT_WIDTHS = {768: Family.SD15, 1024: Family.SD2}
"""The width of a text's encoding by which a UNet's configuration shows its family."""

MODEL_CARD = "README.md"
CARD_BYTES = 64_000
"""How much of a model card is read; its licence stands in the first lines."""

SAID_LICENCE = "modelspec.license"
"""The key of a single file's metadata that names its licence."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a checkpoint is, by its configuration.

    family: None where the configuration is that of no published family.
    is_inpainting: its UNet sees the mask and the masked picture.
    native_px: side of the pictures it was trained on; None where that is not said.
    has_safety_checker: of its own, or borrowed.
    """

    family: Family | None
    is_inpainting: bool
    native_px: int | None
    has_safety_checker: bool


def traits_of(configs: Configs) -> Traits:
    """What the configurations of a checkpoint show. Raises: KeyError where parts are missing."""
    unet, index = configs["unet"], configs.get("model_index", {})
    family = CONTEXT_WIDTHS.get(unet.get("cross_attention_dim", 0))
    sample_px, scale = unet.get("sample_size"), 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    return Traits(
        family=Family.SDXL if "text_encoder_2" in configs else family,
        is_inpainting=unet["in_channels"] == INPAINTING_CHANNELS,
        native_px=sample_px * scale if isinstance(sample_px, int) else None,
        has_safety_checker=all(index.get("safety_checker") or [None]),
    )


def licence_in(path: Path) -> str | None:
    """The licence that a folder's model card or a safetensors file names; None where none does.

    In a card it stands in the metadata at its beginning, as hubs have them.
    """
    try:
        if path.suffix == SUFFIX:
            return read_header(path).metadata.get(SAID_LICENCE) or None
        with (path / MODEL_CARD).open(encoding="utf-8", errors="replace") as file:
            before, *blocks = re.split(r"^---\s*$", file.read(CARD_BYTES), maxsplit=2, flags=re.M)
    except (OSError, ModelUnavailable):
        return None
    if before or not blocks:
        return None
    said = dict(re.findall(r"^(license(?:_name)?):[ \t]*[\"']?([\w.+-]+)", blocks[0], re.M))
    return said.get("license_name") or said.get("license")


TEXT_ENCODER_PREFIXES = {
    "conditioner.embedders.1.model.": Family.SDXL,
    "cond_stage_model.model.": Family.SD2,
    "cond_stage_model.transformer.": Family.SD15,
    "conditioner.embedders.0.model.": Family.SD2,
    "conditioner.embedders.0.transformer.": Family.SD15,
}
"""Where a single file keeps the text encoder that only its family has. The last two are those of
the sgm code, which XL's refiner and incomplete XL files use too."""

XL_ADDED_EMBEDDING = "model.diffusion_model.label_emb."
"""Tensor of the UNet in every XL file, also the refiner's."""


def detect_family(names: Iterable[str]) -> Family | None:
    """The family of a single file, by its tensors' names; None for anything else."""
    known = list(names)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in known)

    family = next((each for prefix, each in TEXT_ENCODER_PREFIXES.items() if has(prefix)), None)
    is_sgm = has("conditioner.")
    is_other = is_sgm and (family is Family.SDXL) != has(XL_ADDED_EMBEDDING)
    return None if is_other else family


def published_configs(family: Family, is_inpainting: bool) -> Configs:
    """The configuration a family was published with.

    is_inpainting: the UNet has 9 channels; such checkpoints may ship another scheduler.
    """
    configs: Configs = json.loads((CONFIG_FOLDER / f"{family}.json").read_text())
    inpainting_scheduler = configs.pop("inpainting_scheduler", configs["scheduler"])
    return configs | {"scheduler": inpainting_scheduler} if is_inpainting else configs


def read_configs(folder: Path) -> Configs:
    """The configurations in a diffusers folder, of which the weights may be missing.

    Raises: ModelUnavailable.
    """
    return {
        name: read_json(folder / file)
        for name, file in CONFIG_FILES.items()
        if (folder / file).is_file()
    }

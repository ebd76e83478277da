"""Which of a component's weight files are read: one rule for folders here and for the hub.

Torch-free. A component has one file or several shards with an index, in one or more variants, named
as `save_pretrained` of diffusers and transformers names them.
"""

from collections.abc import Collection
from pathlib import Path

from models.checkpoints.files.weights import SUFFIX, read_json

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"

STEMS = {
    "text_encoder": TRANSFORMERS_STEM,
    "text_encoder_2": TRANSFORMERS_STEM,
    "vae": DIFFUSERS_STEM,
    "safety_checker": TRANSFORMERS_STEM,
    "unet": DIFFUSERS_STEM,
}
"""Component to how the names of its weight files begin."""

HALF = "fp16"
"""The variant that is taken where nothing else is there."""


def chosen_variant(names: Collection[str], stem: str, wanted: str | None) -> str | None:
    """The variant to read: the wanted one, else the plain files (None), else "fp16".

    names: files of the component's folder.
    """
    return next((each for each in (wanted, None, HALF) if has_variant(names, stem, each)), None)


def has_variant(names: Collection[str], stem: str, variant: str | None) -> bool:
    """Whether the files of a variant are among a component's files; None means the plain ones."""
    return _file(stem, variant) in names or _index(stem, variant) in names


def chosen_files(folder: Path, names: Collection[str], stem: str, wanted: str | None) -> list[str]:
    """The weight files that are read; empty where there are none.

    folder: of the component; at least its JSON files are there. names: files that it has, or will
    have. Raises: ModelUnavailable for an index that cannot be read.
    """
    variant = chosen_variant(names, stem, wanted)
    file, index = _file(stem, variant), _index(stem, variant)
    # Where both are there, diffusers reads the shards and transformers the one file.
    if index in names and (stem == DIFFUSERS_STEM or file not in names):
        return sorted(_shards(folder / index) & {*names})
    return [file] if file in names else []


def _file(stem: str, variant: str | None) -> str:
    return f"{stem}{_infix(variant)}{SUFFIX}"


def _index(stem: str, variant: str | None) -> str:
    return f"{stem}{SUFFIX}.index{_infix(variant)}.json"


def _infix(variant: str | None) -> str:
    return "" if variant is None else f".{variant}"


def _shards(index: Path) -> set[str]:
    """The safetensors files that an index names; `refuse_foreign_parts` refuses all others."""
    places = read_json(index).get("weight_map")
    names = places.values() if isinstance(places, dict) else ()
    return {name for name in names if isinstance(name, str) and name.endswith(SUFFIX)}

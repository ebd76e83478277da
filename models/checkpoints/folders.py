"""Checkpoints in diffusers layout: one folder per component, `model_index.json` beside them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.checkpoints.files.unused import refuse_unused
from models.checkpoints.files.weight_files import (
    DIFFUSERS_STEM,
    STEMS,
    TRANSFORMERS_STEM,
    chosen_files,
    chosen_variant,
    has_variant,
)
from models.checkpoints.files.weights import (
    read_header,
    read_json,
    refuse_foreign_parts,
    refuse_quantized,
)
from models.checkpoints.parts import Part, vae_dtype
from models.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
REQUIRED = ("tokenizer", "scheduler", "text_encoder", "vae", "unet")
XL_ONLY = ("tokenizer_2", "text_encoder_2")
ATTENTION = "sdpa"
"""What transformers' models compute attention with: PyTorch's own function."""

CHECKER = ("feature_extractor", "safety_checker")


def folder_parts(folder: Path, variant: str | None, dtype: "torch.dtype") -> dict[str, Part]:
    """The parts of a checkpoint. variant: infix of its weight files.

    Raises: ModelUnavailable.
    """
    index = read_json(folder / INDEX)
    present = _present(index)
    is_sdxl = "text_encoder_2" in present
    loaders = _loaders(folder, variant, dtype, is_sdxl)
    required = {*REQUIRED, *(XL_ONLY if is_sdxl else ())}
    if "safety_checker" in present:
        required.add("feature_extractor")
    if missing := sorted(required - present):
        raise ModelUnavailable(f"{folder} lacks {', '.join(missing)}")
    _check_variant(folder, {name: _names_in(folder / name) for name in present}, variant)
    parts = {
        name: Part(folder / name, folder_bytes(folder / name), load)
        for name, load in loaders.items()
        if name in present
    }
    switches = {name: value for name, value in index.items() if isinstance(value, bool)}
    return parts | {"switches": Part(folder / INDEX, 1, lambda: switches)}


def folder_weights(folder: Path, listing: Iterable[str], variant: str | None) -> list[str]:
    """The weight files that loading a checkpoint reads, among the paths of a repository.

    folder: where its JSON files already are. variant: as in `folder_parts`.
    Raises: ModelUnavailable.
    """
    if not (folder / INDEX).is_file():
        return []
    listed = [*listing]
    present = _present(read_json(folder / INDEX)) & STEMS.keys()
    names = {name: _names_under(f"{name}/", listed) for name in present}
    _check_variant(folder, names, variant)
    return [
        f"{part}/{file}"
        for part in sorted(present)
        for file in chosen_files(folder / part, names[part], STEMS[part], variant)
    ]


def lent_weights(folder: Path, listing: Iterable[str], part: str) -> list[str]:
    """The weight files of one part of a repository, or of one that is that part alone.

    Raises: ModelUnavailable.
    """
    place = lent_folder(folder, part)
    prefix = "" if place == folder else f"{part}/"
    files = chosen_files(place, _names_under(prefix, listing), STEMS[part], None)
    return [prefix + file for file in files]


def lent_folder(folder: Path, part: str) -> Path:
    """Where a part lies in a checkpoint, or in a folder that holds nothing else."""
    return folder / part if (folder / part).is_dir() else folder


def _present(index: dict[str, Any]) -> set[str]:
    """The components that a `model_index.json` names and does not leave out."""
    return {name for name, value in index.items() if isinstance(value, list) and all(value)}


def _names_under(prefix: str, listing: Iterable[str]) -> set[str]:
    names = {path.removeprefix(prefix) for path in listing if path.startswith(prefix)}
    return {name for name in names if "/" not in name}


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


def _check_variant(folder: Path, names: dict[str, set[str]], variant: str | None) -> None:
    """A variant may be missing from some components, as in diffusers, but not from all.

    Raises: ModelUnavailable.
    """
    if variant is not None and not any(
        has_variant(names[part], stem, variant) for part, stem in STEMS.items() if part in names
    ):
        raise ModelUnavailable(f"{folder} has no weights of the variant {variant!r}")


def checker_parts(folder: Path, dtype: "torch.dtype") -> dict[str, Part]:
    """The safety checker of another checkpoint, or of a folder that holds nothing else.

    Raises: ModelUnavailable.
    """
    is_flat = lent_folder(folder, "safety_checker") == folder
    paths = {name: folder if is_flat else folder / name for name in CHECKER}
    for path, file in zip(paths.values(), ("preprocessor_config.json", "config.json"), strict=True):
        if not (path / file).is_file():
            raise ModelUnavailable(f"no safety checker: {path} lacks {file}")
    loaders = _checker_loaders(paths, None, dtype)
    return {name: Part(paths[name], folder_bytes(paths[name]), loaders[name]) for name in CHECKER}


def _loaders(
    folder: Path, variant: str | None, dtype: "torch.dtype", is_sdxl: bool
) -> dict[str, Callable[[], Any]]:
    """One loader per component; the class of each is fixed here, whatever the folder asks for."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def weights(model_class: Any, name: str) -> Callable[[], Any]:
        return lambda: load_model(model_class, folder / name, variant, dtype)

    return {
        "tokenizer": lambda: load_tokenizer(folder / "tokenizer"),
        "tokenizer_2": lambda: load_tokenizer(folder / "tokenizer_2"),
        "scheduler": lambda: read_json(folder / "scheduler/scheduler_config.json"),
        "text_encoder": weights(CLIPTextModel, "text_encoder"),
        "text_encoder_2": weights(CLIPTextModelWithProjection, "text_encoder_2"),
        "vae": lambda: load_vae(folder / "vae", variant, is_sdxl, dtype),
        **_checker_loaders({name: folder / name for name in CHECKER}, variant, dtype),
        "unet": weights(UNet2DConditionModel, "unet"),
    }


def _checker_loaders(
    paths: dict[str, Path], variant: str | None, dtype: "torch.dtype"
) -> dict[str, Callable[[], Any]]:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    return {
        "feature_extractor": lambda: CLIPImageProcessor.from_pretrained(
            paths["feature_extractor"], local_files_only=True
        ),
        "safety_checker": lambda: load_model(
            StableDiffusionSafetyChecker, paths["safety_checker"], variant, dtype
        ),
    }


def load_vae(folder: Path, variant: str | None, is_sdxl: bool, dtype: "torch.dtype") -> Any:
    """A VAE from its folder. is_sdxl: of the checkpoint it is for. Raises: as `load_model`."""
    from diffusers import AutoencoderKL

    config = read_json(folder / "config.json")
    own_dtype = vae_dtype(config, is_sdxl=is_sdxl, dtype=dtype)
    return load_model(AutoencoderKL, folder, variant, own_dtype)


def load_model(model_class: Any, folder: Path, variant: str | None, dtype: "torch.dtype") -> Any:
    """A model of diffusers or transformers from its folder.

    variant: the wanted one, see `chosen_variant`.
    Raises: ModelUnavailable for what `refuse_foreign_parts`, `refuse_quantized` and `refuse_unused`
        refuse; for the rest whatever the library does.
    """
    from transformers import PreTrainedModel

    refuse_foreign_parts(folder)
    is_transformer = issubclass(model_class, PreTrainedModel)
    stem = TRANSFORMERS_STEM if is_transformer else DIFFUSERS_STEM
    names = _names_in(folder)
    for file in chosen_files(folder, names, stem, variant):
        header = read_header(folder / file)
        refuse_quantized(folder / file, header, header.dtypes)
    # diffusers' classes know no such key.
    own = attention_of(model_class) if is_transformer else {}
    model, found = model_class.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        variant=chosen_variant(names, stem, variant),
        dtype=dtype,
        output_loading_info=True,
        **own,
    )
    # Both libraries would go on with random numbers, or none, in their place.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    refuse_unused(found["unexpected_keys"])
    return model


def attention_of(model_class: Any) -> dict[str, Any]:
    """For `from_pretrained` of transformers: what the model and its parts compute attention with.

    A configuration that is left to choose may name a kernel of the hub, whose code would be fetched
    and run. diffusers' safety checker takes no "sdpa", having no attention of its own.
    """
    parts = dict.fromkeys(model_class.config_class.sub_configs, ATTENTION)
    itself = ATTENTION if model_class._supports_sdpa else "eager"
    return {"attn_implementation": {"": itself, **parts}}


def load_tokenizer(folder: Path, **changes: Any) -> Any:
    """CLIP's tokenizer. changes: what differs from its own configuration, such as `pad_token`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **changes)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) or 1

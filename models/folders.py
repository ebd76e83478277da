"""Checkpoints in diffusers layout: one folder per component, `model_index.json` beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ModelUnavailable
from models.parts import Part, vae_dtype
from models.weights import read_json, refuse_foreign_parts

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
    index = _read_index(folder)
    present = {name for name, value in index.items() if isinstance(value, list) and all(value)}
    is_sdxl = "text_encoder_2" in present
    loaders = _loaders(folder, variant, dtype, is_sdxl)
    required = {*REQUIRED, *(XL_ONLY if is_sdxl else ())}
    if "safety_checker" in present:
        required.add("feature_extractor")
    if missing := sorted(required - present):
        raise ModelUnavailable(f"{folder} lacks {', '.join(missing)}")
    parts = {
        name: Part(folder / name, _folder_bytes(folder / name), load)
        for name, load in loaders.items()
        if name in present
    }
    switches = {name: value for name, value in index.items() if isinstance(value, bool)}
    return parts | {"switches": Part(folder / INDEX, 1, lambda: switches)}


def checker_parts(folder: Path, dtype: "torch.dtype") -> dict[str, Part]:
    """The safety checker of another checkpoint, or of a folder that holds nothing else.

    Raises: ModelUnavailable.
    """
    is_checkpoint = (folder / "safety_checker").is_dir()
    paths = {name: folder / name if is_checkpoint else folder for name in CHECKER}
    for path, file in zip(paths.values(), ("preprocessor_config.json", "config.json"), strict=True):
        if not (path / file).is_file():
            raise ModelUnavailable(f"no safety checker: {path} lacks {file}")
    loaders = _checker_loaders(paths, None, dtype)
    return {name: Part(paths[name], _folder_bytes(paths[name]), loaders[name]) for name in CHECKER}


def _loaders(
    folder: Path, variant: str | None, dtype: "torch.dtype", is_sdxl: bool
) -> dict[str, Callable[[], Any]]:
    """One loader per component; the class of each is fixed here, whatever the folder asks for."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    def weights(model_class: Any, name: str) -> Callable[[], Any]:
        return lambda: load_model(model_class, folder / name, variant, dtype)

    def vae() -> Any:
        config = read_json(folder / "vae/config.json")
        own_dtype = vae_dtype(config, is_sdxl=is_sdxl, dtype=dtype)
        return load_model(AutoencoderKL, folder / "vae", variant, own_dtype)

    return {
        "tokenizer": lambda: load_tokenizer(folder / "tokenizer"),
        "tokenizer_2": lambda: load_tokenizer(folder / "tokenizer_2"),
        "scheduler": lambda: read_json(folder / "scheduler/scheduler_config.json"),
        "text_encoder": weights(CLIPTextModel, "text_encoder"),
        "text_encoder_2": weights(CLIPTextModelWithProjection, "text_encoder_2"),
        "vae": vae,
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


def load_model(model_class: Any, folder: Path, variant: str | None, dtype: "torch.dtype") -> Any:
    """A model of diffusers or transformers from its folder.

    Raises: ModelUnavailable for what `refuse_foreign_parts` refuses; for the rest whatever the
        library does.
    """
    from transformers import PreTrainedModel

    refuse_foreign_parts(folder)
    # diffusers' classes know no such key.
    own = attention_of(model_class) if issubclass(model_class, PreTrainedModel) else {}
    model, found = model_class.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        variant=variant or _guess_variant(folder),
        dtype=dtype,
        output_loading_info=True,
        **own,
    )
    # Both libraries would go on with random numbers, or none, in their place.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
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


def _read_index(folder: Path) -> dict[str, Any]:
    return read_json(folder / INDEX)


def _guess_variant(folder: Path) -> str | None:
    """ "fp16" where a folder holds only half-precision files."""
    files = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) or 1

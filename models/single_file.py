"""Checkpoints in one `.safetensors` file, in the layout of the original latent-diffusion code.

The family is read from the names of the tensors, the UNet's channels from their shapes, the rest of
the configuration from our own table or from a folder the operator names. Names and layouts are
converted by diffusers (`loaders/single_file_utils.py`), whose own loader would ask the hub.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from models.errors import ModelUnavailable
from models.families import Configs, Family, detect_family, published_configs, read_configs
from models.folders import ATTENTION, load_tokenizer
from models.parts import Part, vae_dtype
from models.weights import Header, read_header

if TYPE_CHECKING:
    import torch

UNET_PREFIX = "model.diffusion_model."
CONV_IN = UNET_PREFIX + "input_blocks.0.0.weight"
VAE_PREFIX = "first_stage_model."
CLIP_PREFIXES = {
    Family.SD15: "cond_stage_model.transformer.",
    Family.SDXL: "conditioner.embedders.0.transformer.",
}
OPEN_CLIP_PREFIXES = {
    Family.SD2: "cond_stage_model.model.",
    Family.SDXL: "conditioner.embedders.1.model.",
}
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}

Tensors: TypeAlias = "dict[str, torch.Tensor]"


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A file that was looked into, not yet loaded."""

    path: Path
    header: Header
    family: Family
    configs: Configs

    def read(self, *prefixes: str) -> Tensors:
        """The tensors whose names begin so."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return {
                name: file.get_tensor(name)
                for name in self.header.shapes
                if name.startswith(prefixes)
            }


def single_file_parts(
    path: Path,
    dtype: "torch.dtype",
    config_folder: Path | None,
    find_tokenizer: Callable[[], Path],
    prediction_type: str | None,
) -> dict[str, Part]:
    """The parts of a checkpoint; it has no safety checker.

    config_folder: diffusers folder to take configuration and tokenizers from.
    find_tokenizer: gives the folder of CLIP's vocabulary where there is no such folder.
    prediction_type: None where the file has to say.
    Raises: ModelUnavailable.
    """
    checkpoint = open_single_file(path, config_folder)
    loaders: dict[str, Callable[[], Any]] = {
        "scheduler": lambda: _scheduler_config(checkpoint, prediction_type, config_folder),
        "switches": lambda: _switches(checkpoint.configs),
    }
    for suffix in ("", "_2") if checkpoint.family is Family.SDXL else ("",):
        loaders[f"tokenizer{suffix}"] = _tokenizer_loader(
            checkpoint, f"tokenizer{suffix}", config_folder, find_tokenizer
        )
        loaders[f"text_encoder{suffix}"] = _text_loader(checkpoint, f"text_encoder{suffix}", dtype)
    loaders["vae"] = lambda: _load_vae(checkpoint, dtype)
    loaders["unet"] = lambda: _load_unet(checkpoint, dtype)
    size = path.stat().st_size
    return {name: Part(path, size if name == "unet" else 1, loaders[name]) for name in loaders}


def open_single_file(path: Path, config_folder: Path | None) -> SingleFile:
    """Raises: ModelUnavailable for what is no checkpoint of a known family."""
    header = read_header(path)
    family = detect_family(header.shapes)
    if family is None or CONV_IN not in header.shapes:
        raise ModelUnavailable(
            f"{path} is no complete Stable Diffusion 1.x, 2.x or XL base checkpoint in the "
            f"original layout; its tensors are named like {min(header.shapes, default='nothing')!r}"
        )
    channels = header.shapes[CONV_IN][1]
    configs = (
        published_configs(family, is_inpainting=channels == 9)
        if config_folder is None
        else read_configs(config_folder)
    )
    needed = {"unet", "vae", "text_encoder", "scheduler"}
    if family is Family.SDXL:
        needed.add("text_encoder_2")
    if missing := sorted(needed - configs.keys()):
        raise ModelUnavailable(f"{config_folder} lacks the configuration of {', '.join(missing)}")
    configs["unet"] = configs["unet"] | {"in_channels": channels}
    return SingleFile(path, header, family, configs)


def _switches(configs: Configs) -> dict[str, bool]:
    index = configs.get("model_index", {})
    return {name: value for name, value in index.items() if isinstance(value, bool)}


def _scheduler_config(
    checkpoint: SingleFile, prediction_type: str | None, config_folder: Path | None
) -> dict[str, Any]:
    """With the prediction type of, in this order, the operator, the file, the configuration.

    Raises: ModelUnavailable for Stable Diffusion 2, of which either kind was published.
    """
    scheduler = checkpoint.configs["scheduler"]
    said = prediction_type or _said_prediction_type(checkpoint.header)
    is_ambiguous = (
        checkpoint.family is Family.SD2
        and config_folder is None
        and checkpoint.configs["unet"]["in_channels"] == 4
    )
    if said is None and is_ambiguous:
        raise ModelUnavailable(
            "a Stable Diffusion 2 file of 4 channels does not show what it "
            'predicts; set prediction_type = "epsilon" (2-base, 2.1-base) or "v_prediction" '
            "(2, 2.1) in models.toml"
        )
    changes: dict[str, Any] = {} if said is None else {"prediction_type": said}
    if "ztsnr" in checkpoint.header.shapes:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler | changes


def _said_prediction_type(header: Header) -> str | None:
    """By kohya's metadata, or by the empty tensor that marks v-prediction SDXL files."""
    if "v_pred" in header.shapes:
        return "v_prediction"
    return PREDICTION_TYPES.get(header.metadata.get("modelspec.prediction_type", ""))


def _tokenizer_loader(
    checkpoint: SingleFile, name: str, config_folder: Path | None, find: Callable[[], Path]
) -> Callable[[], Any]:
    def load() -> Any:
        if config_folder is not None and (config_folder / name).is_dir():
            tokenizer = load_tokenizer(config_folder / name)
        else:
            changes = published_configs(checkpoint.family, is_inpainting=False)[name]
            tokenizer = load_tokenizer(find(), model_max_length=77, **changes)
        words = checkpoint.configs[name.replace("tokenizer", "text_encoder")]["vocab_size"]
        if len(tokenizer) > words:
            raise ValueError(f"{name} has {len(tokenizer)} words, its text encoder {words}")
        return tokenizer

    return load


def _text_loader(checkpoint: SingleFile, name: str, dtype: "torch.dtype") -> Callable[[], Any]:
    def load() -> Any:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        is_second = name == "text_encoder_2"
        model_class = CLIPTextModelWithProjection if is_second else CLIPTextModel
        config = CLIPTextConfig(**checkpoint.configs[name])
        config._attn_implementation = ATTENTION  # not what the configuration may ask for
        model = _empty(model_class, config)
        is_open_clip = is_second or checkpoint.family is Family.SD2
        convert = _open_clip_tensors if is_open_clip else _clip_tensors
        tensors = {
            text_name(key, model): value
            for key, value in convert(checkpoint, model).items()
            if not key.endswith("position_ids")
        }
        return _filled(model, tensors, dtype)

    return load


def _clip_tensors(checkpoint: SingleFile, model: Any) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    converted: Tensors = convert_ldm_clip_checkpoint(
        checkpoint.read(CLIP_PREFIXES[checkpoint.family])
    )
    return converted


def _open_clip_tensors(checkpoint: SingleFile, model: Any) -> Tensors:
    """Without the last layer for Stable Diffusion 2, whose UNet was trained on the one before."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    prefix = OPEN_CLIP_PREFIXES[checkpoint.family]
    layers = range(model.config.num_hidden_layers)
    tensors = checkpoint.read(prefix)
    if checkpoint.family is Family.SD2:
        tensors = {
            name: value
            for name, value in tensors.items()
            if _layer_of(name) in layers and not name.endswith("text_projection")
        }
    converted: Tensors = convert_open_clip_checkpoint(model, tensors, prefix=prefix)
    return converted


def _layer_of(name: str) -> int:
    """The transformer layer a tensor belongs to; 0 for those outside of layers."""
    found = re.search(r"\.resblocks\.(\d+)\.", name)
    return int(found[1]) if found else 0


def text_name(name: str, model: Any) -> str:
    """A tensor's name as this transformers release has it: with "text_model." or without."""
    bare = name.removeprefix("text_model.")
    is_inside = hasattr(model, "text_model") and not bare.startswith("text_projection")
    return f"text_model.{bare}" if is_inside else bare


def _load_vae(checkpoint: SingleFile, dtype: "torch.dtype") -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = checkpoint.configs["vae"]
    own_dtype = vae_dtype(config, is_sdxl=checkpoint.family is Family.SDXL, dtype=dtype)
    tensors = convert_ldm_vae_checkpoint(checkpoint.read(VAE_PREFIX), config)
    return _filled(_empty(AutoencoderKL.from_config, config), tensors, own_dtype)


def _load_unet(checkpoint: SingleFile, dtype: "torch.dtype") -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = checkpoint.configs["unet"]
    tensors = convert_ldm_unet_checkpoint(checkpoint.read(UNET_PREFIX), config)
    return _filled(_empty(UNet2DConditionModel.from_config, config), tensors, dtype)


def _empty(create: Callable[[Any], Any], config: Any) -> Any:
    """A model whose weights take no memory yet."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return create(config)


def _filled(model: Any, tensors: Tensors, dtype: "torch.dtype") -> Any:
    """The model with these weights, all of them and no others. Raises: ValueError."""
    missing, extra = _difference(model.state_dict(), tensors)
    if missing or extra:
        raise ValueError(f"{type(model).__name__} lacks {missing} and does not know {extra}")
    model.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, assign=True)
    return model


def _difference(expected: Iterable[str], found: Iterable[str]) -> tuple[list[str], list[str]]:
    """Up to three names that only one side has."""
    return sorted({*expected} - {*found})[:3], sorted({*found} - {*expected})[:3]

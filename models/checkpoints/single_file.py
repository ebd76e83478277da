"""Checkpoints in one `.safetensors` file, in the layout of the original latent-diffusion code.

The family is read from the names of the tensors, the UNet's channels from their shapes, the rest of
the configuration from our own table or from a folder the operator names. Names and layouts are
converted by diffusers (`loaders/single_file_utils.py`), whose own loader would ask the hub.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from models.checkpoints.families import (
    Configs,
    Family,
    detect_family,
    published_configs,
    read_configs,
)
from models.checkpoints.files.unused import refuse_unused
from models.checkpoints.files.weights import Header, read_header, refuse_quantized
from models.checkpoints.folders import (
    ATTENTION,
    folder_bytes,
    lent_folder,
    load_tokenizer,
    load_vae,
)
from models.checkpoints.parts import Part, vae_dtype
from models.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

UNET_PREFIX = "model.diffusion_model."
CONV_IN = UNET_PREFIX + "input_blocks.0.0.weight"
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX, SGM_CLIP_PREFIX = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
)
TEXT_PREFIXES: dict[Family, dict[str, tuple[str, ...]]] = {
    Family.SD15: {"text_encoder": (CLIP_PREFIX, SGM_CLIP_PREFIX)},
    Family.SD2: {"text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model.")},
    Family.SDXL: {
        "text_encoder": (SGM_CLIP_PREFIX,),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
}
"""Where the original code and its successor, sgm, keep text encoders; a file uses one of them."""

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
SAID = "modelspec.prediction_type"
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Names of the empty tensors that mark SDXL files."""

OUTSIDE_PARTS = re.compile(
    r"model_ema\..*|(denoiser\.)?(log_)?sigmas|betas|(.*_)?alphas_cumprod(_prev)?|posterior_.*|logvar"
    r"|lvlb_weights|scale_factor|global_step|epoch|embedding_manager\..*"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(logit_scale|text_projection)"
    rf"|{V_MARK}|{ZERO_SNR_MARK}"
)
"""Tensors outside of the parts that are not needed: averaged weights, tables of the noise schedule
that the scheduler computes itself, counters; and the marks, which are read by their names."""

OPEN_CLIP_KNOWN = re.compile(
    r"transformer\..*|positional_embedding|token_embedding\.weight|ln_final\.(weight|bias)"
    r"|text_projection|attn_mask|visual\..*"
)
"""OpenCLIP's tensors that diffusers converts, and those of its other half."""

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Tensors: TypeAlias = "dict[str, torch.Tensor]"


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A file that was looked into, not yet loaded."""

    path: Path
    header: Header
    family: Family
    configs: Configs

    def text_prefix(self, name: str) -> str:
        """Prefix of the names of a text encoder's tensors."""
        prefixes = TEXT_PREFIXES[self.family][name]
        return next((each for each in prefixes if self.names(each)), prefixes[0])

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.header.shapes if name.startswith(prefix)]

    def read(self, prefix: str) -> Tensors:
        """The tensors whose names begin so."""
        return read_tensors(self.path, self.header, prefix)


def read_tensors(path: Path, header: Header, prefix: str = "") -> Tensors:
    """The tensors whose names begin so. Raises: ModelUnavailable for quantized ones."""
    from safetensors import safe_open

    names = [name for name in header.shapes if name.startswith(prefix)]
    refuse_quantized(path, header, names)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def single_file_parts(
    path: Path,
    dtype: "torch.dtype",
    config_folder: Path | None,
    find_tokenizer: Callable[[], Path],
    prediction_type: str | None,
    vae: Path | None = None,
) -> dict[str, Part]:
    """The parts of a checkpoint; it has no safety checker.

    config_folder: diffusers folder to take configuration and tokenizers from.
    find_tokenizer: gives the folder of CLIP's vocabulary where there is no such folder.
    prediction_type: None where the file has to say.
    vae: file or folder that is taken in place of the file's own, see `vae_part`.
    Raises: ModelUnavailable.
    """
    checkpoint = open_single_file(path, config_folder)
    if vae is None and not checkpoint.names(VAE_PREFIX):
        raise ModelUnavailable(
            f"{path} holds no VAE; name one as `vae` in models.toml: a .safetensors file, a folder "
            "in diffusers layout or a hub id"
        )
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
    parts = {name: Part(path, size if name == "unet" else 1, loaders[name]) for name in loaders}
    if vae is not None:
        is_sdxl = checkpoint.family is Family.SDXL
        parts["vae"] = vae_part(vae, lambda: checkpoint.configs["vae"], is_sdxl, dtype)
    return parts


def vae_part(
    source: Path, config: Callable[[], dict[str, Any]], is_sdxl: bool, dtype: "torch.dtype"
) -> Part:
    """A VAE from elsewhere: a `.safetensors` file or a folder in diffusers layout.

    source: the file may be a VAE alone or a whole checkpoint in the original layout; the folder a
        VAE's own or that of a checkpoint. config: gives the configuration for a file. is_sdxl: of
        the checkpoint it is for.
    """
    if source.is_dir():
        folder = lent_folder(source, "vae")
        return Part(folder, folder_bytes(folder), lambda: load_vae(folder, None, is_sdxl, dtype))
    size = source.stat().st_size if source.is_file() else 1
    return Part(source, size, lambda: _load_vae_file(source, config(), is_sdxl, dtype))


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
    checkpoint = SingleFile(path, header, family, configs)
    _refuse_other_parts(checkpoint)
    return checkpoint


def _refuse_other_parts(checkpoint: SingleFile) -> None:
    """See that what lies outside of the parts is not needed; a part is judged when it is read.

    Raises: ModelUnavailable.
    """
    parts = (
        UNET_PREFIX,
        VAE_PREFIX,
        *map(checkpoint.text_prefix, TEXT_PREFIXES[checkpoint.family]),
    )
    others = (name for name in checkpoint.header.shapes if not name.startswith(parts))
    try:
        refuse_unused(name for name in others if not OUTSIDE_PARTS.fullmatch(name))
    except ModelUnavailable as error:
        raise ModelUnavailable(f"{checkpoint.path}: {error}") from error


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
    """The prediction type in metadata of trainers and tools, or by the mark of v-prediction SDXL.

    Raises: ModelUnavailable for metadata that name another one.
    """
    if V_MARK in header.shapes:
        return "v_prediction"
    said = header.metadata.get(SAID, "").strip()
    if said and said.lower() not in PREDICTION_TYPES:
        raise ModelUnavailable(
            f"its {SAID} is {said!r}, which is not supported; where the file is wrong, set "
            'prediction_type = "epsilon" or "v_prediction" in models.toml'
        )
    return PREDICTION_TYPES.get(said.lower())


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
        prefix = checkpoint.text_prefix(name)
        config = CLIPTextConfig(**checkpoint.configs[name])
        config._attn_implementation = ATTENTION  # not what the configuration may ask for
        model = _empty(model_class, config)
        if is_second or checkpoint.family is Family.SD2:
            tensors = _open_clip_tensors(checkpoint, prefix, model)
        else:
            tensors = _without_prefix(checkpoint.read(prefix), prefix)
        renamed = {text_name(key, model): value for key, value in tensors.items()}
        return _filled(model, renamed, dtype)

    return load


def _open_clip_tensors(checkpoint: SingleFile, prefix: str, model: Any) -> Tensors:
    """Without the last layer for Stable Diffusion 2, whose UNet was trained on the one before.

    Raises: ModelUnavailable for tensors that diffusers would pass over.
    """
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    layers = range(model.config.num_hidden_layers)
    tensors = checkpoint.read(prefix)
    bare_names = _without_prefix(tensors, prefix)
    refuse_unused(name for name in bare_names if not OPEN_CLIP_KNOWN.fullmatch(name))
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
    is_sdxl = checkpoint.family is Family.SDXL
    tensors = _without_prefix(checkpoint.read(VAE_PREFIX), VAE_PREFIX)
    return _filled_vae(tensors, checkpoint.configs["vae"], is_sdxl, dtype)


def _load_vae_file(path: Path, config: dict[str, Any], is_sdxl: bool, dtype: "torch.dtype") -> Any:
    """A VAE alone, in diffusers' names or the original ones, or that of a whole checkpoint."""
    header = read_header(path)
    is_whole = any(name.startswith(VAE_PREFIX) for name in header.shapes)
    prefix = VAE_PREFIX if is_whole else ""
    tensors = _without_prefix(read_tensors(path, header, prefix), prefix)
    return _filled_vae(tensors, config, is_sdxl, dtype)


def _filled_vae(
    tensors: Tensors, config: dict[str, Any], is_sdxl: bool, dtype: "torch.dtype"
) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    own_dtype = vae_dtype(config, is_sdxl=is_sdxl, dtype=dtype)
    if any(".down_blocks." in name for name in tensors):
        tensors = {_newer_name(name): value for name, value in tensors.items()}
    else:
        original = tensors
        tensors = _converted(original, lambda: convert_ldm_vae_checkpoint(original, config))
    return _filled(_empty(AutoencoderKL.from_config, config), tensors, own_dtype)


def _newer_name(name: str) -> str:
    """A VAE tensor's name in present diffusers, which has renamed the parts of attentions."""
    for old, new in OLD_ATTENTION.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _load_unet(checkpoint: SingleFile, dtype: "torch.dtype") -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = checkpoint.configs["unet"]
    original = checkpoint.read(UNET_PREFIX)
    tensors = _converted(original, lambda: convert_ldm_unet_checkpoint(original, config))
    return _filled(_empty(UNet2DConditionModel.from_config, config), tensors, dtype)


def _without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _converted(original: Tensors, convert: Callable[[], Tensors]) -> Tensors:
    """What diffusers makes of tensors, of which it drops those it does not know without a word.

    The converters hand tensors on, or views of them, so that memory tells which were taken.
    Raises: ModelUnavailable where others than the harmless ones were dropped.
    """
    places = {name: value.data_ptr() for name, value in original.items()}  # before any is popped
    converted = convert()
    taken = {value.data_ptr() for value in converted.values()}
    refuse_unused(name for name, place in places.items() if place not in taken)
    return converted


def _empty(create: Callable[[Any], Any], config: Any) -> Any:
    """A model whose weights take no memory yet."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return create(config)


def _filled(model: Any, tensors: Tensors, dtype: "torch.dtype") -> Any:
    """The model with these weights: all that it has, and no others but harmless ones.

    Raises: ValueError, ModelUnavailable.
    """
    expected = model.state_dict().keys()
    refuse_unused(tensors.keys() - expected)
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"{type(model).__name__} lacks {', '.join(missing[:3])}")
    model.load_state_dict({name: tensors[name].to(dtype) for name in expected}, assign=True)
    return model

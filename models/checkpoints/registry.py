"""From a model id to loaded weights.

Only safetensors files are read and no code from a checkpoint is run: the classes are ours to
choose. The heavy imports stand inside functions, so that naming a model costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.files.weights import read_json
from models.checkpoints.folders import checker_parts, folder_parts
from models.checkpoints.hub import (
    CONFIG_PATTERNS,
    Download,
    checker_download,
    fetch,
    fetch_folder,
    find_tokenizer,
    vae_download,
)
from models.checkpoints.parts import Part
from models.checkpoints.single_file import single_file_parts, vae_part
from models.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

OTHER_SAMPLING = ("EDM", "FlowMatch")
"""How the classes of schedulers begin whose models no other scheduler can sample."""

Report: TypeAlias = Callable[[float, str], None]
"""Called with the loaded share (0 … 1) and the name of what comes next."""


@dataclass(frozen=True, slots=True)
class Components:
    """The loaded parts of a Stable Diffusion checkpoint, on one device.

    All are in one dtype but for an SDXL VAE, which may be in float32.
    safety_checker, feature_extractor: both None where there is none.
    tokenizer_2, text_encoder_2: SDXL's, None for other families.
    switches: of `model_index.json`, such as `force_zeros_for_empty_prompt`.
    weights_sha256: one digest of all weight files, where somebody has taken it.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler_config: dict[str, Any]
    safety_checker: Any
    feature_extractor: Any
    tokenizer_2: Any = None
    text_encoder_2: Any = None
    switches: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        tensors = [
            tensor
            for module in self._modules()
            for tensor in (*module.parameters(), *module.buffers())
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: "torch.device") -> "Components":
        """The same, moved to a device."""
        for module in self._modules():
            module.to(device)
        return self

    def _modules(self) -> list[Any]:
        parts = (self.text_encoder, self.text_encoder_2, self.vae, self.unet, self.safety_checker)
        return [part for part in parts if part is not None]


def load_components(
    spec: ModelSpec,
    device: "torch.device",
    dtype: "torch.dtype",
    report: Report = lambda share, name: None,
) -> Components:
    """Load a checkpoint onto a device.

    report: told the loaded share by file size, for a progress bar and for readiness.
    Raises: ModelUnavailable.
    """
    from models.checkpoints.lora import fuse_lora

    try:
        loaded = _load(parts_of(spec, dtype), device, report)
        for lora in spec.loras:
            fuse_lora(Path(lora.path).expanduser(), lora.scale, loaded)
        scheduler = _scheduler_config(loaded.pop("scheduler"), spec)
    except ModelUnavailable as error:
        raise ModelUnavailable(f"model {spec.id!r}: {error}") from error
    report(1.0, "ready")
    return Components(scheduler_config=scheduler, **loaded)


def _scheduler_config(own: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The checkpoint's own with what the operator says. Raises: ModelUnavailable."""
    changes = {"_class_name": spec.scheduler, "prediction_type": spec.prediction_type}
    name = str(own.get("_class_name"))
    if name.startswith(OTHER_SAMPLING):
        raise ModelUnavailable(f"the checkpoint's scheduler {name!r} samples in another way")
    return own | {key: value for key, value in changes.items() if value is not None}


def parts_of(spec: ModelSpec, dtype: "torch.dtype") -> dict[str, Part]:
    """What is to be loaded for a model, by the names of `Components`."""
    path = Path(spec.source).expanduser()
    vae = fetch(vae_download(spec.vae)) if spec.vae is not None else None
    if path.suffix == ".safetensors" or path.is_file():
        parts = single_file_parts(
            path, dtype, _configs(spec), find_tokenizer(path), spec.prediction_type, vae
        )
    else:
        folder = fetch_folder(spec)
        parts = folder_parts(folder, spec.variant, dtype)
        if vae is not None:
            config = folder / "vae" / "config.json"
            is_sdxl = "text_encoder_2" in parts
            parts["vae"] = vae_part(vae, lambda: read_json(config), is_sdxl, dtype)
    if spec.safety_checker is not None and "safety_checker" not in parts:
        parts |= checker_parts(fetch(checker_download(spec.safety_checker)), dtype)
    return parts


def _configs(spec: ModelSpec) -> Path | None:
    """The folder that `config` names."""
    if spec.config is None:
        return None
    return fetch(Download(spec.config, CONFIG_PATTERNS))


def _load(parts: dict[str, Part], device: "torch.device", report: Report) -> dict[str, Any]:
    """Every part, by name; modules on the device, frozen. Optional ones that are absent: None."""
    total = sum(part.size for part in parts.values())
    loaded: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    done = 0
    for name, part in parts.items():
        report(done / total, name)
        try:
            loaded[name] = part.load()
        except Exception as error:  # a bad value in a configuration raises anything
            raise ModelUnavailable(f"cannot load {part.path} ({name}): {error}") from error
        if hasattr(loaded[name], "requires_grad_"):
            loaded[name].to(device).eval().requires_grad_(False)
        done += part.size
    return loaded

"""From a model id to loaded weights.

A model id is a name in `configs/models.toml`, "builtin", a folder in diffusers layout or a hub id.
Only safetensors files are read and no code from a checkpoint is run: the classes are ours to
choose. The heavy imports stand inside `load_components`, so that naming a model costs nothing.
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from models.errors import ModelUnavailable

if TYPE_CHECKING:
    import torch

BUILTIN_FOLDER = Path(__file__).parent / "builtin" / "weights"
WEIGHT_PATTERNS = ("*/*.json", "*/*.txt", "model_index.json")

Report: TypeAlias = Callable[[float, str], None]
"""Called with the loaded share (0 … 1) and the name of what comes next."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Where a model comes from.

    source: folder or hub id.
    revision: commit of a hub id, None for its default branch.
    variant: infix of the weight files, such as "fp16".
    """

    id: str
    source: str
    revision: str | None = None
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class Components:
    """The loaded parts of a Stable Diffusion checkpoint, on one device in one dtype.

    safety_checker, feature_extractor: both None where the checkpoint has none.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler_config: dict[str, Any]
    safety_checker: Any
    feature_extractor: Any


def read_catalog(path: Path) -> dict[str, ModelSpec]:
    """The models of a `models.toml`. Raises: ModelUnavailable for an entry with wrong keys."""
    with path.open("rb") as file:
        tables = tomllib.load(file).get("models", {})
    try:
        return {name: ModelSpec(id=name, **table) for name, table in tables.items()}
    except TypeError as error:
        raise ModelUnavailable(f"{path}: an entry has unknown or missing keys") from error


def find_model(model_id: str, catalog: dict[str, ModelSpec]) -> ModelSpec:
    """The catalog's entry, or a spec for an id that is itself a source."""
    return catalog.get(model_id) or ModelSpec(id=model_id, source=model_id)


def fetch_folder(spec: ModelSpec) -> Path:
    """The local diffusers folder of a model, downloaded from the hub where need be.

    `HF_HUB_OFFLINE=1` restricts a hub id to what was downloaded before.
    Raises: ModelUnavailable.
    """
    folder = BUILTIN_FOLDER if spec.source == "builtin" else Path(spec.source).expanduser()
    if not folder.is_dir():
        folder = _download(spec)
    if not (folder / "model_index.json").is_file():
        raise ModelUnavailable(f"model {spec.id!r}: {folder} holds no model_index.json")
    return folder


def _download(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    infix = f".{spec.variant}" if spec.variant else ""
    weights = (f"*/diffusion_pytorch_model{infix}.safetensors", f"*/model{infix}.safetensors")
    try:
        return Path(
            snapshot_download(
                spec.source, revision=spec.revision, allow_patterns=[*WEIGHT_PATTERNS, *weights]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailable(
            f"model {spec.id!r}: {spec.source!r} is neither a folder here nor a hub id that can be "
            "reached or was downloaded before; give a diffusers folder, or download the checkpoint "
            "once with network access"
        ) from error


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
    from safetensors import SafetensorError

    folder = fetch_folder(spec)
    present = _present_components(folder)
    loaders = _component_loaders(folder, spec.variant, dtype)
    required = {*loaders} - {*OPTIONAL}
    if "safety_checker" in present:
        required.add("feature_extractor")
    missing = sorted(required - {*present})
    if missing:
        raise ModelUnavailable(f"model {spec.id!r}: {folder} lacks {', '.join(missing)}")
    names = [name for name in loaders if name in present]
    sizes = {name: _folder_bytes(folder / name) for name in names}
    parts: dict[str, Any] = dict.fromkeys(loaders)
    done = 0
    for name in names:
        report(done / sum(sizes.values()), name)
        try:
            parts[name] = loaders[name]()
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelUnavailable(
                f"model {spec.id!r}: cannot load {folder / name}: {error}"
            ) from error
        if hasattr(parts[name], "requires_grad_"):
            parts[name].to(device).eval().requires_grad_(False)
        done += sizes[name]
    report(1.0, "ready")
    scheduler = parts.pop("scheduler")
    return Components(scheduler_config=scheduler, **parts)


OPTIONAL = ("safety_checker", "feature_extractor")


def _component_loaders(
    folder: Path, variant: str | None, dtype: "torch.dtype"
) -> dict[str, Callable[[], Any]]:
    """One loader per component; the class of each is fixed here, whatever the folder asks for."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

    def weights(model_class: Any, name: str) -> Callable[[], Any]:
        def load() -> Any:
            model, found = model_class.from_pretrained(
                folder / name,
                use_safetensors=True,
                local_files_only=True,
                variant=variant or _guess_variant(folder / name),
                dtype=dtype,
                output_loading_info=True,
            )
            # Both libraries would go on with random numbers, or none, in their place.
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
            return model

        return load

    return {
        "tokenizer": lambda: CLIPTokenizer.from_pretrained(
            folder / "tokenizer", local_files_only=True
        ),
        "scheduler": lambda: json.loads((folder / "scheduler/scheduler_config.json").read_text()),
        "feature_extractor": lambda: CLIPImageProcessor.from_pretrained(
            folder / "feature_extractor", local_files_only=True
        ),
        "text_encoder": weights(CLIPTextModel, "text_encoder"),
        "vae": weights(AutoencoderKL, "vae"),
        "safety_checker": weights(StableDiffusionSafetyChecker, "safety_checker"),
        "unet": weights(UNet2DConditionModel, "unet"),
    }


def _present_components(folder: Path) -> list[str]:
    """The names in `model_index.json` that stand for something; absent parts are [null, null]."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text())
        return [name for name, value in index.items() if isinstance(value, list) and all(value)]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelUnavailable(f"{path} is not a model index") from error


def _guess_variant(folder: Path) -> str | None:
    """ "fp16" where a folder holds only half-precision files."""
    files = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) or 1

"""What a model is made of: the operator's `models.toml`, and ids that name a source themselves.

A model id is a name in `models.toml`, "builtin", a folder in diffusers layout, a single
`.safetensors` file or a hub id. No file of a model is read here.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.checkpoints.files.manifests import SHA256
from models.checkpoints.folders import INDEX
from models.errors import ModelUnavailable
from models.params import SchedulerName
from models.spelling import did_you_mean

BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "weights"

ENTRY = {
    "source": str,
    "revision": str,
    "variant": str,
    "config": str,
    "prediction_type": str,
    "scheduler": str,
    "vae": str,
    "safety_checker": str,
    "loras": list,
    "sha256": dict,
}
LORA = {"path": str, "scale": float}
LORA_ENTRY = {"path": str, "sha256": str}
"""Keys of `models.toml` and what they hold; the first one of each is required."""

KINDS = {str: "text", float: "a number", list: "a list", dict: "a table"}

CHOICES = {
    "prediction_type": ("epsilon", "v_prediction"),
    "scheduler": tuple(each.value for each in SchedulerName),
}
"""Keys that hold one of these."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA file that is fused into a model, and how strongly; 1 is what it was trained for."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Where a model comes from.

    source: folder, `.safetensors` file or hub id.
    revision: commit of a hub id, None for its default branch.
    variant: infix of the weight files, such as "fp16".
    config: for a single file, a folder in diffusers layout (weights not needed) or a hub id that
        gives configuration and tokenizer; None takes what its family was published with.
    prediction_type: "epsilon" or "v_prediction" where the checkpoint does not say or is wrong.
    scheduler: the default, a `SchedulerName`, in place of the checkpoint's own.
    vae: `.safetensors` file, folder or hub id of the VAE, in place of the checkpoint's own.
    safety_checker: folder or hub id to borrow a checker from; the checkpoint's own comes first.
    loras: fused at load, in this order.
    sha256: digests that files must have, by their names in `model_files`.
    """

    id: str
    source: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    prediction_type: str | None = None
    scheduler: str | None = None
    vae: str | None = None
    safety_checker: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """A LoRA file that jobs may ask for by a name.

    sha256: the digest that the file must have; None takes any.
    """

    path: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """The operator's lists, by name."""

    models: Mapping[str, ModelSpec]
    loras: Mapping[str, LoraEntry]


def read_catalog(path: Path) -> Catalog:
    """What a `models.toml` lists. Raises: ModelUnavailable, which names the entry and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelUnavailable(f"{path} is no TOML: {error}") from error
    return parse_catalog(text, path)


def parse_catalog(text: str, path: Path) -> Catalog:
    """The same from the text of a file. Raises: ModelUnavailable."""
    try:
        document = tomllib.loads(text)
    except ValueError as error:
        raise ModelUnavailable(f"{path} is no TOML: {error}") from error
    for name in document:
        if name not in ("models", "loras"):
            raise ModelUnavailable(
                f"{path}: [{name}] is neither a model nor a LoRA; did you mean [models.{name}] or "
                f"[loras.{name}]?"
            )
    models = _of_kind(document.get("models", {}), dict, f"{path}: models")
    loras = _of_kind(document.get("loras", {}), dict, f"{path}: loras")
    return Catalog(
        {name: _read_entry(name, table, path) for name, table in models.items()},
        {name: _read_lora_entry(table, f"{path}: [loras.{name}]") for name, table in loras.items()},
    )


def _read_entry(name: str, table: Any, path: Path) -> ModelSpec:
    where = f"{path}: [models.{name}]"
    checked = _checked(table, ENTRY, where)
    for key, choices in CHOICES.items():
        if (value := checked.get(key)) is not None and value not in choices:
            raise ModelUnavailable(
                f"{where} {key} must be one of {', '.join(choices)}{did_you_mean(value, choices)}"
            )
    loras = tuple(_read_lora(lora, f"{where} loras") for lora in checked.get("loras", ()))
    return ModelSpec(id=name, **{**checked, "loras": loras})


def _read_lora(table: Any, where: str) -> LoraSpec:
    return LoraSpec(**_checked(table, LORA, where))


def _read_lora_entry(table: Any, where: str) -> LoraEntry:
    entry = LoraEntry(**_checked(table, LORA_ENTRY, where))
    if entry.sha256 is not None and not SHA256.fullmatch(entry.sha256):
        raise ModelUnavailable(f"{where} sha256 must be 64 hexadecimal digits in lower case")
    return entry


def _checked(table: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """The table, whose values are of these kinds; the first one is required."""
    checked: dict[str, Any] = _of_kind(table, dict, where)
    for key, value in checked.items():
        if key not in kinds:
            raise ModelUnavailable(f"{where}: unknown key {key!r}{did_you_mean(key, kinds)}")
        _of_kind(value, kinds[key], f"{where} {key}")
    if (first := next(iter(kinds))) not in checked:
        raise ModelUnavailable(f"{where}: {first} is missing")
    return checked


def _of_kind(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, (int, float) if kind is float else kind):
        raise ModelUnavailable(f"{where} must be {KINDS[kind]}")
    return value


def find_model(model_id: str, catalog: Mapping[str, ModelSpec]) -> ModelSpec:
    """The catalog's entry, or a spec for an id that is itself a source."""
    return catalog.get(model_id) or ModelSpec(id=model_id, source=model_id)


def find_lora(name: str, catalog: Mapping[str, LoraEntry]) -> LoraEntry:
    """The catalog's entry. Raises: ModelUnavailable."""
    if name not in catalog:
        raise ModelUnavailable(
            f"unknown LoRA {name!r}: no [loras.{name}] in models.toml{did_you_mean(name, catalog)}"
        )
    return catalog[name]


def check_lora(name: str, catalog: Mapping[str, LoraEntry]) -> None:
    """See that a LoRA's file is there. Reads nothing of it. Raises: ModelUnavailable."""
    path = Path(find_lora(name, catalog).path).expanduser()
    if not path.is_file():
        raise ModelUnavailable(f"LoRA {name!r}: there is no file {path}")
    if path.suffix != ".safetensors":
        raise ModelUnavailable(f"LoRA {name!r}: {path} is no .safetensors file")


def check_model(model_id: str, catalog: Mapping[str, ModelSpec]) -> None:
    """See that a model's files can be there; a hub id may be. Reads none of them.

    Raises: ModelUnavailable.
    """
    spec = find_model(model_id, catalog)
    source = spec.source
    if source != "builtin" and not (is_path(source) or HUB_ID.fullmatch(source)):
        raise ModelUnavailable(
            f"unknown model {source!r}: neither an id of models.toml ({', '.join(catalog)}) nor a "
            f"folder, a .safetensors file or a hub id (owner/name){did_you_mean(source, catalog)}"
        )
    path = Path(source).expanduser()
    paths = [Path(lora.path).expanduser() for lora in spec.loras]
    if spec.vae is not None and not (is_path(spec.vae) or HUB_ID.fullmatch(spec.vae)):
        raise ModelUnavailable(
            f"model {model_id!r}: vae {spec.vae!r} is neither a folder, a .safetensors file nor a "
            "hub id (owner/name)"
        )
    if spec.vae is not None and is_path(spec.vae):
        paths.append(Path(spec.vae).expanduser())
    if source != "builtin" and is_path(source):
        paths.append(path)
    for each in paths:
        if not each.exists():
            raise ModelUnavailable(f"model {model_id!r}: there is no file or folder {each}")
        if each.is_file() and each.suffix != ".safetensors":
            raise ModelUnavailable(f"model {model_id!r}: {each} is no .safetensors file")
    if source != "builtin" and path.is_dir() and not (path / INDEX).is_file():
        raise ModelUnavailable(f"model {model_id!r}: {path} holds no {INDEX}")


def is_path(source: str) -> bool:
    """Whether a source can only be a file or folder, or is one."""
    path = Path(source).expanduser()
    is_written_so = source.startswith(("/", ".", "~")) or source.count("/") > 1
    return path.exists() or is_written_so or path.suffix == ".safetensors"

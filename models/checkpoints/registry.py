"""From a model id to loaded weights.

A model id is a name in `models/models.toml`, "builtin", a folder in diffusers layout, a single
`.safetensors` file or a hub id. Only safetensors files are read and no code from a checkpoint is
run: the classes are ours to choose. The heavy imports stand inside functions, so that naming a
model costs nothing.
"""

import glob
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from models.checkpoints.families import (
    MODEL_CARD,
    Traits,
    licence_in,
    read_configs,
    traits_of,
)
from models.checkpoints.files.manifests import SHA256
from models.checkpoints.files.weights import read_header, read_json
from models.checkpoints.folders import (
    CHECKER,
    INDEX,
    REQUIRED,
    XL_ONLY,
    checker_parts,
    folder_parts,
    folder_weights,
    lent_folder,
    lent_weights,
)
from models.checkpoints.parts import Part
from models.checkpoints.single_file import open_single_file, single_file_parts, vae_part
from models.errors import ModelUnavailable
from models.params import SchedulerName
from models.spelling import did_you_mean

if TYPE_CHECKING:
    import torch

BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "weights"
BUILTIN_DIGESTS = BUILTIN_FOLDER / "sha256.json"
READ_SUFFIXES = (".safetensors", ".json", ".txt")
CONFIG_PATTERNS = (
    INDEX,
    MODEL_CARD,
    *(f"{part}/*.{end}" for part in (*REQUIRED, *XL_ONLY, *CHECKER) for end in ("json", "txt")),
)
CHECKER_PATTERNS = (
    *("safety_checker/*.json", "feature_extractor/*.json", "config.json"),
    *("preprocessor_config.json", "model.safetensors.index*.json"),
)
VAE_PATTERNS = ("vae/*.json", "config.json", "diffusion_pytorch_model.safetensors.index*.json")

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

OTHER_SAMPLING = ("EDM", "FlowMatch")
"""How the classes of schedulers begin whose models no other scheduler can sample."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

TOKENIZER_SOURCE = "openai/clip-vit-large-patch14"
"""Where single files get their vocabulary; all three families use CLIP's."""
TOKENIZER_PATTERNS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")

Report: TypeAlias = Callable[[float, str], None]
"""Called with the loaded share (0 … 1) and the name of what comes next."""


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


def weight_files(spec: ModelSpec) -> dict[str, Path] | None:
    """The weights that loading a model reads, by their names in `model_files`; needs no torch.

    None where some are not on this machine. Raises: ModelUnavailable for an unreadable index.
    """
    own = local_path(spec)
    found = [(own, _main_download(spec))]
    if spec.vae is not None:
        vae = _vae_download(spec.vae)
        found.append((_if_here(vae), vae))
    if spec.safety_checker is not None:
        checker = _checker_download(spec.safety_checker)
        found.append((_if_here(checker), checker))
    paths = [Path(lora.path).expanduser() for lora in spec.loras]
    for place, wanted in found:
        if place is None:
            return None
        paths += [place] if place.is_file() else _chosen(place, wanted)
    base = own if own is not None and own.is_dir() else Path()
    return {_name_in(base, path): path for path in paths if path.is_file()}


def _chosen(folder: Path, wanted: "Download") -> list[Path]:
    names = [each.relative_to(folder).as_posix() for each in folder.rglob("*")]
    return [folder / each for each in wanted.choose(folder, names)]


def parameter_count(files: Iterable[Path]) -> int:
    """Numbers in weight files, read from their headers. Raises: ModelUnavailable."""
    return sum(math.prod(shape) for file in files for shape in read_header(file).shapes.values())


def local_path(spec: ModelSpec) -> Path | None:
    """The folder or file of a model's own weights; None where some are not on this machine."""
    return BUILTIN_FOLDER if spec.source == "builtin" else _if_here(_main_download(spec))


def sources_of(spec: ModelSpec) -> set[str]:
    """The hub ids that a model is made of; folders and files here are left out."""
    named = (spec.source, spec.config, spec.vae, spec.safety_checker)
    return {each for each in named if each not in (None, "builtin") and not is_path(str(each))}


def local_size(spec: ModelSpec) -> int | None:
    """Bytes of a model's own files that are on this machine; None where some are not here."""
    own = local_path(spec)
    vae = None if spec.vae is None else _if_here(_vae_download(spec.vae))
    if own is None or (vae is None and spec.vae is not None):
        return None
    parts = [own] if vae is None else [own, lent_folder(vae, "vae")]
    return sum(map(_size_bytes, parts)) or None


def local_traits(spec: ModelSpec) -> Traits | None:
    """What a model is, by its files on this machine, of which no weights are read.

    None where they are not here, or are no checkpoint that can be loaded.
    """
    try:
        found = local_path(spec)
        if found is None:
            return None
        traits = _file_traits(found, spec) if found.is_file() else traits_of(read_configs(found))
    except (ModelUnavailable, KeyError, OSError):
        return None
    has_checker = traits.has_safety_checker or spec.safety_checker is not None
    return replace(traits, has_safety_checker=has_checker)


def licence_of(spec: ModelSpec) -> str | None:
    """The licence that a model's card or file names; None where none does, or it is not here."""
    path = BUILTIN_FOLDER.parent if spec.source == "builtin" else local_path(spec)
    return None if path is None else licence_in(path)


def _file_traits(path: Path, spec: ModelSpec) -> Traits:
    """A single file has no safety checker, whatever its configuration was published with."""
    lent = None if spec.config is None else _if_here(Download(spec.config, CONFIG_PATTERNS))
    checkpoint = open_single_file(path, lent)
    traits = traits_of(checkpoint.configs)
    return replace(traits, family=checkpoint.family, has_safety_checker=False)


def _if_here(wanted: "Download") -> Path | None:
    """Where the files of a source are; None where they are not all on this machine."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path = Path(wanted.source).expanduser()
    if path.exists():
        return path
    try:
        return _snapshot(wanted, is_local=True)
    except (LocalEntryNotFoundError, HFValidationError, ModelUnavailable):
        return None


def _size_bytes(path: Path) -> int:
    """0 for a folder without weights: a download that has only begun."""
    if path.is_file():
        return path.stat().st_size
    files = [each for each in path.rglob("*") if each.suffix in READ_SUFFIXES and each.is_file()]
    has_weights = any(each.suffix == ".safetensors" for each in files)
    return sum(each.stat().st_size for each in files) if has_weights else 0


def fetch_folder(spec: ModelSpec) -> Path:
    """The local diffusers folder of a model, downloaded from the hub where need be.

    `HF_HUB_OFFLINE=1` restricts a hub id to what was downloaded before.
    Raises: ModelUnavailable.
    """
    folder = BUILTIN_FOLDER if spec.source == "builtin" else Path(spec.source).expanduser()
    if not folder.is_dir():
        folder = _download(_main_download(spec))
    if not (folder / INDEX).is_file():
        raise ModelUnavailable(f"{folder} holds no {INDEX}")
    return folder


@dataclass(frozen=True, slots=True)
class Download:
    """What is wanted of a hub id.

    patterns: of its small files. choose: gives the weight files, from the folder where the small
        ones are and the paths of all files that the hub has. revision: None for the default branch.
    """

    source: str
    patterns: tuple[str, ...]
    choose: Callable[[Path, Iterable[str]], list[str]] = lambda folder, listing: []
    revision: str | None = None


def _main_download(spec: ModelSpec) -> Download:
    def choose(folder: Path, listing: Iterable[str]) -> list[str]:
        skipped = "vae/" if spec.vae is not None else ()
        files = folder_weights(folder, listing, spec.variant)
        return [file for file in files if not file.startswith(skipped)]

    return Download(spec.source, CONFIG_PATTERNS, choose, spec.revision)


def _checker_download(source: str) -> Download:
    return Download(
        source,
        CHECKER_PATTERNS,
        lambda folder, listing: lent_weights(folder, listing, "safety_checker"),
    )


def _vae_download(source: str) -> Download:
    return Download(
        source, VAE_PATTERNS, lambda folder, listing: lent_weights(folder, listing, "vae")
    )


def _download(wanted: Download) -> Path:
    """The files of a hub id. Once they are all here, the hub is asked no more.

    Raises: ModelUnavailable.
    """
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(wanted, is_local=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return _ask_hub(wanted)


def _ask_hub(wanted: Download) -> Path:
    """The same as the hub has it now. Raises: ModelUnavailable."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(wanted, is_local=False)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ModelUnavailable(
            f"{wanted.source!r} is neither a folder here nor a hub id that can be reached or was "
            "downloaded before; give a diffusers folder or a .safetensors file, or download the "
            f"checkpoint once with network access ({reason})"
        ) from error


def _snapshot(wanted: Download, *, is_local: bool) -> Path:
    """First the small files, which say what weights there are to be; then those.

    Raises: what huggingface_hub does; ModelUnavailable.
    """

    def get(patterns: Iterable[str], revision: str | None) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                wanted.source,
                revision=revision,
                allow_patterns=[*patterns],
                local_files_only=is_local,
            )
        )

    folder = get(wanted.patterns, wanted.revision)
    commit = folder.name  # a branch may move in between
    if files := wanted.choose(folder, _listing(wanted.source, commit, folder)):
        get(map(glob.escape, files), commit)
    return folder


def _listing(source: str, commit: str, folder: Path) -> list[str]:
    """Paths of all files that the hub has, as it said when the small ones were downloaded.

    Caches of older releases of huggingface_hub lack that; the files that are here stand for it.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [each.path for each in get_cached_repo_tree(source, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return [each.relative_to(folder).as_posix() for each in folder.rglob("*")]


def download(spec: ModelSpec) -> list[str]:
    """Get all that a model has on the hub, as it is there now; the hub ids it is made of.

    Raises: ModelUnavailable.
    """
    wanted = [_main_download(spec)]
    if spec.config is not None:
        wanted.append(Download(spec.config, CONFIG_PATTERNS))
    if spec.vae is not None:
        wanted.append(_vae_download(spec.vae))
    if spec.safety_checker is not None:
        wanted.append(_checker_download(spec.safety_checker))
    found = []
    for each in wanted:
        if each.source != "builtin" and not Path(each.source).expanduser().exists():
            _fetch_card(each.source, _ask_hub(each).name)
            found.append(each.source)
    return found


def _fetch_card(source: str, commit: str) -> None:
    """The model card, which names the licence, if the hub has one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
        hf_hub_download(source, MODEL_CARD, revision=commit)


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
        loaded = _load(_parts(spec, dtype), device, report)
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


def model_files(spec: ModelSpec) -> dict[str, Path]:
    """Every file a model may be loaded from, by a name that does not tell where the model lies.

    Of a folder that holds several variants, all; a borrowed VAE or safety checker and LoRA files
    too.
    Raises: ModelUnavailable.
    """
    import torch

    from models.checkpoints.lora import lora_files

    parts = _parts(spec, torch.float32)
    paths = {part.path for part in parts.values()}
    paths |= {each for lora in spec.loras for each in lora_files(Path(lora.path).expanduser())}
    found = [file for path in paths for file in (path.glob("*") if path.is_dir() else [path])]
    index = next((path for path in paths if path.name == INDEX), None)
    base = index.parent if index is not None else Path()
    return {_name_in(base, file): file for file in sorted(found) if file.suffix in READ_SUFFIXES}


def _name_in(base: Path, file: Path) -> str:
    try:
        return file.relative_to(base).as_posix()
    except ValueError:
        return f"{file.parent.name}/{file.name}"


def pinned_digests(spec: ModelSpec) -> dict[str, str]:
    """SHA-256 digests that a model's files must have, by their names in `model_files`."""
    if spec.source == "builtin" and not spec.sha256:
        return dict(json.loads(BUILTIN_DIGESTS.read_text()))
    return spec.sha256


def _parts(spec: ModelSpec, dtype: "torch.dtype") -> dict[str, Part]:
    """What is to be loaded for a model, by the names of `Components`."""
    path = Path(spec.source).expanduser()
    vae = _find(_vae_download(spec.vae)) if spec.vae is not None else None
    if path.suffix == ".safetensors" or path.is_file():
        parts = single_file_parts(
            path, dtype, _configs(spec), _find_tokenizer(path), spec.prediction_type, vae
        )
    else:
        folder = fetch_folder(spec)
        parts = folder_parts(folder, spec.variant, dtype)
        if vae is not None:
            config = folder / "vae" / "config.json"
            is_sdxl = "text_encoder_2" in parts
            parts["vae"] = vae_part(vae, lambda: read_json(config), is_sdxl, dtype)
    if spec.safety_checker is not None and "safety_checker" not in parts:
        parts |= checker_parts(_find(_checker_download(spec.safety_checker)), dtype)
    return parts


def _find(wanted: Download) -> Path:
    """A file or folder here, or that of a hub id, downloaded where need be.

    Raises: ModelUnavailable.
    """
    path = Path(wanted.source).expanduser()
    return path if path.exists() or is_path(wanted.source) else _download(wanted)


def _configs(spec: ModelSpec) -> Path | None:
    """The folder that `config` names."""
    if spec.config is None:
        return None
    return _find(Download(spec.config, CONFIG_PATTERNS))


def _find_tokenizer(checkpoint: Path) -> Callable[[], Path]:
    """Finds the folder with the vocabulary for a single file, which does not hold it."""

    def find() -> Path:
        beside = checkpoint.parent / "tokenizer"
        if beside.is_dir():
            return beside
        try:
            return _download(Download(TOKENIZER_SOURCE, TOKENIZER_PATTERNS))
        except ModelUnavailable as error:
            raise ModelUnavailable(
                f"a single file holds no tokenizer, and {TOKENIZER_SOURCE!r} was not downloaded "
                f"before; put CLIP's vocab.json and merges.txt into {beside}, or name a diffusers "
                "folder of the same family as `config` in models.toml"
            ) from error

    return find


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

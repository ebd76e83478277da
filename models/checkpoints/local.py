"""What the files on this machine tell about a model, whose weights are not loaded.

Nothing here asks the hub, but for `model_files`, which needs every file that loading needs.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from models.checkpoints.catalog import BUILTIN_FOLDER, ModelSpec
from models.checkpoints.families import Traits, licence_in, read_configs, traits_of
from models.checkpoints.files.weights import read_header
from models.checkpoints.folders import INDEX, lent_folder
from models.checkpoints.hub import (
    CONFIG_PATTERNS,
    Download,
    checker_download,
    if_here,
    main_download,
    vae_download,
)
from models.checkpoints.registry import parts_of
from models.checkpoints.single_file import open_single_file
from models.errors import ModelUnavailable

BUILTIN_DIGESTS = BUILTIN_FOLDER / "sha256.json"
READ_SUFFIXES = (".safetensors", ".json", ".txt")


def local_path(spec: ModelSpec) -> Path | None:
    """The folder or file of a model's own weights; None where some are not on this machine."""
    return BUILTIN_FOLDER if spec.source == "builtin" else if_here(main_download(spec))


def local_size(spec: ModelSpec) -> int | None:
    """Bytes of a model's own files that are on this machine; None where some are not here."""
    own = local_path(spec)
    vae = None if spec.vae is None else if_here(vae_download(spec.vae))
    if own is None or (vae is None and spec.vae is not None):
        return None
    parts = [own] if vae is None else [own, lent_folder(vae, "vae")]
    return sum(map(_size_bytes, parts)) or None


def _size_bytes(path: Path) -> int:
    """0 for a folder without weights: a download that has only begun."""
    if path.is_file():
        return path.stat().st_size
    files = [each for each in path.rglob("*") if each.suffix in READ_SUFFIXES and each.is_file()]
    has_weights = any(each.suffix == ".safetensors" for each in files)
    return sum(each.stat().st_size for each in files) if has_weights else 0


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


def _file_traits(path: Path, spec: ModelSpec) -> Traits:
    """A single file has no safety checker, whatever its configuration was published with."""
    lent = None if spec.config is None else if_here(Download(spec.config, CONFIG_PATTERNS))
    checkpoint = open_single_file(path, lent)
    traits = traits_of(checkpoint.configs)
    return replace(traits, family=checkpoint.family, has_safety_checker=False)


def licence_of(spec: ModelSpec) -> str | None:
    """The licence that a model's card or file names; None where none does, or it is not here."""
    path = BUILTIN_FOLDER.parent if spec.source == "builtin" else local_path(spec)
    return None if path is None else licence_in(path)


def weight_files(spec: ModelSpec) -> dict[str, Path] | None:
    """The weights that loading a model reads, by their names in `model_files`; needs no torch.

    None where some are not on this machine. Raises: ModelUnavailable for an unreadable index.
    """
    own = local_path(spec)
    found = [(own, main_download(spec))]
    if spec.vae is not None:
        vae = vae_download(spec.vae)
        found.append((if_here(vae), vae))
    if spec.safety_checker is not None:
        checker = checker_download(spec.safety_checker)
        found.append((if_here(checker), checker))
    paths = [Path(lora.path).expanduser() for lora in spec.loras]
    for place, wanted in found:
        if place is None:
            return None
        paths += [place] if place.is_file() else _chosen(place, wanted)
    base = own if own is not None and own.is_dir() else Path()
    return {_name_in(base, path): path for path in paths if path.is_file()}


def _chosen(folder: Path, wanted: Download) -> list[Path]:
    names = [each.relative_to(folder).as_posix() for each in folder.rglob("*")]
    return [folder / each for each in wanted.choose(folder, names)]


def parameter_count(files: Iterable[Path]) -> int:
    """Numbers in weight files, read from their headers. Raises: ModelUnavailable."""
    return sum(math.prod(shape) for file in files for shape in read_header(file).shapes.values())


def model_files(spec: ModelSpec) -> dict[str, Path]:
    """Every file a model may be loaded from, by a name that does not tell where the model lies.

    Of a folder that holds several variants, all; a borrowed VAE or safety checker and LoRA files
    too.
    Raises: ModelUnavailable.
    """
    import torch

    from models.checkpoints.lora import lora_files

    parts = parts_of(spec, torch.float32)
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

"""Files of the Hugging Face hub: which ones a model needs, and where its cache keeps them.

What was downloaded completely is used without a question to the hub. huggingface_hub is imported
inside functions, so that naming a model costs nothing.
"""

import glob
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from models.checkpoints.catalog import BUILTIN_FOLDER, ModelSpec, is_path
from models.checkpoints.families import MODEL_CARD
from models.checkpoints.folders import (
    CHECKER,
    INDEX,
    REQUIRED,
    XL_ONLY,
    folder_weights,
    lent_weights,
)
from models.errors import ModelUnavailable

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

TOKENIZER_SOURCE = "openai/clip-vit-large-patch14"
"""Where single files get their vocabulary; all three families use CLIP's."""
TOKENIZER_PATTERNS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def sources_of(spec: ModelSpec) -> set[str]:
    """The hub ids that a model is made of; folders and files here are left out."""
    named = (spec.source, spec.config, spec.vae, spec.safety_checker)
    return {each for each in named if each not in (None, "builtin") and not is_path(str(each))}


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


def main_download(spec: ModelSpec) -> Download:
    def choose(folder: Path, listing: Iterable[str]) -> list[str]:
        skipped = "vae/" if spec.vae is not None else ()
        files = folder_weights(folder, listing, spec.variant)
        return [file for file in files if not file.startswith(skipped)]

    return Download(spec.source, CONFIG_PATTERNS, choose, spec.revision)


def checker_download(source: str) -> Download:
    return Download(
        source,
        CHECKER_PATTERNS,
        lambda folder, listing: lent_weights(folder, listing, "safety_checker"),
    )


def vae_download(source: str) -> Download:
    return Download(
        source, VAE_PATTERNS, lambda folder, listing: lent_weights(folder, listing, "vae")
    )


def if_here(wanted: Download) -> Path | None:
    """Where the files of a source are; None where they are not all on this machine."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path = Path(wanted.source).expanduser()
    if path.exists():
        return path
    try:
        return _snapshot(wanted, is_local=True)
    except (LocalEntryNotFoundError, HFValidationError, ModelUnavailable):
        return None


def fetch(wanted: Download) -> Path:
    """A file or folder here, or that of a hub id, downloaded where need be.

    Raises: ModelUnavailable.
    """
    path = Path(wanted.source).expanduser()
    return path if path.exists() or is_path(wanted.source) else _download(wanted)


def fetch_folder(spec: ModelSpec) -> Path:
    """The local diffusers folder of a model, downloaded from the hub where need be.

    `HF_HUB_OFFLINE=1` restricts a hub id to what was downloaded before.
    Raises: ModelUnavailable.
    """
    folder = BUILTIN_FOLDER if spec.source == "builtin" else Path(spec.source).expanduser()
    if not folder.is_dir():
        folder = _download(main_download(spec))
    if not (folder / INDEX).is_file():
        raise ModelUnavailable(f"{folder} holds no {INDEX}")
    return folder


def find_tokenizer(checkpoint: Path) -> Callable[[], Path]:
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
    wanted = [main_download(spec)]
    if spec.config is not None:
        wanted.append(Download(spec.config, CONFIG_PATTERNS))
    if spec.vae is not None:
        wanted.append(vae_download(spec.vae))
    if spec.safety_checker is not None:
        wanted.append(checker_download(spec.safety_checker))
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

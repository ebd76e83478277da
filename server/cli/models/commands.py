"""The commands `inpaint-server models list | pull | verify | trust | add | remove`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from models.checkpoints.catalog import (
    Catalog,
    LoraEntry,
    ModelSpec,
    check_lora,
    check_model,
    find_model,
    parse_catalog,
    read_catalog,
)
from models.checkpoints.files.fingerprint import CACHE_FILE, file_sha256s
from models.checkpoints.files.manifests import (
    check_digest,
    check_downloads,
    check_files,
    manifest_path,
)
from models.checkpoints.files.weights import SUFFIX, read_header
from models.checkpoints.hub import download
from models.checkpoints.local import licence_of, model_files, pinned_digests
from models.errors import ModelUnavailable
from server.cli.models.arguments import KEYS
from server.cli.models.entries import read_text, with_entry, write_checked
from server.cli.models.listing import print_list
from server.cli.models.removal import carry_out, is_confirmed, lines_of, plan_removal
from server.core.settings import Settings
from server.core.settings.folder import make_data_dir
from server.core.terminal import printable

Command: TypeAlias = Callable[[argparse.Namespace, Catalog, Settings], int]


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run one of the commands. Returns the exit status. Raises: ValueError, OSError."""
    try:
        if options.verb == "add" and not settings.models_file.exists():
            catalog = Catalog({}, {})
        else:
            catalog = read_catalog(settings.models_file)
        return COMMANDS[options.verb](options, catalog, settings)
    except ModelUnavailable as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)  # noqa: T201
        return 1


def list_all(options: argparse.Namespace, catalog: Catalog, settings: Settings) -> int:
    """Print each model and LoRA."""
    print_list(catalog, settings, as_json=options.json)
    return 0


def pull(options: argparse.Namespace, catalog: Catalog, settings: Settings) -> int:
    """Download a model as the hub has it now, and accept it as the right one."""
    if is_lora(options.model_id, catalog):
        raise ValueError(f"{options.model_id!r} is a LoRA file, which is not downloaded")
    spec = find_model(options.model_id, catalog.models)
    for source in download(spec):
        print(f"{printable(source)} is here", file=sys.stderr)  # noqa: T201
    print(f"licence: {printable(licence_of(spec) or 'not named')}", file=sys.stderr)  # noqa: T201
    return trust_files(spec, settings)


def verify(options: argparse.Namespace, catalog: Catalog, settings: Settings) -> int:
    """Compare the files of a model or LoRA with those expected, and print their digests."""
    if is_lora(options.model_id, catalog):
        return verify_lora(options.model_id, catalog.loras[options.model_id])
    return verify_files(find_model(options.model_id, catalog.models), settings)


def trust(options: argparse.Namespace, catalog: Catalog, settings: Settings) -> int:
    """Accept a model's present files as the right ones."""
    return trust_files(find_model(options.model_id, catalog.models), settings)


def is_lora(name: str, catalog: Catalog) -> bool:
    """Whether a name means a LoRA; a model of the same name comes first."""
    return name in catalog.loras and name not in catalog.models


def trust_files(spec: ModelSpec, settings: Settings) -> int:
    manifest_path(settings.data_dir, spec.id).unlink(missing_ok=True)
    return verify_files(spec, settings)


def verify_files(spec: ModelSpec, settings: Settings) -> int:
    """Compare the digests of a model's files with those of its first use, and print them.

    Raises: ModelUnavailable, also for weights that are damaged.
    """
    make_data_dir(settings.data_dir)
    files = model_files(spec)
    for path in files.values():
        if path.suffix == SUFFIX:
            read_header(path)
    digests = read_digests([*files.values()], settings.data_dir / CACHE_FILE)
    found = {name: digests[str(path)] for name, path in files.items()}
    for name, digest in found.items():
        print_digest(digest, name)
    check_downloads(found, files)
    check_files(spec.id, found, manifest_path(settings.data_dir, spec.id), pinned_digests(spec))
    return 0


def verify_lora(name: str, entry: LoraEntry) -> int:
    """The same of a LoRA file and the digest of `models.toml`. Raises: ModelUnavailable."""
    check_lora(name, {name: entry})
    path = Path(entry.path).expanduser()
    read_header(path)
    digest = read_digests([path], None)[str(path)]
    print_digest(digest, path.name)
    check_digest(f"LoRA {name!r}: {path}", digest, entry.sha256)
    return 0


def read_digests(paths: list[Path], cache: Path | None) -> dict[str, str]:
    """SHA-256 digests by path, with a progress bar. All files are read, whatever `cache` knows."""
    with tqdm(total=100, desc="checking", unit="%", disable=None) as bar:
        return file_sha256s(
            paths, cache, lambda share: bar.update(round(share * 100) - bar.n), reads_all=True
        )


def print_digest(digest: str, name: str) -> None:
    print(f"{digest}  {printable(name)}")  # noqa: T201 - the command's output, as sha256sum's


def add(options: argparse.Namespace, catalog: Catalog, settings: Settings) -> int:
    """Write an entry into `models.toml`. Raises: ValueError, OSError, ModelUnavailable."""
    name = options.model_id
    kind = "loras" if options.lora else "models"
    if name in (catalog.loras if options.lora else catalog.models):
        raise ValueError(f"{settings.models_file} has an entry [{kind}.{name}] already")
    keys = {key: value for key in KEYS if (value := getattr(options, f"key_{key}")) is not None}
    if options.lora and keys:
        raise ValueError(f"a LoRA's entry has no {', '.join(keys)}")
    values = {"path": options.source} if options.lora else {"source": options.source, **keys}
    text = with_entry(read_text(settings.models_file), kind, name, values)
    wanted = parse_catalog(text, settings.models_file)
    if options.lora:
        check_lora(name, wanted.loras)
    else:
        check_model(name, wanted.models)
    write_checked(settings.models_file, text)
    print(f"{settings.models_file} has [{kind}.{printable(name)}] now", file=sys.stderr)  # noqa: T201
    return 0


def remove(options: argparse.Namespace, catalog: Catalog, settings: Settings) -> int:
    """Remove an entry and the downloads that no other model uses. Returns 1 if it is not wanted.

    Raises: ValueError, OSError, ModelUnavailable.
    """
    plan = plan_removal(options.model_id, catalog, settings)
    if not is_confirmed(lines_of(plan, settings.models_file), is_agreed=options.yes):
        return 1
    carry_out(plan, settings.models_file)
    return 0


COMMANDS: dict[str, Command] = {
    "list": list_all,
    "pull": pull,
    "verify": verify,
    "trust": trust,
    "add": add,
    "remove": remove,
}

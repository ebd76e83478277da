"""The commands `inpaint-server models list | download | verify | trust`."""

import argparse
import sys
from collections.abc import Mapping

from tqdm import tqdm

from models.checkpoints.fingerprint import file_sha256s
from models.checkpoints.manifests import check_downloads, check_files, manifest_path
from models.checkpoints.registry import (
    ModelSpec,
    download,
    find_model,
    local_size,
    model_files,
    pinned_digests,
    read_catalog,
)
from models.checkpoints.weights import SUFFIX, read_header
from models.errors import ModelUnavailable
from server.core.settings import Settings
from server.core.terminal import print_table, printable, size_text


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run one of the commands. Returns the exit status."""
    try:
        catalog = read_catalog(settings.models_file).models
        if options.verb == "list":
            return list_models(catalog, settings)
        spec = find_model(options.model_id, catalog)
        commands = {"download": download_model, "verify": verify, "trust": trust}
        return commands[options.verb](spec, settings)
    except ModelUnavailable as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)  # noqa: T201
        return 1


def list_models(catalog: Mapping[str, ModelSpec], settings: Settings) -> int:
    """Print each model: its use in the settings, its bytes on this machine, its source."""
    uses = dict.fromkeys(settings.models, "offered") | {settings.model: "default"}
    print_table(
        ("id", "use", "here", "source"),
        [
            (each, uses.get(each, "-"), size_text(local_size(spec)), spec.source)
            for each in dict.fromkeys([*catalog, *uses])
            for spec in [find_model(each, catalog)]
        ],
        empty=f"no models in {settings.models_file}",
    )
    return 0


def download_model(spec: ModelSpec, settings: Settings) -> int:
    """Download a model as the hub has it now, and accept it as the right one."""
    for source in download(spec):
        print(f"{printable(source)} is here", file=sys.stderr)  # noqa: T201
    return trust(spec, settings)


def trust(spec: ModelSpec, settings: Settings) -> int:
    """Accept a model's present files as the right ones."""
    manifest_path(settings.data_dir, spec.id).unlink(missing_ok=True)
    return verify(spec, settings)


def verify(spec: ModelSpec, settings: Settings) -> int:
    """Compare the digests of a model's files with those of its first use, and print them.

    Raises: ModelUnavailable, also for weights that are damaged.
    """
    settings.make_data_dir()
    files = model_files(spec)
    for path in files.values():
        if path.suffix == SUFFIX:
            read_header(path)
    with tqdm(total=100, desc="checking", unit="%", disable=None) as bar:
        digests = file_sha256s(
            [*files.values()], None, lambda share: bar.update(round(share * 100) - bar.n)
        )
    found = {name: digests[str(path)] for name, path in files.items()}
    for name, digest in found.items():
        print(f"{digest}  {printable(name)}")  # noqa: T201 - the command's output, as sha256sum's
    check_downloads(found, files)
    check_files(spec.id, found, manifest_path(settings.data_dir, spec.id), pinned_digests(spec))
    return 0

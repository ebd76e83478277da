"""`inpaint-server models list`: what is named, what is here, and what it needs."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from models.checkpoints.catalog import Catalog, ModelSpec, find_model
from models.checkpoints.families import licence_in
from models.checkpoints.local import licence_of, local_size, parameter_count, weight_files
from models.errors import ModelUnavailable
from server.core.settings import Settings
from server.core.terminal import print_table, size_text
from server.serving.diagnosis.checkpoints import gpu_bytes_needed

COLUMNS = ("id", "kind", "use", "here", "GPU memory", "licence", "source")


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of the list.

    kind: "model" or "lora". use: "default", "offered" or "-".
    here_bytes: of its files; None where some are not on this machine.
    gpu_bytes: of a GPU that a model in float16 fits, an estimate; None where it is not known.
    """

    id: str
    kind: str
    use: str
    here_bytes: int | None
    gpu_bytes: int | None
    licence: str | None
    source: str


def print_list(catalog: Catalog, settings: Settings, *, as_json: bool) -> None:
    """Print all models and LoRAs."""
    found = [*listed(catalog, settings)]
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))  # noqa: T201
        return
    rows = [
        (
            *(each.id, each.kind, each.use, size_text(each.here_bytes)),
            *(size_text(each.gpu_bytes), each.licence or "-", each.source),
        )
        for each in found
    ]
    print_table(COLUMNS, rows, empty=f"no models in {settings.models_file}")


def listed(catalog: Catalog, settings: Settings) -> Iterator[Listed]:
    """The models of the catalog and of the settings, and the catalog's LoRAs."""
    uses = dict.fromkeys(settings.models, "offered") | {settings.model: "default"}
    for name in dict.fromkeys([*catalog.models, *uses]):
        spec = find_model(name, catalog.models)
        yield Listed(
            name,
            "model",
            uses.get(name, "-"),
            local_size(spec),
            gpu_memory(spec),
            licence_of(spec),
            spec.source,
        )
    for name, entry in catalog.loras.items():
        path = Path(entry.path).expanduser()
        size = path.stat().st_size if path.is_file() else None
        use = "offered" if name in settings.offered_loras else "-"
        yield Listed(name, "lora", use, size, None, licence_in(path), entry.path)


def gpu_memory(spec: ModelSpec) -> int | None:
    """Memory of a GPU that the model fits; None where its weights are not here or not readable."""
    try:
        files = weight_files(spec)
        return gpu_bytes_needed(parameter_count(files.values())) if files else None
    except (ModelUnavailable, OSError):
        return None

"""Headers of safetensors files: read and checked before any library maps the file.

Torch-free. A header is JSON at the start of the file, after its length; it names every tensor with
its shape, so that a checkpoint's family is known without reading a weight. Pickles are never read.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import ModelUnavailable

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself; the header of an SDXL checkpoint has about 0.4 MB."""

LENGTH_BYTES = 8
SUFFIX = ".safetensors"

NAMED_WEIGHTS = "transformers_weights"
"""The key of a `config.json` by which transformers finds weights of another name."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    shapes: of each tensor, by its name. metadata: free texts of whoever wrote the file.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises: ModelUnavailable for anything else."""
    if path.suffix != SUFFIX:
        raise ModelUnavailable(
            f"{path} is no .safetensors file; other formats may hold pickled code and are not read"
        )
    try:
        entries = json.loads(_header_bytes(path))
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelUnavailable(f"{path} is no safetensors file: {error}") from error
    return Header(shapes, {str(key): str(value) for key, value in metadata.items()})


def refuse_other_weights(folder: Path) -> None:
    """Before a library loads a component's folder: what it will open are good safetensors files.

    An index of shards, or a key of transformers' configuration, may name a pickle, and either
    library opens it whatever it was told of safetensors.
    Raises: ModelUnavailable.
    """
    for path in folder.glob("*.safetensors"):
        read_header(path)
    for path, name in _named_weights(folder):
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(SUFFIX):
            raise ModelUnavailable(
                f"{path} names {name!r}, which is no .safetensors file of its folder; other "
                "formats may hold pickled code and are not read"
            )


def _named_weights(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Files that name weights, with each name. Raises: ModelUnavailable."""
    for path in (*folder.glob("*.safetensors.index*.json"), *folder.glob("config.json")):
        try:
            content = json.loads(path.read_text())
            if path.name != "config.json":
                names = list(content["weight_map"].values())
            else:
                names = [content[key] for key in content if key == NAMED_WEIGHTS]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelUnavailable(f"{path} cannot be read: {error!r}") from error
        yield from ((path, name) for name in names)


def _header_bytes(path: Path) -> bytes:
    """Raises: ValueError for a length that cannot be true, before memory is taken for it."""
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        if len(start) < LENGTH_BYTES:
            raise ValueError("it ends before its header")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES or length > path.stat().st_size - LENGTH_BYTES:
            raise ValueError(f"its header claims {length} bytes")
        return file.read(length)

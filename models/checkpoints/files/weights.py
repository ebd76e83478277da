"""Headers of safetensors files: read and checked before any library maps the file.

Torch-free. A header is JSON at the start of the file, after its length; it names every tensor with
its shape, so that a checkpoint's family is known without reading a weight. Pickles are never read.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from models.errors import ModelUnavailable

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself; the header of an SDXL checkpoint has about 0.4 MB."""

LENGTH_BYTES = 8
SUFFIX = ".safetensors"

MAX_ELEMENTS = 2**56
"""Limit of a tensor's elements, counting sides of 0 as 1. Bytes of any dtype fit 64 bits."""

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""The format's dtypes, and the bits of an element."""

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ"}
"""Dtypes that hold weights by themselves; integers do only together with factors elsewhere."""

NAMED_WEIGHTS = "transformers_weights"
"""The key of a `config.json` by which transformers finds weights of another name."""

FOREIGN_KEYS = {"quantization_config", "fusion_config"}
"""Keys of a `config.json` that choose a library or replace parts of a model."""

ADAPTER = "adapter_config.json"
"""The file by which transformers, where PEFT is installed, finds a base model somewhere else."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    shapes, dtypes: of each tensor, by its name. metadata: free texts of whoever wrote the file.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An entry of a header. start, end: bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file, after every check that the format asks for.

    Raises: ModelUnavailable for anything else.
    """
    if path.suffix != SUFFIX:
        raise ModelUnavailable(
            f"{path} is no .safetensors file; other formats may hold pickled code and are not read"
        )
    try:
        text, data_bytes = _header_text(path)
        entries = _parse(text)
        metadata = entries.pop("__metadata__", {})
        _check_metadata(metadata)
        tensors = {name: _tensor_of(name, entry) for name, entry in entries.items()}
        _check_places(tensors, data_bytes)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{path} is no safetensors file: {error}") from error
    shapes = {name: each.shape for name, each in tensors.items()}
    return Header(shapes, {name: each.dtype for name, each in tensors.items()}, metadata)


def refuse_quantized(path: Path, header: Header, names: Iterable[str]) -> None:
    """See that weights are floating-point numbers, not the integers of a quantization.

    Raises: ModelUnavailable.
    """
    for name in names:
        if header.dtypes[name] not in FLOATS and not name.endswith("position_ids"):
            raise ModelUnavailable(
                f"{path}: {name!r} holds {header.dtypes[name]}; quantized weights are not read"
            )


def _parse(text: str) -> dict[str, Any]:
    """The header as an object. Raises: ValueError, RecursionError."""
    if not text.startswith("{"):
        raise ValueError("its header is no JSON object")
    entries: dict[str, Any] = json.loads(text, object_pairs_hook=_without_duplicates)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _check_metadata(metadata: Any) -> None:
    """Raises: ValueError."""
    texts = metadata.values() if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its __metadata__ is no object of texts")


def _tensor_of(name: str, entry: Any) -> _Tensor:
    """Raises: ValueError for an entry that contradicts itself."""
    name.encode()  # half a surrogate pair is no text
    if not isinstance(entry, dict):
        raise ValueError(f"its entry {name!r} is no object")
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"its tensor {name!r} has no known dtype")
    if not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
        raise ValueError(f"its tensor {name!r} has no good shape or data_offsets")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise ValueError(f"its tensor {name!r} is larger than any memory")
    if math.prod(shape) * DTYPE_BITS[dtype] != (place[1] - place[0]) * 8:
        raise ValueError(f"its tensor {name!r} has not the bytes of its shape")
    return _Tensor(dtype, tuple(shape), place[0], place[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """A list of whole numbers from 0 on; `true` and 1.0 are none."""
    return isinstance(values, list) and all(type(size) is int and size >= 0 for size in values)


def _check_places(tensors: Mapping[str, _Tensor], data_bytes: int) -> None:
    """The tensors lie side by side and fill the file. Raises: ValueError."""
    reached = 0
    for start, end, name in sorted((each.start, each.end, name) for name, each in tensors.items()):
        if start != reached:
            raise ValueError(f"its tensor {name!r} overlaps another or leaves a hole")
        reached = end
    if reached != data_bytes:
        raise ValueError(f"its tensors take {reached} bytes of {data_bytes}")


def read_json(path: Path) -> dict[str, Any]:
    """One of a checkpoint's configurations. Raises: ModelUnavailable for what is no JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} cannot be read: it is no JSON object")
    return content


def refuse_foreign_parts(folder: Path) -> None:
    """Before a library loads a component's folder: nothing there makes it open or run other things.

    What it will open are good safetensors files. An index of shards, or a key of transformers'
    configuration, may name a pickle, and either library opens it whatever it was told of
    safetensors. Other keys make it look for a further library, such as one for quantized weights,
    or load a base model from elsewhere.
    Raises: ModelUnavailable.
    """
    for path in folder.glob("*.safetensors"):
        read_header(path)
    if (folder / ADAPTER).exists():
        raise ModelUnavailable(f"{folder / ADAPTER}: a component that is an adapter is not read")
    for path, name in _named_weights(folder):
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(SUFFIX):
            raise ModelUnavailable(
                f"{path} names {name!r}, which is no .safetensors file of its folder; other "
                "formats may hold pickled code and are not read"
            )


def _named_weights(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Files that name weights, with each name. Raises: ModelUnavailable."""
    for path in folder.glob("*.safetensors.index*.json"):
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict):
            raise ModelUnavailable(f"{path} cannot be read: it has no weight_map")
        yield from ((path, name) for name in names.values())
    for path in folder.glob("config.json"):
        content = read_json(path)
        _refuse_foreign_keys(path, content)
        if NAMED_WEIGHTS in content:
            yield path, content[NAMED_WEIGHTS]


def _refuse_foreign_keys(path: Path, content: dict[str, Any]) -> None:
    """Check nested configurations too. Raises: ModelUnavailable."""
    left: list[Any] = [content]
    while left:
        match left.pop():
            case dict() as values:
                for key in FOREIGN_KEYS & values.keys():
                    if values[key] is not None:
                        raise ModelUnavailable(f"{path} has {key!r}, which is not supported here")
                left += values.values()
            case list() as values:
                left += values


def _header_text(path: Path) -> tuple[str, int]:
    """The header, and how many bytes of tensors follow.

    Raises: ValueError for a length that cannot be true, before memory is taken for it.
    """
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        if len(start) < LENGTH_BYTES:
            raise ValueError("it ends before its header")
        (length,) = struct.unpack("<Q", start)
        data_bytes = path.stat().st_size - LENGTH_BYTES - length
        if length > MAX_HEADER_BYTES or data_bytes < 0:
            raise ValueError(f"its header claims {length} bytes")
        return file.read(length).decode(), data_bytes

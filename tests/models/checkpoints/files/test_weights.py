"""Headers of safetensors files, honest and hostile."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from models.checkpoints.files.weights import DTYPE_BITS, MAX_HEADER_BYTES, Header, read_header
from models.errors import ModelUnavailable


def test_header_gives_shapes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, path, {"title": "x"})

    assert read_header(path) == Header(
        {"a": (2, 3), "b": ()}, {"a": "F32", "b": "F32"}, {"title": "x"}
    )


def with_length(length: int, rest: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + rest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        with_length(3),
        with_length(2**64 - 1),
        with_length(MAX_HEADER_BYTES + 1),
        with_length(2, b"[]"),
        with_length(2, b"{{"),
        with_length(2, b"\xff\xff"),
        with_length(7, b'{"a":1}'),
        with_length(10, b'{"a":{}}  '),
        b"\x80\x04\x95" + b"\0" * 40,
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    with pytest.raises(ModelUnavailable, match=r"x\.safetensors is no safetensors file"):
        read_header(path)


def test_length_beyond_the_limit_is_refused_even_if_the_file_is_as_long(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(with_length(MAX_HEADER_BYTES + 1))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse

    with pytest.raises(ModelUnavailable, match=f"claims {MAX_HEADER_BYTES + 1} bytes"):
        read_header(path)


F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [24, 25]}


def file_of(header: str | bytes, data_bytes: int) -> bytes:
    head = header.encode() if isinstance(header, str) else header
    return with_length(len(head), head) + bytes(data_bytes)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def changed(**changes: Any) -> str:
    return json.dumps({"a": F32 | changes})


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        pytest.param("[" * 200_000, 0, id="deep list"),
        pytest.param('{"a":' * 200_000, 0, id="deep object"),
        ('{"__metadata__": [1]}', 0),
        ('{"__metadata__": {"format": 1}}', 0),
        ('{"__metadata__": "pt"}', 0),
        ('{"a": null}', 0),
        (json.dumps({"a": F32}), 23),
        (json.dumps({"a": F32}), 25),
        (changed(dtype="F31"), 24),
        (changed(dtype=["F32"]), 24),
        (changed(dtype=None), 24),
        (changed(shape=[-2, -3]), 24),
        (changed(shape=[2.0, 3]), 24),
        (changed(shape=[True, 6]), 24),
        (changed(shape="23"), 24),
        (changed(shape=[2, 4]), 24),
        (changed(shape=[2**63, 2**63, 0], data_offsets=[0, 0]), 0),
        (changed(shape=[2**40, 2**40]), 24),
        (changed(data_offsets=[0, 24, 24]), 24),
        (changed(data_offsets=[24, 0]), 24),
        (changed(data_offsets=[-24, 0]), 24),
        (changed(data_offsets=[2**64, 2**64 + 24]), 24),
        (changed(data_offsets=[1, 25]), 25),
        (json.dumps({"a": F32, "b": BYTE | {"data_offsets": [23, 24]}}), 24),
        (json.dumps({"a": F32, "b": BYTE | {"data_offsets": [25, 26]}}), 26),
        (json.dumps({"a": F32, "b": F32}), 24),
        (f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}', 24),
        ('{"a": {"dtype": "F31", "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}', 24),
        (json.dumps({"\ud800": F32}), 24),
        (json.dumps({"a": F32}).encode("utf-16"), 24),
        (f" {json.dumps({'a': F32})}", 24),
        pytest.param(
            f'{{"a": {{"dtype": "F32", "shape": [{"9" * 5_000}], "data_offsets": [0, 24]}}}}',
            24,
            id="long number",
        ),
    ],
)
def test_header_that_contradicts_itself_or_the_file_is_refused(
    tmp_path: Path, header: str | bytes, data_bytes: int
) -> None:
    path = written(tmp_path / "x.safetensors", file_of(header, data_bytes))

    with pytest.raises(ModelUnavailable, match=r"x\.safetensors is no safetensors file"):
        read_header(path)


def test_tensors_may_stand_in_any_order_and_be_empty(tmp_path: Path) -> None:
    empty = {"dtype": "F6_E2M3", "shape": [0, 5], "data_offsets": [24, 24]}
    header = json.dumps({"b": BYTE, "c": empty, "a": F32}) + "   "
    path = written(tmp_path / "x.safetensors", file_of(header, 25))

    assert read_header(path).shapes == {"b": (1,), "c": (0, 5), "a": (2, 3)}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples of a property."""
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


def outcome(path: Path) -> Header | None:
    """None where it is refused; nothing but `ModelUnavailable` may come out."""
    try:
        return read_header(path)
    except ModelUnavailable:
        return None


SIZES = st.one_of(st.integers(-2, 30), st.sampled_from([2**31, 2**63, 2**64, 2**200]))
ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.just({})
)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from([*DTYPE_BITS, "F31"]), ODD),
            "shape": st.one_of(st.lists(st.one_of(SIZES, ODD), max_size=3), ODD),
            "data_offsets": st.one_of(st.lists(SIZES, max_size=3), ODD),
        },
    ),
    ODD,
)
METADATA = st.one_of(st.dictionaries(st.text(max_size=3), st.one_of(st.text(), ODD)), ODD)


@given(
    entries=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3),
    metadata=METADATA,
    data_bytes=st.integers(0, 40),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_header_is_read_or_refused(
    scratch: Path, entries: dict[str, Any], metadata: Any, data_bytes: int
) -> None:
    header = json.dumps(entries | {"__metadata__": metadata})
    header_is_read_as_by_the_library(written(scratch, file_of(header, data_bytes)))


TENSORS = st.lists(
    st.tuples(st.sampled_from(["F32", "U8", "BF16"]), st.lists(st.integers(0, 3), max_size=3)),
    max_size=4,
)


@given(tensors=TENSORS, changes=st.lists(st.tuples(st.integers(0, 9), SIZES), max_size=1))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_one_wrong_number_in_a_good_header_is_found(
    scratch: Path, tensors: list[tuple[str, list[int]]], changes: list[tuple[int, int]]
) -> None:
    header: dict[str, Any] = {}
    end = 0
    for index, (dtype, shape) in enumerate(tensors):
        start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[str(index)] = {"dtype": dtype, "shape": [*shape], "data_offsets": [start, end]}
    numbers = [each["data_offsets"] for each in header.values()]
    good = json.dumps(header)
    for place, value in changes[: len(numbers)]:
        numbers[place % len(numbers)][place % 2] = value
    path = written(scratch, file_of(json.dumps(header), end))

    assert (header_is_read_as_by_the_library(path) is not None) == (json.dumps(header) == good)


@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 8))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_file_with_another_byte_or_end_is_read_or_refused(
    scratch: Path, place: int, byte: int, cut: int
) -> None:
    content = bytearray(file_of(json.dumps({"a": F32, "b": BYTE}), 25))
    content[place % len(content)] = byte
    outcome(written(scratch, bytes(content[: len(content) - cut])))


def header_is_read_as_by_the_library(path: Path) -> Header | None:
    """What we take, the library takes, and finds the same in it."""
    header = outcome(path)
    if header is not None:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        assert shapes == header.shapes
    return header


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x"])
def test_other_formats_are_not_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"no \.safetensors file"):
        read_header(tmp_path / name)

"""Headers of safetensors files, honest and hostile."""

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.errors import ModelUnavailable
from models.weights import MAX_HEADER_BYTES, Header, read_header


def test_header_gives_shapes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, path, {"title": "x"})

    assert read_header(path) == Header({"a": (2, 3), "b": ()}, {"title": "x"})


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


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x"])
def test_other_formats_are_not_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"no \.safetensors file"):
        read_header(tmp_path / name)

"""Pixels resized, and written as PNG with text. How bytes become pixels is `decoding.py`."""

import struct
import zlib
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_PNG_HEADER_END = 33
"""Bytes of the signature and of the IHDR chunk, which has to come first."""


def resize(
    pixels: NDArray[np.uint8], width: int, height: int, resampling: Image.Resampling
) -> NDArray[np.uint8]:
    """`(h, w, 3)` or `(h, w)` stretched, corners on corners; the array itself at its own size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), resampling))


def encode_png(image: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """A lossless PNG of `(h, w, 3)` RGB; the same input gives the same bytes.

    text: keyword to value, stored as tEXt, or as iTXt where Latin-1 does not suffice. Characters
        that PNG cannot hold are replaced: NUL by U+FFFD, lone surrogates by "?".
    Raises: ValueError for a keyword outside the PNG specification's 11.3.3.2.
    """
    # OpenCV's defaults are its fast setting: level 1, run lengths, one filter.
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    png = encoded.tobytes()
    chunks = [_text_chunk(keyword, value) for keyword, value in (text or {}).items()]
    return b"".join((png[:_PNG_HEADER_END], *chunks, png[_PNG_HEADER_END:]))


def _text_chunk(keyword: str, value: str) -> bytes:
    key = _keyword_bytes(keyword)
    value = value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    try:
        return _chunk(b"tEXt", key + b"\0" + value.encode("latin-1"))
    except UnicodeEncodeError:
        # Five zeros: end of keyword, not compressed, method 0, no language, no translated keyword.
        return _chunk(b"iTXt", key + b"\0\0\0\0\0" + value.encode("utf-8", "replace"))


def _keyword_bytes(keyword: str) -> bytes:
    key = keyword.encode("latin-1")
    if not 1 <= len(key) <= 79 or not keyword.isprintable() or keyword != keyword.strip():
        raise ValueError(f"not a PNG keyword: {keyword!r}")
    return key


def _chunk(name: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

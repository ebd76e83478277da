"""Resizes pixels and writes PNG, JPEG and WebP files. `decoding` reads files."""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import ExifTags, Image

Pixel = TypeVar("Pixel", np.uint8, np.float32)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PNG_UP = 2
"""The filter that keeps each row as its difference from the row above (specification, 9.2): numpy
does it at the speed of memory, and it compresses photographs about as well as the best one."""

_LARGEST_JPEG_EXIF = 65_533 - len(b"Exif\0\0")
"""Bytes; a JPEG's segment holds no more."""


def resize(
    pixels: NDArray[Pixel], width: int, height: int, resampling: Image.Resampling
) -> NDArray[Pixel]:
    """`(h, w, 3)` or `(h, w)` stretched, corners on corners; the array itself at its own size.

    float32 has one channel only.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), resampling))


def fit_within(width: int, height: int, max_side_px: int) -> tuple[int, int]:
    """The size scaled down, in its proportions, until no side is longer than `max_side_px`."""
    longest = max(width, height, max_side_px)
    return max(1, width * max_side_px // longest), max(1, height * max_side_px // longest)


def encode_png(
    image: NDArray[np.uint8], text: Mapping[str, str] | None = None, icc_profile: bytes = b""
) -> bytes:
    """A lossless PNG of `(h, w, 3)` RGB.

    The same input gives the same bytes on processors of one kind.

    text: keyword to value, stored as tEXt, or as iTXt where Latin-1 does not suffice. Characters
        that PNG cannot hold are replaced: NUL by U+FFFD, lone surrogates by "?".
    icc_profile: what the colours mean; an empty one means sRGB, and is not written.
    Raises: ValueError for a keyword outside the PNG specification's 11.3.3.2.
    """
    height, width, channels = image.shape
    rows = image.reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = _PNG_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    # Eight bits a sample, colour type RGB, and the only compression, filtering and order there are.
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (
            _PNG_SIGNATURE,
            _chunk(b"IHDR", header),
            *([_profile_chunk(icc_profile)] if icc_profile else ()),
            *(_text_chunk(keyword, value) for keyword, value in (text or {}).items()),
            _chunk(b"IDAT", isal_zlib.compress(filtered, 1)),
            _chunk(b"IEND", b""),
        )
    )


def encode_jpeg(
    image: NDArray[np.uint8], quality: int, comment: str = "", icc_profile: bytes = b""
) -> bytes:
    """A JPEG of `(h, w, 3)` RGB, with its colours at full resolution.

    quality: 1 to 100; at 100 too, pixels change a little.
    comment: EXIF's UserComment, where A1111's web UI looks for its caption. It is left out where
        it takes more than the 64 kB that a JPEG has for EXIF: more than 32,000 characters, some
        of them beyond ASCII.
    """
    exif = _exif(comment)
    return _encode_with_pillow(
        image,
        "JPEG",
        quality=quality,
        subsampling="4:4:4",
        exif=exif if len(exif) <= _LARGEST_JPEG_EXIF else b"",
        icc_profile=icc_profile,
    )


def encode_webp(
    image: NDArray[np.uint8], quality: int, comment: str = "", icc_profile: bytes = b""
) -> bytes:
    """A WebP of `(h, w, 3)` RGB, of at most 16,383 pixels a side.

    quality: 1 to 99; 100 is lossless. comment: as `encode_jpeg`, of any length.
    """
    return _encode_with_pillow(
        image,
        "WEBP",
        quality=quality,
        lossless=quality == 100,
        exif=_exif(comment),
        icc_profile=icc_profile,
    )


def _encode_with_pillow(image: NDArray[np.uint8], kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def _exif(comment: str) -> bytes:
    """EXIF with a UserComment, whose first eight bytes name its encoding (Exif 3.0, 4.6.6.2)."""
    if not comment:
        return b""
    encoded = b"UNICODE\0" + comment.encode("utf-16-be", "replace")
    if comment.isascii():
        encoded = b"ASCII\0\0\0" + comment.encode()
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = encoded
    return exif.tobytes()


def _profile_chunk(profile: bytes) -> bytes:
    # A name, its end, and compression method 0.
    return _chunk(b"iCCP", b"ICC profile\0\0" + isal_zlib.compress(profile, 1))


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

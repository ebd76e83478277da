"""Bytes that Pillow refuses although every pixel is there, made readable: PNG and JPEG.

Only whole parts are left out or added; no pixel is guessed.
"""

import hashlib
import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
END_OF_IMAGE = b"\xff\xd9"

_COLOUR_CHUNKS = (b"iCCP", b"cICP", b"gAMA", b"cHRM", b"sRGB")

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""What cannot stand within the entropy-coded data of a JPEG scan (ITU T.81, B.1.1)."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END = 0xDA, 0xD9

_PADDINGS = tuple(bytes([each]) * 64 for each in (0x55, 0xAA, 0x7F))
"""A decoder that still needs data takes it from here, and finds different values in each."""


@dataclass(frozen=True, slots=True)
class PngContent:
    """needed: the file without the chunks that no pixel depends on.

    colour_chunks: the first of each of those that say what the colours mean, by name; empty where
        its checksum is wrong.
    """

    needed: bytes
    colour_chunks: dict[bytes, bytes]


def read_png(data: bytes) -> PngContent:
    """The chunks of a PNG.

    Left out are ancillary chunks other than tRNS and eXIf, whether their checksums are right or
    not, and an eXIf with a wrong checksum, as libpng does. A tRNS stays in any case, because the
    pixels depend on it. From a chunk that is longer than the file on, the bytes are left to Pillow.
    """
    kept: list[bytes] = []
    colours: dict[bytes, bytes] = {}
    run, at = 0, len(PNG_SIGNATURE)  # kept bytes begin at `run`
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            break
        if name in _COLOUR_CHUNKS and name not in colours:
            colours[name] = data[at + 8 : end - 4] if _is_intact(data, at, end) else b""
        if _is_dispensable(name) or (name == b"eXIf" and not _is_intact(data, at, end)):
            kept.append(data[run:at])
            run = end
        at = end
        if name == b"IEND":
            break
    if not kept:
        return PngContent(data, colours)
    return PngContent(b"".join([*kept, data[run:]]), colours)


def _is_dispensable(name: bytes) -> bool:
    return name.isalpha() and name[:1].islower() and name not in (b"tRNS", b"eXIf")


def _is_intact(data: bytes, at: int, end: int) -> bool:
    checksum = int.from_bytes(data[end - 4 : end], "big")
    return zlib.crc32(memoryview(data)[at + 4 : end - 4]) == checksum


def with_end_of_image(data: bytes) -> bytes | None:
    """A JPEG whose end marker is missing, with one; None where more than that is missing.

    Its pixels must be the same whatever follows the data, and no scan of it may be missing.
    """
    if not data.startswith(JPEG_SIGNATURE) or not _has_every_scan(data):
        return None
    body = data.rstrip(b"\xff")  # half of the end marker
    ended = body + END_OF_IMAGE
    pixels = _digest(ended)
    if any(_digest(body + padding + END_OF_IMAGE) != pixels for padding in _PADDINGS):
        return None
    return ended


def _has_every_scan(data: bytes) -> bool:
    """Whether each coefficient of each component is there to its last bit (ITU T.81, G.1)."""
    missing: dict[int, set[int]] = {}
    at = 2
    while found := _MARKER.search(data, at):
        at = found.start() + 2
        marker = data[at - 1]
        if marker == _END or at + 2 > len(data):
            break
        (length,) = struct.unpack_from(">H", data, at)
        body = data[at + 2 : at + length]
        if marker in _FRAMES:
            missing = {body[6 + 3 * each]: set(range(64)) for each in range(body[5])}
        elif marker == _SCAN:
            count = body[0]
            first, last, approximation = body[1 + 2 * count : 4 + 2 * count]
            if approximation & 0xF == 0:  # the low half: bits that later scans will bring
                for component in body[1 : 1 + 2 * count : 2]:
                    missing[component] -= set(range(first, last + 1))
        at += length
    return bool(missing) and not any(missing.values())


def _digest(data: bytes) -> bytes:
    """Names the pixels of a picture. In strips, because a copy of all of them is too large."""
    hasher = hashlib.sha256()
    with Image.open(BytesIO(data), formats=("JPEG",)) as image:
        image.load()
        width, height = image.size
        for top in range(0, height, 256):
            hasher.update(image.crop((0, top, width, min(top + 256, height))).tobytes())
    return hasher.digest()

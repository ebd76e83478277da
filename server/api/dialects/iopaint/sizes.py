"""Width and height of a picture, from the head of its file.

IOPaint's answer has the size of the init image, so the size decides how the job is made. Only the
head is read here; the sandbox alone decodes a stranger's file.
"""

from models.imaging.repair import JPEG_SIGNATURE, PNG_SIGNATURE

MAX_SEGMENTS = 1_000
"""Largest number of segments before a JPEG's frame; a photo has some twenty."""

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG's frame, which begins with the size."""


def size_of(content: bytes) -> tuple[int, int] | None:
    """Width and height as stored, before any rotation; None for a file of another kind."""
    if content.startswith(PNG_SIGNATURE):
        return big_endian(content[16:20]), big_endian(content[20:24])
    if content.startswith(JPEG_SIGNATURE):
        return size_of_jpeg(content)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return size_of_webp(content)
    return None


def size_of_jpeg(content: bytes) -> tuple[int, int] | None:
    """The size in the first frame's header."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        marker = content[at + 1 : at + 2]
        if content[at : at + 1] != b"\xff" or not marker:
            return None
        if marker[0] in FRAMES:
            return big_endian(content[at + 7 : at + 9]), big_endian(content[at + 5 : at + 7])
        # 0xFF may be repeated before a marker; a segment's length counts its own two bytes.
        at += 1 if marker == b"\xff" else 2 + big_endian(content[at + 2 : at + 4])
    return None


def size_of_webp(content: bytes) -> tuple[int, int] | None:
    """The canvas of an extended file, or the size of the one picture of a simple file."""
    match content[12:16]:
        case b"VP8X":
            return 1 + little_endian(content[24:27]), 1 + little_endian(content[27:30])
        case b"VP8L":
            bits = little_endian(content[21:25])
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            return little_endian(content[26:28]) & 0x3FFF, little_endian(content[28:30]) & 0x3FFF
    return None


def big_endian(data: bytes) -> int:
    """A number in a PNG or a JPEG."""
    return int.from_bytes(data, "big")


def little_endian(data: bytes) -> int:
    """A number in a WebP."""
    return int.from_bytes(data, "little")

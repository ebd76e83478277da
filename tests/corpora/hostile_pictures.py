"""Pictures made to hurt whoever reads them, each with what must come of it. Nothing is downloaded.

`CORPUS` holds them by name. A file is made when it is asked for.
"""

import functools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from server.core.errors import ImageProblem
from tests.corpora import profiles
from tests.support.image_files import (
    PNG_SIGNATURE,
    jpeg_declaring,
    saved,
    webp,
    webp_chunk,
)
from tests.support.image_files import (
    png_chunk as chunk,
)

OK = None
NOT_AN_IMAGE, UNSUPPORTED = ImageProblem.NOT_AN_IMAGE, ImageProblem.UNSUPPORTED
TOO_LARGE, DAMAGED = ImageProblem.TOO_LARGE, ImageProblem.DAMAGED

LARGEST = (8192, 4028)
"""The most pixels that are legal, of the longest legal side."""

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


@dataclass(frozen=True, slots=True)
class HostilePicture:
    """A file to be made, and the problem to be told of it; None where it is a picture after all."""

    make: Callable[[], bytes]
    problem: ImageProblem | None


def header(width: int, height: int, depth: int, colour_type: int, *rest: int) -> bytes:
    """The IHDR chunk. rest: compression, filter and interlace methods, 0 where left out."""
    methods = (*rest, 0, 0, 0)[:3]
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, *methods))


def png(
    size: tuple[int, int],
    depth: int = 8,
    colour_type: int = COLOUR,
    *chunks: bytes,
    pixels: bytes | None = None,
    interlace: int = 0,
) -> bytes:
    """A black PNG, or one of the given compressed pixels. chunks: between IHDR and IDAT."""
    if pixels is None:
        pixels = black(size, depth, colour_type)
    head = header(*size, depth, colour_type, 0, 0, interlace)
    return b"".join([PNG_SIGNATURE, head, *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def black(size: tuple[int, int], depth: int, colour_type: int) -> bytes:
    """The compressed rows of a picture of zeros."""
    width, height = size
    return zeros(height * (1 + -(-width * depth * CHANNELS[colour_type] // 8)))


@functools.cache
def zeros(count: int) -> bytes:
    """So many zero bytes, compressed without ever being there."""
    compressor = zlib.compressobj(1)
    block = bytes(2**20)
    parts = [compressor.compress(block) for _ in range(count // len(block))]
    return b"".join([*parts, compressor.compress(bytes(count % len(block))), compressor.flush()])


def noise(mode: str = "RGB", side: int = 64) -> Image.Image:
    """A small picture that does not compress."""
    shape = (side, side, len(mode)) if len(mode) > 1 else (side, side)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8), mode=None)


def flat_webp(size: tuple[int, int]) -> bytes:
    """A lossless WebP of one colour: every symbol's code has no bits (RFC 9649, 3.7.2.1.1)."""
    fields = [(0x2F, 8), (size[0] - 1, 14), (size[1] - 1, 14), (1, 1), (0, 3)]
    fields += [(0, 1), (0, 1), (0, 1)]  # no transform, no colour cache, no codes of codes
    fields += [(0b101, 3), (200, 8)] * 4  # green, red, blue, alpha: one symbol of eight bits
    fields += [(0b001, 3), (0, 1)]  # distance: one symbol of one bit
    packed, at = 0, 0
    for value, bits in fields:
        packed |= value << at
        at += bits
    return webp(webp_chunk(b"VP8L", packed.to_bytes(-(-at // 8) + 8, "little")))


def scans(size: tuple[int, int], count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each is a walk over all blocks."""
    content = saved(Image.new("RGB", size), "JPEG", progressive=True, quality=50)
    at = content.rindex(b"\xff\xda")
    return content[:at] + content[at:-2] * count + b"\xff\xd9"


def with_exif(orientation: int, file_format: str) -> bytes:
    """A picture that is to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(noise(), file_format, exif=exif)


def with_profile(profile: bytes, mode: str = "RGB") -> bytes:
    """A JPEG with this colour profile."""
    return saved(noise(mode).convert(mode), "JPEG", icc_profile=profile)


def jpeg_with(marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment after its first."""
    content = saved(noise(), "JPEG")
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
    return content[:2] + segment + content[2:]


def exif_loop() -> bytes:
    """An EXIF directory whose next one is itself, with a value that lies beyond the file."""
    directory = struct.pack(">HHHIII", 1, 0x9286, 7, 2**31, 2**31, 8)
    return b"Exif\0\0MM\0*\0\0\0\x08" + directory


def cut(content: bytes, tenths: int) -> bytes:
    """The beginning of a file."""
    return content[: len(content) * tenths // 10]


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    """The same file with one thing changed."""
    assert old in content
    return content.replace(old, new, 1)


def flipped(content: bytes, at: int) -> bytes:
    """One bit changed."""
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def frames(count: int, file_format: str, mode: str = "RGB") -> bytes:
    """An animation of so many frames, all different."""
    pictures = [Image.new(mode, (8, 8), number % 256) for number in range(count)]
    return saved(pictures[0], file_format, save_all=True, append_images=pictures[1:])


SMALL = (16, 16)
HUGE_TEXT = 100_000_000

BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 900 MP in one bit": lambda: png((30_000, 30_000), 1, GREY, pixels=zeros(10_000_000)),
    "png of 144 MP with alpha": lambda: png(
        (12_000, 12_000), 8, COLOUR_ALPHA, pixels=zeros(10_000_000)
    ),
    "png just under Pillow's limit": lambda: png((13_376, 13_376), pixels=zeros(10_000_000)),
    "png of one row": lambda: png((8_193, 1)),
    "png of one column": lambda: png((1, 8_193)),
    "png one row over 33 MP": lambda: png((8_192, 4_029), 1, GREY),
    "png of 2**31": lambda: png((2**31 - 1, 2**31 - 1), pixels=b""),
    "jpeg of 65500": lambda: jpeg_declaring(65_500, 65_500),
    "jpeg of one row": lambda: jpeg_declaring(65_500, 1),
    "webp of 131 MP": lambda: flat_webp((16_384, 8_000)),
    "webp of 268 MP": lambda: flat_webp((16_384, 16_384)),
    "webp, lossy, of 268 MP": lambda: webp(
        webp_chunk(b"VP8 ", b"\x30\x01\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(40))
    ),
    "webp, extended, of 2**24": lambda: webp(
        webp_chunk(b"VP8X", b"\x02\0\0\0" + b"\xff\xff\xff" * 2), webp_chunk(b"ANIM", bytes(6))
    ),
    "10 MB and a byte": lambda: bytes(10_000_001),
    "png with 10 MB of text": lambda: png(SMALL, 8, COLOUR, chunk(b"tEXt", b"k\0" + bytes(10**7))),
}

LARGEST_LEGAL: dict[str, Callable[[], bytes]] = {
    "largest png with alpha": lambda: png(LARGEST, 8, COLOUR_ALPHA),
    "largest png of 16 bits with alpha": lambda: png(LARGEST, 16, COLOUR_ALPHA),
    "largest png of 16 bits with a transparent grey": lambda: png(
        LARGEST, 16, GREY, chunk(b"tRNS", b"\0\1")
    ),
    "largest png of a palette with alpha": lambda: png(
        LARGEST, 1, PALETTE, chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\x80")
    ),
    "largest interlaced png": lambda: png(
        LARGEST, 8, COLOUR_ALPHA, pixels=zeros(4 * LARGEST[0] * LARGEST[1] + 70_000), interlace=1
    ),
    "largest jpeg": lambda: saved(Image.new("L", LARGEST), "JPEG"),
    "largest progressive jpeg of four inks": lambda: saved(
        Image.new("CMYK", LARGEST), "JPEG", progressive=True
    ),
    "largest webp": lambda: flat_webp(LARGEST),
    "largest webp, lossy": lambda: saved(Image.new("RGB", LARGEST), "WEBP", method=0, quality=1),
}

MODES: dict[str, Callable[[], bytes]] = {
    **{
        f"png of {depth} bits and colour type {colour_type}": functools.partial(
            png,
            SMALL,
            depth,
            colour_type,
            *([chunk(b"PLTE", bytes(768))] if colour_type == 3 else []),
        )
        for depth, colour_type in [
            *((1, GREY), (2, GREY), (4, GREY), (16, GREY), (1, PALETTE), (4, PALETTE)),
            *((16, COLOUR), (8, GREY_ALPHA), (16, GREY_ALPHA), (16, COLOUR_ALPHA)),
        ]
    },
    "jpeg of grey": lambda: saved(noise("L"), "JPEG"),
    "jpeg of four inks": lambda: saved(noise("CMYK").convert("CMYK"), "JPEG"),
    "jpeg of four inks as luma and chroma": lambda: replaced(
        saved(noise().convert("CMYK"), "JPEG"),
        b"Adobe\0\x64\0\0\0\0\0",
        b"Adobe\0\x64\0\0\0\0\2",
    ),
    "webp with alpha": lambda: saved(noise("RGBA"), "WEBP"),
    "mask of one pixel": lambda: png((1, 1), 1, GREY),
    "mask of one pixel with alpha": lambda: png((1, 1), 8, GREY_ALPHA),
    **{
        f"{file_format} turned by EXIF {orientation}": functools.partial(
            with_exif, orientation, file_format
        )
        for file_format, orientation in [
            *(("JPEG", orientation) for orientation in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535)),
            *(("PNG", 6), ("WEBP", 6)),
        ]
    },
}

TEXTS: dict[str, Callable[[], bytes]] = {
    "png with a zTXt bomb": lambda: png(
        SMALL, 8, COLOUR, chunk(b"zTXt", b"k\0\0" + zeros(HUGE_TEXT))
    ),
    "png with an iTXt bomb": lambda: png(
        SMALL, 8, COLOUR, chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(HUGE_TEXT))
    ),
    "png with an iCCP bomb": lambda: png(
        SMALL, 8, COLOUR, chunk(b"iCCP", b"k\0\0" + zeros(HUGE_TEXT))
    ),
    "png with 200 texts of a megabyte": lambda: png(
        SMALL, 8, COLOUR, *[chunk(b"zTXt", b"k\0\0" + zeros(2**20 - 1))] * 200
    ),
    "png with 9 MB of text": lambda: png(
        SMALL, 8, COLOUR, chunk(b"tEXt", b"k\0" + bytes(9 * 10**6))
    ),
    "png with a broken profile": lambda: png(SMALL, 8, COLOUR, chunk(b"iCCP", b"k\0\0no zlib")),
    "png with EXIF that loops": lambda: png(SMALL, 8, COLOUR, chunk(b"eXIf", exif_loop()[6:])),
    "jpeg with EXIF that loops": lambda: jpeg_with(0xE1, exif_loop()),
    "jpeg with a profile of another colour space": lambda: saved(
        noise(), "JPEG", icc_profile=bytes(16) + b"CMYKLab " + bytes(500_000)
    ),
    "webp with EXIF that loops": lambda: saved(noise(), "WEBP", exif=exif_loop()),
}

PROFILES: dict[str, Callable[[], bytes]] = {
    "jpeg with a profile of 16 MB": lambda: with_profile(profiles.display_p3(16_000_000)),
    "jpeg with a profile that is only a header": lambda: with_profile(profiles.display_p3()[:128]),
    "jpeg with a profile of 2**32 tags": lambda: with_profile(
        replaced(profiles.display_p3(), b"\0\0\0\x09desc", b"\xff\xff\xff\xffdesc")
    ),
    "jpeg with a profile whose tags lie outside": lambda: with_profile(
        replaced(profiles.display_p3(), b"rXYZ\0\0", b"rXYZ\xff\xff")
    ),
    "png with a profile for ink": lambda: saved(noise(), icc_profile=profiles.ink()),
    "png of grey with an RGB profile": lambda: saved(noise("L"), icc_profile=profiles.display_p3()),
    "webp with a profile of noise": lambda: saved(
        noise(), "WEBP", icc_profile=profiles.display_p3()[:200] + noise().tobytes()
    ),
    "inks with a table of 255**4": lambda: with_profile(profiles.ink(grid=255), "CMYK"),
    "inks with a table of nothing": lambda: with_profile(profiles.ink(grid=0), "CMYK"),
    "inks with 255 outputs": lambda: with_profile(profiles.ink(outputs=255), "CMYK"),
    "inks with half a profile": lambda: with_profile(profiles.ink()[:1_000], "CMYK"),
    "greys with a curve of nothing": lambda: with_profile(profiles.grey(0), "L"),
    "greys with a curve of 2**32": lambda: with_profile(
        replaced(profiles.grey(1), b"curv\0\0\0\0\0\0\0\1", b"curv\0\0\0\0\xff\xff\xff\xff"), "L"
    ),
    "largest mask with a hole": lambda: saved(
        Image.merge("RGBA", [Image.linear_gradient("L").resize(LARGEST)] * 4), compress_level=1
    ),
    "largest jpeg of four inks with a profile": lambda: saved(
        Image.new("CMYK", LARGEST, (9, 9, 9, 9)), "JPEG", icc_profile=profiles.ink()
    ),
    "jpeg without an end of 300 scans": lambda: scans((512, 512), 300)[:-2],
    "largest progressive jpeg of four inks without an end": lambda: saved(
        Image.new("CMYK", LARGEST), "JPEG", progressive=True
    )[:-2],
}

MANY: dict[str, Callable[[], bytes]] = {
    "png with 100,000 chunks": lambda: png(SMALL, 8, COLOUR, *[chunk(b"teSt", b"")] * 100_000),
    "png with 100,000 texts": lambda: png(SMALL, 8, COLOUR, *[chunk(b"tEXt", b"k\0")] * 100_000),
    "png with 100,000 empty IDAT": lambda: png(SMALL, 8, COLOUR, *[chunk(b"IDAT", b"")] * 100_000),
    "png of 1,000 frames": lambda: frames(1_000, "PNG"),
    "webp of 1,000 frames": lambda: frames(1_000, "WEBP"),
    "mask of 3 frames": lambda: frames(3, "PNG", "L"),
    "jpeg of 100 pictures": lambda: frames(100, "MPO"),
    "jpeg of 300 scans": lambda: scans((512, 512), 300),
    "jpeg filled with nothing": lambda: replaced(
        saved(noise(), "JPEG"), b"\xff\xdb", b"\xff" * 500_000 + b"\xff\xdb"
    ),
}

POLYGLOTS: dict[str, Callable[[], bytes]] = {
    "png with a page behind": lambda: saved(noise()) + b"<html><script>alert(1)</script></html>",
    "jpeg with an archive behind": lambda: saved(noise(), "JPEG") + b"PK\3\4" + bytes(1_000),
    "webp with a page behind": lambda: saved(noise(), "WEBP") + b"<script>alert(1)</script>",
    "jpeg with a page inside": lambda: jpeg_with(0xFE, b"<script>alert(1)</script>"),
    "png with pixels to spare": lambda: png(SMALL, pixels=zeros(10_000_000)),
    "png without an end": lambda: saved(noise())[:-12],
}

FOREIGN: dict[str, Callable[[], bytes]] = {
    **{
        file_format: functools.partial(saved, Image.new("RGB", SMALL), file_format)
        for file_format in ("BMP", "TIFF", "ICO", "AVIF", "JPEG2000", "PDF", "GIF")
    },
    "tiff bomb": lambda: saved(Image.new("1", (9_000, 9_000)), "TIFF", compression="tiff_lzw"),
    "gif of 1,000 frames": lambda: frames(1_000, "GIF"),
    "gif with a script": lambda: b"GIF89a=1;alert(document.domain)//",
    "svg with an entity": lambda: (
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
    ),
    "svg with a billion laughs": lambda: (
        b'<svg xmlns="http://www.w3.org/2000/svg">' + b"&a;" * 9_000
    ),
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop",
    "photoshop": lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 4, 30_000, 30_000, 8, 3),
    "heic": lambda: b"\0\0\0\x18ftypheic" + bytes(100),
    "jpeg xl": lambda: b"\xff\x0a" + bytes(100),
}

STRANGERS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "one byte": lambda: b"\x89",
    "page named png": lambda: b"<!DOCTYPE html><html><body><svg/></body></html>",
    "error in json": lambda: b'{"status": "error", "message": "no such key"}',
    "error in xml": lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "10 MB of zeros": lambda: bytes(10_000_000),
    "noise": lambda: np.random.default_rng(1).bytes(100_000),
    "archive": lambda: b"PK\3\4" + bytes(1_000),
    "pickle": lambda: b"cos\nsystem\n(S'id'\ntR.",
    "targa": lambda: saved(Image.new("RGB", SMALL), "TGA"),
    "pcx": lambda: saved(Image.new("RGB", SMALL), "PCX"),
    "fits": lambda: b"SIMPLE  =                    T" + bytes(3_000),
    "sgi": lambda: saved(Image.new("RGB", SMALL), "SGI"),
    "msp": lambda: b"DanM" + struct.pack("<HH", 60_000, 60_000) + bytes(40),
    "webp without chunks": lambda: webp(),
}


def bad_pngs() -> dict[str, Callable[[], bytes]]:
    """Broken in one way each."""
    good = saved(noise())
    idat = good.index(b"IDAT")
    return {
        "png without pixels": lambda: png((0, 5)),
        "png without rows": lambda: png((5, 0)),
        "png with too few pixels": lambda: png((64, 64), pixels=zeros(1_000)),
        "png with no IDAT": lambda: PNG_SIGNATURE + header(9, 9, 8, 2) + chunk(b"IEND", b""),
        "png with a wrong IDAT checksum": lambda: flipped(good, idat + 9),
        "png with a wrong header checksum": lambda: flipped(good, 20),
        "png whose pixels are not compressed": lambda: png(SMALL, pixels=b"x" * 1_000),
        "png with an unknown filter": lambda: png(
            (4, 1), pixels=zlib.compress(b"\x09" + bytes(12))
        ),
        "png of 3 bits": lambda: png(SMALL, 3, GREY, pixels=zeros(100)),
        "png of colour type 7": lambda: PNG_SIGNATURE + header(9, 9, 8, 7) + chunk(b"IEND", b""),
        "png compressed by method 1": lambda: (
            PNG_SIGNATURE + header(9, 9, 8, 2, 1) + chunk(b"IDAT", zeros(252)) + chunk(b"IEND", b"")
        ),
        "png with a second header": lambda: png(SMALL, 8, COLOUR, header(4_000, 4_000, 8, 2)),
        "png with a second header of 900 MP": lambda: png(
            SMALL, 8, COLOUR, header(30_000, 30_000, 8, 2)
        ),
        "png with a chunk of 2**31": lambda: (
            good[: idat - 4] + struct.pack(">I", 2**31 - 1) + good[idat:]
        ),
        "png palette of 7 bytes": lambda: png(SMALL, 8, PALETTE, chunk(b"PLTE", bytes(7))),
    }


def bad_jpegs() -> dict[str, Callable[[], bytes]]:
    """Broken in one way each."""
    good = saved(noise(), "JPEG")
    return {
        "jpeg without rows": lambda: jpeg_declaring(16, 0),
        "jpeg without columns": lambda: jpeg_declaring(0, 16),
        "jpeg of 12 bits": lambda: jpeg_declaring(16, 16, precision=12),
        "jpeg larger than its pixels": lambda: jpeg_declaring(4_000, 4_000),
        "jpeg without quantisation": lambda: replaced(good, b"\xff\xdb", b"\xff\xfe"),
        "jpeg without codes": lambda: replaced(good, b"\xff\xc4", b"\xff\xfe"),
        "jpeg with broken codes": lambda: replaced(
            good,
            b"\xff\xc4" + good[good.index(b"\xff\xc4") + 2 :][:6],
            b"\xff\xc4\0\x1f\0\xff\xff\xff",
        ),
        "jpeg of arithmetic codes": lambda: replaced(good, b"\xff\xc0", b"\xff\xc9"),
        "jpeg without loss": lambda: replaced(good, b"\xff\xc0", b"\xff\xc3"),
        "jpeg without a scan": lambda: good[: good.index(b"\xff\xda")] + b"\xff\xd9",
        "jpeg with a segment beyond its end": lambda: good[:2] + b"\xff\xe1\xff\xff" + good[2:200],
    }


def bad_webps() -> dict[str, Callable[[], bytes]]:
    """Broken in one way each."""
    good = saved(noise(), "WEBP", lossless=True)
    extended = b"\x02\0\0\0\x0f\0\0\x0f\0\0"
    return {
        "webp with a long length": lambda: good[:4] + b"\xff\xff\xff\xff" + good[8:],
        "webp with a long chunk": lambda: good[:16] + b"\xf0\xff\xff\xff" + good[20:],
        "webp of two bits of noise": lambda: flipped(flipped(good, 40), 60),
        "webp animation without frames": lambda: webp(
            webp_chunk(b"VP8X", extended), webp_chunk(b"ANIM", bytes(6))
        ),
        "webp with a frame outside": lambda: webp(
            webp_chunk(b"VP8X", extended),
            webp_chunk(b"ANIM", bytes(6)),
            webp_chunk(
                b"ANMF", b"\xff\xff\0" * 2 + b"\x0f\0\0" * 2 + bytes(4) + flat_webp(SMALL)[12:]
            ),
        ),
        "webp that declares less than it holds": lambda: webp(
            webp_chunk(b"VP8X", b"\0" * 4 + b"\x07\0\0" * 2), flat_webp((8_000, 4_000))[12:]
        ),
    }


def cuts() -> dict[str, Callable[[], bytes]]:
    """Every format cut off at every tenth."""
    files = {name: saved(noise(), name) for name in ("PNG", "JPEG", "WEBP")}
    files["progressive JPEG"] = saved(noise(), "JPEG", progressive=True)
    return {
        f"{name} cut at {tenths}/10": functools.partial(cut, content, tenths)
        for name, content in files.items()
        for tenths in range(1, 10)
    }


def expecting(
    problem: ImageProblem | None, files: dict[str, Callable[[], bytes]]
) -> dict[str, HostilePicture]:
    """The same fate for all of them."""
    return {
        name: HostilePicture(make, EXCEPTIONS.get(name, problem)) for name, make in files.items()
    }


EXCEPTIONS: dict[str, ImageProblem | None] = {
    "png with a second header of 900 MP": TOO_LARGE,
    "jpeg with a profile of 16 MB": TOO_LARGE,
    # What the libraries forgive: every pixel is defined all the same.
    "png compressed by method 1": OK,
    "png with a chunk of 2**31": OK,
    "png palette of 7 bytes": OK,
    "jpeg larger than its pixels": OK,
    "jpeg without codes": OK,
    "jpeg of arithmetic codes": OK,
}
"""What ends otherwise than the rest of its group."""

CORPUS: dict[str, HostilePicture] = {
    **expecting(TOO_LARGE, BOMBS),
    **expecting(OK, LARGEST_LEGAL),
    **expecting(OK, MODES),
    **expecting(OK, TEXTS),
    **expecting(OK, PROFILES),
    **expecting(OK, MANY),
    **expecting(OK, POLYGLOTS),
    **expecting(UNSUPPORTED, FOREIGN),
    **expecting(NOT_AN_IMAGE, STRANGERS),
    **expecting(DAMAGED, bad_pngs()),
    **expecting(DAMAGED, bad_jpegs()),
    **expecting(DAMAGED, bad_webps()),
    **expecting(DAMAGED, cuts()),
}

"""Bytes to pixels and back: decoding under limits, resizing, PNG with text.

Everything here takes bytes from strangers or gives bytes to them. What a mask means is `masks.py`;
keeping a hostile file's cost away from the server (process, memory, time) is the caller's business.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from models.errors import ImageFault, UnreadableImage

# Pillow's 64 MB is more than a child process with a memory limit can spare, and no text is used.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20
# A filter around each call would not be safe with threads: the list of filters is global.
warnings.simplefilter("error", Image.DecompressionBombWarning)

_FORMATS = ("PNG", "JPEG", "WEBP")

_OTHER_FORMATS = (
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\1\0",  # ICO
    b"8BPS",  # Photoshop
    b"%PDF",
    b"%!PS",
    b"\xff\x0a",  # JPEG XL, bare
    b"\0\0\0\x0cJXL ",
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"<svg",
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture with this EXIF orientation upright."""

_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)
"""What Pillow's readers let through on damaged files; warnings where the process escalates them."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PNG_UP = 2
"""The filter that keeps each row as its difference from the row above (specification, 9.2): numpy
does it at the speed of memory, and it compresses photographs about as well as the best one."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a file may cost; sizes are in pixels and judged before anything is decoded."""

    max_bytes: int = 10_000_000
    max_pixels: int = 33_000_000
    max_side: int = 8_192


def decode_image(
    data: bytes, limits: ImageLimits, *, field: str = "init_image"
) -> NDArray[np.uint8]:
    """The first frame, upright, over white: `(h, w, 3)` RGB.

    Samples of 16 bits keep their high byte. Colour profiles are ignored.
    Raises: UnreadableImage, naming `field`.
    """
    with _translated_faults(data, field):
        return _to_array(_decode(data, limits, field, "white"), "RGB")


def decode_mask(
    data: bytes, limits: ImageLimits, *, field: str = "mask_image"
) -> NDArray[np.uint8]:
    """The first frame's luma, upright, over black: `(h, w)`.

    Black below, so that white strokes on a transparent canvas are the area to repaint.
    Raises: UnreadableImage, naming `field`.
    """
    with _translated_faults(data, field):
        return _to_array(_decode(data, limits, field, "black"), "L")


def resize_pair(
    init_image: NDArray[np.uint8], mask_image: NDArray[np.uint8], width: int, height: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Both pictures stretched to `width` x `height`, whatever their own sizes and proportions.

    init_image: `(h, w, 3)`, by Lanczos as in diffusers; mask_image: `(h', w')`, by a filter without
    overshoot, since ringing around a mask would move its edge.
    """
    return (
        resize(init_image, width, height, Image.Resampling.LANCZOS),
        resize(mask_image, width, height, Image.Resampling.BILINEAR),
    )


def resize(
    pixels: NDArray[np.uint8], width: int, height: int, resampling: Image.Resampling
) -> NDArray[np.uint8]:
    """`(h, w, 3)` or `(h, w)` stretched, corners on corners; the array itself at its own size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), resampling))


def encode_png(image: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """A lossless PNG of `(h, w, 3)` RGB.

    The same input gives the same bytes on processors of one kind.

    text: keyword to value, stored as tEXt, or as iTXt where Latin-1 does not suffice. Characters
        that PNG cannot hold are replaced: NUL by U+FFFD, lone surrogates by "?".
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
            *(_text_chunk(keyword, value) for keyword, value in (text or {}).items()),
            _chunk(b"IDAT", isal_zlib.compress(filtered, 1)),
            _chunk(b"IEND", b""),
        )
    )


def _decode(data: bytes, limits: ImageLimits, field: str, background: str) -> Image.Image:
    """The picture in mode L or RGB, without alpha."""
    if len(data) > limits.max_bytes:
        raise UnreadableImage(
            field, ImageFault.TOO_LARGE, f"must not be larger than {limits.max_bytes} bytes"
        )
    # libwebp allocates its canvas as soon as Pillow opens the file.
    if canvas := _webp_canvas(data):
        _check_size(canvas, limits, field)
    image = Image.open(BytesIO(data), formats=_FORMATS)
    _check_size(image.size, limits, field)
    image.load()
    to_upright = _to_upright(image)
    flat = _flatten(_to_8_bit(image, data, field), background)
    return flat if to_upright is None else flat.transpose(to_upright)


@contextmanager
def _translated_faults(data: bytes, field: str) -> Iterator[None]:
    """The one place where Pillow's exceptions become ours."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as fault:
        raise UnreadableImage(
            field, ImageFault.TOO_LARGE, "needs too much memory to decode"
        ) from fault
    except UnidentifiedImageError as fault:
        if _is_other_format(data):
            raise UnreadableImage(
                field, ImageFault.UNSUPPORTED, "must be a PNG, JPEG or WebP picture"
            ) from fault
        raise UnreadableImage(field, ImageFault.NOT_AN_IMAGE, "is not a picture") from fault
    except _DAMAGE as fault:
        raise UnreadableImage(field, ImageFault.NOT_AN_IMAGE, "is damaged or incomplete") from fault


def _is_other_format(data: bytes) -> bool:
    head = data[:1024].lstrip()
    if head.startswith(b"<?xml"):
        return b"<svg" in head
    # AVIF, HEIC: the size of the first box comes before its name.
    return data.startswith(_OTHER_FORMATS) or head.startswith(b"<svg") or data[4:8] == b"ftyp"


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP header declares (RFC 9649, 2.5 to 2.7); None for other bytes."""
    head = data[:30].ljust(30, b"\0")
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    match head[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", head, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":
            (packed,) = struct.unpack_from("<I", head, 21)
            return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        case b"VP8X":
            width, height = (int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
            return width + 1, height + 1
    return None


def _check_size(size: tuple[int, int], limits: ImageLimits, field: str) -> None:
    width, height = size
    if max(size) > limits.max_side or width * height > limits.max_pixels:
        raise UnreadableImage(
            field,
            ImageFault.TOO_LARGE,
            f"must not have more than {limits.max_pixels} pixels or a side over {limits.max_side}",
        )
    if min(size) < 1:
        raise UnreadableImage(field, ImageFault.NOT_AN_IMAGE, "has no pixels")


def _to_upright(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        # Viewers show a picture with broken EXIF as it is stored; so its author knows it that way.
        return None


def _to_8_bit(image: Image.Image, data: bytes, field: str) -> Image.Image:
    """The same pixels in mode L, LA, RGB or RGBA."""
    has_colour_key = "transparency" in image.info
    match image.mode:
        case "1" | "L" | "I;16":
            return _grey(image, data)
        case "RGB" if has_colour_key and _png_bit_depth(data) == 16:
            # Pillow has already dropped the low bytes that decide which pixels are transparent.
            raise UnreadableImage(
                field, ImageFault.UNSUPPORTED, "must not have 16 bits and a transparent colour"
            )
        case "RGB" if has_colour_key:
            return image.convert("RGBA")
        case "P":
            return image.convert("RGBA" if has_colour_key else "RGB")
        case "CMYK":
            return image.convert("RGB")
        case "LA" | "RGB" | "RGBA":
            return image
    raise UnreadableImage(field, ImageFault.UNSUPPORTED, "has an unusual pixel format")


def _grey(image: Image.Image, data: bytes) -> Image.Image:
    """Mode L, or LA where a PNG declares one grey transparent.

    By hand, because Pillow clips 16 bits to 255 and compares the transparent grey, which is in the
    file's own depth, with values scaled to 8 bits.
    """
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    shown = (samples >> 8).astype(np.uint8) if image.mode == "I;16" else samples
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(shown)
    depth = _png_bit_depth(data)
    if depth < 8:
        transparent = transparent * 255 // (2**depth - 1)
    alpha = np.where(samples == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(shown), Image.fromarray(alpha)))


def _png_bit_depth(data: bytes) -> int:
    return data[24]


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if "A" not in image.mode:
        return image
    canvas = Image.new(image.mode.removesuffix("A"), image.size, background)
    canvas.paste(image, mask=image)
    return canvas


def _to_array(image: Image.Image, mode: str) -> NDArray[np.uint8]:
    # Without a needless copy: at the largest size each one costs over 100 MB.
    return np.array(image if image.mode == mode else image.convert(mode))


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

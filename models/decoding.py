"""Bytes from strangers to pixels, under limits: PNG, JPEG and WebP, at the size a job needs.

What a mask means is `masks.py`. Headers are judged before anything is decoded; keeping the cost of
what passes away from the server (a process, its memory, its time) is the caller's business.
"""

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

# WebP is named, or Pillow would load all its formats when it meets the first one.
from PIL import (
    ExifTags,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from models.errors import ImageFault, UnreadableImage

Fit = Callable[[int, int], tuple[int, int]]
"""The width and height wanted of a picture that has this width and height of its own."""

# Pillow's 64 MB is more than a child process with a memory limit can spare, and no text is used.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20
# A filter around each call would not be safe with threads: the list of filters is global.
warnings.simplefilter("error", Image.DecompressionBombWarning)
ImageFile.LOAD_TRUNCATED_IMAGES = False

_FORMATS = ("PNG", "JPEG", "WEBP")

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")

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

_TURNING = frozenset(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
"""Those that swap width and height."""

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

_DAMAGED = "is damaged or incomplete"


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a file may cost; sizes are in pixels and judged before anything is decoded."""

    max_bytes: int = 10_000_000
    max_pixels: int = 33_000_000
    max_side: int = 8_192


def decode_image(
    data: bytes, limits: ImageLimits, fit: Fit | None = None, *, field: str = "init_image"
) -> NDArray[np.uint8]:
    """The first frame, upright, over white: `(h, w, 3)` RGB.

    Samples of 16 bits keep their high byte. Colour profiles are ignored. With `fit` stretched by
    Lanczos, as in diffusers; a JPEG of more than twice that size is read at a half, a quarter or an
    eighth first. Raises: UnreadableImage, naming `field`.
    """
    with _translated_faults(data, field):
        reading = _Reading(field, "RGB", "white", Image.Resampling.LANCZOS)
        return np.array(_decode(data, limits, fit, reading))


def decode_mask(
    data: bytes, limits: ImageLimits, fit: Fit | None = None, *, field: str = "mask_image"
) -> NDArray[np.uint8]:
    """The first frame's luma, upright, over black: `(h, w)`.

    Black below, so that white strokes on a transparent canvas are the area to repaint. With `fit`
    stretched by a filter without overshoot, since ringing around a mask would move its edge.
    Raises: UnreadableImage, naming `field`.
    """
    with _translated_faults(data, field):
        reading = _Reading(field, "L", "black", Image.Resampling.BILINEAR)
        return np.array(_decode(data, limits, fit, reading))


@dataclass(frozen=True, slots=True)
class _Reading:
    """What becomes of the decoded pixels; faults are told of `field`."""

    field: str
    mode: str
    background: str
    resampling: Image.Resampling


def _decode(data: bytes, limits: ImageLimits, fit: Fit | None, reading: _Reading) -> Image.Image:
    """The picture in the mode and size asked for, upright, without alpha."""
    if len(data) > limits.max_bytes:
        raise UnreadableImage(
            reading.field, ImageFault.TOO_LARGE, f"must not be larger than {limits.max_bytes} bytes"
        )
    # libwebp allocates its canvas as soon as Pillow opens the file.
    if canvas := _webp_canvas(data):
        _check_size(canvas, limits, reading.field)
    image = Image.open(BytesIO(data), formats=_FORMATS)
    own_size = image.size
    _check_size(own_size, limits, reading.field)
    if fit and isinstance(image, JpegImagePlugin.JpegImageFile):
        width, height = _stored_size(own_size, _to_upright(image), fit)
        image.draft(None, (2 * width, 2 * height))
    image.load()
    if isinstance(image, WebPImagePlugin.WebPImageFile):
        # Two canvases of the file's size, which nobody needs after the first frame.
        image._decoder = None
    to_upright = _to_upright(image)
    plain = _convert(_flatten(_to_8_bit(image, data, reading.field), reading), reading.mode)
    del image  # at the largest size each copy costs over 100 MB
    if fit:
        plain = plain.resize(_stored_size(own_size, to_upright, fit), reading.resampling)
    return plain if to_upright is None else plain.transpose(to_upright)


def _stored_size(
    size: tuple[int, int], to_upright: Image.Transpose | None, fit: Fit
) -> tuple[int, int]:
    """What `fit` wants of the upright picture, as width and height before it is turned upright."""
    if to_upright not in _TURNING:
        return fit(*size)
    height, width = fit(size[1], size[0])
    return width, height


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
        if _webp_canvas(data) or data.startswith(_SIGNATURES):
            raise UnreadableImage(field, ImageFault.DAMAGED, _DAMAGED) from fault
        raise UnreadableImage(field, ImageFault.NOT_AN_IMAGE, "is not a picture") from fault
    except _DAMAGE as fault:
        raise UnreadableImage(field, ImageFault.DAMAGED, _DAMAGED) from fault


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
        raise UnreadableImage(field, ImageFault.DAMAGED, "has no pixels")


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
        case "L" if not has_colour_key:
            return image
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


def _flatten(image: Image.Image, reading: _Reading) -> Image.Image:
    if "A" not in image.mode:
        return image
    canvas = Image.new(image.mode.removesuffix("A"), image.size, reading.background)
    canvas.paste(image, mask=image)
    return canvas


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)

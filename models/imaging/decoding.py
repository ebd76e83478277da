"""Bytes from strangers to pixels, under limits: PNG, JPEG and WebP, at the size a job needs.

What a mask's author meant is `mask_reading.py`, what a mask does is `masks.py`; colour profiles are
`colour.py`, slight damage is `repair.py`. Headers are judged before anything is decoded; keeping
the cost of what passes away from the server (a process, its memory, its time) is the caller's
business.
"""

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

# The formats are named, or Pillow would load all it has when it meets the first picture.
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
from models.imaging.colour import greys_to_srgb, inks_to_srgb, is_srgb, kept_profile, profile_of_png
from models.imaging.mask_reading import (
    MaskReading,
    MaskRule,
    read_alpha,
    read_holes,
    read_labels,
    read_low_bytes,
    read_luma,
    read_opaque,
)
from models.imaging.repair import (
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    PngContent,
    read_png,
    with_end_of_image,
)
from models.params import OutputFormat

Found = TypeVar("Found")

Fit = Callable[[int, int], tuple[int, int]]
"""The width and height wanted of a picture that has this width and height of its own."""

# A filter around each call would not be safe with threads: the list of filters is global.
warnings.simplefilter("error", Image.DecompressionBombWarning)
ImageFile.LOAD_TRUNCATED_IMAGES = False

_FORMATS = tuple(
    str(reader.format)
    for reader in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        WebPImagePlugin.WebPImageFile,
    )
)

_SIGNATURES = (PNG_SIGNATURE, JPEG_SIGNATURE)

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

_TURNING = frozenset((5, 6, 7, 8))
"""Orientations that swap width and height."""

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


class Stored(NamedTuple):
    """A picture as its file holds it: width, height, and EXIF's orientation, 1 to 8."""

    width: int
    height: int
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as the picture is shown."""
        if self.orientation in _TURNING:
            return self.height, self.width
        return self.width, self.height


class PixelMode(StrEnum):
    """The kind of pixels that a file holds."""

    BLACK_WHITE = "black_white"
    GREY = "grey"
    GREY_16 = "grey_16"
    """16 bits."""
    GREY_ALPHA = "grey_alpha"
    PALETTE = "palette"
    RGB = "rgb"
    RGB_ALPHA = "rgb_alpha"
    CMYK = "cmyk"


_PIXEL_MODES = {
    "1": PixelMode.BLACK_WHITE,
    "L": PixelMode.GREY,
    "I;16": PixelMode.GREY_16,
    "LA": PixelMode.GREY_ALPHA,
    "P": PixelMode.PALETTE,
    "RGB": PixelMode.RGB,
    "RGBA": PixelMode.RGB_ALPHA,
    "CMYK": PixelMode.CMYK,
}
"""By Pillow's name. `_to_8_bit` refuses pictures of any other mode."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An init image.

    pixels: `(h, w, 3)` RGB, in the colours of `icc_profile`, or in sRGB where that is empty.
    is_profile_lost: the file says that its colours are not sRGB, and the pixels do not follow.
    is_alpha_lost: some of it is transparent, of which the pixels show nothing.
    """

    pixels: NDArray[np.uint8]
    stored: Stored
    icc_profile: bytes
    is_profile_lost: bool
    is_alpha_lost: bool = False
    mode: PixelMode = PixelMode.RGB


@dataclass(frozen=True, slots=True)
class DecodedMask:
    """pixels: `(h, w)`, 0 is kept and 255 repainted, whatever the file's way of saying so."""

    pixels: NDArray[np.uint8]
    stored: Stored
    read_as: MaskReading
    mode: PixelMode = PixelMode.GREY


def decode_image(
    data: bytes, limits: ImageLimits, fit: Fit | None = None, *, field: str = "init_image"
) -> DecodedImage:
    """The first frame, upright, over white.

    Samples of 16 bits keep their high byte. An RGB profile is kept; inks and greys are converted
    to sRGB by theirs. With `fit` stretched by Lanczos, as in diffusers; a JPEG of more than twice
    that size is read at a half, a quarter or an eighth first.
    Raises: UnreadableImage, naming `field`.
    """

    def to_rgb(image: Image.Image, png: PngContent) -> tuple[Image.Image, tuple[bytes, bool, bool]]:
        profile = image.info.get("icc_profile") or profile_of_png(png.colour_chunks)
        is_named = b"iCCP" in png.colour_chunks or "icc_profile" in image.info
        is_lost = is_named or not is_srgb(png.colour_chunks)
        if image.mode == "CMYK":
            converted = inks_to_srgb(image, profile)
            plain = image.convert("RGB") if converted is None else converted
            return plain, (b"", is_lost and converted is None, False)
        plain = _to_8_bit(image, data, field)
        has_holes = "A" in plain.mode and plain.getchannel("A").getextrema() != (255, 255)
        if plain.mode in ("L", "LA"):
            converted = greys_to_srgb(plain, profile)
            # Greys of an RGB profile: programs leave it when they turn a picture grey.
            is_lost = is_lost and converted is None and not kept_profile(profile)
            plain = plain if converted is None else converted
            return _convert(_flatten(plain, "white"), "RGB"), (b"", is_lost, has_holes)
        kept = kept_profile(profile)
        return _convert(_flatten(plain, "white"), "RGB"), (kept, is_lost and not kept, has_holes)

    with _translated_faults(data, field):
        reading = _Reading(field, Image.Resampling.LANCZOS)
        image, source, (profile, is_lost, has_holes) = _decode(data, limits, fit, reading, to_rgb)
        pixels = np.array(image)
        return DecodedImage(pixels, source.stored, profile, is_lost, has_holes, source.mode)


def decode_mask(
    data: bytes,
    limits: ImageLimits,
    fit: Fit | None = None,
    *,
    init_image: Stored | None = None,
    rule: MaskRule = MaskRule.EVIDENT,
) -> DecodedMask:
    """The first frame, upright, read as `mask_reading.py` says.

    Luma lies over black, so that white strokes on a transparent canvas are the area to repaint.
    With `fit` stretched by a filter without overshoot, since ringing around a mask would move its
    edge. init_image: what the mask belongs to; where EXIF turns that by a quarter, a mask of its
    stored size is turned with it, unless the mask has an orientation of its own.
    Raises: UnreadableImage, naming `mask_image`.
    """
    field = "mask_image"

    def to_levels(image: Image.Image, png: PngContent) -> tuple[Image.Image, MaskReading]:
        if rule is not MaskRule.EVIDENT:
            return _by_rule(_to_8_bit(image, data, field), rule, field)
        if labels := read_labels(image):
            return labels, MaskReading.LABELS
        low_bytes = read_low_bytes(image)
        plain = low_bytes or _to_8_bit(image, data, field)
        if by_alpha := read_alpha(plain):
            return by_alpha
        is_exact = data.startswith(PNG_SIGNATURE) and "A" not in plain.mode
        levels, read_as = read_luma(_flatten(plain, "black"), is_exact=is_exact)
        if low_bytes and read_as is MaskReading.WHITE and low_bytes.getextrema() != (0, 0):
            read_as = MaskReading.LOW_BYTE
        return levels, read_as

    with _translated_faults(data, field):
        reading = _Reading(field, Image.Resampling.BILINEAR, init_image)
        image, source, read_as = _decode(data, limits, fit, reading, to_levels)
        return DecodedMask(np.array(image), source.stored, read_as, source.mode)


def format_of(data: bytes) -> OutputFormat:
    """The format of a file that has been decoded."""
    if data.startswith(PNG_SIGNATURE):
        return OutputFormat.PNG
    return OutputFormat.JPEG if data.startswith(JPEG_SIGNATURE) else OutputFormat.WEBP


def _by_rule(plain: Image.Image, rule: MaskRule, field: str) -> tuple[Image.Image, MaskReading]:
    """A mask by a rule other than `EVIDENT`. Raises: UnreadableImage."""
    if rule is MaskRule.OPAQUE:
        if opaque := read_opaque(plain):
            return opaque, MaskReading.OPAQUE
        return read_luma(_flatten(plain, "black"), is_exact=False)
    if holes := read_holes(plain):
        return holes, MaskReading.TRANSPARENT
    if rule is MaskRule.TRANSPARENT_OR_ALL:
        return Image.new("L", plain.size, 255), MaskReading.WHITE
    raise UnreadableImage(field, ImageFault.NO_TRANSPARENCY, "has no transparent pixel")


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a picture is read. field: named in errors. like: the picture whose rotation it gets."""

    field: str
    resampling: Image.Resampling
    like: Stored | None = None


class _Source(NamedTuple):
    """How a file holds its picture."""

    stored: Stored
    mode: PixelMode


def _decode(
    data: bytes,
    limits: ImageLimits,
    fit: Fit | None,
    reading: _Reading,
    to_plain: Callable[[Image.Image, PngContent], tuple[Image.Image, Found]],
) -> tuple[Image.Image, _Source, Found]:
    """The picture as `to_plain` makes it, in the size asked for, upright."""
    if len(data) > limits.max_bytes:
        raise UnreadableImage(
            reading.field, ImageFault.TOO_LARGE, f"must not be larger than {limits.max_bytes} bytes"
        )
    # libwebp allocates its canvas as soon as Pillow opens the file.
    if canvas := _webp_canvas(data):
        _check_size(canvas, limits, reading.field)
    png = read_png(data) if data.startswith(PNG_SIGNATURE) else PngContent(data, {})
    try:
        image, own_size = _load(png.needed, limits, fit, reading)
    except OSError:
        ended = with_end_of_image(data)
        if ended is None:
            raise
        image, own_size = _load(ended, limits, fit, reading)
    stored = Stored(*own_size, _orientation(image, own_size, reading))
    plain, found = to_plain(image, png)
    source = _Source(stored, _PIXEL_MODES[image.mode])
    del image  # at the largest size each copy costs over 100 MB
    if fit:
        plain = plain.resize(_fitted(stored, fit), reading.resampling)
    to_upright = _UPRIGHT.get(stored.orientation)
    return plain if to_upright is None else plain.transpose(to_upright), source, found


def _load(
    data: bytes, limits: ImageLimits, fit: Fit | None, reading: _Reading
) -> tuple[Image.Image, tuple[int, int]]:
    """The pixels as Pillow reads them, and the width and height of the file.

    A JPEG may have fewer pixels than its file.
    """
    image = Image.open(BytesIO(data), formats=_FORMATS)
    own_size = image.size
    _check_size(own_size, limits, reading.field)
    if fit and isinstance(image, JpegImagePlugin.JpegImageFile):
        width, height = _fitted(Stored(*own_size, _orientation(image, own_size, reading)), fit)
        image.draft(None, (2 * width, 2 * height))
    image.load()
    if isinstance(image, WebPImagePlugin.WebPImageFile):
        # Two canvases of the file's size, which nobody needs after the first frame.
        image._decoder = None
    return image, own_size


def _fitted(stored: Stored, fit: Fit) -> tuple[int, int]:
    """What `fit` wants of the upright picture, as width and height before it is turned upright."""
    width, height = fit(*stored.upright_size)
    return (height, width) if stored.orientation in _TURNING else (width, height)


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


def _orientation(image: Image.Image, own_size: tuple[int, int], reading: _Reading) -> int:
    """1 to 8: what EXIF says, or says of the picture that this one is like."""
    own = _exif_orientation(image)
    like = reading.like
    if own is None and like is not None and like.orientation in _TURNING:
        # A program that ignores EXIF drew it on the stored picture. A square one cannot be told.
        if own_size == (like.width, like.height) and like.width != like.height:
            return like.orientation
    return own or 1


def _exif_orientation(image: Image.Image) -> int | None:
    """None where EXIF does not say.

    Not by `image.getexif`, which asks XMP too: no browser turns a picture by that.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        orientation = exif.get(ExifTags.Base.Orientation)
    except _DAMAGE:
        # Viewers show a picture with broken EXIF as it is stored; so its author knows it that way.
        return None
    return orientation if orientation in range(1, 9) else None


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


def _flatten(image: Image.Image, background: str) -> Image.Image:
    if "A" not in image.mode:
        return image
    canvas = Image.new(image.mode.removesuffix("A"), image.size, background)
    canvas.paste(image, mask=image)
    return canvas


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)

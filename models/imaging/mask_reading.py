"""What the author of a mask meant: from pixels of any kind to one grey level each.

White is repainted and black is kept. A file in which that says nothing, but something else is
evident, is read by what is evident. The first row that holds decides:

| the file | `MaskReading` | what is repainted |
|---|---|---|
| palette with colours, at most 64 used, none of them white; black is used, or index 0 | labels | \
every index but black, or but index 0 where no black is used |
| 16-bit grey PNG, no value above 255 | low_byte, nonzero | as 8-bit values, by the rows below |
| transparent in part; opaque pixels are grey, some of them light | white | luma over black |
| transparent in part; opaque pixels are dark grey, the border is transparent | opaque | alpha |
| transparent in part; opaque pixels are dark grey, the border is opaque | transparent | 1 - alpha |
| transparent in part; coloured in few shades, the border is transparent | opaque | alpha |
| transparent in part; coloured, in many shades or with an opaque border | transparent | 1 - alpha |
| PNG with the values 0 and 1 only | nonzero | the value 1 |
| any other | white | luma over black: the lighter, the more |

Rows before the last hold only where luma would repaint nothing that was marked, or where opaque
pixels have colours. A `MaskRule` other than `EVIDENT` replaces the table.
"""

import functools
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops


class MaskRule(StrEnum):
    """How the file of a mask is to be read."""

    EVIDENT = "evident"
    """By the table above."""
    TRANSPARENT = "transparent"
    """Transparent pixels are repainted, as in OpenAI's API; a file without any is a fault."""
    TRANSPARENT_OR_ALL = "transparent_or_all"
    """As `TRANSPARENT`, but all is repainted where no pixel is transparent."""
    OPAQUE = "opaque"
    """Opaque pixels are repainted where some are transparent, else luma, as in A1111's web UI."""


class MaskReading(StrEnum):
    """What was taken to mean "repaint this"."""

    WHITE = "white"
    """White; grey is in between."""
    NONZERO = "nonzero"
    """1, in a file with no other value than 0 and 1."""
    LOW_BYTE = "low_byte"
    """White, in a file of 16 bits that holds values of 8 bits."""
    LABELS = "labels"
    """Every label of a palette but black or the first."""
    OPAQUE = "opaque"
    """What is drawn on a transparent canvas."""
    TRANSPARENT = "transparent"
    """The hole in a picture."""


JPEG_NOISE = 8
"""A soft mask's values this close to black or white, in steps of 255, are meant to be that."""

REPAINTED_FROM = 128
"""A hard mask's values from here on are repainted: diffusers' 0.5."""

MAX_LABELS = 64
MIN_SHADES = 8
"""Minimum of the 32 shades of a channel, each in 1 of 200 pixels. Drawing tools leave fewer."""

COLOURFUL = 24
"""Channels that differ by more, in steps of 255, are no grey with noise."""

COLOURFUL_SHARE = 0.05
BLACK = 16
NEARLY_WHITE = 224
NEARLY_TRANSPARENT = 8
STRIP_ROWS = 256


def read_labels(image: Image.Image) -> Image.Image | None:
    """Mode L of a palette image whose indices are labels; None for any other."""
    if image.mode != "P" or "transparency" in image.info:
        return None
    used = np.flatnonzero(image.histogram())
    palette = np.zeros((256, 3), np.int16)
    entries = np.array(image.getpalette("RGB") or [], np.int16).reshape(-1, 3)[:256]
    palette[: len(entries)] = entries
    colours = palette[used]
    is_colourful = bool((np.ptp(colours, axis=1) > COLOURFUL).any())
    is_white = bool((colours.min(axis=1) >= NEARLY_WHITE).any())
    if not is_colourful or is_white or len(used) > MAX_LABELS:
        return None
    is_kept = palette.max(axis=1) <= BLACK
    if not is_kept[used].any():
        is_kept[0] = True
    if not is_kept[used].any():
        return None
    return Image.fromarray(np.where(is_kept, np.uint8(0), np.uint8(255))[np.asarray(image)])


def read_low_bytes(image: Image.Image) -> Image.Image | None:
    """Mode L of a 16-bit image with values up to 255; None for any other."""
    if image.mode != "I;16" or "transparency" in image.info:
        return None
    samples = np.asarray(image)
    return Image.fromarray(samples.astype(np.uint8)) if samples.max() <= 255 else None


def read_alpha(image: Image.Image) -> tuple[Image.Image, MaskReading] | None:
    """Mode L of an LA or RGBA image of which alpha is the mask; None for any other."""
    if "A" not in image.mode:
        return None
    alpha = image.getchannel("A")
    levels = np.asarray(alpha)
    strongest = int(levels.max())
    if levels.min() >= NEARLY_TRANSPARENT or strongest <= NEARLY_TRANSPARENT:
        return None
    colours = _count_colours(image, strongest)
    if not colours.is_colourful and colours.has_light:
        return None
    is_picture = colours.is_colourful and colours.shades >= MIN_SHADES
    if is_picture or _border_share(alpha, strongest) > 0.5:
        return ImageChops.invert(alpha), MaskReading.TRANSPARENT
    # A brush of half strength marks as clearly as one of full strength.
    table = [min(255, round(level * 255 / strongest)) for level in range(256)]
    return alpha.point(table), MaskReading.OPAQUE


def read_holes(image: Image.Image) -> Image.Image | None:
    """Mode L of an image whose transparent pixels are repainted; None where it has none of them."""
    if "A" not in image.mode:
        return None
    holes = ImageChops.invert(image.getchannel("A"))
    return holes if any(holes.histogram()[REPAINTED_FROM:]) else None


def read_opaque(image: Image.Image) -> Image.Image | None:
    """Mode L of an image whose opaque pixels are repainted; None where none is transparent."""
    if "A" not in image.mode:
        return None
    alpha = image.getchannel("A")
    return alpha if any(alpha.histogram()[:255]) else None


def read_luma(image: Image.Image, *, is_exact: bool) -> tuple[Image.Image, MaskReading]:
    """Mode L of a mode L or RGB image. is_exact: the file keeps every value as it was written."""
    extrema = np.array(image.getextrema())
    if is_exact and extrema.max() == 1 and extrema.min() == 0:
        brightest = functools.reduce(ImageChops.lighter, image.split())
        return brightest.point([255 * (level > 0) for level in range(256)]), MaskReading.NONZERO
    return image if image.mode == "L" else image.convert("L"), MaskReading.WHITE


def marks_nothing(mask: NDArray[np.uint8], *, is_soft: bool, is_inverted: bool) -> bool:
    """Whether a mask `(h, w)` repaints no pixel before it is grown or shrunk."""
    strongest = 255 - int(mask.min()) if is_inverted else int(mask.max())
    return strongest < (JPEG_NOISE if is_soft else REPAINTED_FROM)


@dataclass(frozen=True, slots=True)
class _Colours:
    """Colours of the drawn pixels. shades: used ones of 32, in the channel with most of them."""

    has_light: bool
    is_colourful: bool
    shades: int


def _count_colours(image: Image.Image, strongest: int) -> _Colours:
    """Count in strips, because copies of the largest picture's channels are too large.

    strongest: the largest alpha. Pixels of less than half of it do not count as colours, because
    canvases that keep premultiplied colours give back imprecise ones there.
    """
    width, height = image.size
    has_light = False
    saturations = np.zeros(256, np.int64)
    levels = np.zeros((len(image.mode) - 1, 256), np.int64)
    for top in range(0, height, STRIP_ROWS):
        *bands, alpha = image.crop((0, top, width, min(top + STRIP_ROWS, height))).split()
        drawn = alpha.point([255 * (level > NEARLY_TRANSPARENT) for level in range(256)])
        solid = _solid(alpha, strongest)
        has_light |= any(any(band.histogram(drawn)[REPAINTED_FROM:]) for band in bands)
        lightest = functools.reduce(ImageChops.lighter, bands)
        darkest = functools.reduce(ImageChops.darker, bands)
        saturations += ImageChops.subtract(lightest, darkest).histogram(solid)
        levels += [band.histogram(solid) for band in bands]
    shades = levels.reshape(-1, 32, 8).sum(axis=2)
    return _Colours(
        has_light=has_light,
        is_colourful=bool(
            saturations[COLOURFUL + 1 :].sum() >= COLOURFUL_SHARE * saturations.sum()
        ),
        shades=int((shades * 200 >= saturations.sum()).sum(axis=1).max()),
    )


def _solid(alpha: Image.Image, strongest: int) -> Image.Image:
    return alpha.point([255 * (2 * level >= strongest) for level in range(256)])


def _border_share(alpha: Image.Image, strongest: int) -> float:
    """Share of solid pixels among the picture's outermost ones."""
    width, height = alpha.size
    edges = [(0, 0, width, 1), (0, height - 1, width, height)]
    edges += [(0, 0, 1, height), (width - 1, 0, width, height)]
    counts = np.sum([_solid(alpha.crop(edge), strongest).histogram() for edge in edges], axis=0)
    return float(counts[255] / counts.sum())

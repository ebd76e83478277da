"""What is probably wrong with a mask, and a small picture that shows it.

A check sees the levels that a job would use: read by `mask_reading`, at the job's size, inverted if
the job inverts it. Nothing here changes a mask.

Measured on the masks of `tests/corpora/masks.py`, which programs draw: of 1,700 as they are meant
(objects, skies, borders, scratches, dust, extended canvases, PNG and JPEG) none is called inverted,
and all of 800 inverted masks of objects are. Masks that people have drawn were not tried. Where all
but an object of less than 0.3 of the picture is meant to be repainted, that is called inverted too.
"""

from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from models.imaging.images import fit_within, resize
from models.imaging.mask_reading import JPEG_NOISE
from models.imaging.masks import Box, binarise, bounding_box


class MaskFault(StrEnum):
    """What a mask's author probably did not mean."""

    EMPTY = "empty"
    """No pixel is repainted."""
    FULL = "full"
    """All pixels are repainted."""
    PROBABLY_INVERTED = "probably_inverted"
    """White covers most of the picture and all around its border, and what is kept lies inside."""
    GREY_LEVELS = "grey_levels"
    """Many pixels are neither black nor white, and the job takes each as the one or the other."""
    NOISY_EDGE = "noisy_edge"
    """Along the edges many pixels are not quite black or white, as in a JPEG of low quality."""
    TINY_SPECKS = "tiny_specks"
    """Some repainted regions are too small for the model to paint anything in them."""


INVERTED_FROM = 0.7
"""Share of repainted pixels from which a mask may be inverted. Masks of objects cover less than the
rest, 0.3, of the picture."""

INVERTED_BORDER = 0.95
"""Least share of repainted pixels in the picture's outermost rows and columns of such a mask. The
sky, or a wall behind a person, leaves more of them."""

FRAME_FILL = 0.98
"""Share of its bounding box that the kept part of a picture with new pixels on all sides fills."""

FRAME_KEPT = 0.2
"""A kept rectangle of this share of the picture is no object."""

FLAT_STEP = 1
"""Neighbours that differ by at most this much, in steps of 255, in one of both directions, are
flat. Canvases are extended by one colour or by repeating the picture's edge."""

FLAT_OUTSIDE, FLAT_INSIDE = 0.98, 0.9
"""Least share of flat pixels in new parts of a canvas, and largest one in the picture itself."""

SPECK_PX = 16
"""Largest area of a speck: a quarter of the 64 pixels that make one latent."""

NEARLY, MIDDLE = 48, 160
"""Levels from `JPEG_NOISE` to `NEARLY` are nearly black, as many nearly white, and `MIDDLE` between
are grey."""

GREY_WIDTH_PX, GREY_SHARE = 4.0, 0.2
"""Grey pixels for each pixel of edge, from which it is soft; a smooth edge has one or two. And the
share of them in a file that is a photograph rather than a mask."""

NOISE_WIDTH_PX = 1.5
"""Nearly black or white pixels for each pixel of edge, from which it is noisy. JPEGs of a quality
of 60 and less have more; they have at least twice as many as grey ones, soft edges fewer."""

COLOURS = np.array([(255, 0, 80), (0, 200, 255)], np.uint8)
"""The overlay takes the colour that differs more from the picture below the mask."""

CROP_COLOUR, BELOW_CROP = (255, 220, 0), (0, 0, 0)
OVERLAY_SHARE = 0.55


@dataclass(frozen=True, slots=True)
class MaskCheck:
    """faults: in the order of `MaskFault`.

    coverage: share of repainted pixels, 0 to 1. border: the same among the outermost pixels.
    regions, specks: connected repainted areas, and how many of them have at most `SPECK_PX`.
    grey: share of pixels that are neither black nor white nor nearly so.
    """

    faults: tuple[MaskFault, ...]
    coverage: float
    border: float
    regions: int
    specks: int
    grey: float


def check_mask(
    levels: NDArray[np.uint8], picture: NDArray[np.uint8], *, is_soft: bool = False
) -> MaskCheck:
    """Look for faults. Takes 0.2 s for 4 megapixels.

    levels: `(h, w)`, 255 is repainted. picture: `(h, w, 3)`, which tells new parts of a canvas from
    others. is_soft: the job honours grey levels.
    """
    repaint = levels >= JPEG_NOISE if is_soft else binarise(levels)
    coverage = float(np.count_nonzero(repaint) / repaint.size)
    regions, specks = count_regions(repaint)
    grey, grey_width, noise_width = measure_greys(levels)
    border = border_share(repaint)
    is_found = {
        MaskFault.EMPTY: coverage == 0,
        MaskFault.FULL: coverage == 1,
        MaskFault.PROBABLY_INVERTED: INVERTED_FROM <= coverage < 1
        and border >= INVERTED_BORDER
        and not is_frame(repaint, picture),
        MaskFault.GREY_LEVELS: not is_soft and (grey_width > GREY_WIDTH_PX or grey > GREY_SHARE),
        MaskFault.NOISY_EDGE: noise_width > max(NOISE_WIDTH_PX, 2 * grey_width),
        MaskFault.TINY_SPECKS: specks > 0,
    }
    if is_found[MaskFault.PROBABLY_INVERTED]:
        is_found[MaskFault.TINY_SPECKS] = False  # gaps between the strokes that were meant
    faults = tuple(fault for fault, holds in is_found.items() if holds)
    return MaskCheck(faults, coverage, border, regions, specks, grey)


def border_share(repaint: NDArray[np.bool_]) -> float:
    """Share of the picture's outermost pixels that are repainted."""
    edges = [repaint[0], repaint[-1], repaint[1:-1, 0], repaint[1:-1, -1]]
    return float(np.concatenate(edges).mean())


def count_regions(repaint: NDArray[np.bool_]) -> tuple[int, int]:
    """How many connected areas are repainted, and how many of them are specks."""
    _, _, figures, _ = cv2.connectedComponentsWithStats(repaint.view(np.uint8))
    areas = np.asarray(figures)[1:, cv2.CC_STAT_AREA]
    return len(areas), int(np.count_nonzero(areas <= SPECK_PX))


def measure_greys(levels: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Share of grey pixels; grey pixels, and nearly black or white ones, per pixel of edge."""
    counts = np.bincount(levels.ravel(), minlength=256)
    grey = int(counts[NEARLY : NEARLY + MIDDLE].sum())
    nearly = int(counts[JPEG_NOISE:NEARLY].sum() + counts[NEARLY + MIDDLE : 256 - JPEG_NOISE].sum())
    repaint = binarise(levels)
    across = int(np.count_nonzero(repaint[:, 1:] != repaint[:, :-1]))
    down = int(np.count_nonzero(repaint[1:] != repaint[:-1]))
    edge = max(1, across + down)
    return float(grey / levels.size), float(grey / edge), float(nearly / edge)


def is_frame(repaint: NDArray[np.bool_], picture: NDArray[np.uint8]) -> bool:
    """Whether a canvas that was extended on all sides is repainted around the picture in it."""
    box = bounding_box(~repaint)
    if box is None or min(repaint.shape) == 1:
        return False
    kept = repaint.size - np.count_nonzero(repaint)
    if kept < FRAME_FILL * box.width * box.height:
        return False
    if kept >= FRAME_KEPT * repaint.size:
        return True
    flat = find_flat(picture)
    outside = repaint[1:, 1:]
    return share_in(outside, flat) >= FLAT_OUTSIDE and share_in(~outside, flat) <= FLAT_INSIDE


def share_in(area: NDArray[np.bool_], found: NDArray[np.bool_]) -> float:
    """Share of an area's pixels that are among those found; 0 for no area."""
    pixels = int(np.count_nonzero(area))
    return float(np.count_nonzero(found & area) / max(1, pixels))


def find_flat(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels, but for the first row and column, that are as one neighbour: above or to the left."""
    green = picture[:, :, 1]
    above = cv2.absdiff(green[1:, 1:], green[:-1, 1:])
    left = cv2.absdiff(green[1:, 1:], green[1:, :-1])
    return np.minimum(above, left) <= FLAT_STEP


def draw_overlay(
    picture: NDArray[np.uint8], repaint: NDArray[np.bool_], crop: Box, max_side_px: int
) -> NDArray[np.uint8]:
    """The picture in small, `(h, w, 3)`, the mask in colour over it, and the crop as a box.

    A pixel is coloured if any of the mask is in it, so that thin strokes show.
    """
    height, width = repaint.shape
    across, down = fit_within(width, height, max_side_px)
    small = resize(picture, across, down, Resampling.BOX)
    covered = resize(repaint.view(np.uint8) * np.uint8(255), across, down, Resampling.BOX) > 0
    result = small.copy()
    colour = colour_over(small[covered])
    result[covered] = np.rint(small[covered] * (1 - OVERLAY_SHARE) + colour * OVERLAY_SHARE).astype(
        np.uint8
    )
    outline = covered & ~cv2.erode(covered.view(np.uint8), np.ones((3, 3), np.uint8)).view(np.bool_)
    result[outline] = colour
    start = crop.left * across // width, crop.top * down // height
    end = -(-crop.right * across // width) - 1, -(-crop.bottom * down // height) - 1  # rounded up
    cv2.rectangle(result, start, end, BELOW_CROP, 4)
    cv2.rectangle(result, start, end, CROP_COLOUR, 2)
    return result


def colour_over(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The overlay's colour over these pixels `(n, 3)`."""
    if not len(pixels):
        return np.asarray(COLOURS[0])
    distances = np.linalg.norm(COLOURS - pixels.mean(axis=0), axis=1)
    return np.asarray(COLOURS[distances.argmax()])

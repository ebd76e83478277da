"""What a mask does to a picture: which pixels are repainted, and how the result is put together.

White is repainted, black kept; how files say so is `mask_reading.py`. Everything the client kept
stays bit for bit; the soft seam between old and new pixels is made of repainted ones only.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from models.imaging.mask_reading import JPEG_NOISE, REPAINTED_FROM

COLOUR_RING_PX = (8, 24)
"""Distances from the mask at which colours are compared. Nearer pixels may be new ones, since the
model repaints whole latent cells of 8 px."""

MAX_COLOUR_SHIFT = 24
"""More, in steps of 255, is no drift of the model's, but a picture that differs."""


class Box(NamedTuple):
    """Pixel columns `left` to `right` and rows `top` to `bottom`, the ends excluded."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def pixels(self) -> tuple[slice, slice]:
        """The index of these pixels in an array."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, margin_px: int, shape: tuple[int, ...]) -> "Box":
        """With a margin on each side, as far as an array of this shape `(h, w)` has pixels."""
        return Box(
            max(0, self.left - margin_px),
            max(0, self.top - margin_px),
            min(shape[1], self.right + margin_px),
            min(shape[0], self.bottom + margin_px),
        )


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How well a result keeps what the mask protects.

    coverage: share of repainted pixels, 0 to 1.
    box: around the repainted pixels; None without any.
    changed_outside: kept pixels that differ from the init image in any channel.
    largest_difference_outside: over the kept pixels and their channels, 0 to 255.
    """

    coverage: float
    box: Box | None
    changed_outside: int
    largest_difference_outside: int


def binarise(mask_image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """True where the picture is repainted: diffusers' `mask >= 0.5` on values divided by 255."""
    return mask_image >= REPAINTED_FROM


def read_strengths(mask_image: NDArray[np.uint8], *, is_soft: bool) -> NDArray[np.uint8]:
    """How much each pixel is repainted: 0 not at all, 255 in full; between only where `is_soft`."""
    if not is_soft:
        return binarise(mask_image).astype(np.uint8) * np.uint8(255)
    strengths = mask_image.copy()
    strengths[mask_image < JPEG_NOISE] = 0
    strengths[mask_image > 255 - JPEG_NOISE] = 255
    return strengths


def grow(strengths: NDArray[np.uint8], radius_px: int) -> NDArray[np.uint8]:
    """The strongest, or for a negative radius the weakest, value within a disc around each pixel.

    What lies beyond the picture's border counts as neither kept nor repainted.
    """
    low, high = int(strengths.min()), int(strengths.max())
    strong = strengths == high
    if (strong | (strengths == low)).all():
        # With two values a distance transform gives the same result, and its time does not grow
        # with the disc: a tenth of the 1.5 s that the morphology below takes for 4 megapixels and
        # 64 px.
        if radius_px > 0:
            grown = is_within(strong, radius_px)
        else:
            grown = ~is_within(~strong, -radius_px)
        return np.where(grown, np.uint8(high), np.uint8(low))
    offsets = np.arange(-abs(radius_px), abs(radius_px) + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius_px**2).astype(np.uint8)
    morph = cv2.dilate if radius_px > 0 else cv2.erode
    return np.asarray(morph(strengths, disc), np.uint8)


def is_within(area: NDArray[np.bool_], radius_px: int) -> NDArray[np.bool_]:
    """Whether each pixel is in the area, or at most so far from one that is."""
    distance = cv2.distanceTransform((~area).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # The next distance that there is, the root of a whole number, is twice as far beyond.
    return np.asarray(distance <= radius_px + 1 / (4 * radius_px + 2), np.bool_)


def depths(area: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance in px of each pixel from the nearest one outside the area, at most 1,000."""
    distance = cv2.distanceTransform(area.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # OpenCV's last digit depends on where the array lies in memory; the squares are whole numbers.
    return np.sqrt(np.rint(np.square(np.minimum(distance, 1_000))))


def seam_weights(repaint: NDArray[np.bool_], seam_px: int = 4) -> NDArray[np.float32]:
    """Share of the generated picture in each pixel, `(h, w)`, 0 to 1.

    Exactly 0 outside the mask, then rising inside it to 1, at a depth of `seam_px` or of half the
    largest depth nearby, whichever is less: the middle of a thin stroke is repainted in full.
    There is no seam along the picture's own border.
    """
    weights = repaint.astype(np.float32)
    box = bounding_box(repaint)
    if seam_px == 0 or box is None:
        return weights
    # All kept pixels that matter are at most one pixel away from the box, where there are any. The
    # outside of the picture does not count as kept, which leaves its border without a seam.
    around = box.grown(1, repaint.shape).pixels
    depth = depths(np.ascontiguousarray(repaint[around]))
    reach = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * seam_px + 1, 2 * seam_px + 1))
    rim = np.clip(cv2.dilate(depth, reach) / 2, 1, seam_px)
    weights[around] = np.clip(depth / rim, 0, 1)
    return weights


def blur_reach(sigma_px: int) -> int:
    """Pixels beyond the mask that `blur_weights` touches: A1111's kernel, cut at 2.5 sigma."""
    return int(2.5 * sigma_px + 0.5)


def blur_weights(repaint: NDArray[np.bool_], sigma_px: int) -> NDArray[np.float32]:
    """Share of the generated picture in each pixel, `(h, w)`: the mask under a Gaussian.

    Exactly 0 and 1 farther than `blur_reach` from the mask's edge. Agrees with A1111's `mask_blur`
    (`modules/processing.py`), but keeps what touches the picture's border at full weight there.
    """
    side = 2 * blur_reach(sigma_px) + 1
    weights = cv2.GaussianBlur(
        repaint.astype(np.float32), (side, side), sigma_px, borderType=cv2.BORDER_REPLICATE
    )
    weights[weights > 1 - 1e-5] = 1  # the kernel's sum is 1 up to rounding only
    return np.asarray(weights, np.float32)


def paste_back(
    init_image: NDArray[np.uint8], generated: NDArray[np.uint8], weights: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Both pictures `(h, w, 3)` in one, `(h, w)` weights being the generated one's share.

    Pixels of weight 0 equal the init image exactly, those of weight 1 the generated one.
    """
    result = init_image.copy()
    box = bounding_box(weights > 0)
    if box is None:
        return result
    part = init_image[box.pixels].copy()
    generated = np.ascontiguousarray(generated[box.pixels])
    weights = np.ascontiguousarray(weights[box.pixels])
    seam = np.nonzero((weights > 0) & (weights < 1))
    old = part[seam].astype(np.float32)
    blend = old + weights[seam][:, np.newaxis] * (generated[seam] - old)
    cv2.copyTo(generated, (weights > 0).view(np.uint8), part)
    part[seam] = np.rint(blend).astype(np.uint8)
    result[box.pixels] = part
    return result


def match_colours(
    init_image: NDArray[np.uint8], generated: NDArray[np.uint8], repaint: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """The generated picture with each channel shifted so that a ring of kept pixels agrees in mean.

    The shift is whole steps of 255, at most `MAX_COLOUR_SHIFT` of them. Without a mask, or without
    pixels in the ring, there is none.
    """
    if repaint.all() or not repaint.any():
        return generated
    distance = depths(~repaint)
    ring = (distance > COLOUR_RING_PX[0]) & (distance <= COLOUR_RING_PX[1])
    if not ring.any():
        return generated
    drift = (init_image[ring].astype(np.float64) - generated[ring]).mean(axis=0)  # (3,)
    shift = np.rint(drift.clip(-MAX_COLOUR_SHIFT, MAX_COLOUR_SHIFT)).astype(np.int16)
    shifted: NDArray[np.int16] = generated + shift
    return shifted.clip(0, 255).astype(np.uint8)


def measure_fidelity(
    init_image: NDArray[np.uint8], result: NDArray[np.uint8], repaint: NDArray[np.bool_]
) -> Fidelity:
    """init_image, result: `(h, w, 3)`; repaint: `(h, w)`."""
    difference = cv2.absdiff(init_image, result)
    outside = cv2.bitwise_and(difference, difference, mask=(~repaint).view(np.uint8))
    # Channel by channel, which is several times faster than numpy's maximum over the last axis.
    largest = reduce(cv2.max, cv2.split(outside))
    return Fidelity(
        coverage=np.count_nonzero(repaint) / repaint.size,
        box=bounding_box(repaint),
        changed_outside=cv2.countNonZero(largest),
        largest_difference_outside=int(largest.max()),
    )


def bounding_box(repaint: NDArray[np.bool_]) -> Box | None:
    """The smallest box around all repainted pixels; None without any."""
    left, top, width, height = cv2.boundingRect(repaint.view(np.uint8))
    return Box(left, top, left + width, top + height) if width else None

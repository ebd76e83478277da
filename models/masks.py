"""What a mask does to a picture: which pixels are repainted, and how the result is put together.

White is repainted, black kept. Everything the client kept stays bit for bit; the soft seam between
old and new pixels is made of repainted ones only.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray


class Box(NamedTuple):
    """Pixel columns `left` to `right` and rows `top` to `bottom`, the ends excluded."""

    left: int
    top: int
    right: int
    bottom: int


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
    return mask_image >= 128


def seam_weights(repaint: NDArray[np.bool_], seam_px: int = 4) -> NDArray[np.float32]:
    """Share of the generated picture in each pixel, `(h, w)`, 0 to 1.

    Exactly 0 outside the mask, then rising inside it to 1, at a depth of `seam_px` or of half the
    largest depth nearby, whichever is less: the middle of a thin stroke is repainted in full.
    There is no seam along the picture's own border.
    """
    if seam_px == 0:
        return repaint.astype(np.float32)
    # The outside of the picture does not count as kept, which leaves its border without a seam.
    depth = cv2.distanceTransform(repaint.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    reach = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * seam_px + 1, 2 * seam_px + 1))
    rim = np.clip(cv2.dilate(depth, reach) / 2, 1, seam_px)
    return np.clip(depth / rim, 0, 1).astype(np.float32, copy=False)


def paste_back(
    init_image: NDArray[np.uint8],
    generated: NDArray[np.uint8],
    repaint: NDArray[np.bool_],
    seam_px: int = 4,
) -> NDArray[np.uint8]:
    """The generated picture under the mask, the init image elsewhere, all `(h, w, 3)`.

    Pixels of weight 0 equal the init image exactly, those of weight 1 the generated one.
    """
    weights = seam_weights(repaint, seam_px)
    result = init_image.copy()
    cv2.copyTo(generated, repaint.view(np.uint8), result)
    seam = (weights > 0) & (weights < 1)
    old = init_image[seam].astype(np.float32)
    blend = old + weights[seam][:, np.newaxis] * (generated[seam] - old)
    result[seam] = np.rint(blend).astype(np.uint8)
    return result


def measure_fidelity(
    init_image: NDArray[np.uint8], result: NDArray[np.uint8], repaint: NDArray[np.bool_]
) -> Fidelity:
    """init_image, result: `(h, w, 3)`; repaint: `(h, w)`."""
    # Channel by channel, which is several times faster than numpy's maximum over the last axis.
    difference = reduce(cv2.max, cv2.split(cv2.absdiff(init_image, result)))
    difference[repaint] = 0
    return Fidelity(
        coverage=float(repaint.mean()),
        box=_bounding_box(repaint),
        changed_outside=int(np.count_nonzero(difference)),
        largest_difference_outside=int(difference.max()),
    )


def _bounding_box(repaint: NDArray[np.bool_]) -> Box | None:
    columns, rows = (np.flatnonzero(repaint.any(axis=axis)).tolist() for axis in (0, 1))
    if not rows:
        return None
    return Box(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)

"""Paints the masked part of a picture with the colours around it. Torch-free.

The pull-push method of Gortler et al. 1996, "The Lumigraph", section 3.4.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

GREY = 128
"""The grey level of a picture of which all is repainted, so that no kept colour is left."""


def fill_from_around(image: NDArray[np.uint8], repaint: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """`(h, w, 3)` whose pixels in `repaint`, `(h, w)`, are blurred from the kept ones around them.

    The farther from a kept pixel, the wider the blur. Kept pixels stay as they are.
    """
    if repaint.all():
        return np.full_like(image, GREY)
    known = (~repaint).astype(np.float32)
    filled = fill_unknown(image.astype(np.float32) * known[..., np.newaxis], known)
    return np.where(repaint[..., np.newaxis], np.rint(filled), image).clip(0, 255).astype(np.uint8)


def fill_unknown(colours: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colours `(h, w, 3)` with a value at every pixel, of which one at least is known.

    known: `(h, w)`, 1 where a colour is known and 0 where it is not; colours are 0 there.
    """
    if known.all():
        return colours
    # At half the size each pixel has the mean of the known pixels that it covers.
    half = ((known.shape[1] + 1) // 2, (known.shape[0] + 1) // 2)
    share = np.asarray(cv2.resize(known, half, interpolation=cv2.INTER_AREA))
    sums = np.asarray(cv2.resize(colours, half, interpolation=cv2.INTER_AREA))
    is_known = share > 0
    means = sums / np.where(is_known, share, 1)[..., np.newaxis]
    smaller = fill_unknown(means.astype(np.float32), is_known.astype(np.float32))
    # The filled half is enlarged, and gives the unknown pixels their colours.
    height, width = known.shape
    around = np.asarray(cv2.resize(smaller, (width, height), interpolation=cv2.INTER_LINEAR))
    return np.where(known[..., np.newaxis] > 0, colours, around)

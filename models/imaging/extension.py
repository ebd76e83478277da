"""Outpainting: a picture gets new pixels around it before it is inpainted.

The new pixels repeat those of the picture's edge, and the mask says that they are repainted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.params import Range

NEW_PIXELS = Range(0, 512)
"""Allowed number of new pixels on one side."""


class Placement(NamedTuple):
    """Where a picture lies in the extended one, which has `canvas_width` x `canvas_height`."""

    canvas_width: int
    canvas_height: int
    left: int
    top: int
    width: int
    height: int

    @property
    def margins(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """New rows above and below, and new columns left and right."""
        below = self.canvas_height - self.top - self.height
        right = self.canvas_width - self.left - self.width
        return (self.top, below), (self.left, right)


@dataclass(frozen=True, slots=True)
class Extension:
    """New pixels on each side, counted in pixels of the picture's file, each within `NEW_PIXELS`.

    mask_level: the mask's value in the new pixels: 255, or 0 where the mask is inverted.
    """

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0
    mask_level: int = 255

    @property
    def is_empty(self) -> bool:
        """There are no new pixels."""
        return not (self.left or self.top or self.right or self.bottom)

    def extended(self, width: int, height: int) -> tuple[int, int]:
        """The width and height of a picture of this size with the new pixels."""
        return self.left + width + self.right, self.top + height + self.bottom

    def place(self, own_size: tuple[int, int], canvas_size: tuple[int, int]) -> Placement:
        """Where a picture of `own_size` lies once the extended one is scaled to `canvas_size`.

        Its edges are rounded outwards, so that it has a pixel at least. Nothing is rounded where
        nothing is scaled.
        """
        whole_size = self.extended(*own_size)
        left, width = scaled(self.left, own_size[0], whole_size[0], canvas_size[0])
        top, height = scaled(self.top, own_size[1], whole_size[1], canvas_size[1])
        return Placement(*canvas_size, left, top, width, height)

    def extend_picture(self, pixels: NDArray[np.uint8], place: Placement) -> NDArray[np.uint8]:
        """The picture `(h, w, 3)` with its edge repeated in the new pixels."""
        return np.pad(pixels, (*place.margins, (0, 0)), mode="edge")

    def extend_mask(self, mask: NDArray[np.uint8], place: Placement) -> NDArray[np.uint8]:
        """The mask `(h, w)` with `mask_level` in the new pixels."""
        return np.pad(mask, place.margins, constant_values=np.uint8(self.mask_level))


NO_EXTENSION = Extension()


def scaled(start: int, length: int, whole: int, scaled_whole: int) -> tuple[int, int]:
    """The start and length of a part of a side, once the side has another length."""
    first = start * scaled_whole // whole
    end = -(-(start + length) * scaled_whole // whole)  # rounded up
    return first, end - first

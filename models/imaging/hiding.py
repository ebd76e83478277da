"""Makes the pictures that replace those that the safety checker flags. Torch-free."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

from models.imaging.images import resize
from models.params import FlaggedAs

LONGEST_SIDE_CELLS = 8
"""Cells along the longer side of a blurred or pixelated picture; with so few no shape in it can be
recognised."""

TEXT = "Sensitive content"
GREY, LIGHT_GREY = 96, 224
"""Levels of the background and of the text."""


def hide(image: NDArray[np.uint8], flagged_as: FlaggedAs) -> NDArray[np.uint8]:
    """A picture of the same size, `(h, w, 3)`, in the place of a flagged one."""
    match flagged_as:
        case FlaggedAs.BLANK:
            return np.zeros_like(image)
        case FlaggedAs.BLUR:
            return resized_cells(image, Resampling.BICUBIC)
        case FlaggedAs.PIXELATE:
            return resized_cells(image, Resampling.NEAREST)
        case FlaggedAs.TEXT:
            return written_on_grey(image.shape[1], image.shape[0])


def resized_cells(image: NDArray[np.uint8], resampling: Resampling) -> NDArray[np.uint8]:
    """The mean colours of the picture's cells, enlarged to the picture's size."""
    height, width = image.shape[:2]
    longest = max(height, width)
    across, down = (max(1, round(side * LONGEST_SIDE_CELLS / longest)) for side in (width, height))
    return resize(resize(image, across, down, Resampling.BOX), width, height, resampling)


def written_on_grey(width: int, height: int) -> NDArray[np.uint8]:
    """A grey picture with `TEXT` in its middle."""
    picture = Image.new("RGB", (width, height), (GREY,) * 3)
    font = ImageFont.load_default(size=max(1, min(width / 12, height / 2)))
    ImageDraw.Draw(picture).text(
        (width / 2, height / 2), TEXT, fill=(LIGHT_GREY,) * 3, font=font, anchor="mm"
    )
    return np.array(picture)

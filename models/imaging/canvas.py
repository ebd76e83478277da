"""What the model is given of a job's picture, and how its work comes back into that picture.

Puts together what `masks.py` knows, as `InpaintParams` asks. Torch-free.
"""

import dataclasses
import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from models.imaging.images import resize
from models.imaging.masks import (
    Box,
    blur_reach,
    blur_weights,
    bounding_box,
    grow,
    match_colours,
    paste_back,
    read_strengths,
    seam_weights,
)
from models.params import InpaintParams


@dataclass(frozen=True, slots=True)
class Canvas:
    """The part of the picture the model works on, at the model's size, and the way back.

    init_image: `(h, w, 3)` uint8; strengths: `(h, w)` uint8, 0 is kept, 255 repainted in full,
        between only with soft masks.
    picture: `(H, W, 3)` uint8, the whole init image, of which the canvas shows `box`.
    weights: for each pixel of the box, the share of the generated picture in the result.
    digest: names what the model is given by its content.
    """

    init_image: NDArray[np.uint8] = field(repr=False)
    strengths: NDArray[np.uint8] = field(repr=False)
    picture: NDArray[np.uint8] = field(repr=False)
    box: Box
    weights: NDArray[np.float32] = field(repr=False)
    is_colour_matched: bool = False
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        hasher = hashlib.sha256(repr(self.strengths.shape).encode())
        hasher.update(self.init_image.tobytes())
        hasher.update(self.strengths.tobytes())
        object.__setattr__(self, "digest", hasher.digest())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width at the model's size."""
        height, width = self.strengths.shape
        return height, width

    def put_back(self, generated: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The whole picture with the generated canvas `(h, w, 3)` in its place.

        Outside the box, and where the weight is 0, it equals the init image exactly.
        """
        if self.is_colour_matched:
            generated = match_colours(self.init_image, generated, self.strengths > 0)
        returned = resize(generated, self.box.width, self.box.height, Resampling.LANCZOS)
        pasted = paste_back(self.picture[self.box.pixels], returned, self.weights)
        if pasted.shape == self.picture.shape:
            return pasted
        result = self.picture.copy()
        result[self.box.pixels] = pasted
        return result

    def put_back_small(
        self, generated: NDArray[np.uint8], shrink: int, longest_px: int
    ) -> NDArray[np.uint8]:
        """What `put_back` makes, in small and without matched colours.

        generated: the canvas in any size. The result has 1 / `shrink` of the picture's size, or
        less where a side would be longer than `longest_px`.
        """
        height, width = self.picture.shape[:2]
        longest = max(height, width)
        scale = min(longest // shrink, longest_px) / longest
        down, across = max(1, round(height * scale)), max(1, round(width * scale))
        box = Box(
            self.box.left * across // width,
            self.box.top * down // height,
            -(-self.box.right * across // width),  # rounded up
            -(-self.box.bottom * down // height),
        )
        result = resize(self.picture, across, down, Resampling.BOX).copy()
        result[box.pixels] = paste_back(
            result[box.pixels],
            resize(generated, box.width, box.height, Resampling.LANCZOS),
            resize(self.weights, box.width, box.height, Resampling.BOX),
        )
        return result


def prepare_canvas(
    params: InpaintParams, init_image: NDArray[np.uint8], mask_image: NDArray[np.uint8]
) -> Canvas:
    """init_image: `(H, W, 3)` uint8; mask_image: `(H, W)` uint8, of the same size.

    With `only_masked` any size, otherwise `height` x `width`.
    """
    strengths = strengths_of(params, mask_image)
    box = choose_box(params, strengths > 0)
    part = init_image[box.pixels], strengths[box.pixels]
    size = (params.width, params.height) if params.only_masked else (box.width, box.height)
    return Canvas(
        init_image=resize(np.ascontiguousarray(part[0]), *size, Resampling.LANCZOS),
        strengths=resize_strengths(np.ascontiguousarray(part[1]), *size, is_soft=params.soft_mask),
        picture=init_image,
        box=box,
        weights=choose_weights(params, part[1] > 0),
        is_colour_matched=params.match_colours,
    )


def strengths_of(params: InpaintParams, mask_image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """How much each pixel of the picture is repainted: the mask, inverted and grown as asked."""
    if params.invert_mask:
        mask_image = 255 - mask_image
    strengths = read_strengths(mask_image, is_soft=params.soft_mask)
    return grow(strengths, params.mask_grow) if params.mask_grow else strengths


def masked_area(params: InpaintParams, mask_image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """True where `strengths_of` is above 0, in a fraction of its time where a soft mask grows."""
    hard = dataclasses.replace(params, soft_mask=False, invert_mask=False)
    repaint = strengths_of(dataclasses.replace(params, mask_grow=0), mask_image) > 0
    # The area of a grown mask is the grown area, and two levels grow faster than many.
    return strengths_of(hard, repaint.view(np.uint8) * np.uint8(255)) > 0


def repainted_area(params: InpaintParams, mask_image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """True where the result may differ from the init image: the mask, and its blur's reach."""
    repaint = masked_area(params, mask_image)
    if not params.mask_blur:
        return repaint
    box = choose_box(params, repaint)
    area = repaint.copy()
    area[box.pixels] |= choose_weights(params, repaint[box.pixels]) > 0
    return area


def choose_weights(params: InpaintParams, repaint: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Each pixel's share of the generated picture."""
    if params.mask_blur:
        return blur_weights(repaint, params.mask_blur)
    return seam_weights(repaint)


def choose_box(params: InpaintParams, repaint: NDArray[np.bool_]) -> Box:
    """The pixels the model works on; all of them without `only_masked`, or without a mask."""
    height, width = repaint.shape
    whole = Box(0, 0, width, height)
    masked = bounding_box(repaint) if params.only_masked else None
    if masked is None:
        return whole
    # One kept pixel at least on each side, without which the seam would not see the mask's edge;
    # and room for the blur, which pastes beyond that edge.
    margin = params.only_masked_padding + max(1, blur_reach(params.mask_blur))
    return crop_box(masked, margin, whole, (params.width, params.height))


def crop_box(masked: Box, margin: int, whole: Box, proportions: tuple[int, int]) -> Box:
    """`masked` and a margin, widened to the proportions of the model's picture.

    The margin ends at the picture's border. The wider box is centred on the narrower one where the
    border allows, and shifted where not. If the picture is too small for the proportions, it is
    used from border to border and the model sees it stretched.
    """
    left, top, right, bottom = masked.grown(margin, (whole.bottom, whole.right))
    across, down = proportions
    wanted_width = -(-(bottom - top) * across // down)  # rounded up
    wanted_height = -(-(right - left) * down // across)
    left, right = widen(left, right, wanted_width, whole.right)
    top, bottom = widen(top, bottom, wanted_height, whole.bottom)
    return Box(left, top, right, bottom)


def widen(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """The range made `length` long within 0 to `limit`, around its middle; never shortened."""
    length = max(end - start, min(length, limit))
    first = start - (length - (end - start)) // 2
    first = max(0, min(first, limit - length))
    return first, first + length


def resize_strengths(
    strengths: NDArray[np.uint8], width: int, height: int, *, is_soft: bool
) -> NDArray[np.uint8]:
    """A hard mask covers every pixel it touches, so that thin strokes survive a smaller size."""
    if is_soft:
        return resize(strengths, width, height, Resampling.BILINEAR)
    covered = resize(strengths, width, height, Resampling.BOX)
    return (covered > 0).astype(np.uint8) * np.uint8(255)

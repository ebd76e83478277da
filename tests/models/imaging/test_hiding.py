"""Nothing can be recognised of a picture that is hidden."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.imaging.hiding import GREY, LIGHT_GREY, LONGEST_SIDE_CELLS, hide
from models.params import FlaggedAs

SIZES = [(64, 64), (512, 384), (100, 1_000), (1, 300), (3, 2)]


def stripes(height: int, width: int, period: int) -> NDArray[np.uint8]:
    """Black and white stripes, `period` pixels of both."""
    columns = np.arange(width) % period < period // 2
    return np.repeat(np.where(columns, 255, 0).astype(np.uint8)[None, :, None], height, 0).repeat(
        3, axis=2
    )


@pytest.mark.parametrize("flagged_as", FlaggedAs)
@pytest.mark.parametrize("size", SIZES)
def test_size_and_type_are_kept(flagged_as: FlaggedAs, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    hidden = hide(image, flagged_as)
    assert (hidden.shape, hidden.dtype) == (image.shape, image.dtype)
    assert np.array_equal(hidden, hide(image.copy(), flagged_as))


def test_blank_is_black() -> None:
    assert not hide(stripes(64, 64, 8), FlaggedAs.BLANK).any()


@pytest.mark.parametrize("flagged_as", [FlaggedAs.BLUR, FlaggedAs.PIXELATE])
def test_details_leave_no_trace(flagged_as: FlaggedAs) -> None:
    image = stripes(512, 512, 16)
    hidden = hide(image, flagged_as).astype(int)
    assert image.std() > 100
    assert hidden.std() < 1
    assert abs(hidden.mean() - image.mean()) < 1


@pytest.mark.parametrize("flagged_as", [FlaggedAs.BLUR, FlaggedAs.PIXELATE])
def test_colours_of_large_areas_stay(flagged_as: FlaggedAs) -> None:
    image = np.zeros((256, 512, 3), np.uint8)
    image[:, 256:] = (200, 100, 50)
    hidden = hide(image, flagged_as)
    assert hidden[128, 32].max() < 10
    assert np.abs(hidden[128, 480].astype(int) - (200, 100, 50)).max() < 10


@pytest.mark.parametrize("flagged_as", [FlaggedAs.BLUR, FlaggedAs.PIXELATE])
def test_pictures_of_the_same_cells_cannot_be_told_apart(flagged_as: FlaggedAs) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    cell = 256 // LONGEST_SIDE_CELLS
    mixed = image.copy()
    for box in cells(cell):
        pixels = image[box].reshape(-1, 3)
        mixed[box] = rng.permutation(pixels).reshape(cell, cell, 3)
    assert not np.array_equal(mixed, image)
    # Pillow rounds rows before columns, which is a step of 255 at most, and bicubic adds another.
    apart = hide(mixed, flagged_as).astype(int) - hide(image, flagged_as)
    assert np.abs(apart).max() <= 2


def cells(side: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, side * LONGEST_SIDE_CELLS, side):
        for left in range(0, side * LONGEST_SIDE_CELLS, side):
            yield slice(top, top + side), slice(left, left + side)


def test_pixelated_picture_has_few_colours_and_a_blurred_one_no_edges() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (256, 192, 3), dtype=np.uint8)
    noise[:128] //= 4
    pixelated = hide(noise, FlaggedAs.PIXELATE).reshape(-1, 3)
    assert len(np.unique(pixelated, axis=0)) <= LONGEST_SIDE_CELLS * LONGEST_SIDE_CELLS * 3 / 4
    blurred = hide(noise, FlaggedAs.BLUR).astype(int)
    assert np.abs(np.diff(blurred, axis=0)).max() < 10


@pytest.mark.parametrize("size", [(512, 512), (1_024, 256), (64, 64)])
def test_text_is_in_the_middle_and_does_not_depend_on_the_picture(size: tuple[int, int]) -> None:
    first, second = (
        hide(np.full((*size, 3), value, np.uint8), FlaggedAs.TEXT) for value in (0, 255)
    )
    assert np.array_equal(first, second)
    rows, columns = np.nonzero(first[..., 0] != GREY)
    assert first[..., 0].max() > (GREY + LIGHT_GREY) / 2
    assert np.array_equal(first[..., 0], np.asarray(Image.fromarray(first).convert("L")))
    height, width = size
    assert rows.min() > height * 0.3
    assert rows.max() < height * 0.7
    assert columns.min() > 0
    assert columns.max() < width - 1
    assert columns.max() - columns.min() > width / 2

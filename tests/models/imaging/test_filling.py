"""The masked part takes the colours around it; the rest stays."""

import numpy as np
import pytest
from numpy.typing import NDArray

from models.imaging.filling import GREY, fill_from_around

rng = np.random.default_rng(0)


def hole(height: int, width: int) -> NDArray[np.bool_]:
    repaint = np.zeros((height, width), np.bool_)
    repaint[height // 4 : -height // 4, width // 4 : -width // 4] = True
    return repaint


@pytest.mark.parametrize("size", [(64, 64), (65, 131), (8, 200)])
def test_kept_pixels_stay_and_what_was_masked_has_no_influence(size: tuple[int, int]) -> None:
    image, repaint = rng.integers(0, 256, (*size, 3), dtype=np.uint8), hole(*size)
    other = np.where(repaint[..., None], 255 - image, image).astype(np.uint8)
    filled = fill_from_around(image, repaint)
    assert np.array_equal(filled[~repaint], image[~repaint])
    assert np.array_equal(filled, fill_from_around(other, repaint))


def test_one_colour_around_fills_all() -> None:
    image = np.full((64, 96, 3), (10, 200, 30), np.uint8)
    image[hole(64, 96)] = 255
    assert (fill_from_around(image, hole(64, 96)) == (10, 200, 30)).all()


def test_colours_come_from_the_nearer_side() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 200
    filled = fill_from_around(image, hole(64, 64))
    row = filled[32, 16:48, 0].astype(int)
    assert row[0] < 60
    assert row[-1] > 140
    assert (np.diff(row) >= 0).all(), "from dark to light without steps back"


def test_single_kept_pixel_colours_all() -> None:
    image = rng.integers(0, 256, (40, 24, 3), dtype=np.uint8)
    repaint = np.ones((40, 24), np.bool_)
    repaint[7, 3] = False
    assert (fill_from_around(image, repaint) == image[7, 3]).all()


def test_nothing_kept_is_grey_and_nothing_masked_stays() -> None:
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (fill_from_around(image, np.ones((16, 16), np.bool_)) == GREY).all()
    assert np.array_equal(fill_from_around(image, np.zeros((16, 16), np.bool_)), image)

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from models.masks import Box, Fidelity, binarise, measure_fidelity, paste_back, seam_weights

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def pictures_and_masks(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    height, width = draw(SIZES)
    picture = hnp.arrays(np.uint8, (height, width, 3))
    return draw(picture), draw(picture), draw(hnp.arrays(np.bool_, (height, width)))


def rectangle(height: int, width: int, box: Box) -> NDArray[np.bool_]:
    repaint = np.zeros((height, width), np.bool_)
    repaint[box.top : box.bottom, box.left : box.right] = True
    return repaint


def test_binarise_agrees_with_diffusers_for_every_grey() -> None:
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(binarise(greys), greys.astype(np.float32) / 255 >= 0.5)


def test_binarise_threshold_is_128() -> None:
    assert binarise(np.array([[127, 128]], np.uint8)).tolist() == [[False, True]]


@given(SIZES.flatmap(lambda size: hnp.arrays(np.bool_, size)), st.integers(0, 9))
def test_seam_lies_inside_the_mask(repaint: NDArray[np.bool_], seam_px: int) -> None:
    weights = seam_weights(repaint, seam_px)
    assert weights.dtype == np.float32
    assert weights.shape == repaint.shape
    assert np.array_equal(weights > 0, repaint)
    assert weights.max() <= 1


@given(SIZES.flatmap(lambda size: hnp.arrays(np.bool_, size)))
def test_no_seam_is_the_mask_itself(repaint: NDArray[np.bool_]) -> None:
    assert np.array_equal(seam_weights(repaint, 0), repaint.astype(np.float32))


@pytest.mark.parametrize("seam_px", [1, 4, 9])
def test_seam_rises_until_its_depth(seam_px: int) -> None:
    repaint = rectangle(96, 96, Box(16, 16, 80, 80))
    profile = seam_weights(repaint, seam_px)[48, 15 : 17 + seam_px]
    assert profile[0] == 0
    assert profile[seam_px:].tolist() == [1, 1]
    assert (np.diff(profile[: seam_px + 1]) > 0).all()


@pytest.mark.parametrize("thickness", [1, 2, 3, 4, 5, 9])
def test_middle_of_a_stroke_is_repainted_in_full(thickness: int) -> None:
    repaint = rectangle(40, 64, Box(10, 20, 50, 20 + thickness))
    weights = seam_weights(repaint, 4)
    assert weights[20 + thickness // 2, 20:40].tolist() == [1] * 20
    assert weights[20 + (thickness - 1) // 2, 20:40].tolist() == [1] * 20


def test_diagonal_scratch_is_repainted_in_full() -> None:
    repaint = np.eye(32, dtype=np.bool_)
    assert np.array_equal(seam_weights(repaint), repaint.astype(np.float32))


def test_stroke_beside_a_large_area_keeps_its_middle() -> None:
    repaint = rectangle(64, 96, Box(0, 0, 40, 64)) | rectangle(64, 96, Box(55, 0, 58, 64))
    assert seam_weights(repaint, 4)[32, 54:59].tolist() == [0, 1, 1, 1, 0]


def test_no_seam_along_the_border_of_the_picture() -> None:
    weights = seam_weights(rectangle(32, 32, Box(0, 0, 16, 32)), 4)
    assert (weights[:, :13] == 1).all()
    assert (weights[:, 13:16] < 1).all()
    assert np.array_equal(weights, np.tile(weights[:1], (32, 1)))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (40, 40)])
def test_full_mask_has_no_seam(size: tuple[int, int]) -> None:
    assert (seam_weights(np.ones(size, np.bool_)) == 1).all()


@given(pictures_and_masks(), st.integers(0, 6))
def test_paste_back_keeps_both_pictures_exactly(
    case: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]], seam_px: int
) -> None:
    init_image, generated, repaint = case
    weights = seam_weights(repaint, seam_px)
    result = paste_back(init_image, generated, repaint, seam_px)
    assert result.dtype == np.uint8
    assert np.array_equal(result[weights == 0], init_image[weights == 0])
    assert np.array_equal(result[weights == 1], generated[weights == 1])
    assert (result >= np.minimum(init_image, generated)).all()
    assert (result <= np.maximum(init_image, generated)).all()


@given(pictures_and_masks())
def test_paste_back_rounds_to_the_nearest(
    case: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]],
) -> None:
    init_image, generated, repaint = case
    weights = seam_weights(repaint)[..., np.newaxis].astype(np.float64)
    exact = init_image * (1 - weights) + generated * weights
    assert np.abs(paste_back(init_image, generated, repaint) - exact).max() <= 0.5 + 1e-4


@given(pictures_and_masks())
def test_paste_back_is_faithful_outside_the_mask(
    case: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]],
) -> None:
    init_image, generated, repaint = case
    fidelity = measure_fidelity(init_image, paste_back(init_image, generated, repaint), repaint)
    assert fidelity.changed_outside == 0
    assert fidelity.largest_difference_outside == 0


def test_fidelity_of_a_changed_picture() -> None:
    init_image = np.full((10, 20, 3), 100, np.uint8)
    repaint = rectangle(10, 20, Box(4, 2, 9, 6))
    result = init_image.copy()
    result[repaint] = 255
    result[0, 0] = (100, 93, 101)
    result[9, 19, 2] = 140
    assert measure_fidelity(init_image, result, repaint) == Fidelity(
        coverage=0.1,
        box=Box(left=4, top=2, right=9, bottom=6),
        changed_outside=2,
        largest_difference_outside=40,
    )


def test_fidelity_without_repainted_pixels() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    fidelity = measure_fidelity(picture, picture, np.zeros((4, 4), np.bool_))
    assert fidelity == Fidelity(0.0, None, 0, 0)

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from models.imaging.masks import (
    COLOUR_RING_PX,
    MAX_COLOUR_SHIFT,
    Box,
    Fidelity,
    binarise,
    blur_reach,
    blur_weights,
    bounding_box,
    grow,
    match_colours,
    measure_fidelity,
    paste_back,
    read_strengths,
    seam_weights,
)

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


@given(SIZES.flatmap(lambda size: hnp.arrays(np.bool_, size)))
def test_seam_is_the_same_to_the_bit_wherever_the_mask_lies(repaint: NDArray[np.bool_]) -> None:
    height, width = repaint.shape
    expected = seam_weights(repaint)
    for offset in range(16):
        elsewhere = np.empty(height * width + 16, np.bool_)[offset:][: height * width]
        moved = elsewhere.reshape(height, width)
        moved[:] = repaint
        assert np.array_equal(seam_weights(moved), expected)


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
    result = paste_back(init_image, generated, weights)
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
    weights = seam_weights(repaint)
    shares = weights[..., np.newaxis].astype(np.float64)
    exact = init_image * (1 - shares) + generated * shares
    assert np.abs(paste_back(init_image, generated, weights) - exact).max() <= 0.5 + 1e-4


@given(pictures_and_masks())
def test_paste_back_is_faithful_outside_the_mask(
    case: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]],
) -> None:
    init_image, generated, repaint = case
    result = paste_back(init_image, generated, seam_weights(repaint))
    fidelity = measure_fidelity(init_image, result, repaint)
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


GREYS = SIZES.flatmap(lambda size: hnp.arrays(np.uint8, size))
MASKS = SIZES.flatmap(lambda size: hnp.arrays(np.bool_, size))


@given(GREYS)
def test_hard_mask_has_no_strength_between(mask_image: NDArray[np.uint8]) -> None:
    strengths = read_strengths(mask_image, is_soft=False)
    assert np.array_equal(strengths, np.where(binarise(mask_image), 255, 0))


@given(MASKS)
def test_mask_without_grey_is_read_the_same_soft_or_hard(repaint: NDArray[np.bool_]) -> None:
    mask_image = np.where(repaint, 255, 0).astype(np.uint8)
    assert np.array_equal(read_strengths(mask_image, is_soft=True), mask_image)
    assert np.array_equal(read_strengths(mask_image, is_soft=False), mask_image)


def test_soft_mask_ignores_what_jpeg_does_to_black_and_white() -> None:
    mask_image = np.array([[0, 7, 8, 127, 247, 248, 255]], np.uint8)
    read = read_strengths(mask_image, is_soft=True)
    assert read.tolist() == [[0, 0, 8, 127, 247, 255, 255]]
    assert mask_image[0, 1] == 7


@pytest.mark.parametrize("radius", [1, 2, 5, 9])
def test_growing_one_pixel_makes_a_disc(radius: int) -> None:
    strengths = np.zeros((21, 21), np.uint8)
    strengths[10, 10] = 200
    rows, columns = np.ogrid[-10:11, -10:11]
    disc = rows**2 + columns**2 <= radius**2
    assert np.array_equal(grow(strengths, radius), np.where(disc, 200, 0))


@given(MASKS, st.integers(1, 20), st.booleans())
def test_hard_masks_grow_as_soft_ones(
    repaint: NDArray[np.bool_], radius: int, is_growing: bool
) -> None:
    """The short way for two values against the disc itself, which a third value asks for."""
    strengths = repaint.astype(np.uint8) * np.uint8(200)
    # Far enough off, in a corner, not to be seen from the mask.
    height, width = strengths.shape
    framed = np.pad(strengths, ((0, 2 * radius + 1), (0, 0)), mode="edge")
    framed[-1, -1] = 100
    size = radius if is_growing else -radius
    whole = np.pad(strengths, ((0, 2 * radius + 1), (0, 0)), mode="edge")
    assert np.array_equal(grow(whole, size)[:height], grow(framed, size)[:height])


@given(GREYS, st.integers(1, 6))
def test_shrinking_is_growing_what_is_kept(strengths: NDArray[np.uint8], radius: int) -> None:
    assert np.array_equal(grow(strengths, -radius), 255 - grow(255 - strengths, radius))


@given(GREYS, st.integers(1, 5))
def test_growth_only_adds_and_more_adds_more(strengths: NDArray[np.uint8], radius: int) -> None:
    assert (grow(strengths, radius) >= strengths).all()
    assert (grow(strengths, radius + 1) >= grow(strengths, radius)).all()
    assert (grow(strengths, -radius) <= strengths).all()


@pytest.mark.parametrize("radius", [-64, -3, 3, 64])
def test_full_and_empty_masks_neither_grow_nor_shrink(radius: int) -> None:
    for value in (0, 255):
        strengths = np.full((30, 40), value, np.uint8)
        assert np.array_equal(grow(strengths, radius), strengths)


def test_shrinking_leaves_the_border_of_the_picture_alone() -> None:
    left_half = rectangle(20, 20, Box(0, 0, 10, 20)).astype(np.uint8) * np.uint8(255)
    assert bounding_box(grow(left_half, -4) > 0) == Box(0, 0, 6, 20)


@given(MASKS, st.integers(1, 12))
def test_blur_is_a_share(repaint: NDArray[np.bool_], sigma: int) -> None:
    weights = blur_weights(repaint, sigma)
    assert weights.dtype == np.float32
    assert weights.shape == repaint.shape
    assert weights.min() >= 0
    assert weights.max() <= 1


@pytest.mark.parametrize("sigma", [1, 4, 20, 64])
def test_blur_reaches_as_far_as_it_says_and_no_farther(sigma: int) -> None:
    reach = blur_reach(sigma)
    weights = blur_weights(rectangle(3, 2 * reach + 20, Box(0, 0, reach + 10, 3)), sigma)
    edge = reach + 10
    assert (weights[:, : edge - reach] == 1).all()
    assert (weights[:, edge + reach :] == 0).all()
    assert (np.diff(weights[1, edge - reach - 1 : edge + reach + 1]) < 0).all()
    assert weights[1, edge - 1] + weights[1, edge] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sigma", [1, 64])
def test_blur_of_full_and_empty_masks_is_exact(sigma: int) -> None:
    assert (blur_weights(np.ones((30, 40), np.bool_), sigma) == 1).all()
    assert (blur_weights(np.zeros((30, 40), np.bool_), sigma) == 0).all()


def flat(height: int, width: int, *colour: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), colour, np.uint8)


HOLE = rectangle(96, 96, Box(40, 40, 56, 56))


def test_colours_are_shifted_to_those_around_the_mask() -> None:
    init_image, generated = flat(96, 96, 100, 120, 140), flat(96, 96, 103, 115, 140)
    generated[HOLE] = (200, 253, 2)
    matched = match_colours(init_image, generated, HOLE)
    assert np.array_equal(matched[~HOLE], init_image[~HOLE])
    assert matched[48, 48].tolist() == [197, 255, 2]


@given(pictures_and_masks())
def test_colours_that_agree_are_left_alone(
    case: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]],
) -> None:
    init_image, generated, repaint = case
    generated = np.where(repaint[..., np.newaxis], generated, init_image)
    assert np.array_equal(match_colours(init_image, generated, repaint), generated)


def test_only_a_ring_around_the_mask_is_compared() -> None:
    rows, columns = np.ogrid[:96, :96]
    down, across = (np.maximum(np.maximum(40 - each, each - 55), 0) for each in (rows, columns))
    distance = np.hypot(down, across)
    init_image, generated = flat(96, 96, 100, 100, 100), flat(96, 96, 100, 100, 100)
    nearest, farthest = COLOUR_RING_PX
    generated[(distance <= nearest) | (distance > farthest)] = 255
    assert np.array_equal(match_colours(init_image, generated, HOLE), generated)


def test_colour_shift_is_bounded() -> None:
    matched = match_colours(flat(96, 96, 0, 0, 0), flat(96, 96, 200, 200, 200), HOLE)
    assert (matched == 200 - MAX_COLOUR_SHIFT).all()


@pytest.mark.parametrize(
    "repaint",
    [
        np.ones((96, 96), np.bool_),
        np.zeros((96, 96), np.bool_),
        rectangle(96, 96, Box(0, 0, 96, 92)),  # what is kept is too near
    ],
    ids=["full", "empty", "nearly full"],
)
def test_without_a_ring_no_colour_is_shifted(repaint: NDArray[np.bool_]) -> None:
    generated = flat(96, 96, 200, 200, 200)
    assert np.array_equal(match_colours(flat(96, 96, 0, 0, 0), generated, repaint), generated)

"""Where the model's part of a picture lies, and that it comes back to the very same place."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.imaging.canvas import (
    Canvas,
    crop_box,
    masked_area,
    prepare_canvas,
    repainted_area,
    strengths_of,
    widen,
)
from models.imaging.masks import Box, blur_reach, bounding_box, seam_weights
from models.params import InpaintParams

SIDES = st.integers(64 // 8, 1024 // 8).map(lambda n: n * 8)


def make_params(**changes: Any) -> InpaintParams:
    defaults = {"prompt": "", "seed": 0, "width": 128, "height": 96, "only_masked": True}
    return InpaintParams(**{**defaults, **changes})


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(height: int, width: int, box: Box) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[box.pixels] = 255
    return mask


@st.composite
def boxes_in_pictures(draw: st.DrawFn) -> tuple[Box, Box]:
    """A box that is not empty, and the picture around it."""
    width, height = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return Box(left, top, right, bottom), Box(0, 0, width, height)


@given(boxes_in_pictures(), st.integers(0, 500), SIDES, SIDES)
def test_crop_holds_the_mask_and_its_margin(
    case: tuple[Box, Box], margin: int, width: int, height: int
) -> None:
    masked, whole = case
    crop = crop_box(masked, margin, whole, (width, height))

    assert 0 <= crop.left <= max(0, masked.left - margin)
    assert 0 <= crop.top <= max(0, masked.top - margin)
    assert min(whole.right, masked.right + margin) <= crop.right <= whole.right
    assert min(whole.bottom, masked.bottom + margin) <= crop.bottom <= whole.bottom


@given(boxes_in_pictures(), st.integers(0, 500), SIDES, SIDES)
def test_crop_has_the_models_proportions_or_ends_at_both_borders(
    case: tuple[Box, Box], margin: int, width: int, height: int
) -> None:
    masked, whole = case
    crop = crop_box(masked, margin, whole, (width, height))

    # More than the rounding of either side explains.
    exact_width, exact_height = crop.height * width / height, crop.width * height / width
    too_narrow = crop.width < exact_width - 1 and crop.height > exact_height + 1
    too_low = crop.height < exact_height - 1 and crop.width > exact_width + 1
    assert not too_narrow or crop.width == whole.width
    assert not too_low or crop.height == whole.height


@given(boxes_in_pictures(), SIDES, SIDES)
def test_crop_is_no_larger_than_the_proportions_need(
    case: tuple[Box, Box], width: int, height: int
) -> None:
    masked, whole = case
    crop = crop_box(masked, 0, whole, (width, height))

    assert crop.width == masked.width or crop.height == masked.height


@given(st.integers(0, 99), st.integers(1, 99), st.integers(1, 300), st.integers(0, 99))
def test_widened_range_keeps_its_middle_where_the_border_allows(
    start: int, size: int, length: int, beyond: int
) -> None:
    end, limit = start + size, start + size + beyond
    first, last = widen(start, end, length, limit)

    assert first <= start < end <= last <= limit
    assert last - first == max(size, min(length, limit))
    if first > 0 and last < limit:
        assert abs((first + last) - (start + end)) <= 1


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        (Box(400, 300, 420, 310), Box(371, 276, 449, 334)),
        (Box(0, 0, 20, 20), Box(0, 0, 59, 44)),
        (Box(780, 580, 800, 600), Box(741, 556, 800, 600)),
        (Box(0, 290, 800, 300), Box(0, 0, 800, 600)),
        (Box(300, 0, 310, 600), Box(0, 0, 800, 600)),
    ],
)
def test_crops_of_a_picture_of_800_by_600(masked: Box, expected: Box) -> None:
    crop = crop_box(masked, 24, Box(0, 0, 800, 600), (128, 96))

    assert (crop.width, crop.height) == (expected.width, expected.height)
    assert crop == expected


def test_without_only_masked_the_canvas_is_the_picture() -> None:
    picture, mask = noise(96, 128), mask_of(96, 128, Box(3, 5, 40, 50))
    canvas = prepare_canvas(make_params(only_masked=False), picture, mask)

    assert canvas.box == Box(0, 0, 128, 96)
    np.testing.assert_array_equal(canvas.init_image, picture)
    np.testing.assert_array_equal(canvas.strengths, mask)
    np.testing.assert_array_equal(canvas.weights, seam_weights(mask > 0))


@pytest.mark.parametrize("padding", [0, 1, 32, 256])
@pytest.mark.parametrize(
    "box", [Box(100, 80, 103, 82), Box(0, 0, 9, 9), Box(50, 40, 250, 170), Box(0, 0, 300, 200)]
)
def test_returned_canvas_changes_nothing_outside_the_mask(box: Box, padding: int) -> None:
    picture, mask = noise(200, 300), mask_of(200, 300, box)
    canvas = prepare_canvas(make_params(only_masked_padding=padding), picture, mask)
    generated = np.full((96, 128, 3), 77, np.uint8)
    result = canvas.put_back(generated)

    assert canvas.init_image.shape == (96, 128, 3)
    assert canvas.strengths.shape == (96, 128)
    assert (canvas.strengths > 0).any()
    np.testing.assert_array_equal(result[mask == 0], picture[mask == 0])
    weights = seam_weights(mask > 0)
    assert (result[weights == 1] == 77).all()
    np.testing.assert_array_equal(canvas.weights, weights[canvas.box.pixels])


@pytest.mark.parametrize("padding", [0, 32])
@pytest.mark.parametrize("blur", [1, 8, 64])
def test_crop_has_room_for_the_blur(blur: int, padding: int) -> None:
    picture, mask = noise(600, 800), mask_of(600, 800, Box(390, 290, 420, 310))
    params = make_params(mask_blur=blur, only_masked_padding=padding)
    canvas = prepare_canvas(params, picture, mask)
    changed = bounding_box((canvas.put_back(255 - canvas.init_image) != picture).any(axis=2))
    reach = blur_reach(blur)

    whole = prepare_canvas(make_params(mask_blur=blur, only_masked=False), picture, mask).weights
    np.testing.assert_allclose(canvas.weights, whole[canvas.box.pixels], atol=1e-6)
    assert whole.sum() == pytest.approx(canvas.weights.sum(), rel=1e-5)
    assert changed is not None
    assert min(changed.left - 390, changed.top - 290) >= -reach
    assert max(changed.right - 420, changed.bottom - 310) <= reach


def pattern(height: int, width: int) -> NDArray[np.uint8]:
    """Soft shapes of many sizes: detail at every place, none too fine for a smaller size."""
    blurred = cv2.GaussianBlur(noise(height, width).astype(np.float32), (0, 0), 6)
    spread = (blurred - blurred.mean()) / blurred.std()
    picture: NDArray[np.uint8] = (spread * 40 + 128).clip(0, 255).astype(np.uint8)
    return picture


def shift_of(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Pixels by which the second picture is moved against the first: Lucas and Kanade 1981."""
    before, after = (each.mean(axis=2) for each in (first, second))
    slopes = np.stack([slope.ravel() for slope in np.gradient((before + after) / 2)], axis=1)
    moved, *_ = np.linalg.lstsq(slopes, (before - after).ravel(), rcond=None)
    return float(np.abs(moved).max())


@pytest.mark.parametrize("pixels", [0.0, 0.25, 1.0])
def test_shift_is_measured_in_parts_of_a_pixel(pixels: float) -> None:
    picture = pattern(200, 300)
    move = np.array([[1, 0, pixels], [0, 1, 0]], np.float64)
    moved = np.asarray(cv2.warpAffine(picture, move, (300, 200)), np.uint8)
    inside = np.s_[10:-10, 10:-10]

    assert shift_of(picture[inside], moved[inside]) == pytest.approx(pixels, abs=0.05)


@pytest.mark.parametrize("padding", [0, 17, 200])
@pytest.mark.parametrize("box", [Box(101, 83, 162, 129), Box(5, 7, 395, 290), Box(0, 0, 71, 43)])
@pytest.mark.parametrize(("width", "height"), [(128, 96), (96, 160), (256, 256), (512, 64)])
def test_canvas_returns_without_a_shift(box: Box, padding: int, width: int, height: int) -> None:
    """A model that answers with what it was given leaves every edge in its place."""
    picture, mask = pattern(301, 403), mask_of(301, 403, box)
    params = make_params(width=width, height=height, only_masked_padding=padding)
    canvas = prepare_canvas(params, picture, mask)
    result = canvas.put_back(canvas.init_image)

    np.testing.assert_array_equal(result[mask == 0], picture[mask == 0])
    before, after = (each[box.pixels] for each in (picture, result))
    assert shift_of(before, after) < 0.05


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 136), (512, 512)])
def test_edges_stay_where_they_are(width: int, height: int) -> None:
    """Straight edges, measured to parts of a pixel, after the way there and back."""
    picture = np.full((240, 320, 3), 40, np.uint8)
    picture[:, 157:] = 210
    picture[123:, :157] = 130
    canvas = prepare_canvas(
        make_params(width=width, height=height), picture, mask_of(240, 320, Box(90, 60, 230, 190))
    )
    result = canvas.put_back(canvas.init_image).astype(np.float64)

    upright = (result[70:110, 140:175, 0].mean(axis=0) - 40).sum() / 170
    level = (result[108:138, 100:140, 0].mean(axis=1) - 40).sum() / 90
    assert upright == pytest.approx(175 - 157, abs=0.1)
    assert level == pytest.approx(138 - 123, abs=0.1)


def test_canvas_of_the_models_own_size_is_exact() -> None:
    """Without a change of scale what the model returns is what is pasted."""
    picture, mask = noise(400, 400), mask_of(400, 400, Box(150, 160, 212, 190))
    params = make_params(only_masked_padding=32, width=128, height=96)
    canvas = prepare_canvas(params, picture, mask)

    assert (canvas.box.width, canvas.box.height) == (128, 96)
    np.testing.assert_array_equal(canvas.init_image, picture[canvas.box.pixels])
    np.testing.assert_array_equal(canvas.put_back(canvas.init_image), picture)


def test_box_larger_than_the_models_picture_is_scaled_down_and_back() -> None:
    picture, mask = pattern(600, 800), mask_of(600, 800, Box(40, 40, 760, 560))
    canvas = prepare_canvas(make_params(), picture, mask)
    result = canvas.put_back(canvas.init_image)

    assert (canvas.box.width, canvas.box.height) == (786, 590)
    assert result.shape == picture.shape
    assert np.abs(result.astype(np.int16) - picture).mean() < 3


def test_thin_stroke_survives_a_smaller_size() -> None:
    mask = np.zeros((600, 800), np.uint8)
    mask[10:590, 400] = 255
    canvas = prepare_canvas(make_params(), noise(600, 800), mask)

    assert (canvas.strengths.max(axis=1)[2:-2] == 255).all()


@pytest.mark.parametrize(
    "changes", [{}, {"invert_mask": True}, {"mask_grow": -3}, {"soft_mask": True}], ids=str
)
def test_empty_mask_changes_nothing(changes: dict[str, Any]) -> None:
    picture, mask = noise(200, 300), np.zeros((200, 300), np.uint8)
    if "invert_mask" in changes:
        mask = 255 - mask
    if "mask_grow" in changes:
        mask[50:56, 50:56] = 255
    params = make_params(mask_blur=8, match_colours=True, **changes)
    canvas = prepare_canvas(params, picture, mask)

    assert canvas.init_image.shape == (96, 128, 3)
    np.testing.assert_array_equal(canvas.put_back(255 - canvas.init_image), picture)


def canvas_of(mask: NDArray[np.uint8], **changes: Any) -> Canvas:
    return prepare_canvas(make_params(only_masked=False, **changes), noise(*mask.shape), mask)


@pytest.mark.parametrize("soft", [False, True])
def test_inverted_mask_is_the_mask_of_the_opposite_colours(soft: bool) -> None:
    mask = noise(96, 128)[..., 0]
    inverted = canvas_of(mask, invert_mask=True, soft_mask=soft)
    opposite = canvas_of(255 - mask, soft_mask=soft)

    np.testing.assert_array_equal(inverted.strengths, opposite.strengths)
    np.testing.assert_array_equal(inverted.weights, opposite.weights)
    if not soft:
        np.testing.assert_array_equal(inverted.strengths, 255 - canvas_of(mask).strengths)


def test_inverting_comes_before_growing() -> None:
    mask = mask_of(96, 128, Box(40, 40, 80, 60))
    kept = canvas_of(mask, invert_mask=True, mask_grow=5).strengths == 0

    assert bounding_box(kept) == Box(45, 45, 75, 55)


def test_soft_mask_is_repainted_wherever_it_is_not_black() -> None:
    ramp = np.tile(np.arange(128, dtype=np.uint8) * 2, (96, 1))
    canvas = canvas_of(ramp, soft_mask=True)

    assert np.unique(canvas.strengths).size > 100
    np.testing.assert_array_equal(canvas.weights > 0, ramp >= 8)


def test_soft_mask_keeps_its_greys_at_another_size() -> None:
    mask = np.full((200, 300), 90, np.uint8)
    mask[:, :150] = 0
    canvas = prepare_canvas(make_params(soft_mask=True), noise(200, 300), mask)

    assert canvas.strengths.max() == 90
    assert canvas.strengths.min() == 0


def test_canvases_are_told_apart_by_what_the_model_sees() -> None:
    mask = mask_of(96, 128, Box(40, 40, 80, 60))
    plain = canvas_of(mask).digest

    assert plain == canvas_of(mask, mask_blur=9, soft_mask=True, match_colours=True).digest
    others = [
        canvas_of(mask, invert_mask=True),
        canvas_of(mask, mask_grow=1),
        canvas_of(mask // 2, soft_mask=True),
        prepare_canvas(make_params(), noise(96, 128), mask),
    ]
    assert len({plain, *(other.digest for other in others)}) == 5


def test_source_arrays_are_left_as_they_were() -> None:
    picture, mask = noise(96, 128), mask_of(96, 128, Box(20, 20, 60, 60))
    params = make_params(invert_mask=True, mask_grow=4, mask_blur=4, match_colours=True)
    canvas = prepare_canvas(params, picture, mask)
    canvas.put_back(255 - canvas.init_image)

    np.testing.assert_array_equal(picture, noise(96, 128))
    np.testing.assert_array_equal(mask, mask_of(96, 128, Box(20, 20, 60, 60)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask_blur": 5},
        {"mask_grow": 6},
        {"mask_grow": -6},
        {"invert_mask": True, "mask_blur": 3},
        {"soft_mask": True, "mask_blur": 4},
        {"only_masked": True, "mask_blur": 8, "only_masked_padding": 0},
    ],
)
def test_repainted_area_is_all_that_may_change(changes: dict[str, Any]) -> None:
    params = InpaintParams(prompt="", seed=0, width=128, height=128, **changes)
    init_image = np.zeros((128, 128, 3), np.uint8)
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 30:80] = 255
    canvas = prepare_canvas(params, init_image, mask)
    white = np.full_like(canvas.init_image, 255)
    changed = np.asarray(canvas.put_back(white).any(axis=2))
    area = repainted_area(params, mask)
    assert changed.any()
    assert not changed[~area].any()
    assert area.mean() < 1


@pytest.mark.parametrize("grow_px", [-9, 0, 9])
@pytest.mark.parametrize("is_soft", [True, False])
@pytest.mark.parametrize("is_inverted", [True, False])
def test_masked_area_is_where_strengths_are(grow_px: int, is_soft: bool, is_inverted: bool) -> None:
    spots = np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8)
    mask = np.kron(spots, np.ones((12, 12), np.uint8))
    mask[:30, :40] = 0
    mask[30:60] = 255
    params = InpaintParams(
        prompt="", seed=0, mask_grow=grow_px, soft_mask=is_soft, invert_mask=is_inverted
    )
    area = masked_area(params, mask)
    assert 0 < area.mean() < 1
    np.testing.assert_array_equal(area, strengths_of(params, mask) > 0)

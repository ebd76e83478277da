"""What a check finds in masks as people draw them, and how often it is right."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from models.imaging.decoding import ImageLimits, decode_mask
from models.imaging.mask_check import (
    BELOW_CROP,
    COLOURS,
    CROP_COLOUR,
    SPECK_PX,
    MaskCheck,
    MaskFault,
    check_mask,
    draw_overlay,
)
from models.imaging.masks import Box, binarise
from tests.corpora.masks import OBJECTS, OTHERS, Draw, Sample, blob, drawn, extended, photograph
from tests.support.image_files import saved

SIZES = ((640, 480), (384, 600))
SEEDS = range(6)
SIDE = 256
PICTURE = np.asarray(photograph((SIDE, SIDE), 0))


def check(sample: Sample) -> MaskCheck:
    levels = decode_mask(sample.mask, ImageLimits()).pixels
    return check_mask(levels, np.asarray(sample.picture))


def checks_of(draw: Draw, *, is_inverted: bool = False) -> Iterator[MaskCheck]:
    for size in SIZES:
        for seed in SEEDS:
            yield check(drawn(draw, size, seed, is_inverted=is_inverted))


@pytest.mark.parametrize("draw", [*OBJECTS, *OTHERS])
def test_mask_as_meant_has_no_fault(draw: Draw) -> None:
    found = {fault for each in checks_of(draw) for fault in each.faults}
    assert found <= ({MaskFault.GREY_LEVELS} if draw.__name__ == "soft_brush" else set())


@pytest.mark.parametrize("draw", OBJECTS)
def test_inverted_mask_of_objects_is_found(draw: Draw) -> None:
    for each in checks_of(draw, is_inverted=True):
        assert MaskFault.PROBABLY_INVERTED in each.faults
        assert MaskFault.TINY_SPECKS not in each.faults


def test_picture_extended_on_all_sides_is_not_inverted() -> None:
    found = [check(extended(size, seed)) for size in SIZES for seed in SEEDS]
    assert [each.faults for each in found] == [()] * len(found)
    assert max(each.coverage for each in found) > 0.85


def levels_of(*boxes: Box) -> NDArray[np.uint8]:
    levels = np.zeros((SIDE, SIDE), np.uint8)
    for box in boxes:
        levels[box.pixels] = 255
    return levels


SQUARE = levels_of(Box(60, 80, 160, 180))


@pytest.mark.parametrize(
    ("levels", "faults"),
    [
        (levels_of(), {MaskFault.EMPTY}),
        (np.full((SIDE, SIDE), 127, np.uint8), {MaskFault.EMPTY, MaskFault.GREY_LEVELS}),
        (255 - levels_of(), {MaskFault.FULL}),
        (SQUARE, set()),
        (np.maximum(SQUARE, levels_of(Box(10, 10, 14, 14))), {MaskFault.TINY_SPECKS}),
        (np.maximum(SQUARE, levels_of(Box(10, 10, 15, 15))), set()),
        (PICTURE[:, :, 1], {MaskFault.GREY_LEVELS, MaskFault.TINY_SPECKS}),
    ],
    ids=["empty", "grey", "full", "square", "speck", "spot", "photograph"],
)
def test_fault(levels: NDArray[np.uint8], faults: set[MaskFault]) -> None:
    assert {*check_mask(levels, PICTURE).faults} == faults


def test_grey_that_is_asked_for_is_no_fault() -> None:
    ramp = np.broadcast_to(np.arange(SIDE, dtype=np.uint8), (SIDE, SIDE))
    assert check_mask(ramp, PICTURE).faults == (MaskFault.GREY_LEVELS,)
    soft = check_mask(ramp, PICTURE, is_soft=True)
    assert soft.faults == ()
    assert soft.coverage == 1 - 8 / SIDE


@pytest.mark.parametrize(("quality", "is_noisy"), [(40, True), (90, False)])
def test_jpeg_of_low_quality_has_a_noisy_edge(quality: int, is_noisy: bool) -> None:
    mask = blob((640, 480), np.random.default_rng(0))
    levels = decode_mask(saved(mask, "JPEG", quality=quality), ImageLimits()).pixels
    faults = check_mask(levels, np.asarray(photograph(mask.size, 0))).faults
    assert faults == ((MaskFault.NOISY_EDGE,) if is_noisy else ())


def test_regions_and_specks_are_counted() -> None:
    spots = [Box(x, 20, x + 4, 24) for x in (10, 30, 50)]
    found = check_mask(levels_of(*spots, Box(100, 100, 140, 140)), PICTURE)
    assert (found.regions, found.specks) == (4, 3)
    assert spots[0].width * spots[0].height == SPECK_PX


def test_overlay_shows_mask_and_crop() -> None:
    picture = np.full((600, 1200, 3), 90, np.uint8)
    repaint = np.zeros((600, 1200), np.bool_)
    repaint[300, 100:1100] = True  # a hair
    overlay = draw_overlay(picture, repaint, Box(0, 0, 1200, 600), 512)
    assert overlay.shape == (256, 512, 3)
    assert any((overlay[128, 256] == colour).all() for colour in COLOURS)
    assert (overlay[1, 256] == CROP_COLOUR).all()
    assert (overlay[64, 256] == 90).all()


@pytest.mark.parametrize("index", [0, 1])
def test_overlay_differs_from_what_is_below(index: int) -> None:
    picture = np.broadcast_to(COLOURS[index], (64, 64, 3))
    whole = np.ones((64, 64), np.bool_)
    overlay = draw_overlay(picture, whole, Box(8, 8, 56, 56), 64).astype(np.int16)
    below, other = COLOURS[index].astype(np.int16), COLOURS[1 - index].astype(np.int16)
    assert np.abs(overlay[32, 32] - other).sum() < np.abs(overlay[32, 32] - below).sum()


def test_overlay_of_the_smallest_picture() -> None:
    overlay = draw_overlay(
        np.zeros((1, 8192, 3), np.uint8), np.zeros((1, 8192), np.bool_), Box(0, 0, 8192, 1), 512
    )
    assert overlay.shape == (1, 512, 3)
    assert {*map(tuple, overlay[0])} <= {CROP_COLOUR, BELOW_CROP}


@pytest.mark.parametrize("size", [(1, 600), (600, 1), (2, 300), (1, 1)])
@pytest.mark.parametrize("kept", [0, 1, 12])
def test_narrow_picture(size: tuple[int, int], kept: int) -> None:
    levels = np.full(size, 255, np.uint8)
    levels.ravel()[5 : 5 + kept] = 0
    found = check_mask(levels, np.full((*size, 3), 90, np.uint8))
    assert (found.coverage == 1) is (kept == 0 or size == (1, 1))
    assert found.border == pytest.approx(found.coverage, abs=0.01)


def test_noise_is_no_trouble() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    found = check_mask(noise, PICTURE)
    assert found.regions > 200
    assert found.coverage == pytest.approx(binarise(noise).mean())
    assert MaskFault.GREY_LEVELS in found.faults

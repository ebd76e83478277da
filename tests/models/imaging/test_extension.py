"""New pixels around a picture: where they lie, and what is in them."""

import numpy as np
import pytest

from models.imaging.extension import Extension, Placement

PICTURE = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)


def test_picture_stays_exact_and_its_edge_is_repeated() -> None:
    extension = Extension(left=2, top=1, right=3, bottom=4)
    place = extension.place((4, 3), extension.extended(4, 3))
    extended = extension.extend_picture(PICTURE, place)
    assert extended.shape == (8, 9, 3)
    np.testing.assert_array_equal(extended[1:4, 2:6], PICTURE)
    np.testing.assert_array_equal(extended[1:4, 0], PICTURE[:, 0])
    np.testing.assert_array_equal(extended[7, 2:6], PICTURE[2])
    np.testing.assert_array_equal(extended[0, 8], PICTURE[0, 3])


@pytest.mark.parametrize("level", [255, 0])
def test_mask_has_its_level_in_the_new_pixels_alone(level: int) -> None:
    extension = Extension(right=2, mask_level=level)
    mask = np.full((3, 4), 7, np.uint8)
    extended = extension.extend_mask(mask, extension.place((4, 3), (6, 3)))
    np.testing.assert_array_equal(extended, [[7, 7, 7, 7, level, level]] * 3)


@pytest.mark.parametrize(
    ("extension", "own", "canvas", "place"),
    [
        (Extension(left=64), (64, 64), (128, 64), (64, 0, 64, 64)),
        (Extension(left=64), (64, 64), (64, 64), (32, 0, 32, 64)),
        (Extension(left=64, bottom=64), (64, 64), (256, 256), (128, 0, 128, 128)),
        (Extension(left=10, right=10), (80, 80), (96, 80), (9, 0, 78, 80)),
        (Extension(left=512, right=512), (1, 64), (1024, 64), (511, 0, 2, 64)),
        (Extension(), (70, 70), (64, 64), (0, 0, 64, 64)),
    ],
)
def test_place_is_scaled_with_the_whole(
    extension: Extension,
    own: tuple[int, int],
    canvas: tuple[int, int],
    place: tuple[int, int, int, int],
) -> None:
    assert extension.place(own, canvas) == Placement(*canvas, *place)


def test_picture_has_a_pixel_wherever_it_lies() -> None:
    for side in range(0, 513, 37):
        for canvas in range(64, 513, 8):
            extension = Extension(left=side, right=512 - side)
            place = extension.place((1, 1), (canvas, 64))
            assert 1 <= place.width <= 2
            assert 0 <= place.left <= canvas - place.width

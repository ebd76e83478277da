"""Hostile bytes to the two arrays of a job."""

import numpy as np
import pytest

from models.errors import ImageFault
from models.images import ImageLimits
from server.errors import ImageProblem, ImageUnavailable
from server.sandbox import PROBLEM_OF_FAULT, DecodedPair, decode_pair
from tests.http_stub import png_bytes

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=2_000_000, max_side=2_000)


def pair_of(
    init_size: tuple[int, int],
    mask_size: tuple[int, int] = (64, 64),
    width: int | None = None,
    height: int | None = None,
) -> DecodedPair:
    images = {"init_image": png_bytes(*init_size), "mask_image": png_bytes(*mask_size)}
    return decode_pair(images, width, height, LIMITS)


@pytest.mark.parametrize(
    ("own", "asked", "size"),
    [
        ((96, 64), (None, None), (96, 64)),
        ((101, 67), (None, None), (96, 64)),
        ((96, 64), (128, 72), (128, 72)),
        ((96, 64), (192, None), (192, 128)),
        ((96, 64), (None, 128), (192, 128)),
        ((1500, 750), (None, None), (1024, 512)),
        ((10, 10), (None, None), (64, 64)),
        ((1500, 10), (None, None), (1024, 64)),
    ],
)
def test_pair_has_the_size_asked_for_or_its_own(
    own: tuple[int, int], asked: tuple[int | None, int | None], size: tuple[int, int]
) -> None:
    pair = pair_of(own, (64, 64), *asked)
    width, height = size
    assert pair.init_image.shape == (height, width, 3)
    assert pair.mask.shape == (height, width)
    assert pair.init_image.dtype == pair.mask.dtype == np.uint8


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ImageProblem.NOT_AN_IMAGE),
        (b"<html>not found</html>", ImageProblem.NOT_AN_IMAGE),
        (b"GIF89a\x01\x00\x01\x00", ImageProblem.NOT_AN_IMAGE),
        (png_bytes()[:60], ImageProblem.NOT_AN_IMAGE),
        (b"x" * 100_001, ImageProblem.TOO_LARGE),
        (png_bytes(2_001, 1), ImageProblem.TOO_LARGE),
        (png_bytes(1_500, 1_500), ImageProblem.TOO_LARGE),
    ],
    ids=["empty", "html", "gif", "cut off", "bytes", "side", "pixels"],
)
@pytest.mark.parametrize("name", ["init_image", "mask_image"])
def test_problem_names_the_image(name: str, content: bytes, problem: ImageProblem) -> None:
    images = dict.fromkeys(["init_image", "mask_image"], png_bytes()) | {name: content}
    with pytest.raises(ImageUnavailable) as refused:
        decode_pair(images, None, None, LIMITS)
    assert refused.value.problems == {name: problem}


def test_both_images_at_fault_are_named() -> None:
    with pytest.raises(ImageUnavailable) as refused:
        decode_pair({"init_image": b"x", "mask_image": b"y"}, None, None, LIMITS)
    assert set(refused.value.problems) == {"init_image", "mask_image"}


def test_every_fault_of_an_image_has_a_problem() -> None:
    assert set(PROBLEM_OF_FAULT) == set(ImageFault)


def test_pair_survives_storing() -> None:
    generator = np.random.default_rng(0)
    init_image = generator.integers(0, 256, (64, 72, 3), np.uint8)
    mask = generator.integers(0, 256, (64, 72), np.uint8)
    again = DecodedPair.from_bytes(DecodedPair(init_image, mask).to_bytes())
    np.testing.assert_array_equal(again.init_image, init_image)
    np.testing.assert_array_equal(again.mask, mask)
    assert again.mask.flags.c_contiguous


def test_stored_pair_is_never_unpickled() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        DecodedPair.from_bytes(b"\x80\x04N.")

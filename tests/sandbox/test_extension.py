"""Pictures that are extended: their size in the child, and the new pixels in the parent."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import ExifTags, Image

from models.imaging.decoding import ImageLimits
from models.imaging.extension import Extension
from server.core.errors import ImageProblem, ImageUnavailable
from server.sandbox.wire import PICTURE, REPLY, Kind, TargetSize
from tests.corpora import hostile_pictures as hostile
from tests.support.blocking_decoder import BlockingDecoder
from tests.support.http_stub import png_bytes
from tests.support.image_files import saved

pytestmark = pytest.mark.process

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=2_000_000, max_side=1_600)
NOISE = hostile.noise("RGB", 64)
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))
ALL_SIDES = Extension(left=64, top=32, right=8, bottom=24)


@pytest.fixture(scope="module")
def decoder() -> Iterator[BlockingDecoder]:
    decoder = BlockingDecoder(LIMITS, wall_s=60)
    yield decoder
    decoder.close()


def test_picture_and_mask_stay_exact(decoder: BlockingDecoder) -> None:
    images = {"init_image": saved(NOISE), "mask_image": saved(MASK)}
    pair = decoder.decode_pair(images, TargetSize(extension=ALL_SIDES))
    assert pair.init_image.shape == (120, 136, 3)
    inner = np.s_[32:96, 64:128]
    np.testing.assert_array_equal(pair.init_image[inner], np.asarray(NOISE))
    np.testing.assert_array_equal(pair.mask[inner], np.asarray(MASK))
    np.testing.assert_array_equal(pair.init_image[32:96, 0], np.asarray(NOISE)[:, 0])
    outside = np.ones(pair.mask.shape, bool)
    outside[inner] = False
    assert (pair.mask[outside] == 255).all()
    assert pair.notices == ()


@pytest.mark.parametrize("level", [255, 0])
def test_without_a_mask_the_new_pixels_alone_are_repainted(
    decoder: BlockingDecoder, level: int
) -> None:
    extension = Extension(right=64, mask_level=level)
    target = TargetSize(extension=extension)
    pair = decoder.decode_pair({"init_image": saved(NOISE)}, target)
    assert (pair.mask[:, :64] == 255 - level).all()
    assert (pair.mask[:, 64:] == level).all()


@pytest.mark.parametrize(
    ("target", "size", "left"),
    [
        (TargetSize(extension=Extension(left=64)), (128, 64), 64),
        (TargetSize(256, 128, extension=Extension(left=64)), (256, 128), 128),
        (TargetSize(256, None, extension=Extension(left=64)), (256, 128), 128),
        (TargetSize(None, 256, extension=Extension(left=64)), (512, 256), 256),
        (TargetSize(extension=Extension(left=7)), (64, 64), 6),
        (TargetSize(keeps_own_size=True, extension=Extension(left=7)), (71, 64), 7),
    ],
)
def test_size_is_that_of_the_extended_picture(
    decoder: BlockingDecoder, target: TargetSize, size: tuple[int, int], left: int
) -> None:
    images = {"init_image": saved(NOISE), "mask_image": saved(Image.new("L", (30, 30)))}
    pair = decoder.decode_pair(images, target)
    assert pair.mask.shape == size[::-1]
    assert pair.init_image.shape == (*size[::-1], 3)
    assert (pair.mask[:, :left] == 255).all()
    assert not pair.mask[:, left:].any()


def test_sides_are_those_of_the_upright_picture(decoder: BlockingDecoder) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = saved(Image.new("RGB", (96, 64), "red"), exif=exif)
    target = TargetSize(extension=Extension(left=8))
    pair = decoder.decode_pair({"init_image": picture}, target)
    assert pair.mask.shape == (96, 72)
    assert (pair.mask > 0).sum() == 8 * 96


def test_limits_are_those_of_the_extended_picture(decoder: BlockingDecoder) -> None:
    for size in [(1_500, 64), (1_200, 1_200)]:
        images = {"init_image": saved(Image.new("RGB", size))}
        assert decoder.decode_pair(images).mask.shape[1] <= 1_024
        with pytest.raises(ImageUnavailable) as refused:
            decoder.decode_pair(images, TargetSize(extension=Extension(left=500)))
        assert refused.value.problems == {"init_image": ImageProblem.TOO_LARGE}


def test_faulty_pictures_are_named_as_without_an_extension(decoder: BlockingDecoder) -> None:
    images = {"init_image": b"x", "mask_image": png_bytes()}
    with pytest.raises(ImageUnavailable) as refused:
        decoder.decode_pair(images, TargetSize(extension=ALL_SIDES))
    assert refused.value.problems == {"init_image": ImageProblem.NOT_AN_IMAGE}


def test_extended_text_to_image_is_grey(decoder: BlockingDecoder) -> None:
    pair = decoder.decode_pair({}, TargetSize(extension=Extension(left=64)))
    assert pair.mask.shape == (512, 576)
    assert (pair.init_image == 128).all()


@pytest.mark.parametrize("keeps_own_size", [False, True])
@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((64, 64), (128, 64)),
        ((128, 64), (64, 64)),
        ((0, 64), (64, 64)),
        ((1_560, 64), (1_560, 64)),
        ((65_535, 65_535), (65_535, 65_535)),
        ((1_400, 1_400), (1_400, 1_400)),
    ],
)
def test_size_of_a_lying_child_gets_nowhere(
    size: tuple[int, int], stored: tuple[int, int], keeps_own_size: bool
) -> None:
    claim = REPLY.pack(PICTURE, *size, *stored, 1, 0, 0, 0)
    lines = ["import os", "os.write(1, b'R')", "os.read(0, 9)", f"os.write(1, {claim!r})"]
    decoder = BlockingDecoder(LIMITS, program="\n".join(lines))
    target = TargetSize(keeps_own_size=keeps_own_size, extension=Extension(left=64))
    try:
        assert decoder.decode(Kind.INIT_IMAGE, png_bytes(), target) is ImageProblem.DAMAGED
    finally:
        decoder.close()

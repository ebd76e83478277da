"""Masks as clients write them, to what is repainted; ordinary ones always to the same."""

import functools
import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.errors import ImageFault, UnreadableImage
from models.imaging.decoding import DecodedMask, ImageLimits, decode_mask
from models.imaging.mask_reading import MaskReading, MaskRule, marks_nothing
from tests.support.image_files import saved, with_alpha

SIDE = 64
DISC = Image.new("L", (SIDE, SIDE))
ImageDraw.Draw(DISC).ellipse((20, 8, 43, 31), fill=255)
ONES = DISC.point([*[0] * 255, 1])
INSIDE = np.asarray(DISC) > 0
SOFT = DISC.resize((SIDE // 2, SIDE // 2)).resize((SIDE, SIDE))

gradient = Image.linear_gradient("L").resize((SIDE, SIDE))
noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
PHOTO = Image.blend(
    Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))),
    Image.fromarray(noise),
    0.2,
)
QUADRANTS = Image.new("RGB", (SIDE, SIDE), "red")
for place, colour in {(0, 32): "blue", (32, 0): "lime", (32, 32): "yellow"}.items():
    QUADRANTS.paste(colour, (*place, place[0] + 32, place[1] + 32))


def read(data: bytes) -> DecodedMask:
    return decode_mask(data, ImageLimits())


def flat(colour: object, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)  # type: ignore[arg-type]


def labelled(labels: NDArray[np.bool_], *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putdata(labels.astype(np.uint8).ravel().tolist())
    image.putpalette([level for colour in colours for level in colour])
    return image


def inverted(image: Image.Image) -> Image.Image:
    return image.point([255 - level for level in range(256)])


def strokes(colour: str, file_format: str) -> bytes:
    return saved(with_alpha(flat(colour), DISC), file_format)


def numbers(dtype: str, value: int) -> bytes:
    return saved(Image.fromarray(np.where(INSIDE, value, 0).astype(dtype)))


KIND: dict[str, tuple[Callable[[], bytes], MaskReading]] = {
    "0 and 1 in L": (lambda: numbers("u1", 1), MaskReading.NONZERO),
    "0 and 1 in RGB": (
        lambda: saved(Image.merge("RGB", [ONES] * 3)),
        MaskReading.NONZERO,
    ),
    "0 and 1 in the red channel": (
        lambda: saved(Image.merge("RGB", [ONES, flat(0, "L"), flat(0, "L")])),
        MaskReading.NONZERO,
    ),
    "0 and 1 in a grey palette": (
        lambda: saved(labelled(INSIDE, (0, 0, 0), (1, 1, 1))),
        MaskReading.NONZERO,
    ),
    "0 and 1 in 16 bits": (lambda: numbers("<u2", 1), MaskReading.NONZERO),
    "0 and 255 in 16 bits": (lambda: numbers("<u2", 255), MaskReading.LOW_BYTE),
    "labels on black": (
        lambda: saved(labelled(INSIDE, (0, 0, 0), (128, 0, 0))),
        MaskReading.LABELS,
    ),
    "labels on a first colour": (
        lambda: saved(labelled(INSIDE, (128, 64, 128), (220, 20, 60))),
        MaskReading.LABELS,
    ),
    "labels, black last": (
        lambda: saved(labelled(~INSIDE, (0, 0, 142), (0, 0, 0))),
        MaskReading.LABELS,
    ),
    **{
        f"strokes of {colour} in {file_format}": (
            functools.partial(strokes, colour, file_format),
            MaskReading.OPAQUE,
        )
        for colour in ("black", "#303030", "red", "lime", "blue", "yellow", "#ff00ff")
        for file_format in ("PNG", "WEBP")
    },
    "strokes of black in LA": (
        lambda: saved(with_alpha(flat(0, "L"), DISC)),
        MaskReading.OPAQUE,
    ),
    "strokes of red at half strength": (
        lambda: saved(with_alpha(flat("red"), DISC.point([level // 2 for level in range(256)]))),
        MaskReading.OPAQUE,
    ),
    "strokes of black in a palette": (
        lambda: saved(labelled(INSIDE, (0, 0, 0), (0, 0, 0)), transparency=b"\0\xff"),
        MaskReading.OPAQUE,
    ),
    "strokes of red in a palette": (
        lambda: saved(labelled(INSIDE, (0, 0, 0), (255, 0, 0)), transparency=0),
        MaskReading.OPAQUE,
    ),
    "strokes of two colours": (
        lambda: saved(with_alpha(QUADRANTS, DISC)),
        MaskReading.OPAQUE,
    ),
    "photograph with a hole": (
        lambda: saved(with_alpha(PHOTO, inverted(DISC))),
        MaskReading.TRANSPARENT,
    ),
    "photograph with a hole in WebP": (
        lambda: saved(with_alpha(PHOTO, inverted(DISC)), "WEBP"),
        MaskReading.TRANSPARENT,
    ),
    "photograph without its outside": (
        lambda: saved(with_alpha(PHOTO, DISC)),
        MaskReading.TRANSPARENT,
    ),
    "drawing in few colours with a hole": (
        lambda: saved(with_alpha(QUADRANTS, inverted(DISC))),
        MaskReading.TRANSPARENT,
    ),
    "black canvas with a hole": (
        lambda: saved(with_alpha(flat("black"), inverted(DISC))),
        MaskReading.TRANSPARENT,
    ),
}


@pytest.mark.parametrize("name", KIND)
def test_mask_with_another_evident_meaning_is_read_by_it(name: str) -> None:
    make, read_as = KIND[name]
    mask = read(make())
    assert mask.read_as is read_as
    marked = ~INSIDE if name == "photograph without its outside" else INSIDE
    tolerance = 3 if "WEBP" in name or "WebP" in name else 0
    assert np.abs(mask.pixels.astype(int) - 255 * marked).max() <= tolerance


def test_soft_strokes_stay_soft() -> None:
    for image in (flat("black"), flat("red"), flat("white")):
        mask = read(saved(with_alpha(image, SOFT)))
        assert np.array_equal(mask.pixels, np.asarray(SOFT))
    mask = read(saved(with_alpha(PHOTO, inverted(SOFT))))
    assert np.array_equal(mask.pixels, np.asarray(SOFT))


def luma_over_black(data: bytes) -> NDArray[np.uint8]:
    """What was read of every mask before any was read otherwise."""
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode == "I;16":
        return (np.asarray(image) >> 8).astype(np.uint8)
    if "transparency" in image.info or "A" in image.mode:
        image = image.convert("LA" if image.mode == "LA" else "RGBA")
        canvas = Image.new("L" if image.mode == "LA" else "RGB", image.size, "black")
        canvas.paste(image, mask=image)
        image = canvas
    elif image.mode == "P":
        image = image.convert("RGB")
    return np.asarray(image.convert("L"))


ORDINARY: dict[str, Callable[[Image.Image], bytes]] = {
    "L": lambda mask: saved(mask),
    "RGB": lambda mask: saved(mask.convert("RGB")),
    "opaque RGBA": lambda mask: saved(mask.convert("RGBA")),
    "opaque LA": lambda mask: saved(mask.convert("LA")),
    "one bit": lambda mask: saved(mask.convert("1", dither=Image.Dither.NONE)),
    "JPEG": lambda mask: saved(mask, "JPEG", quality=30),
    "JPEG in colour": lambda mask: saved(mask.convert("RGB"), "JPEG", quality=30),
    "WebP": lambda mask: saved(mask.convert("RGB"), "WEBP", quality=30),
    "grey palette": lambda mask: saved(mask.convert("P")),
    "palette of few colours": lambda mask: saved(mask.convert("RGB").quantize(4)),
    "palette of a JPEG": lambda mask: saved(
        Image.open(io.BytesIO(saved(mask.convert("RGB"), "JPEG", quality=30))).quantize(16)
    ),
    "16 bits": lambda mask: saved(Image.fromarray(np.asarray(mask).astype("<u2") * 257)),
    "white strokes": lambda mask: saved(with_alpha(flat("white"), mask)),
    "white strokes in LA": lambda mask: saved(with_alpha(flat(255, "L"), mask)),
    "white strokes in WebP": lambda mask: saved(with_alpha(flat("white"), mask), "WEBP"),
    "light grey strokes": lambda mask: saved(with_alpha(flat("#a0a0a0"), mask)),
    "white canvas with a hole": lambda mask: saved(with_alpha(flat("white"), inverted(mask))),
    "half transparent in part": lambda mask: saved(
        with_alpha(mask.convert("RGB"), gradient.point([max(level, 9) for level in range(256)]))
    ),
    "black and white beside nothing": lambda mask: saved(
        with_alpha(mask.convert("RGB"), gradient.point([255 * (at > 90) for at in range(256)]))
    ),
}


def drawn(kind: int, values: NDArray[np.uint8]) -> Image.Image:
    """A mask with at least one white and one black area."""
    mask = Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling(kind))
    mask.paste(255, (0, 50, 20, 64))
    mask.paste(0, (44, 50, 64, 64))
    return mask


hard = arrays(np.uint8, (6, 6), elements=st.sampled_from([0, 255]))
grey = arrays(np.uint8, (6, 6), elements=st.integers(0, 255))


@pytest.mark.parametrize("name", ORDINARY)
@given(
    values=hard | grey,
    kind=st.sampled_from([Image.Resampling.NEAREST, Image.Resampling.BILINEAR]),
)
@settings(max_examples=40, deadline=None)
def test_ordinary_mask_is_read_by_its_luma(
    name: str, values: NDArray[np.uint8], kind: Image.Resampling
) -> None:
    data = ORDINARY[name](drawn(kind, values))
    mask = read(data)
    assert mask.read_as is MaskReading.WHITE
    assert np.array_equal(mask.pixels, luma_over_black(data))


@pytest.mark.parametrize("name", ["L", "RGB", "opaque RGBA", "one bit", "JPEG", "16 bits"])
@pytest.mark.parametrize("level", [0, 127, 255])
def test_flat_mask_is_read_by_its_luma(name: str, level: int) -> None:
    data = ORDINARY[name](flat(level, "L"))
    mask = read(data)
    assert mask.read_as is MaskReading.WHITE
    assert np.array_equal(mask.pixels, luma_over_black(data))


def test_nearly_black_jpeg_is_no_mask_of_ones() -> None:
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 2, (SIDE, SIDE), np.uint8))
    mask = read(saved(noisy, "JPEG", quality=100))
    assert mask.read_as is MaskReading.WHITE
    assert mask.pixels.max() <= 2


def test_canvas_on_which_nothing_was_drawn_marks_nothing() -> None:
    for image in (flat((0, 0, 0, 0), "RGBA"), flat((255, 255, 255, 0), "RGBA")):
        mask = read(saved(image))
        assert mask.read_as is MaskReading.WHITE
        assert not mask.pixels.any()


def test_pictures_own_palette_is_no_label_map() -> None:
    white_too = labelled(INSIDE, (255, 0, 0), (255, 255, 255))
    many = Image.fromarray(noise).quantize(256)
    for image in (white_too, many):
        assert read(saved(image)).read_as is MaskReading.WHITE


@pytest.mark.parametrize(
    ("level", "is_soft", "is_inverted", "expected"),
    [
        (127, False, False, True),
        (128, False, False, False),
        (7, True, False, True),
        (8, True, False, False),
        (255, False, True, True),
        (127, False, True, False),
    ],
)
def test_marks_nothing_agrees_with_what_is_repainted(
    level: int, is_soft: bool, is_inverted: bool, expected: bool
) -> None:
    mask = np.full((4, 4), level, np.uint8)
    assert marks_nothing(mask, is_soft=is_soft, is_inverted=is_inverted) is expected


def by_rule(image: Image.Image, rule: MaskRule, file_format: str = "PNG") -> DecodedMask:
    return decode_mask(saved(image, file_format), ImageLimits(), rule=rule)


HOLE = DISC.point([255 - level for level in range(256)])


@pytest.mark.parametrize("picture", [PHOTO, flat("white"), flat("black"), flat(200, "L")])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparent_pixels_are_repainted_whatever_their_colours(
    picture: Image.Image, file_format: str
) -> None:
    mask = by_rule(with_alpha(picture, HOLE), MaskRule.TRANSPARENT, file_format)
    assert mask.read_as is MaskReading.TRANSPARENT
    assert np.array_equal(mask.pixels > 127, INSIDE)


@pytest.mark.parametrize(
    "image",
    [DISC, PHOTO, with_alpha(PHOTO, flat(255, "L")), with_alpha(PHOTO, flat(200, "L"))],
    ids=["grey", "colours", "opaque", "nearly opaque"],
)
def test_mask_without_a_transparent_pixel_is_a_fault(image: Image.Image) -> None:
    with pytest.raises(UnreadableImage) as refused:
        by_rule(image, MaskRule.TRANSPARENT)
    assert refused.value.kind is ImageFault.NO_TRANSPARENCY


def test_image_without_a_transparent_pixel_may_be_repainted_as_a_whole() -> None:
    rule = MaskRule.TRANSPARENT_OR_ALL
    for image in (
        DISC,
        PHOTO,
        with_alpha(PHOTO, flat(255, "L")),
        with_alpha(PHOTO, flat(200, "L")),
    ):
        mask = by_rule(image, rule)
        assert mask.read_as is MaskReading.WHITE
        assert (mask.pixels == 255).all()
    holes = by_rule(with_alpha(PHOTO, HOLE), rule)
    assert holes.read_as is MaskReading.TRANSPARENT
    assert np.array_equal(holes.pixels > 127, INSIDE)


@pytest.mark.parametrize("picture", [PHOTO, flat("white"), flat("black")])
def test_opaque_pixels_are_repainted_where_some_are_transparent(picture: Image.Image) -> None:
    mask = by_rule(with_alpha(picture, DISC), MaskRule.OPAQUE)
    assert mask.read_as is MaskReading.OPAQUE
    assert np.array_equal(mask.pixels > 127, INSIDE)


@pytest.mark.parametrize("image", [DISC, DISC.convert("RGB"), with_alpha(DISC, flat(255, "L"))])
def test_opaque_mask_is_read_by_its_luma(image: Image.Image) -> None:
    mask = by_rule(image, MaskRule.OPAQUE)
    assert mask.read_as is MaskReading.WHITE
    assert np.array_equal(mask.pixels > 127, INSIDE)

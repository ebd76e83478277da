import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image

from models.imaging.images import encode_jpeg, encode_png, encode_webp, resize
from tests.corpora import profiles
from tests.support.png_text import COLOURS, HEIGHT, WIDTH, read_text

Encode = Callable[..., bytes]

rng = np.random.default_rng(1)


def test_resize_leaves_fitting_pictures_alone() -> None:
    assert resize(COLOURS, WIDTH, HEIGHT, Image.Resampling.LANCZOS) is COLOURS


def test_resize_agrees_with_pillow() -> None:
    expected = Image.fromarray(COLOURS).resize((40, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(resize(COLOURS, 40, 24, Image.Resampling.LANCZOS), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (HEIGHT, WIDTH), (64, 40)])
def test_encode_round_trip(size: tuple[int, int]) -> None:
    picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)


def test_encode_of_a_view() -> None:
    assert encode_png(COLOURS[::2, ::-1]) == encode_png(COLOURS[::2, ::-1].copy())


def test_encode_is_deterministic() -> None:
    text = {"parameters": "x", "Comment": "Grüße 🐈"}
    assert encode_png(COLOURS, text) == encode_png(COLOURS.copy(), dict(text))


def test_encode_stores_text() -> None:
    text = {"Title": "café", "parameters": "猫\nSteps: 20", "Comment": ""}
    data = encode_png(COLOURS, text)
    assert read_text(data) == text
    assert data.count(b"tEXt") == 2
    assert data.count(b"iTXt") == 1


@given(st.text())
def test_encode_stores_any_text(value: str) -> None:
    expected = value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    assert read_text(encode_png(COLOURS, {"parameters": value})) == {"parameters": expected}


def test_encode_survives_lone_surrogates() -> None:
    assert read_text(encode_png(COLOURS, {"a": "\ud800"})) == {"a": "?"}


@pytest.mark.parametrize("keyword", ["", " a", "a ", "a\0b", "k" * 80, "猫"])
def test_encode_refuses_bad_keywords(keyword: str) -> None:
    with pytest.raises(ValueError, match=r"keyword|latin-1"):
        encode_png(COLOURS, {keyword: "x"})


def test_profile_is_written_and_the_pixels_stay() -> None:
    profile = profiles.display_p3(2**20 - 1_000)
    image = Image.open(io.BytesIO(encode_png(COLOURS, {"parameters": "x"}, profile)))
    assert np.array_equal(np.asarray(image), COLOURS)
    assert image.info["icc_profile"] == profile
    assert "icc_profile" not in Image.open(io.BytesIO(encode_png(COLOURS))).info


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """A picture as photographs are: colours that change slowly."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = (rows * 3, columns * 3, 255 - rows - columns)
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def pixels_of(data: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


def comment_of(data: bytes) -> str:
    """As A1111's web UI reads it."""
    image = Image.open(io.BytesIO(data))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is None:
        return ""
    encodings = {b"ASCII\0\0\0": "ascii", b"UNICODE\0": "utf-16-be"}
    return str(comment[8:].decode(encodings[comment[:8]]))


@pytest.mark.parametrize(("encode", "kind"), [(encode_jpeg, "JPEG"), (encode_webp, "WEBP")])
def test_lossy_files_are_near_and_smaller_with_less_quality(encode: Encode, kind: str) -> None:
    picture = smooth(64, 80)
    good, poor = encode(picture, 95), encode(picture, 10)
    assert Image.open(io.BytesIO(good)).format == kind
    assert len(poor) < len(good)
    errors = [np.abs(pixels_of(data) - picture).mean() for data in (good, poor)]
    assert errors[0] < 3 < errors[1] < 20
    assert encode(picture, 95) == good


def test_webp_of_quality_100_is_lossless() -> None:
    assert np.array_equal(pixels_of(encode_webp(COLOURS, 100)), COLOURS)
    assert not np.array_equal(pixels_of(encode_webp(COLOURS, 99)), COLOURS)


@pytest.mark.parametrize("encode", [encode_jpeg, encode_webp])
@pytest.mark.parametrize("comment", ["a cat\nSteps: 20", "猫 🐈 café", ""])
def test_comment_and_profile_are_kept(encode: Encode, comment: str) -> None:
    profile = profiles.display_p3(2**20 - 1_000)
    data = encode(COLOURS, 95, comment, profile)
    assert comment_of(data) == comment
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile
    assert "icc_profile" not in Image.open(io.BytesIO(encode(COLOURS, 95))).info


def test_comment_with_lone_surrogates_is_written() -> None:
    assert comment_of(encode_jpeg(COLOURS, 95, "\ud800")) == "?"


@pytest.mark.parametrize(("letter", "fits"), [("a", 65_000), ("猫", 32_000)])
def test_comment_too_long_for_a_jpeg_is_left_out(letter: str, fits: int) -> None:
    assert comment_of(encode_jpeg(COLOURS, 95, letter * fits)) == letter * fits
    longer = letter * (fits + 1_000)
    assert comment_of(encode_jpeg(COLOURS, 95, longer)) == ""
    assert comment_of(encode_webp(COLOURS, 95, longer)) == longer

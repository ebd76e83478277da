import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.imaging.images import encode_png, resize
from tests.corpora import profiles
from tests.support.png_text import COLOURS, HEIGHT, WIDTH, read_text

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

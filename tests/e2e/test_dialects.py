"""Every dialect gives the picture that the native API gives for the same numbers.

The pictures are compared pixel by pixel, and outside the mask with the init image.
"""

import functools
import io
from collections.abc import Iterator

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from server.cli.demo import EXAMPLES
from tests.support.dialect_calls import NATIVE_CALLS, DialectCalls, Wish
from tests.support.every_dialect import EVERY_CALLS, OTHER_CALLS
from tests.support.processes import ServerProcess, serving

SIDE = 128
KEY = "key-of-the-first"


def png_of(name: str) -> bytes:
    """One of the shipped examples, small."""
    buffer = io.BytesIO()
    Image.open(EXAMPLES / name).resize((SIDE, SIDE)).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png() -> bytes:
    levels = np.zeros((SIDE, SIDE), np.uint8)
    levels[32:96, 40:104] = 255
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


INIT, MASK = png_of("clouds.png"), mask_png()


def pixels_of(file: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(np.int16)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    environment = {
        "INPAINT_AUTH__KEYS": KEY,
        "INPAINT_STEPS_POLICY": "exact",
        "INPAINT_REPRODUCIBLE": "true",
    }
    with serving(tmp_path_factory.mktemp("server"), environment) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> httpx2.Client:
    server.client.headers["Authorization"] = f"Bearer {KEY}"
    return server.client


@functools.cache
def native_pictures(client: httpx2.Client, samples: int) -> list[NDArray[np.int16]]:
    answer = NATIVE_CALLS.send(client, wish(samples))
    return [*map(pixels_of, NATIVE_CALLS.pictures(client, answer))]


def wish(samples: int) -> Wish:
    return Wish("a red circle", INIT, MASK, seed=11, samples=samples)


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("calls", OTHER_CALLS, ids=lambda calls: calls.name)
def test_pictures_equal_those_of_the_native_api(
    client: httpx2.Client, calls: DialectCalls, samples: int
) -> None:
    if samples > calls.max_samples:
        pytest.skip(f"{calls.name} has {calls.max_samples} pictures a call at most")
    answer = calls.send(client, wish(samples))
    pictures = [*map(pixels_of, calls.pictures(client, answer))]

    assert len(pictures) == samples
    for picture, native in zip(pictures, native_pictures(client, samples), strict=True):
        assert np.array_equal(picture, native)


@pytest.mark.parametrize("calls", EVERY_CALLS, ids=lambda calls: calls.name)
def test_nothing_changes_outside_the_mask(client: httpx2.Client, calls: DialectCalls) -> None:
    (picture, *_) = map(pixels_of, calls.pictures(client, calls.send(client, wish(1))))
    is_changed = (picture != pixels_of(INIT)).any(axis=2)
    is_painted = pixels_of(MASK)[:, :, 0] > 127

    assert not is_changed[~is_painted].any()
    assert is_changed[is_painted].mean() > 0.9

"""`/api/v1` by IOPaint's own page, in Chromium."""

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.support.clouds import Clouds, assert_changed_within
from tests.support.processes import ServerProcess
from tests.support.programs import KEY, CallClient, MakeCall, Pixels, program
from tests.support.reverse_proxy import iopaint_site

PAGE = "iopaint_page.py"


@pytest.fixture(scope="module")
def site(server: ServerProcess) -> Iterator[str]:
    program("chromium")
    with iopaint_site(server.url, KEY) as url:
        yield url


def decoded_mask(text: str) -> Pixels:
    """`(h, w)`"""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("L"))


def test_page_paints_the_stroke_alone(
    site: str, client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    answers = client(PAGE, call(base=site), call(base=site), call(base=site, seed=8))

    before = np.asarray(Image.open(clouds.picture))
    for answer in answers:
        painted = decoded_mask(answer.extra["mask"]) > 127
        assert painted.any()
        assert_changed_within(painted, before, answer.picture)
    assert len({answer.extra["mask"] for answer in answers}) == 1
    first, again, other_seed = [answer.picture for answer in answers]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other_seed)


def test_page_shows_our_errors_and_no_other(site: str, client: CallClient, call: MakeCall) -> None:
    (answer,) = client(PAGE, call(base=site, prompt="a cat " * 3000))

    assert answer.extra["notifications"] == []
    assert answer.error == "422"
    assert "prompt" in answer.text

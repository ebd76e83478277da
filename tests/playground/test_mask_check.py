"""Masks that are wrong, in Chromium: the page says so beside the send button, and mends them."""

import base64
import io
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.support.browsers import browser_program
from tests.support.processes import ServerProcess

pytestmark = [pytest.mark.process, pytest.mark.slow]

MASK = Image.open(str(files("models.builtin") / "examples" / "clouds_mask.png")).convert("L")
WRONG: dict[str, Callable[[Image.Image], Image.Image]] = {
    "inverted": lambda mask: Image.eval(mask, lambda level: 255 - level),
    "stretched": lambda mask: mask.resize((512, 256)),
    "soft": lambda mask: mask.filter(ImageFilter.GaussianBlur(20)),
}


@pytest.fixture
def masks(tmp_path: Path) -> dict[str, str]:
    """The paths of masks by what is wrong with them."""
    paths = {name: str(tmp_path / f"{name}.png") for name in WRONG}
    for name, path in paths.items():
        WRONG[name](MASK).save(path)
    return paths


def test_wrong_masks_are_found_and_cured(
    server: ServerProcess, masks: dict[str, str], tmp_path: Path, shots: str
) -> None:
    call = {"base": server.url, "shots": shots, **masks}
    with browser_program("maskcheck.py", tmp_path, **call) as browser:
        lines = [browser.next() for _ in range(9)]

    for line in (each for each in lines if each["step"] == "inverted"):
        assert line["found"] == ["probably_inverted"]
        assert "probably swapped" in line["text"]
        assert line["cured"] == []
        sent = Image.open(io.BytesIO(base64.b64decode(line["mask"]))).convert("L")
        assert np.abs(np.asarray(sent, np.int16) - np.asarray(MASK, np.int16)).max() <= 1
    by_step = {line["step"]: line for line in lines}
    assert by_step["stretched"]["found"] == ["other_proportions"]
    assert "512 × 256" in by_step["stretched"]["text"]
    assert by_step["empty"]["found"] == ["empty"]
    assert by_step["soft"]["found"] == ["grey_levels"]
    assert by_step["soft"]["cured"] == []
    assert by_step["soft"]["is_soft"] is True
    assert by_step["counted"]["before"] == 0, "nothing is sent while somebody paints"
    assert "must be a multiple of 8" in by_step["counted"]["text"]
    assert [each for line in lines for each in line.get("wrong", [])] == []
    assert [each for line in lines for each in line.get("errors", [])] == []

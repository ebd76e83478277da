"""The vendor's calls without a mask, and its check, with the built-in model."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from server.cli.demo import EXAMPLES
from tests.support.processes import ServerProcess, serving
from tests.support.waiting import until

SIDE = 128
STEPS = {"num_inference_steps": 4, "seed": 11, "enhance_prompt": "no", "safety_checker": "no"}


def small_clouds() -> str:
    """A shipped example as base64."""
    buffer = io.BytesIO()
    Image.open(EXAMPLES / "clouds.png").resize((SIDE, SIDE)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def white() -> str:
    buffer = io.BytesIO()
    Image.new("L", (SIDE, SIDE), 255).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


INIT, WHITE = small_clouds(), white()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    environment = {"INPAINT_STEPS_POLICY": "exact", "INPAINT_REPRODUCIBLE": "true"}
    with serving(tmp_path_factory.mktemp("server"), environment) as process:
        yield process


def picture(server: ServerProcess, path: str, **fields: Any) -> NDArray[np.uint8]:
    answer = server.client.post(path, json=fields).json()
    assert answer["status"] == "success", answer
    file = server.client.get(answer["output"][0]).content
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def native_picture(server: ServerProcess, **fields: Any) -> NDArray[np.uint8]:
    made = server.client.post("/api/jobs", json=fields).json()
    job = made

    def is_finished() -> bool:
        nonlocal job
        job = server.client.get(f"/api/jobs/{made['id']}").json()
        return bool(job["state"] == "finished")

    until(is_finished, 110, "the job's end")
    file = server.client.get(job["outputs"][0]["url"]).content
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize(
    "path", ["/api/v3/img2img", "/api/v4/dreambooth/img2img", "/api/v7/images/image-to-image"]
)
def test_image_to_image_is_inpainting_with_a_white_mask(server: ServerProcess, path: str) -> None:
    fields = {"prompt": "a red circle", "init_image": INIT, "strength": 0.8}
    native = native_picture(
        server,
        **fields,
        mask_image=WHITE,
        num_inference_steps=4,
        seed=11,
        safety_check=False,
    )
    assert np.array_equal(picture(server, path, **fields, **STEPS), native)


def test_text_to_image_makes_the_same_picture_everywhere(server: ServerProcess) -> None:
    fields = {"prompt": "a red circle", "width": SIDE, "height": SIDE}
    first, *others = (
        picture(server, path, **fields, **STEPS)
        for path in ("/api/v3/text2img", "/api/v3/dreambooth", "/api/v6/realtime/text2img")
    )
    assert first.shape == (SIDE, SIDE, 3)
    assert first.std() > 5, "it is no plain grey"
    assert all(np.array_equal(each, first) for each in others)


def test_check_asks_the_safety_checker(server: ServerProcess) -> None:
    """The built-in model's checker flags what is magenta."""
    scene = Image.new("RGB", (SIDE, SIDE), (200, 220, 240))
    ImageDraw.Draw(scene).ellipse((32, 32, 96, 96), fill=(255, 0, 255))
    buffer = io.BytesIO()
    scene.save(buffer, "PNG")
    magenta = base64.b64encode(buffer.getvalue()).decode()
    for image, is_flagged in ((INIT, False), (magenta, True)):
        answer = server.client.post("/api/v3/nsfw_image_check", json={"init_image": image}).json()
        assert answer["has_nsfw_concept"] == [is_flagged], answer

"""Calls of OpenAI's images API: ours, and the forms that published clients send."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import httpx2
from PIL import Image, ImageChops

from tests.support.dialect_calls import DialectCalls, Wish
from tests.support.image_files import saved

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"


def transparent_where_white(mask: bytes) -> bytes:
    """A mask of OpenAI's form, of one in which white is painted."""
    levels = Image.open(io.BytesIO(mask)).convert("L")
    canvas = Image.new("RGBA", levels.size, "black")
    canvas.putalpha(ImageChops.invert(levels))
    return saved(canvas)


@dataclass(frozen=True)
class OpenAICalls:
    """A client that sends what OpenAI's Python SDK sends."""

    name: str = "openai"
    max_samples: int = 4

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        files = {
            "image": ("upload", wish.init_image, "application/octet-stream"),
            "mask": ("mask.png", transparent_where_white(wish.mask_image), "image/png"),
        }
        fields = {
            "prompt": wish.prompt,
            "model": "gpt-image-1",
            "n": str(wish.samples),
            "seed": str(wish.seed),
            "num_inference_steps": str(wish.steps),
            "guidance_scale": str(wish.guidance_scale),
            "strength": str(wish.strength),
        }
        return client.post(EDITS, files=files, data=fields, headers=wish.headers)

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        assert answer.status_code == 200, answer.text
        return [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]]

    def is_refused(self, answer: httpx2.Response) -> bool:
        return answer.status_code >= 400 and {*error_of(answer)} == {
            *("message", "type", "param", "code")
        }

    def error_text(self, answer: httpx2.Response) -> str:
        return str(error_of(answer)["message"])


CALLS: DialectCalls = OpenAICalls()


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The only thing in an answer that refuses."""
    body = answer.json()
    assert {*body} == {"error"}
    error: dict[str, Any] = body["error"]
    return error

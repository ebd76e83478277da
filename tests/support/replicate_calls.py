"""Calls of Replicate's API as its two clients make them."""

import base64
from dataclasses import dataclass
from typing import Any

import httpx2

from tests.support.dialect_calls import DialectCalls, Wish, polled, text_of

MODEL = "stability-ai/stable-diffusion-inpainting"
VERSION = "95b7223104132402a9ae91cc677285bc5eb997834bd2349fa486f53910fd68b3"
"""A model of Replicate's, and one of its versions, which no server here has."""


def file_of(uri: str) -> bytes:
    """The content of a data URI."""
    return base64.b64decode(uri.partition(",")[2])


@dataclass(frozen=True)
class ReplicateCalls:
    """A client that sends files as data URIs and polls."""

    name: str = "replicate"
    max_samples: int = 4

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        inputs = {
            "prompt": wish.prompt,
            "image": f"data:application/octet-stream;base64,{text_of(wish.init_image)}",
            "mask": f"data:application/octet-stream;base64,{text_of(wish.mask_image)}",
            "seed": wish.seed,
            "num_outputs": wish.samples,
            "num_inference_steps": wish.steps,
            "guidance_scale": wish.guidance_scale,
            "strength": wish.strength,
        }
        body = {"version": VERSION, "input": inputs}
        return client.post("/v1/predictions", json=body, headers=wish.headers)

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        def read() -> Any:
            return client.get(answer.json()["urls"]["get"]).json()

        prediction = polled(read, lambda found: found["completed_at"] is not None)
        assert prediction["status"] == "succeeded", prediction
        return [*map(file_of, prediction["output"])]

    def is_refused(self, answer: httpx2.Response) -> bool:
        return answer.status_code >= 400 and answer.json().keys() == {"title", "detail", "status"}

    def error_text(self, answer: httpx2.Response) -> str:
        problem = answer.json()
        return f"{problem['title']}: {problem['detail']}"


CALLS: DialectCalls = ReplicateCalls()

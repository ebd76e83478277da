"""The inpaint call of the vendor's APIs after V3, as each of them is called by its clients."""

from dataclasses import dataclass
from typing import Any

import httpx2

from tests.support.dialect_calls import DialectCalls, Wish, polled, text_of


@dataclass(frozen=True)
class VendorCalls:
    """One of the vendor's APIs.

    prefix: of its paths. steps: its name of the number of steps.
    """

    name: str
    prefix: str
    steps: str = "num_inference_steps"
    max_samples: int = 4

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        fields = {
            "prompt": wish.prompt,
            "init_image": text_of(wish.init_image),
            "mask_image": f"data:image/png;base64,{text_of(wish.mask_image)}",
            "seed": wish.seed,
            "samples": wish.samples,
            self.steps: wish.steps,
            "guidance_scale": wish.guidance_scale,
            "strength": wish.strength,
            "enhance_prompt": "no",
        }
        return client.post(f"{self.prefix}/inpaint", json=fields, headers=wish.headers)

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        path = f"{self.prefix}/fetch/{answer.json()['id']}"

        def fetch() -> Any:
            return client.post(path, json={}).json()

        job = polled(fetch, lambda job: job["status"] != "processing")
        assert job["status"] == "success", job
        assert job["proxy_links"] == job["output"]
        return [client.get(url).content for url in job["output"]]

    def is_refused(self, answer: httpx2.Response) -> bool:
        return bool(answer.json()["status"] == "error")

    def error_text(self, answer: httpx2.Response) -> str:
        message = answer.json()["message"]
        assert isinstance(message, str)
        return message


V4_CALLS: DialectCalls = VendorCalls("v4", "/api/v4/dreambooth", steps="steps")
V6_CALLS: DialectCalls = VendorCalls("v6", "/api/v6/images")
V7_CALLS: DialectCalls = VendorCalls("v7", "/api/v7/images")
CALLS = (V4_CALLS, V6_CALLS, V7_CALLS)

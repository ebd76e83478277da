"""The same inpaint call in every wire language, for suites that run over all of them.

Each dialect has a `DialectCalls`; those of V3 and the native API stand here.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

from tests.support.http_stub import ANSWER_S
from tests.support.waiting import until


@dataclass(frozen=True)
class Wish:
    """What a client wants, in the words of no dialect.

    init_image: a PNG. mask_image: a PNG of mode L, of which white is painted.
    key: None sends what the client sends by itself.
    """

    prompt: str
    init_image: bytes
    mask_image: bytes
    seed: int
    samples: int = 1
    steps: int = 4
    guidance_scale: float = 7.5
    strength: float = 1.0
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


class DialectCalls(Protocol):
    """A client of one dialect."""

    @property
    def name(self) -> str: ...

    @property
    def max_samples(self) -> int:
        """The most pictures that one call can ask for."""

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        """The answer to one inpaint call."""

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        """The files of an answer, in sample order; polls where the dialect polls."""

    def is_refused(self, answer: httpx2.Response) -> bool:
        """Whether the call was refused, in this dialect's form."""

    def error_text(self, answer: httpx2.Response) -> str:
        """What a person reads of a refusal."""


def text_of(image: bytes) -> str:
    """A picture as base64."""
    return base64.b64encode(image).decode()


def polled(read: Callable[[], Any], is_over: Callable[[Any], bool]) -> Any:
    """The first result of `read` that is over."""
    found: list[Any] = []

    def look() -> bool:
        found[:] = [read()]
        return is_over(found[0])

    until(look, ANSWER_S, "the job's end")
    return found[0]


@dataclass(frozen=True)
class V3Calls:
    """stablediffusionapi.com V3, of a server that runs the steps as asked for."""

    name: str = "v3"
    max_samples: int = 4

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        fields = {
            "prompt": wish.prompt,
            "init_image": text_of(wish.init_image),
            "mask_image": text_of(wish.mask_image),
            "seed": wish.seed,
            "samples": wish.samples,
            "num_inference_steps": wish.steps,
            "guidance_scale": wish.guidance_scale,
            "strength": wish.strength,
            "enhance_prompt": "no",
        }
        return client.post("/api/v3/inpaint", json=fields, headers=wish.headers)

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        def fetch() -> Any:
            return client.post(f"/api/v3/fetch/{answer.json()['id']}", json={}).json()

        job = polled(fetch, lambda job: job["status"] != "processing")
        assert job["status"] == "success", job
        return [client.get(url).content for url in job["output"]]

    def is_refused(self, answer: httpx2.Response) -> bool:
        return bool(answer.json()["status"] == "error")

    def error_text(self, answer: httpx2.Response) -> str:
        return str(answer.json()["message"])


@dataclass(frozen=True)
class NativeCalls:
    """The native API."""

    name: str = "native"
    max_samples: int = 4

    def send(self, client: httpx2.Client, wish: Wish) -> httpx2.Response:
        fields = {
            "prompt": wish.prompt,
            "init_image": text_of(wish.init_image),
            "mask_image": text_of(wish.mask_image),
            "seed": wish.seed,
            "samples": wish.samples,
            "num_inference_steps": wish.steps,
            "guidance_scale": wish.guidance_scale,
            "strength": wish.strength,
        }
        return client.post("/api/jobs", json=fields, headers=wish.headers)

    def pictures(self, client: httpx2.Client, answer: httpx2.Response) -> list[bytes]:
        path = f"/api/jobs/{answer.json()['id']}"
        job = polled(lambda: client.get(path).json(), lambda job: job["finished_at"] is not None)
        assert job["state"] == "finished", job
        return [client.get(each["url"]).content for each in job["outputs"]]

    def is_refused(self, answer: httpx2.Response) -> bool:
        return answer.headers["content-type"] == "application/problem+json"

    def error_text(self, answer: httpx2.Response) -> str:
        problem = answer.json()
        fields = [f"{each['field']} {each['message']}" for each in problem["errors"]]
        return " ".join([problem["title"], *fields])


V3_CALLS: DialectCalls = V3Calls()
NATIVE_CALLS: DialectCalls = NativeCalls()

"""Calls of OpenAI's images API: ours, and the forms that published clients send."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
from PIL import Image, ImageChops

from tests.support.dialect_calls import DialectCalls, Wish
from tests.support.http_stub import png_bytes
from tests.support.image_files import saved
from tests.support.native_calls import Event, events_of

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


def hole_png(width: int = 64, height: int = 64) -> bytes:
    """A mask whose left half is transparent."""
    mask = Image.new("RGBA", (width, height), "white")
    mask.paste((0, 0, 0, 0), (0, 0, width // 2, height))
    return saved(mask)


INIT, MASK = png_bytes(), hole_png()


@dataclass(frozen=True)
class Part:
    """A part of a multipart form. file_name, media_type: None where the client sends none."""

    name: str
    content: bytes
    file_name: str | None = None
    media_type: str | None = None

    @property
    def wire(self) -> bytes:
        file_name = "" if self.file_name is None else f'; filename="{self.file_name}"'
        media_type = "" if self.media_type is None else f"\r\nContent-Type: {self.media_type}"
        head = f'Content-Disposition: form-data; name="{self.name}"{file_name}{media_type}'
        return f"{head}\r\n\r\n".encode() + self.content + b"\r\n"


@dataclass(frozen=True)
class Recorded:
    """A call of `edits` as a client sends it. is_chunked: without `Content-Length`."""

    parts: tuple[Part, ...]
    is_chunked: bool = False

    def send(self, client: httpx2.Client) -> httpx2.Response:
        boundary = "c8f0a5b7d3e1"
        pieces = [f"--{boundary}\r\n".encode() + part.wire for part in self.parts]
        pieces.append(f"--{boundary}--\r\n".encode())
        content: bytes | Iterator[bytes] = iter(pieces) if self.is_chunked else b"".join(pieces)
        headers = {
            "Accept": "application/json",
            "Content-Type": f"multipart/form-data; boundary={boundary}",
        }
        return client.post(EDITS, content=content, headers=headers)


OCTETS = "application/octet-stream"
TEXTS = (Part("prompt", b"a cat"), Part("model", b"gpt-image-1"), Part("n", b"2"))

RECORDED = {
    "python, paths": Recorded(
        (
            *TEXTS,
            Part("image", INIT, "image.png", "image/png"),
            Part("mask", MASK, "mask.png", "image/png"),
        )
    ),
    "python, bytes": Recorded(
        (*TEXTS, Part("image", INIT, "upload", OCTETS), Part("mask", MASK, "upload", OCTETS))
    ),
    "python, list": Recorded(
        (*TEXTS, Part("image[]", INIT, "upload", OCTETS), Part("mask", MASK, "upload", OCTETS))
    ),
    "python 1.35": Recorded(
        (*TEXTS, Part("image", INIT, "upload", OCTETS), Part("mask", MASK, "upload", OCTETS))
    ),
    "python 0.28": Recorded(
        (
            *TEXTS,
            Part("size", b"64x64"),
            Part("image", INIT, "image", OCTETS),
            Part("mask", MASK, "mask", OCTETS),
        )
    ),
    "javascript, read stream": Recorded(
        (
            Part("image", INIT, "image.png", OCTETS),
            Part("mask", MASK, "mask.png", OCTETS),
            *TEXTS,
        ),
        is_chunked=True,
    ),
    "javascript, toFile": Recorded(
        (
            Part("image", INIT, "image.png", "image/png"),
            Part("mask", MASK, "mask.png", "image/png"),
            *TEXTS,
        )
    ),
    "litellm": Recorded(
        (
            *TEXTS,
            Part("image[]", INIT, "/home/somebody/pictures/image.png", "image/png"),
            Part("mask", MASK, "/home/somebody/pictures/mask.png", "image/png"),
        )
    ),
    "gateway": Recorded(
        (
            *TEXTS,
            Part("image[]", INIT, "blob", OCTETS),
            Part("mask", MASK, "blob", OCTETS),
            Part("mask[]", MASK, "blob", OCTETS),
        )
    ),
    "without file names": Recorded((*TEXTS, Part("image", INIT), Part("mask", MASK))),
}
"""Forms of the same call, which asks for two pictures."""


def edit(client: httpx2.Client, **fields: str) -> httpx2.Response:
    """An edit of `INIT` with `MASK`."""
    texts = (Part(name, value.encode()) for name, value in ({"prompt": "a cat"} | fields).items())
    files = Part("image", INIT, "upload", OCTETS), Part("mask", MASK, "upload", OCTETS)
    return Recorded((*texts, *files)).send(client)


def events_in(answer: httpx2.Response) -> Iterator[Event]:
    """A stream's events. Each repeats its name in its data."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    for name, data in events_of(answer.iter_lines()):
        assert data["type"] == name
        yield name, data

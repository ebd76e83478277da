"""The server anybody would write: FastAPI, one diffusers pipeline, a lock around it.

`python -m benchmarks.rivals.obvious --model FOLDER --port PORT`
"""

import argparse
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from starlette.responses import Response

from benchmarks import checkpoints
from benchmarks.orders import Order
from benchmarks.rivals.plain import build_pipeline, paint

STARTED_AT = "X-Started-At"
"""Header of an answer: when the pipeline's call for it began, seconds since the epoch."""


class Body(BaseModel):
    """A request; other fields are ignored."""

    prompt: str
    init_image: str
    mask_image: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    strength: float
    seed: int

    def order(self, client: httpx2.Client) -> Order:
        """The request with its pictures fetched and decoded."""
        size = (self.width, self.height)
        return Order(
            prompt=self.prompt,
            num_inference_steps=self.num_inference_steps,
            seed=self.seed,
            init_image=fetch(client, self.init_image).convert("RGB").resize(size),
            mask_image=fetch(client, self.mask_image).convert("L").resize(size),
            guidance_scale=self.guidance_scale,
            strength=self.strength,
        )


def fetch(client: httpx2.Client, url: str) -> Image.Image:
    """The picture at an address."""
    return Image.open(io.BytesIO(client.get(url).raise_for_status().content))


def png_response(picture: Image.Image, started_at: float) -> Response:
    """The picture itself: one answer, where ours sends an address first."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    headers = {STARTED_AT: str(started_at)}
    return Response(buffer.getvalue(), headers=headers, media_type="image/png")


def create_app(pipeline: Any) -> FastAPI:
    """One picture at a time; who comes meanwhile waits for the lock in a thread."""
    app = FastAPI()
    lock = threading.Lock()
    client = httpx2.Client(trust_env=False)

    @app.post("/inpaint")
    def inpaint(body: Body) -> Response:
        order = body.order(client)
        with lock:
            started_at = time.time()
            (picture,) = paint(pipeline, [order])
        return png_response(picture, started_at)

    return app


def serve(create: Callable[[Any], FastAPI]) -> None:
    """Load the model, then listen, so that a connection means readiness."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = create(build_pipeline(checkpoints.load(options.model)))
    uvicorn.run(app, port=options.port, http="httptools", log_level="warning")


if __name__ == "__main__":
    serve(create_app)

"""The obvious server with batching of whole requests, as generic model servers offer it.

Requests of equal size, step count, guidance and strength that come within 50 ms share one call of
the pipeline, eight at most; while a call runs, others gather.

`python -m benchmarks.rivals.batched --model FOLDER --port PORT`
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import anyio.to_thread
import httpx2
from fastapi import FastAPI
from PIL import Image
from starlette.responses import Response

from benchmarks.orders import Order
from benchmarks.rivals.obvious import Body, png_response, serve
from benchmarks.rivals.plain import paint

MOST_PER_CALL = 8
GATHER_S = 0.05

Result: TypeAlias = tuple[Image.Image, float]
"""The picture, and when the call that made it began."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """An order and who waits for it."""

    order: Order
    result: asyncio.Future[Result]
    came_at: float = field(default_factory=time.monotonic)


class Batcher:
    """Gathers orders and makes those of one kind together, the oldest first."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._waiting: list[Waiting] = []
        self._has_come = asyncio.Event()

    async def paint(self, order: Order) -> Result:
        """The order's picture, made with others."""
        waiting = Waiting(order, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._has_come.set()
        return await waiting.result

    async def run(self) -> None:
        """Make batches for ever."""
        while True:
            batch = await self._gather()
            started_at = time.time()
            try:
                orders = [each.order for each in batch]
                pictures = await asyncio.to_thread(paint, self._pipeline, orders)
            except Exception as error:  # noqa: BLE001 - those who wait are told
                for each in batch:
                    each.result.set_exception(error)
                continue
            for each, picture in zip(batch, pictures, strict=True):
                each.result.set_result((picture, started_at))

    async def _gather(self) -> list[Waiting]:
        """The oldest order and others of its kind: until there are enough or it has waited long."""
        while True:
            self._has_come.clear()
            batch = self._oldest_kind()
            left_s = batch[0].came_at + GATHER_S - time.monotonic() if batch else None
            if batch and (len(batch) == MOST_PER_CALL or (left_s is not None and left_s <= 0)):
                self._waiting = [each for each in self._waiting if each not in batch]
                return batch
            try:
                await asyncio.wait_for(self._has_come.wait(), left_s)
            except TimeoutError:
                continue

    def _oldest_kind(self) -> list[Waiting]:
        if not self._waiting:
            return []
        kind = self._waiting[0].order.kind
        return [each for each in self._waiting if each.order.kind == kind][:MOST_PER_CALL]


def create_app(pipeline: Any) -> FastAPI:
    """Batches are made in a thread of their own."""
    batcher = Batcher(pipeline)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)
    client = httpx2.Client(trust_env=False)

    @app.post("/inpaint")
    async def inpaint(body: Body) -> Response:
        order = await anyio.to_thread.run_sync(body.order, client)
        picture, started_at = await batcher.paint(order)
        return await anyio.to_thread.run_sync(png_response, picture, started_at)

    return app


if __name__ == "__main__":
    serve(create_app)

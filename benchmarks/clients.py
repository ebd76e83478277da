"""Clients: calls with a size and a time of arrival, sent to a server and timed until the PNG."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import httpx2

from benchmarks.orders import GUIDANCE_SCALE, example_image, example_mask, make_prompt
from benchmarks.rivals.obvious import STARTED_AT
from server.core.settings import Settings
from server.jobs.store import JobStore
from server.storage.database import open_engine

TIMEOUT_S = 600.0
PNG_MAGIC = b"\x89PNG"


@dataclass(frozen=True, slots=True)
class Call:
    """A request to be sent. arrives_s: seconds after the scenario's begin, at the earliest.

    is_checked: by the safety checker, if the server has one.
    """

    num_inference_steps: int
    seed: int
    side_px: int
    arrives_s: float = 0.0
    is_checked: bool = False

    def body(self, images_url: str) -> dict[str, Any]:
        """The request's JSON, the same for every server."""
        return {
            "prompt": make_prompt(self.seed),
            "init_image": f"{images_url}/{self.seed}.png",
            "mask_image": f"{images_url}/mask.png",
            "width": self.side_px,
            "height": self.side_px,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": GUIDANCE_SCALE,
            "strength": 1.0,
            "seed": self.seed,
            "safety_checker": "yes" if self.is_checked else "no",
            "enhance_prompt": "no",
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call. latency_s: until the last byte of the PNG.

    sent_at, started_at: seconds since the epoch; the latter when the first step could begin.
    """

    num_inference_steps: int
    sent_at: float
    latency_s: float
    started_at: float = field(default=float("nan"))
    job_id: int | None = None

    @property
    def start_delay_s(self) -> float:
        """Seconds from sending until the first step could begin."""
        return self.started_at - self.sent_at


class Target(Protocol):
    """A server under test."""

    async def send(self, client: httpx2.AsyncClient, call: Call) -> Answer:
        """One call, until its picture is here. Raises: httpx2.HTTPError, RuntimeError."""
        ...

    def complete(self, answers: Sequence[Answer]) -> list[Answer]:
        """The answers with what is learnt only afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """`inpaint-server`. url: of the API; data_dir: where its job rows are."""

    url: str
    images_url: str
    data_dir: Path

    async def send(self, client: httpx2.AsyncClient, call: Call) -> Answer:
        """The V3 call, held until the job ends, then the picture from its address."""
        sent_at, began = time.time(), time.perf_counter()
        body = call.body(self.images_url)
        answer = (await client.post(f"{self.url}/api/v3/inpaint", json=body)).json()
        if answer["status"] != "success":
            raise RuntimeError(f"no picture: {answer}")
        check_png(await client.get(answer["output"][0]))
        latency_s = time.perf_counter() - began
        return Answer(call.num_inference_steps, sent_at, latency_s, job_id=answer["id"])

    def complete(self, answers: Sequence[Answer]) -> list[Answer]:
        """When each job's first step could begin: claimed, its prompt and pictures encoded."""
        engine = open_engine(Settings(data_dir=self.data_dir).sqlalchemy_url)
        store = JobStore(engine)
        begun = [first_step_at(store, answer.job_id or 0) for answer in answers]
        engine.dispose()
        return [
            replace(answer, started_at=started_at)
            for answer, started_at in zip(answers, begun, strict=True)
            if started_at is not None
        ]


def first_step_at(store: JobStore, job_id: int) -> float | None:
    """Seconds since the epoch, None for a job without a receipt."""
    job, receipt = store.get(job_id), store.receipt_of(job_id)
    if job is None or job.started_at is None or receipt is None:
        return None
    return job.started_at + receipt.times.prepare_ms / 1000


@dataclass(frozen=True, slots=True)
class Rival:
    """A program of `benchmarks.rivals`."""

    url: str
    images_url: str

    async def send(self, client: httpx2.AsyncClient, call: Call) -> Answer:
        """One call, answered with the picture."""
        sent_at, began = time.time(), time.perf_counter()
        response = await client.post(f"{self.url}/inpaint", json=call.body(self.images_url))
        check_png(response)
        latency_s = time.perf_counter() - began
        started_at = float(response.headers[STARTED_AT])
        return Answer(call.num_inference_steps, sent_at, latency_s, started_at)

    def complete(self, answers: Sequence[Answer]) -> list[Answer]:
        """All was said in the header."""
        return list(answers)


def check_png(response: httpx2.Response) -> None:
    """Raises: httpx2.HTTPError, RuntimeError for anything but a picture."""
    if not response.raise_for_status().content.startswith(PNG_MAGIC):
        raise RuntimeError(f"not a picture: {response.text[:200]}")


async def drive(target: Target, calls: Sequence[Call], clients: int) -> tuple[list[Answer], float]:
    """Clients that each send the next call as soon as their last is answered; seconds in all.

    A call that has a later time of arrival is waited for.
    """
    pending = iter(calls)
    answers: list[Answer] = []
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        began = time.perf_counter()

        async def run_client() -> None:
            for call in pending:
                await asyncio.sleep(began + call.arrives_s - time.perf_counter())
                answers.append(await target.send(client, call))

        await asyncio.gather(*(run_client() for _ in range(clients)))
        elapsed_s = time.perf_counter() - began
    return target.complete(answers), elapsed_s


def save_images(folder: Path, calls: Sequence[Call]) -> None:
    """The pictures that the calls name and that are not there, for a local host to serve."""
    for call in calls:
        path = folder / f"{call.seed}.png"
        if not path.exists():
            example_image(call.side_px, call.seed).save(path, compress_level=1)
    example_mask(calls[0].side_px).save(folder / "mask.png")


def wait_until_ready(url: str, timeout_s: float) -> None:
    """Until the address answers 200. Raises: TimeoutError."""
    ends_at = time.monotonic() + timeout_s
    while time.monotonic() < ends_at:
        with suppress(httpx2.TransportError):
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not become ready")

"""A job as server-sent events: what a client is told, and when the stream ends."""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel

from server.api.dialects.native.writing import JobAnswer
from server.jobs.job import JobProgress, JobState
from server.jobs.watcher import Subscription

HEARTBEAT_S = 15.0
"""Between two comments on a stream without news; proxies cut silent connections."""


class Queued(BaseModel):
    """The job waits. position: 1 is next."""

    position: int | None


class Started(BaseModel):
    """A worker has the job. attempt: 1 unless earlier workers were lost."""

    attempt: int


class Step(BaseModel):
    """Denoising steps done and to do, over all samples."""

    step: int
    total_steps: int


class Preview(Step):
    """How the first picture looked after so many steps. image: a PNG as a data URI."""

    image: str


class Unauthorized(BaseModel):
    """The key has been revoked or has expired. code: what a new connection would be refused by."""

    code: str = "invalid_api_key"


async def write_events(
    subscription: Subscription,
    read_ended: Callable[[], Awaitable[JobAnswer]],
    read_preview: Callable[[], Awaitable[bytes | None]],
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncIterator[bytes]:
    """The present state, then each change until the job or the key has ended, or the server stops.

    read_ended: in full, for the last event. read_preview: the newest one, None where it is gone.
    """
    last: JobProgress | None = None
    while not subscription.is_over:
        now = await subscription.next(heartbeat_s)
        if now is None:
            yield KEEPALIVE_COMMENT
            continue
        for name, data in events_between(last, now):
            yield write_event(name, data, f"{now.attempt}-{now.step}-{name}")
        if (step := new_preview_step(last, now)) and (image := await read_preview()):
            preview = Preview(step=step, total_steps=now.total_steps, image=data_uri(image))
            yield write_event("preview", preview, f"{now.attempt}-{step}-preview")
        last = now
        if now.state.is_terminal:
            yield write_event(now.state, await read_ended(), now.state)
            return
    if subscription.has_key_ended:
        yield write_event("unauthorized", Unauthorized(), "unauthorized")


def events_between(last: JobProgress | None, now: JobProgress) -> Iterator[tuple[str, BaseModel]]:
    """The events that lead from what was told last to what is; none of a job that has ended."""
    if now.state is JobState.QUEUED:
        yield "queued", Queued(position=now.position)
    if now.state is not JobState.RUNNING:
        return
    is_told = last is not None and last.state is JobState.RUNNING and last.attempt == now.attempt
    if not is_told:
        yield "started", Started(attempt=now.attempt)
    if now.total_steps:
        yield "step", Step(step=now.step, total_steps=now.total_steps)


def new_preview_step(last: JobProgress | None, now: JobProgress) -> int | None:
    """Of the preview that there is; None where it was told of last."""
    is_told = last is not None and (
        (last.attempt, last.preview_step) == (now.attempt, now.preview_step)
    )
    return now.preview_step if now.state is JobState.RUNNING and not is_told else None


def data_uri(image: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def write_event(name: str, data: BaseModel, event_id: str) -> bytes:
    """One event; its data is one line of JSON."""
    return format_sse_event(data_str=data.model_dump_json(), event=name, id=event_id)


def describe_stream() -> dict[int | str, dict[str, Any]]:
    """OpenAPI's word of the stream."""
    text = (
        "Events queued, started and step, then one named after the final state, with the job; "
        "where they were asked for also preview: after how many steps it was made, and the first "
        "picture in small as a data URI, at most 128 pixels a side. "
        "Where the API key ends before the job, the last event is unauthorized. "
        "A connection begins with the present state, and misses what comes too quickly for it."
    )
    return {
        200: {
            "description": text,
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "The final state was received before: do not connect again"},
    }

"""A job's progress as server-sent events, from its present state to its end."""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel

from server.api.dialects.native.writing import JobAnswer
from server.jobs.job import JobProgress, JobState
from server.jobs.watcher import Subscription

HEARTBEAT_S = 15.0
"""Seconds between two keep-alive comments; proxies close connections that stay silent."""


class Queued(BaseModel):
    """The job waits in the queue. position: 1 is next."""

    position: int | None


class Started(BaseModel):
    """A worker has claimed the job. attempt: 1 unless earlier workers were lost."""

    attempt: int


class Step(BaseModel):
    """Denoising steps done and to do, over all samples."""

    step: int
    total_steps: int


class Preview(Step):
    """The first picture after so many steps. image: a PNG as a data URI."""

    image: str


class Unauthorized(BaseModel):
    """The key was revoked or has expired. code: as a new connection would be refused with."""

    code: str = "invalid_api_key"


async def write_events(
    subscription: Subscription,
    read_ended: Callable[[], Awaitable[JobAnswer]],
    read_preview: Callable[[], Awaitable[bytes | None]],
    heartbeat_s: float = HEARTBEAT_S,
) -> AsyncIterator[bytes]:
    """The present state, then each change until the job ends, the key ends or the server stops.

    read_ended: the job in full, for the last event. read_preview: the newest preview, None where
    it has been removed.
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
    """The events for a change from the last progress sent; none for a job that has ended."""
    if now.state is JobState.QUEUED:
        yield "queued", Queued(position=now.position)
    if now.state is not JobState.RUNNING:
        return
    was_running = last is not None and last.state is JobState.RUNNING
    if last is None or not was_running or last.attempt != now.attempt:
        yield "started", Started(attempt=now.attempt)
    if now.total_steps:
        yield "step", Step(step=now.step, total_steps=now.total_steps)


def new_preview_step(last: JobProgress | None, now: JobProgress) -> int | None:
    """The step of a preview that has not been sent yet; None where there is none."""
    is_sent = last is not None and (
        (last.attempt, last.preview_step) == (now.attempt, now.preview_step)
    )
    return now.preview_step if now.state is JobState.RUNNING and not is_sent else None


def data_uri(image: bytes) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def write_event(name: str, data: BaseModel, event_id: str) -> bytes:
    """One event in wire form; its data is one line of JSON."""
    return format_sse_event(data_str=data.model_dump_json(), event=name, id=event_id)


def describe_stream() -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the stream."""
    text = (
        "Events queued, started and step, then one named after the final state, with the job; "
        "where they were asked for also preview: the number of steps, and the first picture as a "
        "small data URI, at most 128 pixels a side. "
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

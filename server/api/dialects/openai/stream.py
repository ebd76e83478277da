"""A call's pictures as server-sent events: previews while the job runs, then the pictures."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from server.api.dialects.inline import InlinePicture, split
from server.api.dialects.openai import writing
from server.api.dialects.openai.reading import Call
from server.core.errors import ApiError, InvalidApiKey, JobTooSlow, ServerBusy
from server.jobs.job import Job, JobProgress
from server.jobs.watcher import Subscription

HEARTBEAT_S = 15.0
"""Seconds between two keep-alive comments; proxies close connections that stay silent."""


@dataclass(frozen=True, slots=True)
class PictureStream:
    """One call's events.

    wait_s: how long the job may take. read_end: the ended job and its pictures; raises JobFailed.
    read_preview: the newest preview, None where it has been removed. fill: as `inline.fill`.
    """

    call: Call
    job: Job
    subscription: Subscription
    wait_s: float
    read_end: Callable[[], Awaitable[tuple[Job, list[InlinePicture]]]]
    read_preview: Callable[[], Awaitable[bytes | None]]
    fill: Callable[[Sequence[bytes | InlinePicture]], AsyncIterator[bytes]]

    async def events(self, heartbeat_s: float = HEARTBEAT_S) -> AsyncIterator[bytes]:
        """All events; an `ApiError` is the last one, because the status has been sent."""
        try:
            async for event in self._events(heartbeat_s):
                yield event
        except ApiError as error:
            yield write_event(writing.write_stream_error(error))

    async def _events(self, heartbeat_s: float) -> AsyncIterator[bytes]:
        """Raises: JobTooSlow, InvalidApiKey, ServerBusy; JobFailed, StorageUnavailable;
        BrokenAnswer.
        """
        until = time.monotonic() + self.wait_s
        sent, last = 0, (0, 0)
        while not self.subscription.is_over:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise JobTooSlow(self.wait_s)
            now = await self.subscription.next(min(heartbeat_s, left_s))
            if now is None:
                yield KEEPALIVE_COMMENT
                continue
            if now.state.is_terminal:
                job, pictures = await self.read_end()
                for index, picture in enumerate(pictures):
                    event = writing.write_completed(self.call, job, index, picture)
                    async for piece in self.fill(split(write_event(event), [picture])):
                        yield piece
                return
            shown = (now.attempt, now.preview_step or 0)
            if shown != last and self._is_due(now, sent) and (image := await self.read_preview()):
                yield write_event(writing.write_partial(self.call, self.job, sent, image))
                sent, last = sent + 1, shown
        raise InvalidApiKey if self.subscription.has_key_ended else ServerBusy

    def _is_due(self, now: JobProgress, sent: int) -> bool:
        """Whether a further preview is to be sent: they are spread evenly over the steps."""
        wanted = self.call.partial_images
        if now.preview_step is None or sent >= wanted:
            return False
        return now.preview_step * (wanted + 1) >= now.total_steps * (sent + 1)


def write_event(data: writing.Body) -> bytes:
    """One event in wire form, with the name that its data repeats."""
    return format_sse_event(data_str=writing.to_json(data).decode(), event=data["type"])

"""For dialects that cannot be polled: waits for a job's pictures."""

import asyncio

from fastapi import Request

from server.api.dependencies import cancel
from server.api.dialects.inline import PICTURES_GONE
from server.api.services import Services
from server.core.errors import JobFailed, JobTooSlow, ServerBusy
from server.jobs.job import Failure, Job, JobState


async def wait_for_pictures(services: Services, request: Request, job: Job) -> Job:
    """The job once it has finished with pictures.

    A job whose client goes away is cancelled, because nobody could fetch its pictures.
    Raises: JobFailed; JobTooSlow or ServerBusy for a job that did not end, which is cancelled.
    """
    ended = await wait_for_end(services, request, job)
    if ended is None:
        ended = await cancel(services, job)
        if ended.state is JobState.CANCELLED:
            raise (
                ServerBusy if services.watcher.is_stopping else JobTooSlow(services.settings.wait_s)
            )
    return with_pictures(ended)


def with_pictures(ended: Job) -> Job:
    """The job as it is passed in. Raises: JobFailed for a job without pictures."""
    if ended.has_pictures:
        return ended
    is_cancelled = ended.state is JobState.CANCELLED
    sentence = ended.error or ("The job was cancelled" if is_cancelled else PICTURES_GONE)
    raise JobFailed("cancelled" if is_cancelled else Failure.of(sentence), sentence)


async def wait_for_end(services: Services, request: Request, job: Job) -> Job | None:
    """The job once it has ended; None where the client leaves first, or `wait_s` is over first."""
    waiting = asyncio.create_task(services.watcher.wait(job.id, services.settings.wait_s))
    leaving = asyncio.create_task(until_disconnected(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()
        leaving.cancel()


async def until_disconnected(request: Request) -> None:
    """Return when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

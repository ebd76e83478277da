"""`JobWatcher`: the clients of this process that wait for a job's end or follow its progress.

A thread polls the database's change signal, which reports ends of jobs. After a change, and every
`FOLLOW_S` while clients follow jobs, the watched jobs are read once for all clients together. All
other state belongs to the event loop.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from server.core.errors import TooManyStreams
from server.core.logs import get_logger
from server.jobs.job import Job, JobProgress
from server.jobs.store import JobStore
from server.storage.database import Topic
from server.storage.notify import ChangeSignal

logger = get_logger(__name__)

POLL_S = 0.01
"""Longest wait for the change signal, in which a new client is not noticed."""

FOLLOW_S = 0.25
"""Between two reads of followed jobs, because PostgreSQL does not report progress."""

PAUSE_FACTOR = 10
"""The pause after a read, as a multiple of its time, so that reads take a tenth of a core."""

RETRY_S = 0.5
"""The pause after a failed read, and the longest pause after any read."""


class Subscription:
    """One client's view of one job's progress. key_digest: of the API key in the client's request.

    Only the latest progress is kept, so a slow client misses steps and no queue grows.
    """

    def __init__(self, job_id: int, key_id: str, key_digest: str) -> None:
        self.job_id = job_id
        self.key_id = key_id
        self.key_digest = key_digest
        self.is_over = False
        """No progress will follow: the job was removed, the key ended, or the server stops."""
        self.has_key_ended = False
        self._progress: JobProgress | None = None
        self._changed = asyncio.Event()

    async def next(self, timeout_s: float) -> JobProgress | None:
        """The job's progress once it has changed; None after `timeout_s`, and when it is over.

        The first time it is the present progress.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return None
        self._changed.clear()
        return None if self.is_over else self._progress

    def publish(self, progress: JobProgress) -> None:
        """Set the job's progress, and wake the client if it has changed."""
        if progress != self._progress:
            self._progress = progress
            self._changed.set()

    def end(self) -> None:
        """No progress will follow."""
        self.is_over = True
        self._changed.set()


class JobWatcher:
    """Use as an async context manager; leaving it releases every client.

    max_streams_per_key: subscriptions at a time.
    """

    def __init__(self, store: JobStore, max_streams_per_key: int) -> None:
        self._store = store
        self._max_streams_per_key = max_streams_per_key
        self._waiting: dict[asyncio.Future[Job | None], int] = {}
        self._subscriptions: set[Subscription] = set()
        self._is_stopping = False
        self._must_end = False
        self._must_read = threading.Event()
        # A limiter of its own, because hanging calls may use up the threads of another.
        self._limiter = CapacityLimiter(1)

    async def __aenter__(self) -> "JobWatcher":
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(), name="watcher")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release_all()
        self._must_end = True
        self._must_read.set()
        await self._task

    def __len__(self) -> int:
        """Clients that wait for a job or follow one."""
        return len(self._waiting) + len(self._subscriptions)

    @property
    def is_stopping(self) -> bool:
        """The server is stopping."""
        return self._is_stopping

    def release_all(self) -> None:
        """Release all clients, also later ones: the server is stopping. For signal handlers."""
        self._is_stopping = True
        self._loop.call_soon_threadsafe(self._release)

    def end_invalid(self, is_valid: Callable[[str], bool]) -> None:
        """End the subscriptions whose key is no longer valid. is_valid: by a key's digest."""
        for each in self._subscriptions:
            if not is_valid(each.key_digest):
                each.has_key_ended = True
                each.end()

    async def wait(self, job_id: int, timeout_s: float) -> Job | None:
        """The job once it has ended; None after `timeout_s`, or when the server stops."""
        if self._is_stopping:
            return None
        ended: asyncio.Future[Job | None] = self._loop.create_future()
        self._waiting[ended] = job_id
        self._must_read.set()  # the job may have ended already
        try:
            async with asyncio.timeout(timeout_s):
                return await ended
        except TimeoutError:
            return None
        finally:
            del self._waiting[ended]

    @contextmanager
    def subscribe(self, job_id: int, key_id: str, key_digest: str = "") -> Iterator[Subscription]:
        """Follow a job until the block is left. Raises: TooManyStreams."""
        of_key = [each for each in self._subscriptions if each.key_id == key_id]
        if len(of_key) >= self._max_streams_per_key:
            raise TooManyStreams(self._max_streams_per_key)
        subscription = Subscription(job_id, key_id, key_digest)
        if self._is_stopping:
            subscription.end()
        self._subscriptions.add(subscription)
        self._must_read.set()
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)

    def _release(self) -> None:
        for ended in self._waiting:
            if not ended.done():
                ended.set_result(None)
        for each in self._subscriptions:
            each.end()

    async def _run(self) -> None:
        with self._store.change_signal(Topic.ENDED) as signal:
            while not self._must_end:
                try:
                    await run_sync(self._wait_for_change, signal, limiter=self._limiter)
                    started = time.monotonic()
                    await self._read_jobs()
                    took_s = time.monotonic() - started
                    await asyncio.sleep(min(PAUSE_FACTOR * took_s, RETRY_S))
                except Exception:
                    # The task must not end, because it alone wakes the clients.
                    logger.exception("watched jobs cannot be read")
                    self._must_read.set()
                    await asyncio.sleep(RETRY_S)

    def _wait_for_change(self, signal: ChangeSignal) -> None:
        """In a thread: wait for the end of a job, a new client, or the next read of progress."""
        read_at = time.monotonic() + FOLLOW_S
        while not (self._must_read.is_set() or signal.has_changed()):
            if self._subscriptions and time.monotonic() >= read_at:
                break
            if len(self):
                signal.wait(POLL_S)
            else:
                self._must_read.wait()
        self._must_read.clear()

    async def _read_jobs(self) -> None:
        """Read the watched jobs and wake their clients. Raises: SQLAlchemyError."""
        if waited := {*self._waiting.values()}:
            jobs = await run_sync(self._store.ended, waited, limiter=self._limiter)
            ended = {job.id: job for job in jobs}
            for future, job_id in self._waiting.items():
                if job_id in ended and not future.done():
                    future.set_result(ended[job_id])
        if followed := {each.job_id for each in self._subscriptions}:
            found = await run_sync(self._store.progress_of, followed, limiter=self._limiter)
            for each in self._subscriptions:
                if each.job_id in found:
                    each.publish(found[each.job_id])
                elif each.job_id in followed:
                    each.end()

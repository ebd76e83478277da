"""`Services`: the parts of the API process, and the thread limits for its blocking calls."""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

from server.api.auth.keyring import KeyRing
from server.api.monitoring.health import Health
from server.api.monitoring.status import StatusReader
from server.api.shadow import Shadow
from server.core.background import Background
from server.core.errors import StorageUnavailable
from server.core.fairness import FairSemaphore, KeyedCounter
from server.core.metrics import Metrics
from server.core.rate_limits import TokenBuckets
from server.core.settings import Settings
from server.egress.downloads import ImageDownloader
from server.jobs.estimates import Estimator, QuotedEstimates
from server.jobs.store import JobStore
from server.jobs.watcher import JobWatcher
from server.sandbox.pool import DecoderPool
from server.storage.files import Storage
from server.webhooks.deliveries import DeliveryStore
from server.webhooks.sender import WebhookSender

P = ParamSpec("P")
R = TypeVar("R")

FILES = "files"
"""The one owner of all slots for file calls."""

WEBHOOKS = "webhooks"
"""Name of the background task; a server whose webhook task fails is not ready."""

STORE_THREADS = 8
"""Short database calls at a time. Each may take a connection of the database's pool, as may the
webhook sender's calls, the janitor, the watcher and one group commit."""

SUBMIT_THREADS = 32
"""Submits at a time, which share group commits. They have threads of their own, so that a disk that
fsyncs slowly does not delay reads."""

FILE_THREADS = 32
"""File calls at a time. A call keeps its thread until the file store has answered, even after its
caller's timeout. A file store that hangs therefore takes these threads and no others."""

PICTURES = 2
"""Pictures worked on at a time, for thumbnails, comparisons and checks, because each takes a core.
The networks that ask for thumbnails, which need no key, and the keys take turns."""

FILE_TIMEOUT_S = 10.0
"""Timeout of a file call, including the time until a thread is free."""


@dataclass(frozen=True, slots=True)
class Services:
    """The API process's parts, built once by `app.build_services`.

    admitted: requests by key between admission and submit (`accept`).
    thumbnails: the latest ones by their pictures' keys, for `outputs`.
    uploads, upload_bytes: what each key may upload.
    quotes: the first estimate that a client got for each job, to be compared with the truth.
    """

    settings: Settings
    keys: KeyRing
    store: JobStore
    estimator: Estimator
    storage: Storage
    fetcher: ImageDownloader
    sandbox: DecoderPool
    watcher: JobWatcher
    deliveries: DeliveryStore
    webhooks: WebhookSender
    background: Background
    metrics: Metrics
    health: Health
    status: StatusReader
    shadow: Shadow
    admitted: KeyedCounter = field(default_factory=KeyedCounter)
    store_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(STORE_THREADS))
    submit_threads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(SUBMIT_THREADS))
    file_threads: FairSemaphore = field(
        default_factory=lambda: FairSemaphore(FILE_THREADS, FILE_THREADS)
    )
    picture_slots: FairSemaphore = field(default_factory=lambda: FairSemaphore(PICTURES, PICTURES))
    thumbnails: dict[str, bytes] = field(default_factory=dict)
    uploads: TokenBuckets = field(default_factory=TokenBuckets)
    upload_bytes: TokenBuckets = field(default_factory=TokenBuckets)
    quotes: QuotedEstimates = field(default_factory=QuotedEstimates)

    async def in_store_thread(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run a short database call in a thread, so that it does not block the event loop."""
        call = functools.partial(function, *args, **kwargs)
        return await self._in_thread(call, self.store_threads)

    async def in_submit_thread(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run a database call that waits for a group commit."""
        call = functools.partial(function, *args, **kwargs)
        return await self._in_thread(call, self.submit_threads)

    async def _in_thread(self, call: Callable[[], R], limiter: CapacityLimiter) -> R:
        with self.health.recording_failures():
            return await to_thread.run_sync(call, limiter=limiter)

    async def in_file_thread(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run a file call. Raises: StorageUnavailable, also after `FILE_TIMEOUT_S`."""
        call = functools.partial(function, *args, **kwargs)
        with self.health.recording_failures():
            try:
                async with asyncio.timeout(FILE_TIMEOUT_S):
                    await self.file_threads.acquire(FILES)
                    return await self.file_threads.use_in_thread(FILES, call)
            except TimeoutError as error:
                raise StorageUnavailable("the file store does not answer") from error

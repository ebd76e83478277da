"""What the API process is made of, and how endpoints reach its synchronous parts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread

from server.auth import KeyRing
from server.egress import Fetcher
from server.errors import ApiError
from server.jobs import JobStore
from server.metrics import Metrics
from server.settings import Settings
from server.storage import Storage
from server.waiters import Waiters

P = ParamSpec("P")
R = TypeVar("R")

STORE_THREADS = 8
"""Database and file calls at a time; fewer than the connections of the database pool."""

DECODE_THREADS = 2
"""Pictures decoded at a time: each may take 100 MB while it is."""


@dataclass(frozen=True, slots=True)
class Services:
    """The API process's parts, built once by `app.create_app`."""

    settings: Settings
    keys: KeyRing
    store: JobStore
    storage: Storage
    fetcher: Fetcher
    waiters: Waiters
    metrics: Metrics
    store_threads: anyio.CapacityLimiter
    decode_threads: anyio.CapacityLimiter

    async def in_store_thread(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call a synchronous part without blocking the event loop."""
        call = functools.partial(function, *args, **kwargs)
        return await anyio.to_thread.run_sync(call, limiter=self.store_threads)

    async def in_decode_thread(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call the picture decoder without blocking the event loop."""
        call = functools.partial(function, *args, **kwargs)
        try:
            decoded = await anyio.to_thread.run_sync(call, limiter=self.decode_threads)
        except ApiError:
            self.metrics.decodes.labels("refused").inc()
            raise
        self.metrics.decodes.labels("decoded").inc()
        return decoded

"""What the API process is made of, and how endpoints reach its synchronous parts."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from server.auth import KeyRing
from server.background import Background
from server.deliveries import DeliveryStore
from server.egress import Fetcher
from server.errors import StorageUnavailable
from server.estimates import Estimator, ToldEstimates
from server.followers import Followers
from server.health import Health
from server.job_store import JobStore
from server.keeping import Keeper
from server.metrics import Metrics
from server.outlook import Outlook
from server.sandbox import Sandbox
from server.settings import Settings
from server.slots import Headcount
from server.storage import Storage
from server.threads import Threads
from server.waiters import Waiters
from server.webhooks import WebhookSender

P = ParamSpec("P")
R = TypeVar("R")

WEBHOOKS = "webhooks"
"""Name of the background task without which a server is not ready."""

STORE_THREADS = 8
"""Database calls at a time. Each may take a connection of the database's pool, as may each thread
of the webhooks and the one of the janitor; waiters and followers take two each, and all that share
commits one for each kind."""

FILE_THREADS = 8
"""File calls at a time, apart from those of the database: a file store that hangs may take all of
them for some seconds, and stops nothing else."""

FILE_PATIENCE_S = 10.0
"""For a file call, with the time until a thread is free."""


@dataclass(frozen=True, slots=True)
class Services:
    """The API process's parts, built once by `app.create_app`.

    arrivals: requests by key that are fetched, decoded and stored now.
    """

    settings: Settings
    keys: KeyRing
    store: JobStore
    outlook: Outlook
    estimator: Estimator
    storage: Storage
    fetcher: Fetcher
    sandbox: Sandbox
    keeper: Keeper
    waiters: Waiters
    followers: Followers
    deliveries: DeliveryStore
    webhooks: WebhookSender
    background: Background
    metrics: Metrics
    health: Health
    store_threads: Threads
    file_threads: Threads
    arrivals: Headcount = field(default_factory=Headcount)
    told: ToldEstimates = field(default_factory=ToldEstimates)

    async def in_store_thread(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call what reads or writes the database without blocking the event loop."""
        with self.health.noting():
            return await self.store_threads.call(function, *args, **kwargs)

    async def in_file_thread(
        self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """The same for what reads or removes files. Raises: StorageUnavailable, also when late."""
        with self.health.noting():
            try:
                async with asyncio.timeout(FILE_PATIENCE_S):
                    return await self.file_threads.call(function, *args, **kwargs)
            except TimeoutError as error:
                raise StorageUnavailable("the file store does not answer") from error

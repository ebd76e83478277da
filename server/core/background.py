"""`Background`: runs the server's background tasks and restarts those that end.

A task that died unnoticed would stop the webhooks, for example, while everything else works.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType

from server.core.logs import get_logger

logger = get_logger(__name__)

FIRST_DELAY_S = 1.0
LAST_DELAY_S = 30.0
STEADY_S = 60.0
"""A task that ran so long restarts with the first delay, and no longer counts as failing."""


class Background:
    """Use as an async context manager; leaving cancels the tasks and waits for them.

    delays_s: before a restart, the first and the longest. clock: monotonic seconds.
    """

    def __init__(
        self,
        delays_s: tuple[float, float] = (FIRST_DELAY_S, LAST_DELAY_S),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_delay_s, self._last_delay_s = delays_s
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []
        self._failed_at: dict[str, float] = {}

    async def __aenter__(self) -> "Background":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Start a task that should never return; `run` is called again after each failure."""
        self._tasks.append(asyncio.create_task(self._restart(name, run), name=name))

    def failing(self) -> list[str]:
        """Names of the tasks that ended within `STEADY_S`."""
        now = self._clock()
        return [name for name, at in self._failed_at.items() if now - at < STEADY_S]

    async def _restart(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        delay_s = self._first_delay_s
        while True:
            started = self._clock()
            try:
                await run()
            except Exception as error:
                logger.exception("background task failed", detail=name, error=type(error).__name__)
            else:
                logger.error("background task ended", detail=name)
            now = self._clock()
            if now - started > STEADY_S:
                delay_s = self._first_delay_s
            self._failed_at[name] = now
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, self._last_delay_s)

"""Requests that wait for their job: one thread learns of ended jobs and wakes them.

A thread per waiting request would not scale to thousands; a waiter here is one future.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType

from server.changes import ChangeSignal
from server.database import Topic
from server.job_store import JobStore
from server.jobs import Job
from server.telemetry import get_logger

logger = get_logger(__name__)

POLL_S = 0.01
"""Between two looks at the change signal, which costs microseconds; bounds the wake-up latency."""

RETRY_S = 0.5
"""After a look that failed."""


class Waiters:
    """Use as a context manager: entering starts the thread, leaving wakes every waiter."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._futures: dict[int, list[asyncio.Future[Job]]] = defaultdict(list)
        # Re-entrant: SIGTERM's handler runs on the event loop's thread, maybe while it holds this.
        self._lock = threading.RLock()
        self._is_released = False
        self._has_newcomers = False
        self._has_waiters = threading.Event()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waiters", daemon=True)

    def __enter__(self) -> "Waiters":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_stopping.set()
        self._has_waiters.set()
        self._thread.join()
        self.release_all()

    @property
    def is_released(self) -> bool:
        """The server is stopping."""
        return self._is_released

    def release_all(self) -> None:
        """Let all waiters go, later ones too, with "not ended yet": the server is stopping."""
        with self._lock:
            self._is_released = True
            waiting = [future for futures in self._futures.values() for future in futures]
        for future in waiting:
            _call(future, future.cancel)

    async def wait(self, job_id: int, timeout_s: float) -> Job | None:
        """The job once it has ended; None after `timeout_s`, or when the server stops."""
        future: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._is_released:
                return None
            self._futures[job_id].append(future)
            self._has_newcomers = True
        self._has_waiters.set()
        try:
            done, _ = await asyncio.wait([future], timeout=timeout_s)
            return future.result() if done and not future.cancelled() else None
        finally:
            self._forget(job_id, future)

    def _forget(self, job_id: int, future: asyncio.Future[Job]) -> None:
        with self._lock:
            self._futures[job_id].remove(future)
            if not self._futures[job_id]:
                del self._futures[job_id]

    def _run(self) -> None:
        with self._store.change_signal(Topic.ENDED) as signal:
            while not self._is_stopping.is_set():
                try:
                    self._look(signal)
                except Exception:
                    # The thread must not end: nobody would ever be woken again.
                    logger.exception("ended jobs cannot be looked up")
                    self._has_newcomers = True  # for all of them
                    self._is_stopping.wait(RETRY_S)

    def _look(self, signal: ChangeSignal) -> None:
        """Once, when there is anybody to look for. Raises: SQLAlchemyError."""
        with self._lock:
            waiting = sorted(self._futures)
            has_newcomers, self._has_newcomers = self._has_newcomers, False
        if not waiting:
            self._has_waiters.clear()
            # Somebody may have come between the look and the clearing.
            if not self._futures:
                self._has_waiters.wait()
            return
        # A job may have ended before its waiter came: new ones are looked up at once.
        if signal.has_changed() or has_newcomers:
            self._wake(self._store.ended(waiting))
        time.sleep(POLL_S)  # half as dear as waiting for the event, and as short

    def _wake(self, ended: list[Job]) -> None:
        for job in ended:
            with self._lock:
                futures = list(self._futures.get(job.id, ()))
            for future in futures:
                _call(future, _resolve, future, job)


def _call(future: asyncio.Future[Job], act: Callable[..., object], *arguments: object) -> None:
    """From any thread, on the future's own loop."""
    try:
        future.get_loop().call_soon_threadsafe(act, *arguments)
    except RuntimeError:
        return  # the loop has ended, and nobody waits


def _resolve(future: asyncio.Future[Job], job: Job) -> None:
    if not future.done():
        future.set_result(job)

"""Clients that follow jobs: one thread looks for all of them, and wakes who has news.

Not a queue of events: a follower gets how its job stands now, so that one who reads slowly misses
steps and nothing piles up.
"""

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from server.changes import ChangeSignal
from server.errors import TooManyStreams
from server.job_store import JobStore
from server.jobs import Standing
from server.telemetry import get_logger

logger = get_logger(__name__)

POLL_S = 0.1
"""Between two looks at the change signal. Workers write progress twice a second."""

RETRY_S = 0.5
"""After a look that failed."""


class Follower:
    """One client's view of one job. Belongs to the event loop that made it.

    key_digest: of the key that the client came with.
    """

    def __init__(self, key_digest: str = "") -> None:
        self.key_digest = key_digest
        self.is_over = False
        """No more will come: the job is gone, the key has ended, or the server stops."""
        self.has_key_ended = False
        self._loop = asyncio.get_running_loop()
        self._has_news = asyncio.Event()
        self._standing: Standing | None = None

    async def news(self, timeout_s: float) -> Standing | None:
        """How the job stands, once that has changed; None after `timeout_s`, and when it is over.

        The first time it is how the job stands now.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._has_news.wait()
        except TimeoutError:
            return None
        self._has_news.clear()
        return None if self.is_over else self._standing

    def tell(self, standing: Standing | None) -> None:
        """From any thread: how the job stands, or that it is over."""
        try:
            self._loop.call_soon_threadsafe(self._take, standing)
        except RuntimeError:
            return  # the loop has ended, and nobody listens

    def end_with_key(self) -> None:
        """On the event loop: it is over, because the key is no longer valid."""
        self.has_key_ended = True
        self._take(None)

    def _take(self, standing: Standing | None) -> None:
        # What was looked up before the end may come after it, and nothing follows an end.
        self.is_over = self.is_over or standing is None
        self._standing = standing
        self._has_news.set()


class Followers:
    """Use as a context manager: entering starts the thread, leaving ends every follower's view.

    max_per_key: views at a time.
    """

    def __init__(self, store: JobStore, max_per_key: int) -> None:
        self._store = store
        self._max_per_key = max_per_key
        self._counts: Counter[str] = Counter()
        self._followers: dict[int, set[Follower]] = defaultdict(set)
        self._newcomers: list[tuple[int, Follower]] = []
        # Re-entrant: SIGTERM's handler runs on the event loop's thread, maybe while it holds this.
        self._lock = threading.RLock()
        self._is_released = False
        self._is_stopping = False
        self._wake = threading.Event()
        self._known: dict[int, Standing | None] = {}
        self._thread = threading.Thread(target=self._run, name="followers", daemon=True)

    def __enter__(self) -> "Followers":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_stopping = True
        self._wake.set()
        self._thread.join()
        self.release_all()

    def __len__(self) -> int:
        """How many follow any job."""
        with self._lock:
            return sum(map(len, self._followers.values()))

    def release_all(self) -> None:
        """It is over for all, later ones too: the server is stopping."""
        with self._lock:
            self._is_released = True
            everybody = [each for group in self._followers.values() for each in group]
        for follower in everybody:
            follower.tell(None)

    def end_invalid(self, is_valid: Callable[[str], bool]) -> None:
        """On the event loop: it is over for clients whose key is no longer valid, by its digest."""
        with self._lock:
            everybody = [each for group in self._followers.values() for each in group]
        for follower in everybody:
            if not is_valid(follower.key_digest):
                follower.end_with_key()

    @contextmanager
    def follow(self, job_id: int, key_id: str, key_digest: str = "") -> Iterator[Follower]:
        """Follow a job until the block is left. Raises: TooManyStreams."""
        follower = Follower(key_digest)
        with self._lock:
            if self._counts[key_id] >= self._max_per_key:
                raise TooManyStreams(self._max_per_key)
            self._counts[key_id] += 1
            self._followers[job_id].add(follower)
            self._newcomers.append((job_id, follower))
            if self._is_released:
                follower.tell(None)
        self._wake.set()
        try:
            yield follower
        finally:
            with self._lock:
                self._counts[key_id] -= 1
                if not self._counts[key_id]:
                    del self._counts[key_id]
                self._followers[job_id].remove(follower)
                if not self._followers[job_id]:
                    del self._followers[job_id]

    def _run(self) -> None:
        with self._store.change_signal() as signal:
            while True:
                self._wake.clear()  # before the look at what it wakes for
                if self._is_stopping:
                    return
                try:
                    pause_s = self._look(signal)
                except Exception:
                    # The thread must not end: nobody would ever hear anything again.
                    logger.exception("followed jobs cannot be looked up")
                    self._known = {}  # all are looked up anew, and told
                    pause_s = RETRY_S
                self._wake.wait(pause_s)

    def _look(self, signal: ChangeSignal) -> float | None:
        """Once; gives the seconds until the next look. Raises: SQLAlchemyError."""
        with self._lock:
            followed = set(self._followers)
            newcomers, self._newcomers = self._newcomers, []
        known = self._known
        stale = followed if signal.has_changed() else followed - known.keys()
        found = self._store.standings(sorted(stale)) if stale else {}
        changed = {each for each in stale if each not in known or known[each] != found.get(each)}
        self._known = {each: known[each] for each in followed - stale} | {
            each: found.get(each) for each in stale
        }
        self._tell(changed, newcomers)
        # Without anybody there is nothing to look for until somebody comes.
        return POLL_S if followed else None

    def _tell(self, changed: set[int], newcomers: list[tuple[int, Follower]]) -> None:
        with self._lock:
            told = {each for job_id in changed for each in self._followers.get(job_id, ())}
            of_changed = [
                (job_id, each) for job_id in changed for each in self._followers.get(job_id, ())
            ]
        of_known = [(job_id, each) for job_id, each in newcomers if each not in told]
        for job_id, follower in (*of_changed, *of_known):
            if not self._is_released:
                follower.tell(self._known.get(job_id))

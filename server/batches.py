"""`Batches`: what arrives while a call is under way is done together by the next one.

A wait for the disk takes some milliseconds, whatever is in it, and so does the database's commit.
One thread makes the calls, and nobody else stands still for them: threads that wait together wake
together, and then wait for each other.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batches(Generic[T, R]):
    """Does items in batches, in the order of arrival.

    work: does all of a batch; for each item, in order, its result or what it is to raise. What the
    work raises itself is raised for all. name: of the thread, which is there when it is needed.
    rest: called before the next batch, for others who want what the work takes hold of. Not after a
        single item, as then there is no hurry.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Sequence[R | Exception]],
        name: str,
        rest: Callable[[], None] | None = None,
    ) -> None:
        self._work = work
        self._rest = rest
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: list[tuple[T, Future[R]]] = []
        self._is_busy = False
        self._lock = threading.Lock()

    def begin(self, item: T) -> Future[R]:
        """Have an item done with the next batch; never waits."""
        future: Future[R] = Future()
        with self._lock:
            self._waiting.append((item, future))
            if not self._is_busy:
                self._thread.submit(self._run)
                self._is_busy = True
        return future

    def run(self, item: T) -> R:
        """Have an item done, and wait for it. Raises: what its work raises."""
        return self.begin(item).result()

    def _run(self) -> None:
        """Until nothing waits."""
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._is_busy = False
                    return
            outcomes: Sequence[R | Exception]
            try:
                outcomes = self._work([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 - all callers raise it
                outcomes = [error] * len(batch)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
            if self._rest is not None and len(batch) > 1:
                self._rest()

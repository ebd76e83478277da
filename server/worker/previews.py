"""`PreviewFiles`: how running jobs look, in small files that the API process reads.

One file for each job that asked for it, written anew by each preview, removed with the job's end.
What goes wrong here is logged and forgotten: the next preview comes soon.
"""

import functools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.imaging.images import encode_png
from server.core.errors import StorageUnavailable
from server.core.logs import get_logger
from server.jobs.job import Job
from server.storage.files import Storage

logger = get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

SETTLE_S = 0.02
"""For a file store that answers at once; what a slower one keeps is told half a second later."""


class DaemonThread(Executor):
    """Calls in their order, in a thread that the process does not wait for at its end: a file store
    may never answer."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        self._calls.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - whoever asks for the result hears of it
                future.set_exception(error)


class PreviewFiles:
    """Belongs to the worker's thread, and does the slow part in another.

    thread: which writes and removes files in the order of the calls, so that nothing is left behind
        by a preview that was on its way.
    """

    def __init__(self, storage: Storage, thread: Executor) -> None:
        self._storage = storage
        self._thread = thread
        self._steps: dict[int, int] = {}
        self._on_the_way: dict[int, Future[int | None]] = {}

    def is_due(self, job: Job, step: int) -> bool:
        """Whether a preview of this step is wanted, and no earlier one still on its way."""
        is_new = step > self._steps.get(job.id, 0)
        return job.wants_previews and is_new and job.id not in self._on_the_way

    def store(self, job: Job, step: int, picture: NDArray[np.uint8]) -> None:
        """Write a preview `(h, w, 3)`."""
        self._on_the_way[job.id] = self._thread.submit(self._write, job, step, picture)

    def settle(self) -> None:
        """Give what is on its way a moment to arrive."""
        wait(self._on_the_way.values(), SETTLE_S)
        for job_id, future in [*self._on_the_way.items()]:
            if future.done():
                del self._on_the_way[job_id]
                step = future.result()
                if step is not None:
                    self._steps[job_id] = step

    def step_of(self, job: Job) -> int | None:
        """After how many steps the job's file shows it; None where there is no file."""
        return self._steps.get(job.id)

    def drop(self, job: Job) -> None:
        """Remove the file of a job that this worker holds no longer."""
        if job.wants_previews:
            self._steps.pop(job.id, None)
            self._on_the_way.pop(job.id, None)
            self._thread.submit(self._remove, job)

    def _write(self, job: Job, step: int, picture: NDArray[np.uint8]) -> int | None:
        """The step, None where the file could not be written."""
        try:
            self._storage.put(job.preview_key, encode_png(picture))
        except StorageUnavailable:
            logger.warning("preview not stored", job_id=job.id)
            return None
        return step

    def _remove(self, job: Job) -> None:
        try:
            self._storage.delete(job.preview_key)
        except StorageUnavailable:
            logger.warning("preview not deleted", job_id=job.id)

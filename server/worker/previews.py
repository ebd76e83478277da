"""`PreviewFiles`: stores small previews of running jobs as files, which the API process reads.

Each job that requests previews has one file, which each preview overwrites and the job's end
removes. Errors are only logged, because the next preview follows soon.
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

COLLECT_S = 0.02
"""Wait for a fast file store. Writes of a slower one are collected at the next heartbeat."""


class DaemonThread(Executor):
    """Runs calls in order in a daemon thread, because a file store may never answer, and the
    process must still end."""

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
            except Exception as error:  # noqa: BLE001 - `Future.result` raises it
                future.set_exception(error)


class PreviewFiles:
    """Belongs to the worker's thread, and writes files in another.

    thread: writes and removes files in the order of the calls, so that a preview that is being
        written does not survive its job.
    """

    def __init__(self, storage: Storage, thread: Executor) -> None:
        self._storage = storage
        self._thread = thread
        self._steps: dict[int, int] = {}
        self._pending: dict[int, Future[int | None]] = {}

    def is_due(self, job: Job, step: int) -> bool:
        """Whether the job wants a preview of this step, and none is being written."""
        is_new = step > self._steps.get(job.id, 0)
        return job.wants_previews and is_new and job.id not in self._pending

    def store(self, job: Job, step: int, picture: NDArray[np.uint8]) -> None:
        """Start to write a preview `(h, w, 3)`."""
        self._pending[job.id] = self._thread.submit(self._write, job, step, picture)

    def collect(self) -> None:
        """Wait a moment for pending writes, and record the steps of finished ones."""
        wait(self._pending.values(), COLLECT_S)
        for job_id, future in [*self._pending.items()]:
            if future.done():
                del self._pending[job_id]
                step = future.result()
                if step is not None:
                    self._steps[job_id] = step

    def step_of(self, job: Job) -> int | None:
        """The step that the job's file shows; None where there is no file."""
        return self._steps.get(job.id)

    def drop(self, job: Job) -> None:
        """Remove the file of a job whose lease has ended."""
        if job.wants_previews:
            self._steps.pop(job.id, None)
            self._pending.pop(job.id, None)
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

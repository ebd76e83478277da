"""`Finalizer`: writes the ends of jobs into the stores, in a thread beside the engine.

An end is a list of steps, such as: encode, store a picture, commit, remove the input. A step that
fails because a store is unavailable is retried with a growing delay, and the steps before it are
not repeated. The thread never waits for a retry, so the ends of other jobs go on.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError

from server.core.errors import StorageUnavailable
from server.core.logs import get_logger
from server.jobs.job import Failure, Job

logger = get_logger(__name__)

Step = Callable[[], None]
"""An idempotent step. Raises: StorageUnavailable or SQLAlchemyError where a store is unavailable;
any other error fails the job."""

FIRST_BACKOFF_S = 0.5
MAX_DATABASE_BACKOFF_S = 2.0
"""Short, because the whole worker waits while the database is unavailable."""

MAX_STORAGE_BACKOFF_S = 30.0
STORAGE_TIMEOUT_S = 3_600.0
"""A job fails when the file store has refused its pictures for so long."""

CLOSE_TIMEOUT_S = 2.0
"""Wait for the current step when the worker ends."""


@dataclass(slots=True, eq=False)
class Finalization:
    """The end of one job.

    steps: those not yet done; only the thread may use them while `is_busy`.
    error: of the last try. refused_at: when the file store first refused a step.
    """

    job: Job
    steps: deque[Step]
    is_busy: bool = False
    error: Exception | None = None
    backoff_s: float = 0.0
    retry_at: float = 0.0
    refused_at: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether the stores have taken every step."""
        return not self.is_busy and not self.steps


class Finalizer:
    """The finalizations under way. Belongs to one thread, and runs the steps in another.

    fail: the steps of a job's end without pictures. clock: monotonic seconds.
    """

    def __init__(
        self,
        fail: Callable[[Job, Failure], list[Step]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fail = fail
        self._clock = clock
        self._finalizations: dict[int, Finalization] = {}
        self._due: queue.SimpleQueue[Finalization | None] = queue.SimpleQueue()
        self._step_since: float | None = None
        # A daemon thread, because the process must end even if a file store never answers.
        self._thread = threading.Thread(target=self._run, name="finalizer", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._finalizations)

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._finalizations

    @property
    def stuck_s(self) -> float:
        """How long the current step has been running."""
        since = self._step_since
        return 0.0 if since is None else self._clock() - since

    def begin(self, job: Job, steps: Iterable[Step]) -> None:
        """Start to run the steps of a job's end."""
        finalization = self._finalizations[job.id] = Finalization(job, deque(steps))
        self._enqueue(finalization)

    def fail(self, job: Job, failure: Failure) -> None:
        """Start to end a job without pictures."""
        self.begin(job, self._fail(job, failure))

    def poll(self) -> list[int]:
        """Start due retries; returns the ids of jobs that have ended since the last poll."""
        done = [
            job_id for job_id, finalization in self._finalizations.items() if finalization.is_done
        ]
        for job_id in done:
            del self._finalizations[job_id]
        now = self._clock()
        for finalization in self._finalizations.values():
            if finalization.is_busy:
                continue
            if finalization.error is not None:
                self._decide_retry(finalization, finalization.error, now)
            if now >= finalization.retry_at:
                self._enqueue(finalization)
        return done

    def close(self) -> list[Job]:
        """Stop; returns the jobs whose ends the stores have not taken.

        Waits a little for the current step. A step that takes longer may still succeed, so its job
        is not returned.
        """
        self._due.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        return [
            finalization.job
            for finalization in self._finalizations.values()
            if not finalization.is_done and not finalization.is_busy
        ]

    def _enqueue(self, finalization: Finalization) -> None:
        finalization.is_busy = True
        self._due.put(finalization)

    def _decide_retry(self, finalization: Finalization, error: Exception, now: float) -> None:
        """Schedule a retry, or replace the steps by those that fail the job."""
        finalization.error = None
        is_storage = isinstance(error, StorageUnavailable)
        longest_s = MAX_STORAGE_BACKOFF_S if is_storage else MAX_DATABASE_BACKOFF_S
        finalization.backoff_s = min(2 * finalization.backoff_s or FIRST_BACKOFF_S, longest_s)
        finalization.retry_at = now + finalization.backoff_s
        failure = self._failure_of(finalization, error, now)
        if failure is None:
            logger.warning(
                "a store is unavailable, the job's end is retried",
                job_id=finalization.job.id,
                error=type(error).__name__,
                detail=str(error),
                delay_s=finalization.backoff_s,
            )
            return
        logger.error("job failed", job_id=finalization.job.id, detail=failure, exc_info=error)
        finalization.steps = deque(self._fail(finalization.job, failure))
        finalization.refused_at = None

    def _failure_of(
        self, finalization: Finalization, error: Exception, now: float
    ) -> Failure | None:
        """The failure with which the job ends, or None for a retry."""
        if isinstance(error, StorageUnavailable):
            finalization.refused_at = (
                now if finalization.refused_at is None else finalization.refused_at
            )
            is_timeout = now - finalization.refused_at > STORAGE_TIMEOUT_S
            return Failure.NOT_STORED if is_timeout else None
        return None if is_outage(error) else Failure.UNKNOWN

    def _run(self) -> None:
        while (finalization := self._due.get()) is not None:
            self._run_steps(finalization)

    def _run_steps(self, finalization: Finalization) -> None:
        """Run the remaining steps, up to the first that fails."""
        try:
            while finalization.steps:
                self._step_since = self._clock()
                finalization.steps[0]()
                finalization.steps.popleft()
        except Exception as error:  # noqa: BLE001 - `poll` decides what follows
            finalization.error = error
        finally:
            self._step_since = None
            finalization.is_busy = False


def is_outage(error: Exception) -> bool:
    """Whether the database itself failed, and has not refused the values or the statement."""
    is_refusal = isinstance(error, IntegrityError | DataError) or (
        isinstance(error, StatementError) and not isinstance(error, DBAPIError)
    )
    return isinstance(error, SQLAlchemyError) and not is_refusal

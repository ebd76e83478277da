"""`Finalizer`: jobs' ends on their way into the stores, beside the engine's steps.

An end is a row of steps, such as: encode, store a picture, commit, remove the input. A step that a
store does not take is tried again later, and what was done before it is not done again. One thread
does the steps; waiting is not its business, so that a store that is away holds nobody up.
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
"""May be done again. Raises: StorageUnavailable or SQLAlchemyError where a store is away; anything
else is the job's own fault and fails it."""

FIRST_PAUSE_S = 0.5
DATABASE_PAUSE_S = 2.0
"""The longest: nobody else gets on without a database either."""

STORAGE_PAUSE_S = 30.0
STORAGE_PATIENCE_S = 3_600.0
"""How long pictures are kept for a file store that does not take them."""

CLOSE_S = 2.0
"""For what is being done when the worker ends."""


@dataclass(slots=True, eq=False)
class Ending:
    """One job's end.

    steps: what is left; belongs to the thread while the ending is busy.
    error: what stopped the last try. refused_at: when the file store first refused it.
    """

    job: Job
    steps: deque[Step]
    is_busy: bool = False
    error: Exception | None = None
    pause_s: float = 0.0
    again_at: float = 0.0
    refused_at: float | None = None

    @property
    def is_over(self) -> bool:
        """The stores have all of it."""
        return not self.is_busy and not self.steps


class Finalizer:
    """The ends on their way. All calls come from one thread.

    fail: the steps of a job's end without pictures. clock: seconds, never turned back.
    """

    def __init__(
        self,
        fail: Callable[[Job, Failure], list[Step]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fail = fail
        self._clock = clock
        self._endings: dict[int, Ending] = {}
        self._due: queue.SimpleQueue[Ending | None] = queue.SimpleQueue()
        self._step_since: float | None = None
        # A daemon: a file store may never answer, and the process is to end all the same.
        self._thread = threading.Thread(target=self._run, name="endings", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._endings)

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._endings

    @property
    def stuck_s(self) -> float:
        """For how long the thread has been in one and the same step."""
        since = self._step_since
        return 0.0 if since is None else self._clock() - since

    def begin(self, job: Job, steps: Iterable[Step]) -> None:
        """The job ends in this way."""
        ending = self._endings[job.id] = Ending(job, deque(steps))
        self._try(ending)

    def fail(self, job: Job, failure: Failure) -> None:
        """The job ends without pictures."""
        self.begin(job, self._fail(job, failure))

    def look(self) -> list[int]:
        """Go on with what is due; ids of the jobs that have ended since the last look."""
        over = [job_id for job_id, ending in self._endings.items() if ending.is_over]
        for job_id in over:
            del self._endings[job_id]
        now = self._clock()
        for ending in self._endings.values():
            if ending.is_busy:
                continue
            if ending.error is not None:
                self._judge(ending, ending.error, now)
            if now >= ending.again_at:
                self._try(ending)
        return over

    def close(self) -> list[Job]:
        """Try nothing again; the jobs whose ends the stores do not have.

        Waits a little for what is being done; what takes longer may yet be, and is not among them.
        """
        self._due.put(None)
        self._thread.join(CLOSE_S)
        return [
            ending.job
            for ending in self._endings.values()
            if not ending.is_over and not ending.is_busy
        ]

    def _try(self, ending: Ending) -> None:
        ending.is_busy = True
        self._due.put(ending)

    def _judge(self, ending: Ending, error: Exception, now: float) -> None:
        """What a failed try means: the same again later, or another end."""
        ending.error = None
        longest_s = STORAGE_PAUSE_S if isinstance(error, StorageUnavailable) else DATABASE_PAUSE_S
        ending.pause_s = min(2 * ending.pause_s or FIRST_PAUSE_S, longest_s)
        ending.again_at = now + ending.pause_s
        failure = self._failure_of(ending, error, now)
        if failure is None:
            logger.warning(
                "a store is away, the job's end waits",
                job_id=ending.job.id,
                error=type(error).__name__,
                detail=str(error),
                delay_s=ending.pause_s,
            )
            return
        logger.error("job failed", job_id=ending.job.id, detail=failure, exc_info=error)
        ending.steps = deque(self._fail(ending.job, failure))
        ending.refused_at = None

    def _failure_of(self, ending: Ending, error: Exception, now: float) -> Failure | None:
        """None while it is worth trying again."""
        if isinstance(error, StorageUnavailable):
            ending.refused_at = now if ending.refused_at is None else ending.refused_at
            is_over = now - ending.refused_at > STORAGE_PATIENCE_S
            return Failure.NOT_STORED if is_over else None
        return None if is_away(error) else Failure.UNKNOWN

    def _run(self) -> None:
        while (ending := self._due.get()) is not None:
            self._go_on(ending)

    def _go_on(self, ending: Ending) -> None:
        """Do what is left, up to the first step that fails."""
        try:
            while ending.steps:
                self._step_since = self._clock()
                ending.steps[0]()
                ending.steps.popleft()
        except Exception as error:  # noqa: BLE001 - whatever it is, this job's end hears of it
            ending.error = error
        finally:
            self._step_since = None
            ending.is_busy = False


def is_away(error: Exception) -> bool:
    """Whether the database failed, and not what was written to it."""
    is_refusal = isinstance(error, IntegrityError | DataError) or (
        isinstance(error, StatementError) and not isinstance(error, DBAPIError)
    )
    return isinstance(error, SQLAlchemyError) and not is_refusal

"""How many workers a cluster needs: `QueueDepth`, a policy of Ray Serve's autoscaler.

The controller of Ray Serve pickles this module by value and calls the policy on its event loop. So
nothing heavy is imported at the top, and the database is asked in a thread.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.jobs.store import Demand

LOOK_S = 1.0
"""Seconds between two looks at the database."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the database told. ready: workers that claim jobs."""

    demand: "Demand"
    ready: int


def wanted_workers(look: Look, running: int, *, jobs_per_worker: int, max_wait_s: float) -> int:
    """The number of workers for the jobs that wait or run, at most one for each job.

    Running jobs count too. Without them a cluster whose jobs all run would want no worker, would
    stop those that it has, and would get the jobs back.
    running: replicas that run now. max_wait_s: once a job has waited longer, one more is wanted
    than run now, because the jobs are larger than `jobs_per_worker` expects.
    """
    jobs = look.demand.queued + look.demand.running
    wanted = math.ceil(jobs / jobs_per_worker)
    waited_s = look.demand.oldest_wait_s
    # A replica runs long before its worker has loaded the model. Until all of them claim jobs, the
    # jobs wait for a model, and one replica more would wait for it as well.
    if waited_s is not None and waited_s > max_wait_s and look.ready >= running:
        return min(max(wanted, running + 1), jobs)
    return wanted


class QueueDepth:
    """The policy. Ray Serve applies its limits and its delays to the answers.

    config: the settings file that names the database, unless the controller's environment does.
    """

    def __init__(self, jobs_per_worker: int, max_wait_s: float, config: str | None = None) -> None:
        self._jobs_per_worker = jobs_per_worker
        self._max_wait_s = max_wait_s
        self._config = config
        self._read: Callable[[], Look] | None = None
        self._last: Look | None = None
        self._thread: threading.Thread | None = None
        self._next_look_at = 0.0

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The wanted number of workers. context: Ray Serve's `AutoscalingContext`."""
        self._look_when_due()
        look = self._last
        if look is None:  # the database is away, or was not asked yet
            return context.target_num_replicas, {}
        wanted = wanted_workers(
            look,
            context.current_num_replicas,
            jobs_per_worker=self._jobs_per_worker,
            max_wait_s=self._max_wait_s,
        )
        return wanted, {}

    def _look_when_due(self) -> None:
        """Start a look, one at a time: a database that hangs holds one thread, not one per call."""
        is_looking = self._thread is not None and self._thread.is_alive()
        if is_looking or time.monotonic() < self._next_look_at:
            return
        self._next_look_at = time.monotonic() + LOOK_S
        self._thread = threading.Thread(target=self._update, name="queue-depth", daemon=True)
        self._thread.start()

    def _update(self) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        from server.core.logs import get_logger

        try:
            if self._read is None:
                self._read = look_reader(self._config)
            self._last = self._read()
        except (SQLAlchemyError, OSError, ValueError) as error:
            self._last = None
            get_logger(__name__).warning("queue not read", detail=str(error))


def look_reader(config: str | None) -> Callable[[], Look]:
    """Reads the database of this process's settings. Raises: ValueError."""
    from server.core.settings import load_settings
    from server.jobs.store import JobStore
    from server.storage.database import LEAST_CONNECTIONS, open_engine

    settings = load_settings(Path(config) if config else None)
    store = JobStore(open_engine(settings.sqlalchemy_url, connections=LEAST_CONNECTIONS))

    def look() -> Look:
        ready = sum(each.state == "ready" for each in store.workers.alive())
        return Look(store.demand(), ready)

    return look

"""How many workers a cluster needs: `QueueDepth`, a policy of Ray Serve's autoscaler.

The controller of Ray Serve pickles this module by value and calls the policy on its event loop. So
nothing heavy is imported at the top, and the database is asked in a thread.
"""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.jobs.store import Demand

LOOK_S = 1.0
"""Seconds between two looks at the database."""


def wanted_workers(
    demand: "Demand", running: int, *, jobs_per_worker: int, max_wait_s: float
) -> int:
    """The number of workers for the jobs that wait or run.

    Running jobs count too. Without them a cluster whose jobs all run would want no worker, would
    stop those that it has, and would get the jobs back.
    running: workers that run now. max_wait_s: once a job has waited longer, one more is wanted than
    run now, because the jobs are larger than `jobs_per_worker` expects.
    """
    wanted = math.ceil((demand.queued + demand.running) / jobs_per_worker)
    if demand.oldest_wait_s is not None and demand.oldest_wait_s > max_wait_s:
        return max(wanted, running + 1)
    return wanted


class QueueDepth:
    """The policy. Ray Serve applies its limits and its delays to the answers.

    config: the settings file that names the database, unless the controller's environment does.
    """

    def __init__(self, jobs_per_worker: int, max_wait_s: float, config: str | None = None) -> None:
        self._jobs_per_worker = jobs_per_worker
        self._max_wait_s = max_wait_s
        self._config = config
        self._read: Callable[[], Demand] | None = None
        self._demand: Demand | None = None
        self._look: threading.Thread | None = None
        self._next_look_at = 0.0

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The wanted number of workers. context: Ray Serve's `AutoscalingContext`."""
        self._look_when_due()
        demand = self._demand
        if demand is None:  # the database is away, or was not asked yet
            return context.target_num_replicas, {}
        wanted = wanted_workers(
            demand,
            context.current_num_replicas,
            jobs_per_worker=self._jobs_per_worker,
            max_wait_s=self._max_wait_s,
        )
        return wanted, {}

    def _look_when_due(self) -> None:
        """Start a look, one at a time: a database that hangs holds one thread, not one per call."""
        is_looking = self._look is not None and self._look.is_alive()
        if is_looking or time.monotonic() < self._next_look_at:
            return
        self._next_look_at = time.monotonic() + LOOK_S
        self._look = threading.Thread(target=self._update, name="queue-depth", daemon=True)
        self._look.start()

    def _update(self) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        from server.core.logs import get_logger

        try:
            if self._read is None:
                self._read = demand_reader(self._config)
            self._demand = self._read()
        except (SQLAlchemyError, OSError, ValueError) as error:
            self._demand = None
            get_logger(__name__).warning("queue not read", detail=str(error))


def demand_reader(config: str | None) -> "Callable[[], Demand]":
    """Reads the demand from the database of this process's settings. Raises: ValueError."""
    from server.core.settings import load_settings
    from server.jobs.store import JobStore
    from server.storage.database import LEAST_CONNECTIONS, open_engine

    settings = load_settings(Path(config) if config else None)
    engine = open_engine(settings.sqlalchemy_url, connections=LEAST_CONNECTIONS)
    return JobStore(engine).demand

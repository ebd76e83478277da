"""`Supervisor`: starts a worker process per device, and restarts those that end or hang.

When a worker ends, its jobs are queued again at once, before their leases expire.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from server.core.logs import get_logger
from server.core.settings import Settings
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus

logger = get_logger(__name__)

POLL_S = 0.05
DELAYS_S = (1.0, 30.0)
"""Back-off before a worker is restarted: the first delay, and the longest."""

UNUSABLE = 78
"""Exit status of a worker whose model or device cannot be used, so that a restart will not help:
EX_CONFIG of `sysexits.h`."""

UNUSABLE_DELAY_S = 300.0
"""Delay before such a worker is restarted: the hub or a missing file may be back by then."""

STEADY_S = 60.0
"""After a run of this length the back-off starts at the first delay again."""

GRACE_S = 25.0
"""Seconds from SIGTERM to SIGKILL. A shutdown may take 30 s, and the server needs the rest."""

POLLS_PER_STALL = 20
"""How often a worker's status is read within the shorter of the two limits."""

# -P: import nothing from the working folder, which other users may be able to write to.
PROGRAM = (sys.executable, "-P", "-m", "server.cli.main")
WORKER_COMMAND = (*PROGRAM, "worker")


def new_worker_id() -> str:
    """A worker id that is unique across machines."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


class StallDetector:
    """Detects a worker that hangs, by its status in the database.

    It measures on its own steady clock how long the status has not changed, so that neither a
    clock that jumps nor a failing database makes a worker look dead.
    stall_s: a ready worker without a report for so long hangs; it reports between two steps.
    load_stall_s: the same while it starts or loads; it reports after each part of the model, but
    not during a download.
    """

    def __init__(
        self,
        store: JobStore,
        worker_id: str,
        stall_s: float,
        load_stall_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._stall_s = stall_s
        self._load_stall_s = load_stall_s
        self._clock = clock
        self._last: WorkerStatus | None = None
        self._has_polled = self._has_reported = False
        self._next_poll_at = self._reported_at = clock()
        self.has_been_ready = False
        """Whether the worker has ever reported that it is ready."""

    def has_stalled(self) -> bool:
        """Whether the worker hangs. Most calls make no query."""
        now = self._clock()
        if now < self._next_poll_at:
            return False
        self._next_poll_at = now + min(self._stall_s, self._load_stall_s) / POLLS_PER_STALL
        try:
            status = self._store.workers.get(self._worker_id)
        except SQLAlchemyError:
            self._reported_at = now  # without a database the worker could not report
            return False
        is_ready = status is not None and status.state == "ready"
        self.has_been_ready |= is_ready
        if not self._has_polled:
            # The first status may be that of an earlier run, so it is no report.
            self._has_polled, self._last = True, status
        elif status != self._last:
            self._last, self._reported_at, self._has_reported = status, now, True
        limit_s = self._stall_s if is_ready and self._has_reported else self._load_stall_s
        return now - self._reported_at > limit_s


class WorkerChild:
    """A worker's command, and its row in the database.

    stalls_s: both limits of `StallDetector`.
    """

    def __init__(
        self, device: str, command: Sequence[str], store: JobStore, stalls_s: tuple[float, float]
    ) -> None:
        self._id = new_worker_id()
        self._store = store
        self._stalls_s = stalls_s
        self._detector: StallDetector | None = None
        self._has_been_ready = False
        self.failed_starts = 0
        """Runs in a row that have ended before the worker was ready. A run that ends while the
        database fails is not counted: a worker needs the database to start."""
        self.label = {"worker_id": self._id, "device": device}
        self.command = [*command, "--worker-id", self._id, "--device", device]

    def new_stall_detector(self) -> StallDetector:
        """A detector for the run that begins now."""
        self._detector = StallDetector(self._store, self._id, *self._stalls_s)
        return self._detector

    def requeue_jobs(self) -> None:
        """Queue the jobs of a worker that has ended; where that fails, their leases expire.

        Never raises. The row is removed too, because it may say that the worker is ready. It stays
        only where it says why the worker failed.
        """
        has_been_ready = self._detector is not None and self._detector.has_been_ready
        self._detector = None
        try:
            self._store.requeue_of(self._id)
            status = self._store.workers.get(self._id)
            if status is None or status.state != "failed":
                self._store.workers.remove(self._id)
        except SQLAlchemyError:
            logger.exception("jobs not requeued", **self.label)
        else:
            has_been_ready |= status is not None and status.state == "ready"
            self.failed_starts = 0 if has_been_ready else self.failed_starts + 1
        self._has_been_ready |= has_been_ready

    def remove_row(self) -> None:
        """Remove the row of a worker that will not be restarted. Never raises."""
        with suppress(SQLAlchemyError):
            self._store.workers.remove(self._id)

    def failure_reason(self) -> str:
        """After `UNUSABLE`: the reason that the worker has reported. Never raises."""
        with suppress(SQLAlchemyError):
            status = self._store.workers.get(self._id)
            return status.detail if status is not None else ""
        return ""

    def leaves_no_worker(self) -> bool:
        """After `UNUSABLE`: whether this worker was never ready, and no other is. Never raises."""
        with suppress(SQLAlchemyError):
            seen = self._store.workers.alive()
            return not (self._has_been_ready or any(each.state == "ready" for each in seen))
        return False


def worker_children(
    devices: Sequence[str],
    flags: Sequence[str],
    store: JobStore,
    stalls_s: tuple[float, float],
    command: Sequence[str] = WORKER_COMMAND,
) -> list[WorkerChild]:
    """A worker for each device.

    flags: further flags of the worker command. stalls_s: both limits of `StallDetector`.
    command: starts a worker; gets the flags, `--parent`, `--worker-id` and `--device`.
    """
    # The parent's pid is passed, because this process may have ended by the time that the worker
    # has started and could ask for it.
    whole = [*command, *flags, "--parent", str(os.getpid())]
    return [WorkerChild(device, whole, store, stalls_s) for device in devices]


def configured_workers(
    settings: Settings, flags: Sequence[str], store: JobStore, command: Sequence[str]
) -> list[WorkerChild]:
    """A worker for each device of the settings. command: empty for `WORKER_COMMAND`."""
    stalls_s = settings.worker_stall_s, settings.worker_load_stall_s
    command = command or WORKER_COMMAND
    return worker_children(settings.worker_devices, flags, store, stalls_s, command)


class Supervisor:
    """Use as a context manager: entering starts the workers, leaving stops them and waits.

    delays_s: as `DELAYS_S`. unusable_delay_s: delay before a restart after `UNUSABLE`.
    """

    def __init__(
        self,
        children: Sequence[WorkerChild],
        delays_s: tuple[float, float] = DELAYS_S,
        unusable_delay_s: float = UNUSABLE_DELAY_S,
    ) -> None:
        self._first_delay_s, self._last_delay_s = delays_s
        self._unusable_delay_s = unusable_delay_s
        self._children = frozenset(children)
        self._unusable: set[WorkerChild] = set()
        self.failure: str | None = None
        """Why no worker can be used, once all were `UNUSABLE` and none was ever ready."""
        self._is_stop_requested = False
        self._is_stopping = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._restart_until_stopped, args=(child,), name=f"supervisor-{index}"
            )
            for index, child in enumerate(children)
        ]

    def __enter__(self) -> "Supervisor":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Begin to stop the workers, without waiting. Safe to call in a signal handler."""
        # The event is set only once: a second signal could arrive while the first handler holds the
        # event's lock, and would deadlock.
        if not self._is_stop_requested:
            self._is_stop_requested = True
            self._is_stopping.set()

    @property
    def has_ended(self) -> bool:
        """Whether all workers have ended and none will be restarted."""
        return not any(thread.is_alive() for thread in self._threads)

    def _restart_until_stopped(self, child: WorkerChild) -> None:
        """Run the worker, and run it again after a back-off, until the server stops."""
        delay_s = self._first_delay_s
        while not self._is_stopping.is_set():
            started = time.monotonic()
            self._unusable.discard(child)
            exit_code = self._run_once(child)
            if self._is_stopping.is_set():
                break
            if exit_code == UNUSABLE:
                self._back_off(child)
                continue
            if time.monotonic() - started > STEADY_S:
                delay_s = self._first_delay_s
            logger.error("worker ended", **child.label, exit_code=exit_code, delay_s=delay_s)
            self._is_stopping.wait(delay_s)
            delay_s = min(delay_s * 2, self._last_delay_s)
        child.remove_row()

    def _back_off(self, child: WorkerChild) -> None:
        """Wait before the restart of an unusable worker; record the failure if all are unusable."""
        self._unusable.add(child)
        failure_reason = child.failure_reason()
        if self._children <= self._unusable and child.leaves_no_worker():
            self.failure = failure_reason or "no worker can be started"
        else:
            logger.error(
                "worker cannot be used",
                **child.label,
                detail=failure_reason,
                delay_s=self._unusable_delay_s,
            )
        self._is_stopping.wait(self._unusable_delay_s)

    def _run_once(self, child: WorkerChild) -> int | None:
        """Start the worker and wait for its exit status; None where it could not be started."""
        try:
            # A process group of its own, so that Ctrl-C reaches this process only, which then stops
            # its workers in order.
            process = subprocess.Popen(child.command, process_group=0)
        except OSError as error:
            logger.error("worker cannot be started", **child.label, detail=str(error))
            child.requeue_jobs()
            return None
        logger.info("worker started", **child.label, pid=process.pid)
        try:
            return self._wait(process, child)
        finally:
            child.requeue_jobs()

    def _wait(self, process: subprocess.Popen[bytes], child: WorkerChild) -> int:
        """Wait until the process ends; kill it when it hangs, stop it when the server stops."""
        detector = child.new_stall_detector()
        while not self._is_stopping.wait(POLL_S):
            if process.poll() is not None:
                return process.returncode
            if detector.has_stalled():
                logger.error("worker hangs", **child.label, pid=process.pid)
                process.kill()  # SIGTERM is handled between two steps, which never come
                return process.wait()
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

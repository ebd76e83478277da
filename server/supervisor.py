"""Starts one worker process per device, restarts it, and hands its jobs back at once."""

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

from server.job_store import JobStore, WorkerStatus
from server.telemetry import get_logger

logger = get_logger(__name__)

POLL_S = 0.05
FIRST_DELAY_S = 1.0
LAST_DELAY_S = 30.0
STEADY_S = 60.0
"""A worker that lived so long starts again with the first delay."""

GRACE_S = 25.0
"""From SIGTERM to SIGKILL; the rest of the half minute that a stop may take is the server's own."""

STALL_S = 120.0
"""A ready worker that says nothing for so long hangs: it speaks between two steps."""

LOAD_STALL_S = 1_800.0
"""The same for one that starts or loads: it speaks after each part of the model, but a download
of one says nothing."""

WATCHES_PER_STALL = 20
"""How often a worker's last word is read, in the shorter of the two times."""

WORKER_COMMAND = (sys.executable, "-m", "server.cli", "worker")


def new_worker_id() -> str:
    """A name that no other worker has, on any machine."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


class Watch:
    """Tells whether a worker has fallen silent. stall_s, load_stall_s: see the constants.

    Compares the worker's word with its earlier one, by this process's own steady clock: a clock
    that jumps cannot make a worker look dead, nor can a database that is away.
    """

    def __init__(
        self,
        store: JobStore,
        worker_id: str,
        stall_s: float,
        load_stall_s: float = LOAD_STALL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._stall_s = stall_s
        self._load_stall_s = load_stall_s
        self._clock = clock
        self._word: WorkerStatus | None = None
        self._has_looked = self._has_spoken = False
        self._look_again_at = self._heard_at = clock()

    def has_stalled(self) -> bool:
        """Whether it hangs. Costs a query from time to time."""
        now = self._clock()
        if now < self._look_again_at:
            return False
        self._look_again_at = now + min(self._stall_s, self._load_stall_s) / WATCHES_PER_STALL
        try:
            word = self._store.worker(self._worker_id)
        except SQLAlchemyError:
            self._heard_at = now  # the worker could not have spoken
            return False
        if not self._has_looked:
            # May be the word of an earlier life.
            self._has_looked, self._word = True, word
        elif word != self._word:
            self._word, self._heard_at, self._has_spoken = word, now, True
        is_ready = self._has_spoken and word is not None and word.state == "ready"
        return now - self._heard_at > (self._stall_s if is_ready else self._load_stall_s)


class Supervisor:
    """Use as a context manager: entering starts the workers, leaving stops them and waits.

    devices: one worker each. flags: for the worker command, besides its id and device.
    delays_s: before a worker is started again, the first and the longest.
    stalls_s: see `STALL_S` and `LOAD_STALL_S`.
    command: what starts a worker; gets the flags, `--parent`, `--worker-id` and `--device`.
    """

    def __init__(
        self,
        devices: Sequence[str],
        flags: Sequence[str],
        store: JobStore,
        delays_s: tuple[float, float] = (FIRST_DELAY_S, LAST_DELAY_S),
        stalls_s: tuple[float, float] = (STALL_S, LOAD_STALL_S),
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._store = store
        self._stalls_s = stalls_s
        # Told and not asked for: a worker takes seconds to start, and we may be gone by then.
        self._command = [*command, *flags, "--parent", str(os.getpid())]
        self._first_delay_s, self._last_delay_s = delays_s
        self._is_told = False
        self._is_stopping = threading.Event()
        self._keepers = [
            threading.Thread(
                target=self._keep,
                args=(new_worker_id(), device),
                name=f"keeper-{index}",
            )
            for index, device in enumerate(devices)
        ]

    def __enter__(self) -> "Supervisor":
        for keeper in self._keepers:
            keeper.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        for keeper in self._keepers:
            keeper.join()

    def stop(self) -> None:
        """Tell the workers to end, and do not wait. May be called by a signal's handler."""
        # Not set twice: a second signal could come while the event's own lock is taken.
        if not self._is_told:
            self._is_told = True
            self._is_stopping.set()

    @property
    def has_ended(self) -> bool:
        """Whether all workers are gone for good."""
        return not any(keeper.is_alive() for keeper in self._keepers)

    def _keep(self, worker_id: str, device: str) -> None:
        """One worker's life after life."""
        delay_s = self._first_delay_s
        while not self._is_stopping.is_set():
            started = time.monotonic()
            exit_code = self._live(worker_id, device)
            self._take_back(worker_id)
            if self._is_stopping.is_set():
                break
            if time.monotonic() - started > STEADY_S:
                delay_s = self._first_delay_s
            logger.error("worker ended", worker_id=worker_id, exit_code=exit_code, delay_s=delay_s)
            self._is_stopping.wait(delay_s)
            delay_s = min(delay_s * 2, self._last_delay_s)
        with suppress(SQLAlchemyError):
            self._store.forget_worker(worker_id)

    def _live(self, worker_id: str, device: str) -> int | None:
        """One life, from start to exit status; None where there was no room for a process."""
        # A group of its own: Ctrl-C is for the server, which tells its workers in its own time.
        command = [*self._command, "--worker-id", worker_id, "--device", device]
        try:
            process = subprocess.Popen(command, process_group=0)
        except OSError:
            logger.exception("worker cannot be started", worker_id=worker_id)
            return None
        logger.info("worker started", worker_id=worker_id, pid=process.pid, device=device)
        return self._wait(process, worker_id)

    def _take_back(self, worker_id: str) -> None:
        """Queue the jobs of a worker that has ended; where that fails, their leases run out.

        It is not ready any more, whatever it said. Only why it failed is worth keeping.
        """
        try:
            self._store.requeue_of(worker_id)
            word = self._store.worker(worker_id)
            if word is None or word.state != "failed":
                self._store.forget_worker(worker_id)
        except SQLAlchemyError:
            logger.exception("jobs not taken back", worker_id=worker_id)

    def _wait(self, process: subprocess.Popen[bytes], worker_id: str) -> int:
        """Until the process ends: by itself, because it hangs, or because we are stopping."""
        watch = Watch(self._store, worker_id, *self._stalls_s)
        while not self._is_stopping.wait(POLL_S):
            if process.poll() is not None:
                return process.returncode
            if watch.has_stalled():
                logger.error("worker hangs", worker_id=worker_id, pid=process.pid)
                process.kill()  # it would not hear anything gentler
                return process.wait()
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

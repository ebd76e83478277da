"""Starts one worker process per device, restarts it, and hands its jobs back at once."""

import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError

from server.jobs import JobStore
from server.telemetry import get_logger

logger = get_logger(__name__)

FIRST_DELAY_S = 1.0
LAST_DELAY_S = 30.0
STEADY_S = 60.0
"""A worker that lived so long starts again with the first delay."""

GRACE_S = 30.0
"""From SIGTERM to SIGKILL."""

WORKER_COMMAND = (sys.executable, "-m", "server.cli", "worker")


class Supervisor:
    """Use as a context manager: entering starts the workers, leaving stops them.

    devices: one worker each. flags: for the worker command, besides its id and device.
    delays_s: before a worker is started again, the first and the longest.
    command: what starts a worker; gets the flags, `--worker-id` and `--device`.
    """

    def __init__(
        self,
        devices: Sequence[str],
        flags: Sequence[str],
        store: JobStore,
        delays_s: tuple[float, float] = (FIRST_DELAY_S, LAST_DELAY_S),
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._store = store
        self._first_delay_s, self._last_delay_s = delays_s
        self._command = command
        self._is_stopping = threading.Event()
        self._keepers = [
            threading.Thread(
                target=self._keep,
                args=(f"{socket.gethostname()}-{secrets.token_hex(3)}-{index}", device, flags),
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
        self._is_stopping.set()
        for keeper in self._keepers:
            keeper.join()

    def _keep(self, worker_id: str, device: str, flags: Sequence[str]) -> None:
        """One worker's life after life."""
        command = [*self._command, *flags]
        delay_s = self._first_delay_s
        while not self._is_stopping.is_set():
            started = time.monotonic()
            # A group of its own: Ctrl-C is for the server, which tells its workers in its own time.
            process = subprocess.Popen(
                [*command, "--worker-id", worker_id, "--device", device], process_group=0
            )
            logger.info("worker started", worker_id=worker_id, pid=process.pid, device=device)
            exit_code = self._wait(process)
            self._take_back(worker_id)
            if self._is_stopping.is_set():
                return
            if time.monotonic() - started > STEADY_S:
                delay_s = self._first_delay_s
            logger.error("worker ended", worker_id=worker_id, exit_code=exit_code, delay_s=delay_s)
            self._is_stopping.wait(delay_s)
            delay_s = min(delay_s * 2, self._last_delay_s)

    def _take_back(self, worker_id: str) -> None:
        """Queue the jobs of a worker that has ended; where that fails, their leases run out."""
        try:
            self._store.requeue_of(worker_id)
            if self._is_stopping.is_set():
                self._store.forget_worker(worker_id)
        except SQLAlchemyError:
            logger.exception("jobs not taken back", worker_id=worker_id)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Until the process ends, by itself or because we are stopping."""
        while not self._is_stopping.wait(0.05):
            if process.poll() is not None:
                return process.returncode
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

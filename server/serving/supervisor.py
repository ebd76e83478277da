"""Keeps the worker processes alive, one per device.

A worker that ends is started again, and its jobs are handed back at once.
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
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus

logger = get_logger(__name__)

POLL_S = 0.05
DELAYS_S = (1.0, 30.0)
"""Before a worker is started again: the first time, and the longest."""

UNUSABLE = 78
"""Exit status of a worker whose model or device cannot be used: only somebody else can mend that.
That of `sysexits.h` for a wrong configuration."""

UNUSABLE_DELAY_S = 300.0
"""Before such a worker is started again: the hub may be back, or a file."""

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

# -P: not from the folder where the server was called, which anybody may be able to write to.
PROGRAM = (sys.executable, "-P", "-m", "server.cli.main")
WORKER_COMMAND = (*PROGRAM, "worker")


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
        self.has_been_ready = False
        """Whether the worker has ever said so."""

    def has_stalled(self) -> bool:
        """Whether it hangs. Costs a query from time to time."""
        now = self._clock()
        if now < self._look_again_at:
            return False
        self._look_again_at = now + min(self._stall_s, self._load_stall_s) / WATCHES_PER_STALL
        try:
            word = self._store.workers.get(self._worker_id)
        except SQLAlchemyError:
            self._heard_at = now  # the worker could not have spoken
            return False
        if not self._has_looked:
            # May be the word of an earlier life.
            self._has_looked, self._word = True, word
            self._note(word)
        elif word != self._word:
            self._word, self._heard_at, self._has_spoken = word, now, True
            self._note(word)
        is_ready = self._has_spoken and word is not None and word.state == "ready"
        return now - self._heard_at > (self._stall_s if is_ready else self._load_stall_s)

    def _note(self, word: WorkerStatus | None) -> None:
        self.has_been_ready |= word is not None and word.state == "ready"


class WorkerChild:
    """A worker, and what the database knows of it. stalls_s: see `STALL_S` and `LOAD_STALL_S`."""

    def __init__(
        self, device: str, command: Sequence[str], store: JobStore, stalls_s: tuple[float, float]
    ) -> None:
        self._id = new_worker_id()
        self._store = store
        self._stalls_s = stalls_s
        self._watch: Watch | None = None
        self._has_been_ready = False
        self.label = {"worker_id": self._id, "device": device}
        self.command = [*command, "--worker-id", self._id, "--device", device]

    def new_watch(self) -> Callable[[], bool]:
        """For one life: whether the worker hangs."""
        self._watch = Watch(self._store, self._id, *self._stalls_s)
        return self._watch.has_stalled

    def take_back(self) -> None:
        """Queue the jobs of a worker that has ended; where that fails, their leases run out.

        Never raises. The worker is not ready any more, whatever its row says; the row is kept only
        where it tells why the worker failed.
        """
        self._has_been_ready |= self._watch is not None and self._watch.has_been_ready
        try:
            self._store.requeue_of(self._id)
            word = self._store.workers.get(self._id)
            if word is None or word.state != "failed":
                self._store.workers.remove(self._id)
        except SQLAlchemyError:
            logger.exception("jobs not taken back", **self.label)

    def forget(self) -> None:
        """Remove the row of a worker that will not be started again. Never raises."""
        with suppress(SQLAlchemyError):
            self._store.workers.remove(self._id)

    def complaint(self) -> str:
        """After `UNUSABLE`: the reason, in the worker's words. Never raises."""
        with suppress(SQLAlchemyError):
            word = self._store.workers.get(self._id)
            return word.detail if word is not None else ""
        return ""

    def is_missed(self) -> bool:
        """After `UNUSABLE`: whether this worker was never ready and no other is. Never raises."""
        with suppress(SQLAlchemyError):
            seen = self._store.workers.alive()
            return not (self._has_been_ready or any(each.state == "ready" for each in seen))
        return False


def worker_children(
    devices: Sequence[str],
    flags: Sequence[str],
    store: JobStore,
    stalls_s: tuple[float, float] = (STALL_S, LOAD_STALL_S),
    command: Sequence[str] = WORKER_COMMAND,
) -> list[WorkerChild]:
    """A worker for each device.

    flags: for the worker command, besides its id and device. stalls_s: see the constants.
    command: what starts a worker; gets the flags, `--parent`, `--worker-id` and `--device`.
    """
    # Told and not asked for: a worker takes seconds to start, and we may be gone by then.
    whole = [*command, *flags, "--parent", str(os.getpid())]
    return [WorkerChild(device, whole, store, stalls_s) for device in devices]


class Supervisor:
    """Use as a context manager: entering starts the workers, leaving stops them and waits.

    delays_s: before a worker is started again, the first and the longest. unusable_delay_s: the
    same after `UNUSABLE`.
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
        """Why no worker can be used, once all have tried and none ever could."""
        self._is_told = False
        self._is_stopping = threading.Event()
        self._keepers = [
            threading.Thread(target=self._keep, args=(child,), name=f"keeper-{index}")
            for index, child in enumerate(children)
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

    def _keep(self, child: WorkerChild) -> None:
        """Start the worker again and again, until the server stops."""
        delay_s = self._first_delay_s
        while not self._is_stopping.is_set():
            started = time.monotonic()
            self._unusable.discard(child)
            exit_code = self._live(child)
            if self._is_stopping.is_set():
                break
            if exit_code == UNUSABLE:
                self._put_off(child)
                continue
            if time.monotonic() - started > STEADY_S:
                delay_s = self._first_delay_s
            logger.error("worker ended", **child.label, exit_code=exit_code, delay_s=delay_s)
            self._is_stopping.wait(delay_s)
            delay_s = min(delay_s * 2, self._last_delay_s)
        child.forget()

    def _put_off(self, child: WorkerChild) -> None:
        """Wait long, or say that there is no use in waiting."""
        self._unusable.add(child)
        complaint = child.complaint()
        if self._children <= self._unusable and child.is_missed():
            self.failure = complaint or "no worker can be started"
        else:
            logger.error(
                "worker cannot be used",
                **child.label,
                detail=complaint,
                delay_s=self._unusable_delay_s,
            )
        self._is_stopping.wait(self._unusable_delay_s)

    def _live(self, child: WorkerChild) -> int | None:
        """One life, from start to exit status; None where there was no room for a process."""
        try:
            # A group of its own: Ctrl-C is for us, and we tell our children in our own time.
            process = subprocess.Popen(child.command, process_group=0)
        except OSError as error:
            logger.error("worker cannot be started", **child.label, detail=str(error))
            child.take_back()
            return None
        logger.info("worker started", **child.label, pid=process.pid)
        try:
            return self._wait(process, child)
        finally:
            child.take_back()

    def _wait(self, process: subprocess.Popen[bytes], child: WorkerChild) -> int:
        """Until the process ends: by itself, because it hangs, or because we are stopping."""
        has_stalled = child.new_watch()
        while not self._is_stopping.wait(POLL_S):
            if process.poll() is not None:
                return process.returncode
            if has_stalled():
                logger.error("worker hangs", **child.label, pid=process.pid)
                process.kill()  # it would not hear anything gentler
                return process.wait()
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

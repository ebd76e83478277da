"""`Watchdog`: ends a process whose event loop has stopped, so that it can be started again.

The kernel still accepts connections for such a process, but nothing answers them, and asyncio runs
no signal handler.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType

from server.core.logs import get_logger

logger = get_logger(__name__)

CHECK_S = 1.0
"""Seconds between two checks."""

STALL_S = 30.0
"""A loop without a tick for so long has stopped."""

STOPPING_STALL_S = 10.0
"""The limit of `STALL_S` during shutdown."""

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""


class Watchdog:
    """Use as a context manager: a thread checks the ticks until the block ends.

    It counts checks without a tick and not the seconds since the last tick, so that a process that
    was paused (Ctrl-Z, a suspended machine) gets the full time after it resumes.

    end: called once, in the thread; in a real process it does not return.
    """

    def __init__(
        self,
        end: Callable[[], None] | None = None,
        *,
        check_s: float = CHECK_S,
        stall_s: float = STALL_S,
        stopping_stall_s: float = STOPPING_STALL_S,
    ) -> None:
        self._end = end or end_process
        self._look_s = check_s
        self._max_missed = round(stall_s / check_s)
        self._max_missed_stopping = round(stopping_stall_s / check_s)
        self._ticks = 0
        self._is_stopping = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def tick(self) -> None:
        """Report that the event loop runs. Call it on the loop, more often than every `CHECK_S`."""
        self._ticks += 1

    def expect_end(self) -> None:
        """Use the shorter limit from now on. Safe to call in a signal handler."""
        self._is_stopping = True

    def _watch(self) -> None:
        ticks, missed = self._ticks, 0
        while not self._is_over.wait(self._look_s):
            missed = missed + 1 if self._ticks == ticks else 0
            ticks = self._ticks
            if missed >= (self._max_missed_stopping if self._is_stopping else self._max_missed):
                self._end()
                return


def end_process() -> None:
    """Log the main thread's stack, and exit without running any more of its code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else ""
    logger.error("the event loop has stopped, ending", exception=stack)
    os._exit(EXIT_CODE)

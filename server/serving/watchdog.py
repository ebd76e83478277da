"""`Watchdog`: ends a process whose event loop has stopped, so that it can be started again.

Such a process accepts connections and answers none, and no signal handler of asyncio runs in it.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType

from server.core.logs import get_logger

logger = get_logger(__name__)

LOOK_S = 1.0
STALL_S = 30.0
"""A loop that has not run for so long is taken for dead."""

STOPPING_STALL_S = 10.0
"""The same once the process was told to end."""

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""


class Watchdog:
    """Use as a context manager: a thread looks on until it is left.

    Looks without a tick are counted, and not the seconds since the last one: a process that was
    paused (Ctrl-Z, a suspended machine) gets its time after it.

    end: called once, in the thread; does not return in a real process.
    """

    def __init__(
        self,
        end: Callable[[], None] | None = None,
        *,
        look_s: float = LOOK_S,
        stall_s: float = STALL_S,
        stopping_stall_s: float = STOPPING_STALL_S,
    ) -> None:
        self._end = end or end_process
        self._look_s = look_s
        self._looks = round(stall_s / look_s)
        self._stopping_looks = round(stopping_stall_s / look_s)
        self._ticks = 0
        self._is_stopping = False
        self._is_left = threading.Event()
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
        self._is_left.set()
        self._thread.join()

    def tick(self) -> None:
        """The event loop runs; to be called by it, more often than once a look."""
        self._ticks += 1

    def expect_end(self) -> None:
        """The process was told to end. May be called by a signal's handler."""
        self._is_stopping = True

    def _watch(self) -> None:
        ticks, silent_looks = self._ticks, 0
        while not self._is_left.wait(self._look_s):
            silent_looks = silent_looks + 1 if self._ticks == ticks else 0
            ticks = self._ticks
            if silent_looks >= (self._stopping_looks if self._is_stopping else self._looks):
                self._end()
                return


def end_process() -> None:
    """Say where the main thread stands, and end without any of its code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else ""
    logger.error("the event loop has stopped, ending", exception=stack)
    os._exit(EXIT_CODE)

"""Keeps the threads of a server on one processor core, and the processes it starts off it.

The threads share one interpreter lock, and hand it over dozens of times for each accepted job.
Where they lie on two cores each of these times one core wakes the other: the same work took up to
twice the processor time, and calls waited for it. Little is lost, as one thread at a time may run
Python.
"""

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.telemetry import get_logger

logger = get_logger(__name__)

MAY_USE: frozenset[int] = (
    frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else frozenset()
)
"""Cores of this process as it began; an operator may have chosen them."""

LAST_CORE = 36
"""Of the fields of `/proc/thread-self/stat` behind the name: where the thread ran last."""


def stay_on_one_core(index: int | None = None) -> None:
    """The calling thread, and those that it starts from now on.

    index: of this process, where several must not meet on a core. One that is alone stays where it
    is: the system has put it where there was room. Where the system knows no such thing, or does
    not let us, nothing changes.
    """
    if sys.platform == "linux":
        try:
            os.sched_setaffinity(0, {core_now() if index is None else nth_core(index)})
        except (OSError, ValueError, IndexError):
            logger.warning("threads are not kept on one core", exc_info=True)


def core_now() -> int:
    """The one on which the calling thread ran last. Raises: OSError, ValueError, IndexError."""
    stat = Path("/proc/thread-self/stat").read_text()
    return int(stat.rpartition(")")[2].split()[LAST_CORE])


def nth_core(index: int) -> int:
    """One of those that this process may use, all of them before one comes again."""
    cores = sorted(MAY_USE)
    return cores[index % len(cores)]


@contextmanager
def on_all_cores() -> Iterator[None]:
    """A process that the calling thread starts in this block may run wherever this server may."""
    own: Collection[int] = ()
    if sys.platform == "linux":
        own = os.sched_getaffinity(0)
        with suppress(OSError):  # not permitted, or a container that has other cores by now
            os.sched_setaffinity(0, MAY_USE)
    try:
        yield
    finally:
        if own:
            with suppress(OSError):
                os.sched_setaffinity(0, own)

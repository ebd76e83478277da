"""Named pipes by which the processes of one machine wake each other after a commit to SQLite.

A wake-up is a hint and no message: who is woken looks at the database, and who is not looks a
little later. So a lost one costs milliseconds.
"""

import errno
import os
import secrets
import select
import stat
import time
from contextlib import suppress
from pathlib import Path

ENOUGH_BYTES = 4096
"""More wake-ups between two looks count as one."""


class WakeupPipe:
    """Wakes one thread of this process whenever somebody calls `wake_all`.

    folder: of all pipes, which is made if need be. Where it cannot hold pipes, time passes instead.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
        self._pipe = open_pipe(self._path)

    def wait(self, timeout_s: float) -> None:
        """Wait until somebody wakes it, or has done so since the last call."""
        if self._pipe is None:
            time.sleep(timeout_s)
            return
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            os.read(self._pipe, ENOUGH_BYTES)

    def close(self) -> None:
        if self._pipe is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._pipe)
            self._pipe = None


def open_pipe(path: Path) -> int | None:
    """A new pipe for reading; None where there cannot be one."""
    hidden = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(0o700, exist_ok=True)
        os.mkfifo(hidden, 0o600)
        # For writing too, or it would be at its end whenever nobody writes.
        pipe = os.open(hidden, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        hidden.rename(path)  # Seen only from now on: `wake_all` removes pipes without readers.
    except OSError:
        os.close(pipe)
        return None
    return pipe


def wake_all(folder: Path) -> None:
    """Wake all listeners, and remove the pipes of processes that were killed. Never waits."""
    for path in folder.glob("[!.]*"):
        try:
            pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ENXIO:
                path.unlink(missing_ok=True)
            continue
        with suppress(OSError):  # It is full, or its reader has gone.
            if stat.S_ISFIFO(os.fstat(pipe).st_mode):
                os.write(pipe, b".")
        os.close(pipe)

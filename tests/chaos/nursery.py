"""A process that has imported the server, and forks one whenever asked: a start in a blink.

For rounds of kills, where the start's imports would take most of the time. Speaks JSON lines over
its standard input and output: `{"arguments": […], "environment": {…}, "log": "…"}` in, a pid out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.repository import REPOSITORY


def main() -> None:
    """Fork servers until the input ends."""
    import server.api.app
    import server.cli.main
    import server.serving.server
    import server.serving.supervisor  # noqa: F401 - what `serve` imports

    # Nobody waits for the children.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(live(**json.loads(line)))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def live(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """A child's life: our command line with its own environment and log."""
    from server.cli.main import main as run

    os.environ.clear()
    os.environ.update(environment)
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, flags), number)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    return run(arguments)


class ForkedServer:
    """A server of the nursery, with what a `subprocess.Popen` offers and the harness uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """None while it lives; its exit status is not known."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def wait(self, timeout: float = 60.0) -> int:
        """Until it has ended. Raises: subprocess.TimeoutExpired."""
        give_up_at = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > give_up_at:
                raise subprocess.TimeoutExpired("serve", timeout)
            time.sleep(0.01)
        return 0

    def send_signal(self, number: int) -> None:
        """To a server that may have gone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The harness's side; use as a context manager."""

    def __enter__(self) -> "Nursery":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def launch(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> ForkedServer:
        """Start a server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": [*arguments], "environment": {**environment}, "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return ForkedServer(int(self._process.stdout.readline()))


if __name__ == "__main__":
    main()

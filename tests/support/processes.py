"""Real processes for tests: the server as an operator starts it, and a host that serves images."""

import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2

from tests.support.shared_stores import environment_of

COMMAND = (sys.executable, "-P", "-m", "server.cli.main")
"""As the console script: nothing is imported from the working directory."""

START_TIMEOUT_S = 120.0
LOG_ENDED = "log ended"
HOLD_S = 110
"""Longer than any test's job takes on a busy machine."""


class Process:
    """A command of ours, followed through its log.

    program: the module that is run, in place of the installed command. folder: where it is called.
    under: a command that becomes it.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *arguments: str,
        program: str | None = None,
        folder: Path | None = None,
        under: Sequence[str] = (),
    ) -> None:
        command = COMMAND if program is None else (sys.executable, "-m", program)
        self._process = subprocess.Popen(
            [*under, *command, *arguments],
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            cwd=folder,
            text=True,
        )
        self.log: list[str] = []
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next log line of this name; the lines before it are passed over."""
        while True:
            try:
                line = self._events.get(timeout=START_TIMEOUT_S)
            except queue.Empty:
                raise AssertionError(f"no {event!r} in the log:\n" + "".join(self.log)) from None
            if line["event"] == event:
                return line
            if line["event"] == LOG_ENDED:
                raise AssertionError(f"no {event!r} before the end:\n" + "".join(self.log))

    def events(self, event: str) -> list[dict[str, Any]]:
        """All log lines of this name so far."""
        lines = [json.loads(line) for line in self.log if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    @property
    def pid(self) -> int:
        """Of the process itself, which is the parent of a server's workers."""
        return self._process.pid

    def stop(self) -> int:
        """SIGTERM, as an operator or Docker does; the exit status."""
        if self._process.poll() is None:
            self._process.terminate()
        return self._end()

    def stop_loop(self) -> None:
        """The main thread of `tests.chaos.stopped_loop` is busy from now on."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._end()

    def _end(self) -> int:
        status = self._process.wait(60)
        # The pipe stays open until the last worker has gone too.
        self._reader.join(60)
        if self._process.stderr is not None:
            self._process.stderr.close()
        return status

    def _read(self) -> None:
        for line in self._process.stderr or ():
            self.log.append(line)
            if line.startswith("{"):
                self._events.put(json.loads(line))
        self._events.put({"event": LOG_ENDED})


class ServerProcess(Process):
    """`inpaint-server serve` on a free port."""

    def __init__(
        self,
        data_dir: Path,
        environment: Mapping[str, str],
        *flags: str,
        program: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.data_dir = data_dir
        ours = {"INPAINT_FETCH__ALLOW_CIDRS": "127.0.0.0/8", "INPAINT_HOLD_S": str(HOLD_S)}
        arguments = ["serve", "--port", "0", "--data-dir", str(data_dir), *flags]
        given = {**ours, **environment_of(data_dir), **environment}
        super().__init__(given, *arguments, program=program, folder=folder)
        self.url: str = self.wait_for("listening")["url"]
        self.client = httpx2.Client(
            base_url=self.url,
            timeout=2 * HOLD_S,
            trust_env=False,
            # Long before the server closes the connection, which may happen as a call is sent.
            limits=httpx2.Limits(keepalive_expiry=1),
        )

    def inpaint(self, **fields: Any) -> dict[str, Any]:
        """Post to the inpaint path; the answer's body."""
        answer: dict[str, Any] = self.client.post("/api/v3/inpaint", json=fields).json()
        return answer


class WorkerProcess(Process):
    """`inpaint-server worker` beside a server of its own."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(environment_of(data_dir), "worker", "--data-dir", str(data_dir))


@contextmanager
def serving(
    data_dir: Path, environment: Mapping[str, str] | None = None, *flags: str
) -> Iterator[ServerProcess]:
    """A server with a ready worker, stopped at the end."""
    server = ServerProcess(data_dir, environment or {}, *flags)
    try:
        server.wait_for("worker ready")
        yield server
    finally:
        server.stop()
        server.client.close()


@contextmanager
def image_host(folder: Path) -> Iterator[str]:
    """The files of a folder over HTTP on loopback; gives the base URL."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    host = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{host.server_address[1]}"
    finally:
        host.shutdown()
        host.server_close()
        thread.join()

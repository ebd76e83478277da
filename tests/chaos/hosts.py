"""The outside world on loopback: a webhook receiver, an image host, and a proxy that cuts lines.

All run on one event loop in a thread of their own. What a host does is the first part of the
request's path.
"""

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from tests.support.http_stub import png_bytes, response

T = TypeVar("T")

IMAGE = png_bytes()
ENDLESS_CHUNK = b"x" * 65_536
DRIP_S = 0.3


class LoopThread:
    """An event loop beside the harness; use as a context manager."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> "LoopThread":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.call(_cancel_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def call(self, work: Coroutine[Any, Any, T], within_s: float = 30) -> T:
        """Run on the loop, and wait for the result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(within_s)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Call:
    """A webhook call as it came in. body: None where it is no JSON."""

    path: str
    webhook_id: str
    body: Any
    at: float


@dataclass(slots=True)
class Host:
    """A running stub. calls: every POST, in order. gets: how many GET requests there were."""

    port: int = 0
    gets: int = 0
    calls: list[Call] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def calls_for(self, job_id: int) -> list[Call]:
        """The webhook calls that told of a job."""
        return [each for each in self.calls if (each.body or {}).get("id") == job_id]


@contextmanager
def running_host(thread: LoopThread) -> Iterator[Host]:
    """Images by GET, webhooks by POST; see `_behave` for the modes."""
    host = Host()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
            }
            content = await reader.readexactly(int(headers.get("content-length", 0)))
            tries = 0
            if method == "GET":
                host.gets += 1
            else:
                tries = sum(call.path == path for call in host.calls)
                body = json.loads(content) if content else None
                host.calls.append(Call(path, headers.get("webhook-id", ""), body, time.time()))
            mode = path.partition("?")[0].split("/")[1]
            if mode == "silent":
                await reader.read()  # until the client has gone
            await _behave(mode, tries, host, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or all is over
        finally:
            writer.close()

    server = thread.call(asyncio.start_server(serve, "127.0.0.1", 0))
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        thread.call(close_server(server))


async def close_server(server: asyncio.Server) -> None:
    server.close()


async def _behave(mode: str, tries: int, host: Host, writer: asyncio.StreamWriter) -> None:
    """Answer as the mode says. tries: earlier calls of the same path."""
    match mode:
        case "image":
            writer.write(response("200 OK", "Content-Type: image/png", body=IMAGE))
        case "ok":
            writer.write(response("200 OK"))
        case "once500" if tries:
            writer.write(response("200 OK"))
        case "500" | "once500":
            writer.write(response("500 Internal Server Error"))
        case "301":
            writer.write(response("301 Moved Permanently", f"Location: {host.url}/ok/redirected"))
        case "404":
            writer.write(response("404 Not Found"))
        case "410":
            writer.write(response("410 Gone"))
        case "429":
            writer.write(response("429 Too Many Requests", "Retry-After: 3600"))
        case "page":
            writer.write(response("200 OK", "Content-Type: image/png", body=b"<!doctype html>"))
        case "loop":
            writer.write(response("302 Found", f"Location: {host.url}/loop"))
        case "inward":
            writer.write(response("302 Found", "Location: http://169.254.169.254/latest/meta-data"))
        case "lying":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99000000000\r\n\r\nx")
        case "half":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        case "reset":
            reset_connection(writer)
        case "drip":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n")
            await _repeat(writer, b"x", DRIP_S)
        case "endless" | "huge":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await _repeat(writer, ENDLESS_CHUNK, 0)
    await writer.drain()


async def _repeat(writer: asyncio.StreamWriter, chunk: bytes, pause_s: float) -> None:
    """Until the other side has had enough."""
    while True:
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(pause_s)


def reset_connection(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class TcpProxy:
    """Passes bytes on to a target until told otherwise.

    latency_s: added to every piece. is_cut: nothing passes and no connection is answered, while
    none is closed: a line that is down.
    """

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._connect = connect
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.latency_s = 0.0
        self.port = 0

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> asyncio.Server:
        """Listen, on a free port unless told which."""
        server = await asyncio.start_server(self._serve, host, port)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def cut(self) -> None:
        """From now on the line is down."""
        self._open.clear()

    async def heal(self) -> None:
        """What was held back passes now."""
        self._open.set()

    async def reset(self) -> None:
        """End all connections with RST."""
        for writer in self._writers:
            reset_connection(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            far_reader, far_writer = await self._connect()
        except OSError:
            writer.close()
            return
        both = {writer, far_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass_on(reader, far_writer))
                tasks.create_task(self._pass_on(far_reader, writer))
        except* OSError:
            pass
        finally:
            self._writers -= both
            for each in both:
                each.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(65_536):
            await asyncio.sleep(self.latency_s)
            await self._open.wait()
            writer.write(content)
            await writer.drain()
        writer.close()


@contextmanager
def running_proxy(
    thread: LoopThread, connect: Callable[[], Coroutine[Any, Any, Any]]
) -> Iterator[TcpProxy]:
    """connect: opens the connection to the target, such as `asyncio.open_connection`."""

    async def start() -> tuple[TcpProxy, asyncio.Server]:
        proxy = TcpProxy(connect)
        return proxy, await proxy.start()

    proxy, server = thread.call(start())
    try:
        yield proxy
    finally:
        thread.call(close_server(server))

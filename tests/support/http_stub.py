"""Real servers on loopback: image hosts that behave well or badly, and our own application."""

import asyncio
import io
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpcore2
import httpx2
import numpy as np
from fastapi import FastAPI
from PIL import Image

from server.api.app import create_app
from server.core.settings import Settings
from server.serving.server import Server, bind
from tests.support.waiting import until

Behaviour = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
"""What a stub does with a request's path; the connection is closed afterwards."""

ANSWER_S = 60.0
"""For an answer that is to come; the first one also waits for the server's start."""


def png_bytes(width: int = 64, height: int = 64, shade: int = 128) -> bytes:
    """A small valid picture."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def response(status: str, *headers: str, body: bytes = b"") -> bytes:
    """A whole HTTP/1.1 answer, with the length of its body."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def answering(content: bytes) -> Behaviour:
    """The same bytes for every request, well formed or not."""

    async def behave(_path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()

    return behave


@dataclass(slots=True)
class Stub:
    """A running stub. heads: the head of every request it has read."""

    host: str
    port: int = 0
    connections: int = 0
    heads: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@asynccontextmanager
async def running_stub(
    behaviour: Behaviour, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Stub]:
    """A stub on a port of a loopback address, a free one unless told which."""
    stub = Stub(host)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stub.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            stub.heads.append(head)
            await behaviour(head.split(" ")[1], writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, host, port)
    stub.port = server.sockets[0].getsockname()[1]
    try:
        yield stub
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


class StubDialler(httpcore2.AnyIOBackend):
    """A dialler that leads a public address to a stub on loopback, and any port to the stub's."""

    def __init__(self, public: str, port: int) -> None:
        self._public = public
        self._port = port

    async def connect_tcp(
        self, host: str, port: int, *arguments: Any, **named: Any
    ) -> httpcore2.AsyncNetworkStream:
        host = "127.0.0.1" if host == self._public else host
        return await super().connect_tcp(host, self._port, *arguments, **named)


@dataclass(frozen=True, slots=True)
class LiveApp:
    """Our application behind its real HTTP server. port, admin_port: for raw sockets.

    app: its inside.
    """

    client: httpx2.Client
    port: int
    admin_port: int
    app: FastAPI
    server: Server
    stop: Callable[[], None]


@contextmanager
def running_app(settings: Settings, host: str = "127.0.0.1") -> Iterator[LiveApp]:
    """The application without workers, on a free port; its client comes from 127.0.0.1."""
    listener = bind(host, 0)
    admin = bind("127.0.0.1", 0)
    port, admin_port = (each.getsockname()[1] for each in (listener, admin))
    told = settings.admin.model_copy(update={"port": admin_port})
    settings = settings.model_copy(update={"port": port, "admin": told})
    app = create_app(settings)
    server = Server(app, settings, admin_port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener, admin]})
    thread.start()

    def stop() -> None:
        server.handle_exit(signal.SIGTERM, None)

    try:
        # Its sockets take connections before it has migrated the database that tests look into.
        until(lambda: server.started or not thread.is_alive(), ANSWER_S, "the server has started")
        # Long before the server closes a connection, which may happen as a call is sent.
        limits = httpx2.Limits(keepalive_expiry=1)
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(
            base_url=url, timeout=ANSWER_S, trust_env=False, limits=limits
        ) as client:
            yield LiveApp(client, port, admin_port, app, server, stop)
    finally:
        stop()
        thread.join()

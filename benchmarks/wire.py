"""HTTP/1.1 at the least cost: clients that send requests made beforehand, receivers of webhooks.

They share the machine's cores with the server under test, and a general client takes as much
CPU time for a call as the server does.
"""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast
from urllib.parse import urlsplit

HEAD_END = b"\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
WEBHOOK_ID = re.compile(rb"\r\nwebhook-id: *(\S+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Message:
    """A request or an answer. head: with its first line; at: when its last byte came, steady."""

    head: bytes
    body: bytes
    at: float

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.head[9:12])


def split_message(content: bytes) -> tuple[bytes, bytes] | None:
    """Head and body of a message whose length is declared, None while it is not whole."""
    head, end, rest = content.partition(HEAD_END)
    if not end:
        return None
    length = CONTENT_LENGTH.search(head)
    size = int(length[1]) if length else 0
    return (head, rest[:size]) if len(rest) >= size else None


def post_bytes(url: str, values: Any) -> bytes:
    """A POST of JSON, as it goes over the wire."""
    parts = urlsplit(url)
    body = json.dumps(values).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get_bytes(url: str) -> bytes:
    """A GET, as it goes over the wire."""
    parts = urlsplit(url)
    return f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()


class Wire(asyncio.Protocol):
    """A connection that carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Message] | None = None
        self._received = b""

    @classmethod
    async def open(cls, url: str) -> "Wire":
        """Connect. Raises: OSError."""
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(cls, parts.hostname or "", parts.port or 80)
        return wire

    async def ask(self, request: bytes) -> Message:
        """The answer. Raises: ConnectionError."""
        if self._transport is None:
            raise ConnectionError("closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Fine at any time."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        parts = split_message(self._received)
        if parts is not None and self._answer is not None and not self._answer.done():
            self._received = b""
            self._answer.set_result(Message(*parts, time.perf_counter()))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed before the answer"))


class Receiver(asyncio.Protocol):
    """A webhook's far end: answers 204 and tells of the call, or takes it and never answers."""

    def __init__(self, note: Callable[[str, float], None] | None) -> None:
        self._note = note
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._note is None:
            return
        self._received += data
        parts = split_message(self._received)
        if parts is not None:
            self._received = b""
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            found = WEBHOOK_ID.search(parts[0])
            self._note(found[1].decode() if found else "", time.perf_counter())


class Receivers:
    """Hosts on loopback addresses of their own, some of them dead. An async context manager.

    living, refusing, hanging: how many. arrived: webhook ids, and when each first came.
    """

    def __init__(self, living: int, refusing: int, hanging: int) -> None:
        self._counts = living, refusing, hanging
        self._stack = AsyncExitStack()
        self.living: list[str] = []
        self.dead: list[str] = []
        self.arrived: dict[str, float] = {}
        self.repeats = 0
        self._awaited = 0
        self._has_come = asyncio.Event()

    async def wait_for(self, count: int, timeout_s: float) -> None:
        """Until so many calls have come, or the time is over."""
        self._awaited = count
        self._look()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_come.wait()

    async def __aenter__(self) -> "Receivers":
        living, refusing, hanging = self._counts
        names = host_names()
        self.living = [await self._listen(next(names), self._note) for _ in range(living)]
        self.dead = [await self._listen(next(names), None) for _ in range(hanging)]
        self.dead += [self._refuse(next(names)) for _ in range(refusing)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def _note(self, webhook_id: str, at: float) -> None:
        if self.arrived.setdefault(webhook_id, at) != at:
            self.repeats += 1
        self._look()

    def _look(self) -> None:
        if self._awaited and len(self.arrived) >= self._awaited:
            self._has_come.set()

    async def _listen(self, name: str, note: Callable[[str, float], None] | None) -> str:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Receiver(note), name, 0, backlog=256)
        self._stack.callback(server.close)
        return url_of(server.sockets[0])

    def _refuse(self, name: str) -> str:
        """Bound and not listening: connections are refused, and nobody else gets the port."""
        bound = self._stack.enter_context(socket.socket())
        bound.bind((name, 0))
        return url_of(bound)


def host_names() -> Iterator[str]:
    """Addresses of 127/8, all of which are this machine's."""
    return (f"127.9.{index // 250}.{1 + index % 250}" for index in range(10_000))


def url_of(listener: Any) -> str:
    """Where webhooks to a socket go."""
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}/hook"

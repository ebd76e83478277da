"""HTTP/1.1 over one connection: a request out, an answer in, under limits of bytes.

The parsing is llhttp's, by way of httptools. What is added is small and all about distrust: heads
and trailers are bounded, bodies are bounded, an answer that nobody asked for ends the connection.
A general client took 4 to 7 ms of CPU for a download that takes 0.5 ms this way.
"""

import asyncio
import ssl
from collections.abc import Mapping
from typing import cast

import httptools
import httpx

MAX_HEAD_BYTES = 65_536
"""Of heads, trailers and chunk framing, beyond as many bytes as the body has: chunks of a byte each
cost a hundred times their size to read."""


class ExchangeFailed(Exception):
    """The other side does not speak HTTP, stops half way, or speaks for too long."""


class BodyTooLarge(Exception):
    """More bytes, or more declared, than the caller wants."""


class Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time.

    status, headers: of the last answer whose head has come; header names are in lower case, and of
      a repeated one the last stands.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.status = 0
        self.headers: dict[str, str] = {}
        self._head: asyncio.Future[None] = loop.create_future()
        self._end: asyncio.Future[None] = loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._is_waiting = False
        self._is_open = True
        self._received = 0
        self._start()

    @property
    def is_idle(self) -> bool:
        """Another exchange may start."""
        return self._is_open and not self._is_waiting

    @property
    def has_answered(self) -> bool:
        """Any byte has come since the request went out."""
        return self._received > 0

    @property
    def peer(self) -> str:
        """The address of the far end: of the host, or of the proxy on the way to it."""
        return str(self._transport.get_extra_info("peername")[0]) if self._transport else ""

    async def send(self, request: bytes, max_body_bytes: int) -> None:
        """Send a whole request and wait for the answer's head; how long is the caller's to limit.

        Raises: ExchangeFailed.
        """
        if self._transport is None or not self.is_idle:
            raise ExchangeFailed("connection is closed")
        loop = asyncio.get_running_loop()
        self._head, self._end = loop.create_future(), loop.create_future()
        self._start(max_body_bytes)
        self._is_waiting = True
        self._transport.write(request)
        await self._wait_for(self._head)

    async def read(self) -> bytes:
        """The answer's body. Raises: ExchangeFailed, BodyTooLarge."""
        await self._wait_for(self._end)
        return bytes(self._body)

    async def over_tls(self, context: ssl.SSLContext, host: str) -> "Connection":
        """The same connection, from here on encrypted. Raises: OSError, ExchangeFailed."""
        if self._transport is None:
            raise ExchangeFailed("connection is closed")
        inner = Connection()
        transport = await asyncio.get_running_loop().start_tls(
            self._transport, inner, context, server_hostname=host
        )
        if transport is None:
            raise ExchangeFailed("connection is closed")
        inner.connection_made(transport)
        return inner

    def abort(self) -> None:
        """Close at once. Fine at any time."""
        self._fail(ExchangeFailed("connection is closed"))

    async def _wait_for(self, future: asyncio.Future[None]) -> None:
        await asyncio.wait([future])  # a cancelled caller leaves the future as it is
        future.result()

    def _start(self, max_body_bytes: int = 0) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._max_body_bytes = max_body_bytes
        self._body = bytearray()
        self._received = 0
        self.headers = {}

    def _fail(self, error: Exception) -> None:
        self._is_open = False
        if self._transport is not None:
            self._transport.abort()
        for future in (self._head, self._end):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting for it

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._is_waiting:
            self._fail(ExchangeFailed("an answer without a request"))
            return
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            is_large = isinstance(error.__context__, BodyTooLarge)
            self._fail(BodyTooLarge() if is_large else ExchangeFailed("answer"))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(ExchangeFailed("no HTTP"))
        framing = self._received - len(self._body)
        if framing > len(self._body) + MAX_HEAD_BYTES and not self._end.done():
            self._fail(ExchangeFailed("more framing than body"))

    def eof_received(self) -> None:
        ends_by_closing = not self.headers.keys() & {"content-length", "transfer-encoding"}
        if self._head.done() and not self._end.done() and ends_by_closing:
            self._end.set_result(None)
        self._fail(ExchangeFailed("closed half way"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ExchangeFailed("connection lost"))

    # Called by the parser.

    def on_message_begin(self) -> None:
        if self._end.done():
            self._is_open = False  # a second answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head.done():
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:
            # Switching protocols was not asked for; others only announce the answer.
            self.headers = {}
            return
        self._head.set_result(None)
        if int(self.headers.get("content-length") or 0) > self._max_body_bytes:
            raise BodyTooLarge

    def on_body(self, body: bytes) -> None:
        if len(self._body) + len(body) > self._max_body_bytes:
            raise BodyTooLarge
        self._body += body

    def on_message_complete(self) -> None:
        if self.status < 200:
            return
        self._is_waiting = False
        if not self._parser.should_keep_alive():
            self._is_open = False
        self._end.set_result(None)


def request_bytes(
    method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes = b"", whole: bool = False
) -> bytes:
    """A request as sent. whole: the target with scheme and host, as a proxy wants it."""
    netloc, path = url.netloc.decode("ascii"), url.raw_path.decode("ascii")
    target = f"{url.scheme}://{netloc}{path}" if whole else path
    length = {"Content-Length": str(len(body))} if method == "POST" else {}
    return head_bytes(method, target, {"Host": netloc, **headers, **length}) + body


def connect_bytes(host: str, port: int, headers: Mapping[str, str]) -> bytes:
    """A proxy's order to open a tunnel."""
    netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return head_bytes("CONNECT", netloc, {"Host": netloc, **headers})


def head_bytes(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """Request line and headers. Raises: ExchangeFailed for what would begin another line."""
    lines = [
        f"{method} {target} HTTP/1.1",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    if any("\r" in line or "\n" in line for line in lines):
        raise ExchangeFailed("line break in a header")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")

"""uvicorn's HTTP/1.1 protocol with deadlines and limits, against slow loris and large heads.

uvicorn waits without limit for a head, a body and a slow reader; each gets a deadline here.
`connections.py` decides which connection is closed when the server is full.
"""

import asyncio
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.auth.keyring import network_of, plain_address
from server.api.bodies import RELEASE, RESERVE_BODY
from server.core.settings.sections import HttpSettings
from server.serving.connections import ConnectionLimiter
from server.serving.tls import ServerTls

MAX_HEADERS = 100

MAX_HEAD_BYTES = 65_536
"""Most bytes of request line and headers. A query string may hold two prompts, but no picture."""

MAX_HEADER_BYTES = 8_192
"""Most bytes of one header, name and value, as in common proxies."""

CLOSE_TIMEOUT_S = 120.0
"""Longest time from closing a TLS connection until the client has read all and closed it too."""

MAX_UNENCRYPTED = 65_536
"""Most bytes that wait for encryption before the application is paused, as without TLS."""

INVALID_REQUEST = "Invalid HTTP request received."

MAX_PIPELINED = 16
"""Most pipelined requests of one connection."""

MIN_SEND_RATE = 8_192
"""Bytes per second that a client must read of its answer, measured over each `send_timeout_s`:
a limit against slow read attacks."""

MAX_UNSENT_IN_KERNEL = 131_072
"""Most unsent bytes of an answer in the kernel. By default the kernel buffers megabytes, and the
server would notice a slow reader late."""


class GuardedConfig(uvicorn.Config):
    """uvicorn's configuration, with the limiter and the limits of `GuardedProtocol`.

    tls: for connections to all ports but `plain_port`; None for HTTP. uvicorn's own `ssl_…` options
    are not used: with these a connection is counted only after its handshake.
    """

    tls: ServerTls | None = None
    plain_port: int | None = None

    def __init__(
        self,
        app: Any,
        limiter: ConnectionLimiter,
        limits: HttpSettings,
        max_body_bytes: int,
        **options: Any,
    ) -> None:
        self.limiter = limiter
        self.limits = limits
        self.max_body_bytes = max_body_bytes
        super().__init__(
            app, http=GuardedProtocol, timeout_keep_alive=limits.keep_alive_s, **options
        )

    def tls_context_for(self, port: int | None) -> ssl.SSLContext | None:
        """For a new connection to this port of ours; None where it is HTTP."""
        return None if self.tls is None or port == self.plain_port else self.tls.context


class GuardedProtocol(HttpToolsProtocol):
    """One connection, with a deadline for the client's next step.

    new, or bytes after a pause ──head_timeout_s──> head ──body_timeout_s──> whole request
    with TLS: new ──head_timeout_s──> handshake made and head
    answer written ──keep_alive_s──> closed;  answer not read ──send_timeout_s──> closed
    """

    def __init__(self, config: GuardedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.address = ""
        self.body_bytes = 0
        self.unsent_bytes = 0
        self._tls_context_for = config.tls_context_for
        self._limiter = config.limiter
        self._limits = config.limits
        # Twice the limit, because chunked encoding adds bytes to each chunk.
        self._max_wire_bytes = 2 * config.max_body_bytes + MAX_HEAD_BYTES
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None
        self._sent_bytes = 0
        """Bytes of answers that the client has read since the last check, at least."""
        self._is_in_head = True
        self._head_bytes = 0
        self._plain_head = b""
        """Head of an upgrade request without its `Upgrade` header, for the second parse."""
        self._received = 0
        """Complete requests so far."""
        self._answered = 0
        self._handshake: asyncio.Task[None] | None = None
        self._early: list[bytes] = []
        """Decrypted bytes that arrived before `_encrypt` knew of the handshake's end."""
        self._below: asyncio.Transport | None = None
        """With TLS, the transport that gets the encrypted bytes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._use(transport)
        if self.client:
            self.address = network_of(self.client[0])
            connection = transport.get_extra_info("socket")
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_IN_KERNEL
            )
        if not self._limiter.opened(self):
            self.cut()
            return
        self._expect_within(self._limits.head_timeout_s)
        context = self._tls_context_for(self.server[1] if self.server else None)
        if context is not None:
            self._handshake = self.loop.create_task(self._encrypt(transport, context))

    def _use(self, transport: asyncio.Transport) -> None:
        """Read from and write to this transport."""
        super().connection_made(transport)
        if self.client:
            # The scope holds an IPv4 address unmapped, as settings name trusted proxies.
            self.client = plain_address(self.client[0]), self.client[1]

    async def _encrypt(self, below: asyncio.Transport, context: ssl.SSLContext) -> None:
        """Make the TLS handshake, then go on with the transport that encrypts."""
        try:
            encrypted = await self.loop.start_tls(
                below,
                self,
                context,
                server_side=True,
                # The head's deadline is over before; it cuts the connection.
                ssl_handshake_timeout=2 * self._limits.head_timeout_s,
                ssl_shutdown_timeout=CLOSE_TIMEOUT_S,
            )
        except OSError:
            encrypted = None
        self._handshake = None
        if encrypted is None:  # asyncio tells of no end during the handshake
            self.connection_lost(None)
            return
        encrypted.set_write_buffer_limits(MAX_UNENCRYPTED)
        self._below = below
        self._use(encrypted)
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_send_deadline()
        self._limiter.closed(self)
        super().connection_lost(exc)

    def cut(self) -> None:
        """Close at once; unsent bytes are dropped."""
        self._clear_deadline()
        # SO_LINGER 0 sends a reset. Otherwise the kernel would go on sending what it has buffered.
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._early.append(data)
            return
        if self.transport.is_closing():
            return
        self._count_sent()
        self._unset_keepalive_if_required()
        was_in_head, received = self._is_in_head, self._received
        if not was_in_head:
            self._limiter.received(self, len(data))
        elif self._deadline is None and self._received == self._answered:
            self._expect_within(self._limits.head_timeout_s)
        self._feed(data)
        if was_in_head and self._is_in_head and received == self._received:
            # The parser reports a header only once it is complete, so the bytes are counted here.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(INVALID_REQUEST)
        elif self.body_bytes > self._max_wire_bytes:
            self.cut()

    def _feed(self, data: bytes) -> None:
        """Parse bytes. An upgrade request is served without the upgrade, as HTTP allows.

        The parser stops after the head of such a request, since another protocol would follow.
        A new parser gets the head again without the `Upgrade` header, then the bytes that follow.
        """
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                head, self._plain_head = self._plain_head, b""
                if not head:  # CONNECT
                    raise httptools.HttpParserError("no tunnel") from upgrade
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self._feed(head + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.logger.warning(INVALID_REQUEST)
            self.send_400_response(INVALID_REQUEST)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS or len(name) + len(value) > MAX_HEADER_BYTES:
            raise ValueError("headers too large")  # the parser stops, and uvicorn answers 400

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > MAX_HEAD_BYTES or len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("head too large, or too many pipelined requests")
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._plain_head = plain_head(self.parser, self.url, self.headers)
            return
        self._is_in_head = False
        if self._received == self._answered:
            self._expect_within(self._limits.body_timeout_s)
        self.scope["extensions"] = {
            RELEASE: {"call": lambda: self._limiter.release(self)},
            RESERVE_BODY: {"call": self._reserve},
        }
        if self._limiter.is_busy_for(self):
            self.scope["extensions"]["inpaint.busy"] = {}
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._plain_head:
            return  # the head of an upgrade request, which is parsed again
        super().on_message_complete()
        self._is_in_head = True
        self._head_bytes = 0
        self._received += 1
        self._clear_deadline()
        if self._received > self._answered:
            self._limiter.request_started(self)
        else:  # answered before it was complete; uvicorn has no timer now
            self._expect_within(self._limits.head_timeout_s)

    def _reserve(self, size: int) -> bool:
        """Count more bytes of the body; False where the limiter has no room for them."""
        self._limiter.received(self, size)
        return self._limiter.has_room_for_body(self)

    def on_response_complete(self) -> None:
        self._answered += 1
        if self._received <= self._answered:
            self._limiter.idle(self)
        if not self._is_in_head and self._deadline is None:
            self._expect_within(self._limits.body_timeout_s)
        super().on_response_complete()
        if self._unsent_size():
            self._start_send_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_send_deadline()

    def resume_writing(self) -> None:
        self._count_sent()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._start_send_deadline()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_send_deadline()

    def _expect_within(self, seconds: float) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(seconds, self.cut)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _unsent_size(self) -> int:
        """Bytes that are written and not in the kernel, those before and after encryption."""
        below = 0 if self._below is None else self._below.get_write_buffer_size()
        return self.transport.get_write_buffer_size() + below

    def _count_sent(self) -> None:
        """Count bytes that have left the write buffer since the last call as read by the client.

        Must be called before each write, because new bytes in the buffer hide those that left it.
        """
        unsent = self._unsent_size()
        self._sent_bytes += max(0, self.unsent_bytes - unsent)
        self._limiter.unsent(self, unsent)

    def _start_send_deadline(self) -> None:
        self._count_sent()
        if self._send_deadline is None:
            self._sent_bytes = 0
            self._send_deadline = self.loop.call_later(
                self._limits.send_timeout_s, self._check_send_rate
            )

    def _check_send_rate(self) -> None:
        """Cut a client that has read too little of its answer since the last check."""
        self._send_deadline = None
        self._count_sent()
        if not self.unsent_bytes:
            return
        if self._sent_bytes < MIN_SEND_RATE * self._limits.send_timeout_s:
            self.cut()
        else:
            self._start_send_deadline()

    def _clear_send_deadline(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None


def plain_head(
    parser: httptools.HttpRequestParser, url: bytes, headers: Sequence[tuple[bytes, bytes]]
) -> bytes:
    """The head of a request without its `Upgrade` header."""
    version = parser.get_http_version().encode()
    lines = [b"%s %s HTTP/%s" % (parser.get_method(), url, version)]
    lines += [b"%s: %s" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])

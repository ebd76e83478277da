"""uvicorn's HTTP/1.1 protocol with deadlines and bounds, against slow loris and large heads."""

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.auth.keyring import network_of, plain_address
from server.api.bodies import RELEASE, RESERVE_BODY
from server.core.settings import HttpSettings
from server.serving.connections import ConnectionLimiter

MAX_HEADERS = 100

MAX_HEAD_BYTES = 65_536
"""Request line and headers. A query string may hold two prompts, but no picture."""

MAX_HEADER_BYTES = 8_192
"""Name and value of one header, as proxies have it."""

INVALID_REQUEST = "Invalid HTTP request received."

MAX_PIPELINED = 16
"""Requests sent ahead on one connection."""

MIN_SEND_RATE = 8_192
"""Bytes per second a client must take of its answer, over each `send_timeout_s`."""

MAX_UNSENT_IN_KERNEL = 131_072
"""Bytes of an answer that the kernel takes before the network does. By itself it takes megabytes,
and asks for more when a third is gone: nobody would see for long whether a slow client reads."""


class GuardedConfig(uvicorn.Config):
    """uvicorn's configuration with what `GuardedProtocol` needs besides."""

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


class GuardedProtocol(HttpToolsProtocol):
    """One connection, with a deadline for whatever the client has to do next.

    new, or bytes after a pause ──head_timeout_s──> head ──body_timeout_s──> whole request
    answer written ──keep_alive_s──> closed;  answer not taken ──send_timeout_s──> closed
    """

    def __init__(self, config: GuardedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.address = ""
        self.body_bytes = 0
        self.unsent_bytes = 0
        self._limiter = config.limiter
        self._limits = config.limits
        # Twice: a chunked body has a few bytes around each chunk.
        self._max_wire_bytes = 2 * config.max_body_bytes + MAX_HEAD_BYTES
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None
        self._taken = 0
        """Bytes of answers, at least, since the last look."""
        self._is_in_head = True
        self._head_bytes = 0
        self._plain_head = b""
        """Of a request to upgrade: its head without that wish, while the parser reads it."""
        self._received = 0
        """Whole requests so far."""
        self._answered = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client:
            # As the names of proxies, and all who read the scope, know it.
            self.client = plain_address(self.client[0]), self.client[1]
            self.address = network_of(self.client[0])
            connection = transport.get_extra_info("socket")
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_IN_KERNEL
            )
        if self._limiter.opened(self):
            self._expect_within(self._limits.head_timeout_s)
        else:
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_send_deadline()
        self._limiter.closed(self)
        super().connection_lost(exc)

    def cut(self) -> None:
        """Close at once, with whatever was not sent."""
        self._clear_deadline()
        # With a reset: else the kernel would go on offering what it holds of the answer.
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._note_taken()
        self._unset_keepalive_if_required()
        was_in_head, received = self._is_in_head, self._received
        if not was_in_head:
            self._limiter.received(self, len(data))
        elif self._deadline is None and self._received == self._answered:
            self._expect_within(self._limits.head_timeout_s)
        self._feed(data)
        if was_in_head and self._is_in_head and received == self._received:
            # The parser keeps a header to itself until it is whole.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(INVALID_REQUEST)
        elif self.body_bytes > self._max_wire_bytes:
            self.cut()

    def _feed(self, data: bytes) -> None:
        """Parse; a request to upgrade is served as it would be without, which HTTP allows.

        The parser stops at the head of such a request and takes what follows for the other
        protocol. A new one gets the head again without the header, and then what follows.
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
            raise ValueError("too much")  # the parser stops, and uvicorn answers 400

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > MAX_HEAD_BYTES or len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too much")
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
            return  # its head only, which is read again
        super().on_message_complete()
        self._is_in_head = True
        self._head_bytes = 0
        self._received += 1
        self._clear_deadline()
        if self._received > self._answered:
            self._limiter.request_started(self)
        else:  # answered before it was whole; uvicorn has no timer now
            self._expect_within(self._limits.head_timeout_s)

    def _reserve(self, size: int) -> bool:
        """Count so many bytes more as the body's; False where they are too many."""
        self._limiter.received(self, size)
        return self._limiter.has_room_for_body(self)

    def on_response_complete(self) -> None:
        self._answered += 1
        if self._received <= self._answered:
            self._limiter.idle(self)
        if not self._is_in_head and self._deadline is None:
            self._expect_within(self._limits.body_timeout_s)
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_sending()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        self._note_taken()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._watch_sending()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def _expect_within(self, seconds: float) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(seconds, self.cut)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _note_taken(self) -> None:
        """What was written and is gone from memory has been taken by the client.

        Called whenever something may be written next, as that hides what was taken before.
        """
        unsent = self.transport.get_write_buffer_size()
        self._taken += max(0, self.unsent_bytes - unsent)
        self._limiter.unsent(self, unsent)

    def _watch_sending(self) -> None:
        self._note_taken()
        if self._send_deadline is None:
            self._taken = 0
            self._send_deadline = self.loop.call_later(
                self._limits.send_timeout_s, self._judge_sending
            )

    def _judge_sending(self) -> None:
        """Cut a client that took too little of its answer since the last look."""
        self._send_deadline = None
        self._note_taken()
        if not self.unsent_bytes:
            return
        if self._taken < MIN_SEND_RATE * self._limits.send_timeout_s:
            self.cut()
        else:
            self._watch_sending()

    def _clear_send_deadline(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None


def plain_head(
    parser: httptools.HttpRequestParser, url: bytes, headers: Sequence[tuple[bytes, bytes]]
) -> bytes:
    """The head of a request without its wish to upgrade."""
    version = parser.get_http_version().encode()
    lines = [b"%s %s HTTP/%s" % (parser.get_method(), url, version)]
    lines += [b"%s: %s" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])

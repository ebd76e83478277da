"""Clients that are slow, many, or silent: deadlines and limits for every connection.

uvicorn waits for ever for the end of a head or a body. `GuardedProtocol` does not, and `Gate` keeps
room for others: when connections run out, the one that has waited longest with no whole request is
closed. A request that has come in whole is never cut, but for shutdown.
"""

import asyncio
import socket
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.auth.keyring import network_of, plain_address
from server.api.bodies import RELEASE, RESERVE_BODY
from server.api.proxies import is_trusted
from server.core.settings import HttpSettings

MAX_HEADERS = 100
MAX_HEAD_BYTES = 65_536
"""Request line and headers. A query string may hold two prompts, but no picture."""

MAX_HEADER_BYTES = 8_192
"""Name and value of one header, as proxies have it."""

INVALID_REQUEST = "Invalid HTTP request received."

MAX_PIPELINED = 16
"""Requests sent ahead on one connection."""

RESERVE = 64
"""Connections beyond the limit, taken only to answer probes and to say that the server is busy."""

MIN_SEND_RATE = 8_192
"""Bytes per second a client must take of its answer, over each `send_timeout_s`."""

MAX_UNSENT_IN_KERNEL = 131_072
"""Bytes of an answer that the kernel takes before the network does. By itself it takes megabytes,
and asks for more when a third is gone: nobody would see for long whether a slow client reads."""

SHARES = 4
"""One address may fill one of so many equal parts of the room for bodies and answers."""


class Connection(Protocol):
    """What the gate knows of a connection.

    address: of the client, or of its network. body_bytes: received of its request, until nobody
    holds them. unsent_bytes: of its answers, written and not taken by the client.
    """

    address: str
    body_bytes: int
    unsent_bytes: int

    def cut(self) -> None:
        """Close at once."""


Waiting = OrderedDict[Connection, None]


class Gate:
    """The open connections of a server: how many, whose, and which one goes when room is needed.

    max_connections: at a time, all together. trusted: proxies, behind which there are many clients.
    Belongs to the event loop.
    """

    def __init__(
        self, settings: HttpSettings, max_connections: int, trusted: Sequence[str] = ()
    ) -> None:
        self._max_connections = max_connections
        self._max_per_address = settings.max_connections_per_address
        self._max_buffered_bytes = settings.max_buffered_bytes
        self._trusted = trusted
        self._counts: Counter[str] = Counter()
        self._open: set[Connection] = set()
        self._waiting: Waiting = OrderedDict()
        self._waiting_of: defaultdict[str, Waiting] = defaultdict(OrderedDict)
        self._owing: Waiting = OrderedDict()
        self._buffered_bytes = 0
        self._buffered_of: Counter[str] = Counter()
        self.cut_count = 0
        """Connections closed to make room, or refused for want of it."""

    @property
    def open_count(self) -> int:
        """Connections."""
        return len(self._open)

    @property
    def is_busy(self) -> bool:
        """True where no further request can be taken up, because all room is used by requests."""
        working = len(self._open) - len(self._waiting)
        return working >= self._max_connections or self._buffered_bytes >= self._max_buffered_bytes

    def is_busy_for(self, connection: Connection) -> bool:
        """The same, also where only the address has filled its share."""
        return self.is_busy or self._excess_of(connection.address) >= 0

    def has_room_for_body(self, connection: Connection) -> bool:
        """Whether the bodies in memory are within the limits, all and those of its address."""
        is_full = self._buffered_bytes >= self._max_buffered_bytes
        return not is_full and self._excess_of(connection.address) < 0

    def enter(self, connection: Connection) -> bool:
        """A new connection; False when there is no room even for a refusal."""
        address = connection.address
        if self._counts[address] >= self._max_per_address and not is_trusted(
            address, self._trusted
        ):
            if not self._cut_oldest(self._waiting_of.get(address)):
                self.cut_count += 1
                return False
        is_full = len(self._open) >= self._max_connections
        if is_full and not self._cut_oldest(self._waiting):
            if len(self._open) >= self._max_connections + RESERVE:
                self.cut_count += 1
                return False
        self._open.add(connection)
        self._counts[address] += 1
        self.wait(connection)
        return True

    def wait(self, connection: Connection) -> None:
        """The connection has no whole request: it may be closed, from now on the youngest."""
        if connection in self._open:
            self.release(connection)
            self._waiting[connection] = self._waiting_of[connection.address][connection] = None

    def work(self, connection: Connection) -> None:
        """The connection has sent a whole request."""
        self._waiting.pop(connection, None)
        of_address = self._waiting_of.get(connection.address)
        if of_address is not None:
            of_address.pop(connection, None)
            if not of_address:
                del self._waiting_of[connection.address]

    def take(self, connection: Connection, size: int) -> None:
        """Bytes of a body came in."""
        if connection in self._open:
            connection.body_bytes += size
            self._buffer(connection, size)

    def release(self, connection: Connection) -> None:
        """Nobody holds the body of the connection's request any longer."""
        self._buffer(connection, -connection.body_bytes)
        connection.body_bytes = 0

    def owe(self, connection: Connection, size: int) -> None:
        """So many bytes of answers are written now, and not taken by the client."""
        if connection not in self._open or size == connection.unsent_bytes:
            return
        change, connection.unsent_bytes = size - connection.unsent_bytes, size
        if size:
            self._owing.setdefault(connection)
        else:
            self._owing.pop(connection, None)
        self._buffer(connection, change)

    def leave(self, connection: Connection) -> None:
        """A connection has ended; does nothing the second time."""
        if connection not in self._open:
            return
        self.release(connection)
        self.owe(connection, 0)
        self._open.remove(connection)
        self.work(connection)
        self._counts[connection.address] -= 1
        if not self._counts[connection.address]:
            del self._counts[connection.address]

    def _buffer(self, connection: Connection, change: int) -> None:
        """More, or fewer, bytes are in memory. Where they are too many, somebody has to go.

        The oldest body that is coming in, then the answer that has been waited with the longest.
        A whole request that is worked on stays, and the server is busy.
        """
        address = connection.address
        self._buffered_bytes += change
        self._buffered_of[address] += change
        if not self._buffered_of[address]:
            del self._buffered_of[address]
        if change <= 0:
            return
        while self._excess_of(address) > 0 and self._cut_unfinished(address):
            pass
        while self._buffered_bytes > self._max_buffered_bytes:
            if not (self._cut_unfinished() or self._cut_oldest(self._owing)):
                return

    def _excess_of(self, address: str) -> int:
        """Bytes an address holds beyond its share; negative where there is room left."""
        excess = self._buffered_of[address] - self._max_buffered_bytes // SHARES
        return -1 if excess >= 0 and is_trusted(address, self._trusted) else excess

    def _cut_unfinished(self, address: str | None = None) -> bool:
        """Cut the oldest body that is coming in, of an address or of all."""
        waiting = self._waiting if address is None else self._waiting_of.get(address, OrderedDict())
        found = next((each for each in waiting if each.body_bytes), None)
        if found is None:
            return False
        self._cut(found)
        return True

    def _cut_oldest(self, waiting: Waiting | None) -> bool:
        if not waiting:
            return False
        self._cut(next(iter(waiting)))
        return True

    def _cut(self, connection: Connection) -> None:
        # The transport tells of its end later only; its place is free now.
        self.leave(connection)
        self.cut_count += 1
        connection.cut()


class GuardedConfig(uvicorn.Config):
    """uvicorn's configuration with what `GuardedProtocol` needs besides."""

    def __init__(
        self, app: Any, gate: Gate, limits: HttpSettings, max_body_bytes: int, **options: Any
    ) -> None:
        self.gate = gate
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
        self._gate = config.gate
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
        if self._gate.enter(self):
            self._expect_within(self._limits.head_timeout_s)
        else:
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_send_deadline()
        self._gate.leave(self)
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
            self._gate.take(self, len(data))
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
            RELEASE: {"call": lambda: self._gate.release(self)},
            RESERVE_BODY: {"call": self._reserve},
        }
        if self._gate.is_busy_for(self):
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
            self._gate.work(self)
        else:  # answered before it was whole; uvicorn has no timer now
            self._expect_within(self._limits.head_timeout_s)

    def _reserve(self, size: int) -> bool:
        """Count so many bytes more as the body's; False where they are too many."""
        self._gate.take(self, size)
        return self._gate.has_room_for_body(self)

    def on_response_complete(self) -> None:
        self._answered += 1
        if self._received <= self._answered:
            self._gate.wait(self)
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
        self._gate.owe(self, unsent)

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

"""`ConnectionLimiter`: limits of connections and of buffered bytes, against slow loris.

Slow loris clients open connections and never complete a request. `protocol.py` sets deadlines for
them. When the server is full before these pass, the oldest connection without a complete request
is closed for a new one. A complete request is only cut at shutdown.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Protocol

from server.api.proxies import is_trusted
from server.core.settings.sections import HttpSettings

RESERVE = 64
"""Connections beyond the limit, which get answers to probes and otherwise 503."""

SHARES = 4
"""One address may use this fraction, a quarter, of the bytes for bodies and answers."""


class Connection(Protocol):
    """A connection as the limiter needs it.

    address: of the client, or its IPv6 network. body_bytes: of its request, still in memory.
    unsent_bytes: of its answers, written but not read by the client.
    """

    address: str
    body_bytes: int
    unsent_bytes: int

    def cut(self) -> None:
        """Close at once."""


Waiting = OrderedDict[Connection, None]


class ConnectionLimiter:
    """Counts connections and their bytes, and closes some of them to make room.

    max_connections: open at a time. trusted: proxies, which stand for many clients and have no
    limit per address. Used on the event loop only.
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
        self._unsent: Waiting = OrderedDict()
        self._buffered_bytes = 0
        self._buffered_of: Counter[str] = Counter()
        self.cut_count = 0
        """Connections closed to make room, or refused because there was none."""

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def is_busy(self) -> bool:
        """Whether complete requests use up the connections or the bytes."""
        working = len(self._open) - len(self._waiting)
        return working >= self._max_connections or self._buffered_bytes >= self._max_buffered_bytes

    def is_busy_for(self, connection: Connection) -> bool:
        """Whether the server is busy, or the connection's address has used up its share."""
        return self.is_busy or self._excess_of(connection.address) >= 0

    def has_room_for_body(self, connection: Connection) -> bool:
        """Whether the bytes in memory are within both limits, of all and of the address."""
        is_full = self._buffered_bytes >= self._max_buffered_bytes
        return not is_full and self._excess_of(connection.address) < 0

    def opened(self, connection: Connection) -> bool:
        """Count a new connection; False when there is no room even to answer 503."""
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
        self.idle(connection)
        return True

    def idle(self, connection: Connection) -> None:
        """The connection waits for a whole request: it may be closed to make room, as the last."""
        if connection in self._open:
            self.release(connection)
            self._waiting[connection] = self._waiting_of[connection.address][connection] = None

    def request_started(self, connection: Connection) -> None:
        """The connection has sent a complete request, so it is not closed to make room."""
        self._stop_waiting(connection)

    def _stop_waiting(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)
        of_address = self._waiting_of.get(connection.address)
        if of_address is not None:
            of_address.pop(connection, None)
            if not of_address:
                del self._waiting_of[connection.address]

    def received(self, connection: Connection, size: int) -> None:
        """Count received bytes of a body."""
        if connection in self._open:
            connection.body_bytes += size
            self._buffer(connection, size)

    def release(self, connection: Connection) -> None:
        """The body of the connection's request is no longer in memory."""
        self._buffer(connection, -connection.body_bytes)
        connection.body_bytes = 0

    def unsent(self, connection: Connection, size: int) -> None:
        """Set the bytes of answers that are written but not read by the client."""
        if connection not in self._open or size == connection.unsent_bytes:
            return
        change, connection.unsent_bytes = size - connection.unsent_bytes, size
        if size:
            self._unsent.setdefault(connection)
        else:
            self._unsent.pop(connection, None)
        self._buffer(connection, change)

    def closed(self, connection: Connection) -> None:
        """Remove a connection; does nothing the second time."""
        if connection not in self._open:
            return
        self.release(connection)
        self.unsent(connection, 0)
        self._open.remove(connection)
        self._stop_waiting(connection)
        self._counts[connection.address] -= 1
        if not self._counts[connection.address]:
            del self._counts[connection.address]

    def _buffer(self, connection: Connection, change: int) -> None:
        """Change the bytes in memory, and close connections while they exceed a limit.

        First goes the oldest incomplete body, then the answer that is unsent for longest. Complete
        requests stay, and the server is busy.
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
            if not (self._cut_unfinished() or self._cut_oldest(self._unsent)):
                return

    def _excess_of(self, address: str) -> int:
        """Bytes of an address beyond its share; negative where it has room left."""
        excess = self._buffered_of[address] - self._max_buffered_bytes // SHARES
        return -1 if excess >= 0 and is_trusted(address, self._trusted) else excess

    def _cut_unfinished(self, address: str | None = None) -> bool:
        """Cut the connection with the oldest incomplete body, of an address or of all."""
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
        # The transport reports its end later, but its slot must be free now.
        self.closed(connection)
        self.cut_count += 1
        connection.cut()

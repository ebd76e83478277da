"""`ConnectionLimiter`: how many connections may be open, whose, and which one goes for another.

uvicorn waits for ever for the end of a head or a body, so slow loris clients could take all
connections. `protocol.py` sets deadlines; this room makes space for others: the oldest connection
that has sent no whole request is closed. A request that has come in whole is never cut, but for
shutdown.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Protocol

from server.api.proxies import is_trusted
from server.core.settings import HttpSettings

RESERVE = 64
"""Connections beyond the limit, taken only to answer probes and to say that the server is busy."""

SHARES = 4
"""One address may fill one of so many equal parts of the room for bodies and answers."""


class Connection(Protocol):
    """What the limiter knows of a connection.

    address: of the client, or of its network. body_bytes: received of its request, until nobody
    holds them. unsent_bytes: of its answers, written and not taken by the client.
    """

    address: str
    body_bytes: int
    unsent_bytes: int

    def cut(self) -> None:
        """Close at once."""


Waiting = OrderedDict[Connection, None]


class ConnectionLimiter:
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

    def opened(self, connection: Connection) -> bool:
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
        self.idle(connection)
        return True

    def idle(self, connection: Connection) -> None:
        """The connection has no whole request: it may be closed, from now on the youngest."""
        if connection in self._open:
            self.release(connection)
            self._waiting[connection] = self._waiting_of[connection.address][connection] = None

    def request_started(self, connection: Connection) -> None:
        """The connection has sent a whole request."""
        self._waiting.pop(connection, None)
        of_address = self._waiting_of.get(connection.address)
        if of_address is not None:
            of_address.pop(connection, None)
            if not of_address:
                del self._waiting_of[connection.address]

    def received(self, connection: Connection, size: int) -> None:
        """Bytes of a body came in."""
        if connection in self._open:
            connection.body_bytes += size
            self._buffer(connection, size)

    def release(self, connection: Connection) -> None:
        """Nobody holds the body of the connection's request any longer."""
        self._buffer(connection, -connection.body_bytes)
        connection.body_bytes = 0

    def unsent(self, connection: Connection, size: int) -> None:
        """So many bytes of answers are written now, and not taken by the client."""
        if connection not in self._open or size == connection.unsent_bytes:
            return
        change, connection.unsent_bytes = size - connection.unsent_bytes, size
        if size:
            self._owing.setdefault(connection)
        else:
            self._owing.pop(connection, None)
        self._buffer(connection, change)

    def closed(self, connection: Connection) -> None:
        """A connection has ended; does nothing the second time."""
        if connection not in self._open:
            return
        self.release(connection)
        self.unsent(connection, 0)
        self._open.remove(connection)
        self.request_started(connection)
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
        self.closed(connection)
        self.cut_count += 1
        connection.cut()

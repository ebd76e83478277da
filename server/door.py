"""The one door out: every connection to an address that a stranger named is opened here.

A name is resolved once, all its addresses are judged, and a judged address itself is dialled, so
that no second look-up can lead elsewhere. Connections are kept for the next request to the same
scheme, host and port: a connection's far end cannot change, and it is judged again, by its address,
under the policy of whoever takes it.
"""

import asyncio
import base64
import contextlib
import functools
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from server.addresses import (
    AddressPolicy,
    Refused,
    host_of,
    parse_address,
    port_of,
    unwrapped,
)
from server.exchange import BodyTooLarge, Connection, ExchangeFailed, connect_bytes, request_bytes
from server.interfaces import is_local, is_nearby
from server.lookups import Lookups, Resolver, numeric_addresses
from server.settings import EgressSettings, Settings

Dialler = Callable[[str, int], Awaitable[socket.socket]]
"""A connected socket to an address and port."""

DIAL_TRIES = 2
KEPT_CONNECTIONS = 32
KEPT_IDLE_S = 15.0
KEPT_AGE_S = 60.0
"""A host that moves to another address is noticed after this long."""
UNREACHABLE_S = 2.0
"""A host that did not answer is left alone this long: a burst of calls names the same one."""
MAX_UNREACHABLE = 256

HEADERS = {"User-Agent": "inpaint-server", "Accept": "*/*", "Accept-Encoding": "identity"}
NETWORK_ERRORS = (ExchangeFailed, BodyTooLarge, OSError, UnicodeError)
"""All that can go wrong on the way to a host that the policy lets through."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where this server itself listens; host may be a wildcard or a name."""

    host: str
    port: int

    def is_at(self, address: str, port: int) -> bool:
        """Whether a connection to the address would end here."""
        if port != self.port:
            return False
        dialled = unwrapped(parse_address(address))
        try:
            own = unwrapped(parse_address(self.host))
        except Refused:
            return is_local(str(dialled))  # a name, of which it is not known what it was bound to
        return dialled == own or (own.is_unspecified and is_local(str(dialled)))


def listeners_of(settings: Settings) -> list[Listener]:
    """Where a server with these settings listens."""
    listeners = [Listener(settings.host, settings.port)]
    if settings.admin.port is not None:
        listeners.append(Listener(settings.admin.host, settings.admin.port))
    return listeners


@dataclass(frozen=True, slots=True)
class Kept:
    """A connection that can be used again.

    address: of its far end; behind a proxy the one in the URL, None where that has a name.
    """

    connection: Connection
    origin: tuple[str, str, int]
    address: str | None
    opened_at: float
    idle_since: float = 0

    def is_usable(self, now: float) -> bool:
        """Still open, not about to be closed from the other side, not too old."""
        is_young = now - self.opened_at < KEPT_AGE_S and now - self.idle_since < KEPT_IDLE_S
        return is_young and self.connection.is_idle


class Door:
    """Requests to judged addresses, one pool of connections for all who ask.

    listeners: of this server, which are never dialled. resolver, dialler: for tests.
    """

    def __init__(
        self,
        settings: EgressSettings | None = None,
        listeners: Sequence[Listener] = (),
        resolver: Resolver | None = None,
        dialler: Dialler | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        settings = settings or EgressSettings()
        proxy = settings.proxy.get_secret_value() if settings.proxy else None
        self._proxy = httpx.URL(proxy) if proxy else None
        self.nat64_prefixes = settings.nat64_prefixes
        self._listeners = listeners
        self._lookups = Lookups(resolver)
        self._dialler = dialler or dial
        self._tls = tls or tls_context(settings.ca_file)
        self._kept: list[Kept] = []
        self._unreachable: dict[tuple[str, int], float] = {}

    @property
    def has_proxy(self) -> bool:
        """Whether names are looked up and judged by a proxy, and not here."""
        return self._proxy is not None

    async def aclose(self) -> None:
        """Close what is kept."""
        for kept in self._kept:
            kept.connection.abort()
        self._kept.clear()

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        url: httpx.URL,
        policy: AddressPolicy,
        *,
        owner: str,
        headers: Mapping[str, str],
        max_body_bytes: int,
        connect_timeout_s: float,
        body: bytes = b"",
    ) -> AsyncIterator[Connection]:
        """The connection with the answer's head read, and its body to be read or left.

        url: from `checked_url`. owner: on whose behalf its name is looked up. connect_timeout_s: of
        connecting alone; the deadline over the whole is the caller's.
        Raises: Refused; one of NETWORK_ERRORS.
        """
        head = {**HEADERS, **headers}
        by_proxy = self._proxy if url.scheme == "http" else None
        if by_proxy is not None:
            head |= proxy_headers(by_proxy)
        request = request_bytes(method, url, head, body, whole=by_proxy is not None)
        kept = await self._send(url, policy, owner, request, max_body_bytes, connect_timeout_s)
        try:
            yield kept.connection
        finally:
            self._keep(kept)

    async def _send(
        self,
        url: httpx.URL,
        policy: AddressPolicy,
        owner: str,
        request: bytes,
        max_body_bytes: int,
        connect_timeout_s: float,
    ) -> Kept:
        kept = self._take(url, policy)
        if kept is not None:
            try:
                await self._send_on(kept, request, max_body_bytes)
                return kept
            except ExchangeFailed:
                # Closed from the other side just when the request went out. A webhook may have been
                # read all the same; its receiver knows it by its id.
                if kept.connection.has_answered:
                    raise
        kept = await self._connect(url, policy, owner, connect_timeout_s)
        await self._send_on(kept, request, max_body_bytes)
        return kept

    async def _send_on(self, kept: Kept, request: bytes, max_body_bytes: int) -> None:
        try:
            await kept.connection.send(request, max_body_bytes)
        except BaseException:
            kept.connection.abort()
            raise

    def _take(self, url: httpx.URL, policy: AddressPolicy) -> Kept | None:
        """A kept connection that this policy would have opened."""
        self._drop_unusable()
        origin = origin_of(url)
        for kept in reversed(self._kept):
            if kept.origin == origin and is_judged_well(kept, policy):
                self._kept.remove(kept)
                return kept
        return None

    def _keep(self, kept: Kept) -> None:
        if not kept.connection.is_idle:
            kept.connection.abort()
            return
        self._kept.append(replace(kept, idle_since=time.monotonic()))
        self._drop_unusable()

    def _drop_unusable(self) -> None:
        now = time.monotonic()
        usable = [kept for kept in self._kept if kept.is_usable(now)][-KEPT_CONNECTIONS:]
        if len(usable) < len(self._kept):
            for kept in self._kept:
                if kept not in usable:
                    kept.connection.abort()
            self._kept = usable

    async def _connect(
        self, url: httpx.URL, policy: AddressPolicy, owner: str, timeout_s: float
    ) -> Kept:
        if self._proxy is not None:
            return await self._connect_by_proxy(self._proxy, url, policy, timeout_s)
        host, port = host_of(url), port_of(url)
        addresses = await self._judged(host, port, policy, owner)
        sock = await self._dial(host, addresses, port, timeout_s)
        address = sock.getpeername()[0]
        is_tls = url.scheme == "https"
        async with asyncio.timeout(timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection,
                sock=sock,
                ssl=self._tls if is_tls else None,
                server_hostname=host if is_tls else None,
            )
        return Kept(connection, origin_of(url), address, time.monotonic())

    async def _judged(self, host: str, port: int, policy: AddressPolicy, owner: str) -> list[str]:
        """The host's addresses, none of which is denied. Raises: Refused, OSError."""
        if self._unreachable.get((host, port), 0) > time.monotonic():
            raise ExchangeFailed("did not answer a moment ago")
        try:
            found = await self._lookups.find(host, port, owner)
        except TimeoutError:
            raise  # ours, perhaps for want of a thread: it says nothing of the host
        except OSError:
            self._remember_unreachable(host, port)
            raise
        addresses = policy.judge(host, found, port)
        self._refuse_own(host, addresses, port, policy)
        return addresses

    def _refuse_own(
        self, host: str, addresses: Sequence[str], port: int, policy: AddressPolicy
    ) -> None:
        """Raises: Refused; OSError where the kernel does not tell what is near."""
        for address in addresses:
            if any(listener.is_at(address, port) for listener in self._listeners):
                raise Refused("this server's own address")
            if is_guarded(host, address, policy):
                raise Refused(f"address {address} of this machine or its network")

    async def _dial(
        self, host: str, addresses: Sequence[str], port: int, timeout_s: float
    ) -> socket.socket:
        for tries, address in enumerate([*addresses, *addresses][:DIAL_TRIES], 1):
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._dialler(address, port)
            except OSError:
                if tries == DIAL_TRIES:
                    self._remember_unreachable(host, port)
                    raise
        raise AssertionError("judged addresses are never none")

    def _remember_unreachable(self, host: str, port: int) -> None:
        self._unreachable.pop((host, port), None)
        self._unreachable[host, port] = time.monotonic() + UNREACHABLE_S
        if len(self._unreachable) > MAX_UNREACHABLE:
            self._unreachable.pop(next(iter(self._unreachable)))

    async def _connect_by_proxy(
        self, proxy: httpx.URL, url: httpx.URL, policy: AddressPolicy, timeout_s: float
    ) -> Kept:
        """Names are the proxy's to resolve and judge; addresses in the URL are judged here too."""
        host, port = host_of(url), port_of(url)
        literals = numeric_addresses(host, port)
        if literals:
            self._refuse_own(host, policy.judge(host, literals, port), port, policy)
        elif not policy.allows_port(host, port):
            raise Refused(f"port {port}")
        async with asyncio.timeout(timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, host_of(proxy), port_of(proxy)
            )
        address = literals[0] if literals else None
        kept = Kept(connection, origin_of(url), address, time.monotonic())
        if url.scheme == "http":
            return kept
        async with asyncio.timeout(timeout_s):
            await self._send_on(kept, connect_bytes(host, port, proxy_headers(proxy)), 0)
        if connection.status != 200:
            connection.abort()
            raise ExchangeFailed(f"the proxy answers {connection.status}")
        async with asyncio.timeout(timeout_s):
            inner = await connection.over_tls(self._tls, host)
        return replace(kept, connection=inner)


def is_judged_well(kept: Kept, policy: AddressPolicy) -> bool:
    """Whether the policy would dial the far end of a kept connection."""
    _, host, port = kept.origin
    if kept.address is None:
        return policy.allows_port(host, port)
    is_allowed = policy.allows(host, parse_address(kept.address), port)
    return is_allowed and not is_guarded(host, kept.address, policy)


def is_guarded(host: str, address: str, policy: AddressPolicy) -> bool:
    """Whether an address, public or not, is this machine's or of a network it is attached to, and
    no operator has opened it: what listens there trusts its neighbours. Raises: OSError."""
    dialled = unwrapped(parse_address(address), policy.nat64_prefixes)
    return not policy.opens(host, dialled) and is_nearby(str(dialled))


def origin_of(url: httpx.URL) -> tuple[str, str, int]:
    """What connections are kept by."""
    return url.scheme, host_of(url), port_of(url)


def proxy_headers(proxy: httpx.URL) -> dict[str, str]:
    """What the proxy wants to know of us."""
    if not proxy.userinfo:
        return {}
    user = f"{proxy.username}:{proxy.password}".encode()
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user).decode()}"}


async def dial(address: str, port: int) -> socket.socket:
    """A TCP connection. Raises: OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
    except BaseException:
        sock.close()
        raise
    return sock


@functools.cache
def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Certificates are verified against the public authorities, and those of the file.

    Built once: that takes 20 ms. Raises: OSError.
    """
    context = httpx.create_ssl_context(trust_env=False)
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context

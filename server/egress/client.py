"""`EgressClient`: sends every request to a URL that a client of this server has named.

Server-side request forgery (SSRF) and DNS rebinding are prevented when a connection is opened.
`GuardedBackend` resolves the host name, checks all its addresses and dials one of the checked
literal addresses. Checking a URL earlier is not enough, because a name can resolve to another
address by the time it is dialled. Host header, SNI and certificate check still use the name.

httpcore2, the transport of httpx2, does HTTP/1.1, TLS and proxies. The client above it is not used,
because it adds cookies, redirects, decompression and the environment's proxies. Each request opens
its own connection. A connection is therefore never used under an older policy, and bytes after the
end of a response are never parsed as the next response.
"""

import contextlib
import functools
import ssl
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import httpcore2
import httpx2

from server.core.settings import Settings
from server.core.settings.sections import EgressSettings
from server.egress.interfaces import is_local, is_on_link
from server.egress.policy import (
    AddressDenied,
    AddressPolicy,
    host_of,
    parse_address,
    port_of,
    unwrap_ipv4,
)
from server.egress.resolver import NameResolver, Resolver, numeric_addresses

MAX_DIALLED_ADDRESSES = 2
"""Addresses of a host that are tried, each under the connect time-out."""

READ_BYTES = 16_384
"""Largest read. The event loop is blocked while httpcore2 parses a read of one-byte chunks."""
MAX_FRAMING_BYTES = 65_536
"""Limit of a response's head, trailers and chunk sizes, plus an eighth of the largest body."""
MIN_CHUNK_BYTES = 64
"""Smallest average chunk. Smaller chunks cost too much parsing for the bytes they carry."""
FREE_CHUNKS = 1_024
"""Chunks of any size that every response may have before `MIN_CHUNK_BYTES` applies."""

HEADERS = {
    "User-Agent": "inpaint-server",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}


class EgressFailed(Exception):
    """The host cannot be reached, does not speak HTTP, or closes the connection early."""


class BodyTooLarge(Exception):
    """The body has, or declares, more bytes than the caller allows."""


TRANSPORT_ERRORS: dict[type[Exception], type[Exception]] = {
    httpcore2.TimeoutException: TimeoutError,
    httpcore2.NetworkError: EgressFailed,
    httpcore2.ProtocolError: EgressFailed,
    httpcore2.ProxyError: EgressFailed,
    httpcore2.UnsupportedProtocol: EgressFailed,
    TimeoutError: TimeoutError,  # before OSError, of which TimeoutError is a subclass
    OSError: EgressFailed,
    UnicodeError: EgressFailed,
}
"""Errors of httpcore2 and the resolver, and ours for each; the first matching class counts."""

NETWORK_ERRORS = (EgressFailed, BodyTooLarge, TimeoutError)
"""All errors of a request to an address that the policy allows."""


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Turn errors of httpcore2 and the resolver into ours."""
    try:
        yield
    except tuple(TRANSPORT_ERRORS) as error:
        ours = next(ours for theirs, ours in TRANSPORT_ERRORS.items() if isinstance(error, theirs))
        raise ours(str(error)) from error


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket on which this server listens. host: an address, a wildcard or a name."""

    host: str
    port: int

    def accepts(self, address: str, port: int) -> bool:
        """Whether a connection to this address and port would reach this listener."""
        if port != self.port:
            return False
        dialled = unwrap_ipv4(parse_address(address))
        try:
            own = unwrap_ipv4(parse_address(self.host))
        except AddressDenied:
            return is_local(str(dialled))  # The listener may be bound to any address of the name.
        return dialled == own or (own.is_unspecified and is_local(str(dialled)))


def listeners_of(settings: Settings) -> list[Listener]:
    """The listeners of a server with these settings."""
    listeners = [Listener(settings.host, settings.port)]
    if settings.admin.port is not None:
        listeners.append(Listener(settings.admin.host, settings.admin.port))
    return listeners


PEER = "peer"
"""Extra information of a `BoundedStream`."""


class BoundedStream(httpcore2.AsyncNetworkStream):
    """A connection that reads at most `max_bytes` from the host, framing included.

    peer: the address that was dialled. The socket cannot name it once the host has closed the
        connection, which may happen before its answer is read.
    A read beyond the limit raises httpcore2.ReadError.
    """

    def __init__(self, inner: httpcore2.AsyncNetworkStream, max_bytes: int, peer: str) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self._peer = peer
        self._received = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - the interface is httpcore2's
        if self._received > self._max_bytes:
            raise httpcore2.ReadError("more bytes than a response may have")
        piece = await self._inner.read(min(max_bytes, READ_BYTES), timeout)
        self._received += len(piece)
        return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as above
    ) -> httpcore2.AsyncNetworkStream:
        encrypted = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        return BoundedStream(encrypted, self._max_bytes, self._peer)

    def get_extra_info(self, info: str) -> Any:
        return self._peer if info == PEER else self._inner.get_extra_info(info)


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Dials only literal addresses that were checked just before: no SSRF, no DNS rebinding.

    checked_addresses: resolves a host and checks every address. Raises: AddressDenied.
    dialler: connects to a literal address.
    """

    def __init__(
        self,
        checked_addresses: Callable[[str, int], Awaitable[Sequence[str]]],
        dialler: httpcore2.AsyncNetworkBackend,
        max_bytes: int,
    ) -> None:
        self._checked_addresses = checked_addresses
        self._dialler = dialler
        self._max_bytes = max_bytes

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - as above
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._checked_addresses(host, port)
        peer, *others = addresses[:MAX_DIALLED_ADDRESSES]
        try:
            stream = await self._dialler.connect_tcp(peer, port, timeout)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
            if not others:
                raise
            peer = others[0]
            stream = await self._dialler.connect_tcp(peer, port, timeout)
        return BoundedStream(stream, self._max_bytes, peer)


class EgressResponse:
    """A response whose head has been received.

    headers: names in lower case, values as latin-1; the last of a repeated header counts.
    peer: the host's address that was dialled, or the proxy as the settings name it.
    """

    def __init__(self, response: httpcore2.Response, max_body_bytes: int) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in response.headers
        }
        self.peer = str(response.extensions["network_stream"].get_extra_info(PEER))
        self._response = response
        self._max_body_bytes = max_body_bytes

    async def read(self) -> bytes:
        """The body as it was sent, without undoing a Content-Encoding.

        Raises: EgressFailed, BodyTooLarge.
        """
        if int(self.headers.get("content-length", 0)) > self._max_body_bytes:
            raise BodyTooLarge
        body, chunks = bytearray(), 0
        with translated_errors():
            async with contextlib.aclosing(self._response.aiter_stream()) as pieces:
                async for piece in pieces:
                    body += piece
                    chunks += 1
                    if len(body) > self._max_body_bytes:
                        raise BodyTooLarge
                    if chunks > FREE_CHUNKS + len(body) / MIN_CHUNK_BYTES:
                        raise EgressFailed("more framing than body")
        return bytes(body)


class EgressClient:
    """Sends requests to checked addresses, directly or by the proxy of the settings.

    listeners: this server's own, which are never dialled. resolver, dialler, tls: for tests.
    """

    def __init__(
        self,
        settings: EgressSettings,
        listeners: Sequence[Listener],
        resolver: Resolver | None = None,
        dialler: httpcore2.AsyncNetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._proxy = proxy_of(settings.proxy.get_secret_value()) if settings.proxy else None
        self.nat64_prefixes = settings.nat64_prefixes
        self._listeners = listeners
        self._resolver = NameResolver(resolver)
        self._dialler = dialler or httpcore2.AnyIOBackend()
        self._tls = tls or tls_context(settings.ca_file)

    @property
    def has_proxy(self) -> bool:
        """Whether a proxy, and not this client, resolves and checks names."""
        return self._proxy is not None

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        url: httpx2.URL,
        policy: AddressPolicy,
        *,
        owner: str,
        headers: Mapping[str, str],
        max_body_bytes: int,
        connect_timeout_s: float,
        body: bytes = b"",
    ) -> AsyncIterator[EgressResponse]:
        """The response, its body unread. A redirect is not followed; the caller requests it anew.

        url: from `checked_url`. owner: the key whose share of the resolver's threads is used.
        connect_timeout_s: for each address that is dialled; the caller sets a deadline for the
        whole request. Raises: AddressDenied; one of NETWORK_ERRORS.
        """
        async with self._connection(policy, owner, max_body_bytes) as connection:
            with translated_errors():
                if self.has_proxy:
                    self._check_for_proxy(url, policy)
                request = self._build_request(method, url, headers, body, connect_timeout_s)
                response = await connection.handle_async_request(request)
                if response.status < 200:
                    raise EgressFailed("unrequested protocol switch")
            yield EgressResponse(response, max_body_bytes)

    def _connection(
        self, policy: AddressPolicy, owner: str, max_body_bytes: int
    ) -> httpcore2.AsyncConnectionPool:
        """A pool for one request; leaving it closes the connection."""

        async def checked_addresses(host: str, port: int) -> Sequence[str]:
            if self._proxy is not None:
                return [host]  # The host is the proxy, which the operator has configured.
            return await self._checked_addresses(host, port, policy, owner)

        max_bytes = max_body_bytes + max_body_bytes // 8 + MAX_FRAMING_BYTES
        return httpcore2.AsyncConnectionPool(
            ssl_context=self._tls,
            proxy=self._proxy,
            network_backend=GuardedBackend(checked_addresses, self._dialler, max_bytes),
        )

    def _build_request(
        self,
        method: str,
        url: httpx2.URL,
        headers: Mapping[str, str],
        body: bytes,
        connect_timeout_s: float,
    ) -> httpcore2.Request:
        host = host_of(url)
        # httpcore2 copies the host into the CONNECT line, so an IPv6 address needs its brackets.
        url_host = f"[{host}]" if self.has_proxy and ":" in host else host
        length = {"Content-Length": str(len(body))} if method == "POST" else {}
        return httpcore2.Request(
            method,
            httpcore2.URL(scheme=url.raw_scheme, host=url_host, port=url.port, target=url.raw_path),
            headers=[*{"Host": url.netloc.decode("ascii"), **HEADERS, **headers, **length}.items()],
            content=body,
            extensions={"timeout": {"connect": connect_timeout_s}, "sni_hostname": host},
        )

    async def _checked_addresses(
        self, host: str, port: int, policy: AddressPolicy, owner: str
    ) -> Sequence[str]:
        """The host's addresses, all allowed. Raises: AddressDenied, OSError, UnicodeError."""
        addresses = policy.check(host, await self._resolver.resolve(host, port, owner), port)
        deny_own(host, addresses, port, policy, self._listeners)
        return addresses

    def _check_for_proxy(self, url: httpx2.URL, policy: AddressPolicy) -> None:
        """Check literal addresses and ports; the proxy resolves and checks names.

        Raises: AddressDenied, OSError.
        """
        host, port = host_of(url), port_of(url)
        literals = numeric_addresses(host, port)
        if literals:
            checked = policy.check(host, literals, port)
            deny_own(host, checked, port, policy, self._listeners)
        elif not policy.allows_port(host, port):
            raise AddressDenied(f"port {port}")


def deny_own(
    host: str,
    addresses: Sequence[str],
    port: int,
    policy: AddressPolicy,
    listeners: Sequence[Listener],
) -> None:
    """Raises: AddressDenied; OSError where the network interfaces cannot be listed."""
    for address in addresses:
        if any(listener.accepts(address, port) for listener in listeners):
            raise AddressDenied("this server's own address")
        if is_own_network(host, address, policy):
            raise AddressDenied(f"address {address} of this machine or its network")


def is_own_network(host: str, address: str, policy: AddressPolicy) -> bool:
    """Whether an address is this machine's, or on a network attached to it, and not allowed by the
    operator. Public addresses count too, because services there may trust their neighbours.

    Raises: OSError.
    """
    dialled = unwrap_ipv4(parse_address(address), policy.nat64_prefixes)
    return not policy.allows_explicitly(host, dialled) and is_on_link(str(dialled))


def proxy_of(url: str) -> httpcore2.Proxy:
    """The proxy of a URL, which may hold a user and password."""
    parsed = httpx2.URL(url)
    user = (parsed.username.encode(), parsed.password.encode()) if parsed.userinfo else None
    return httpcore2.Proxy(
        httpcore2.URL(
            scheme=parsed.raw_scheme, host=parsed.raw_host, port=port_of(parsed), target=b"/"
        ),
        auth=user,
    )


@functools.cache
def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Verifies certificates against the public authorities and those of the file.

    Cached, because building a context takes 20 ms. Raises: OSError.
    """
    context = ssl.create_default_context(cafile=certifi.where())
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context

"""`EgressClient`: the only way to an address that a client of this server has named.

Server-side request forgery (SSRF) and DNS rebinding are stopped at connect, the only check that
holds: whatever a URL says, and whatever its name meant a moment ago, a connection leads where it is
dialled. So the name is resolved at connect, all its addresses are judged, and one of the judged
literal addresses is dialled. Host header, SNI and certificate are those of the name.

HTTP/1.1, TLS and proxies are httpcore2's, the transport of httpx2, used without the client above:
cookies, redirects, decompression and the environment's proxies are not wanted here. Each request
has a connection of its own, so no connection outlives the judgement under which it was opened, and
bytes after the end of an answer are never taken for the next answer.
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

from server.core.settings import EgressSettings, Settings
from server.egress.interfaces import is_local, is_nearby
from server.egress.policy import (
    AddressDenied,
    AddressPolicy,
    host_of,
    parse_address,
    port_of,
    unwrapped,
)
from server.egress.resolver import NameResolver, Resolver, numeric_addresses

DIALLED_ADDRESSES = 2
"""Addresses of a host that are tried, each under the connect time-out."""

READ_BYTES = 16_384
"""Parsing a read of one-byte chunks blocks the event loop for its length."""
MAX_FRAMING_BYTES = 65_536
"""Heads, trailers and chunk sizes of an answer may have this many bytes, and an eighth of the
largest body on top."""
MIN_CHUNK_BYTES = 64
"""On average: smaller chunks cost more to parse than their bytes are worth."""
FREE_CHUNKS = 1_024
"""Chunks of any size that every answer may have."""

HEADERS = {
    "User-Agent": "inpaint-server",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}


class EgressFailed(Exception):
    """The host cannot be reached, does not speak HTTP, or stops half way."""


class BodyTooLarge(Exception):
    """The body has, or declares, more bytes than the caller wants."""


FOREIGN_ERRORS: dict[type[Exception], type[Exception]] = {
    httpcore2.TimeoutException: TimeoutError,
    httpcore2.NetworkError: EgressFailed,
    httpcore2.ProtocolError: EgressFailed,
    httpcore2.ProxyError: EgressFailed,
    httpcore2.UnsupportedProtocol: EgressFailed,
    TimeoutError: TimeoutError,  # before OSError, of which TimeoutError is a subclass
    OSError: EgressFailed,
    UnicodeError: EgressFailed,
}
"""Errors of the transport and the resolver to ours; the first class that fits counts."""

NETWORK_ERRORS = (EgressFailed, BodyTooLarge, TimeoutError)
"""Everything that can go wrong on the way to a host that the policy allows."""


@contextlib.contextmanager
def foreign_errors_turned() -> Iterator[None]:
    """Raise our errors in place of those of the transport and the resolver."""
    try:
        yield
    except tuple(FOREIGN_ERRORS) as error:
        ours = next(kind for foreign, kind in FOREIGN_ERRORS.items() if isinstance(error, foreign))
        raise ours(str(error)) from error


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
        except AddressDenied:
            return is_local(str(dialled))  # a name, of which it is not known what it was bound to
        return dialled == own or (own.is_unspecified and is_local(str(dialled)))


def listeners_of(settings: Settings) -> list[Listener]:
    """Where a server with these settings listens."""
    listeners = [Listener(settings.host, settings.port)]
    if settings.admin.port is not None:
        listeners.append(Listener(settings.admin.host, settings.admin.port))
    return listeners


class BoundedStream(httpcore2.AsyncNetworkStream):
    """A connection that ends after so many bytes from the host, whatever they are.

    Raises on reading: httpcore2.ReadError once the bytes are used up.
    """

    def __init__(self, inner: httpcore2.AsyncNetworkStream, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self._received = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - the interface is httpcore2's
        if self._received > self._max_bytes:
            raise httpcore2.ReadError("more bytes than any answer may have")
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
        return BoundedStream(encrypted, self._max_bytes)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to nothing but judged literal addresses; here SSRF and DNS rebinding are stopped.

    judged: a host's addresses, all fit to be dialled; raises AddressDenied.
    dialler: connects to a literal address.
    """

    def __init__(
        self,
        judged: Callable[[str, int], Awaitable[Sequence[str]]],
        dialler: httpcore2.AsyncNetworkBackend,
        max_bytes: int,
    ) -> None:
        self._judged = judged
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
        first, *others = (await self._judged(host, port))[:DIALLED_ADDRESSES]
        try:
            stream = await self._dialler.connect_tcp(first, port, timeout)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
            if not others:
                raise
            stream = await self._dialler.connect_tcp(others[0], port, timeout)
        return BoundedStream(stream, self._max_bytes)


class Answer:
    """A host's answer, of which the head has come.

    headers: names in lower case, values as latin-1; of a repeated header the last stands.
    peer: the address of the far end: of the host, or of the proxy.
    """

    def __init__(self, response: httpcore2.Response, max_body_bytes: int) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in response.headers
        }
        self.peer = str(response.extensions["network_stream"].get_extra_info("server_addr")[0])
        self._response = response
        self._max_body_bytes = max_body_bytes

    async def read(self) -> bytes:
        """The body as it comes off the wire, still compressed where it is.

        Raises: EgressFailed, BodyTooLarge.
        """
        if int(self.headers.get("content-length", 0)) > self._max_body_bytes:
            raise BodyTooLarge
        body, chunks = bytearray(), 0
        with foreign_errors_turned():
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
    """Sends requests to judged addresses, directly or by the proxy of the settings.

    listeners: of this server; they are never dialled. resolver, dialler, tls: for tests.
    """

    def __init__(
        self,
        settings: EgressSettings | None = None,
        listeners: Sequence[Listener] = (),
        resolver: Resolver | None = None,
        dialler: httpcore2.AsyncNetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        settings = settings or EgressSettings()
        self._proxy = proxy_of(settings.proxy.get_secret_value()) if settings.proxy else None
        self.nat64_prefixes = settings.nat64_prefixes
        self._listeners = listeners
        self._lookups = NameResolver(resolver)
        self._dialler = dialler or httpcore2.AnyIOBackend()
        self._tls = tls or tls_context(settings.ca_file)

    @property
    def has_proxy(self) -> bool:
        """Whether names are resolved and judged by a proxy, and not here."""
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
    ) -> AsyncIterator[Answer]:
        """The answer with its head read; its body may be read or left. Redirects are the caller's
        to follow, each with a request of its own.

        url: from `checked_url`. owner: the key on whose behalf the name is looked up.
        connect_timeout_s: for each address that is dialled; the deadline over the whole is the
        caller's. Raises: AddressDenied; one of NETWORK_ERRORS.
        """
        async with self._connection(policy, owner, max_body_bytes) as connection:
            with foreign_errors_turned():
                if self.has_proxy:
                    self._check_for_proxy(url, policy)
                request = self._written(method, url, headers, body, connect_timeout_s)
                response = await connection.handle_async_request(request)
                if response.status < 200:
                    raise EgressFailed("another protocol, which was not asked for")
            yield Answer(response, max_body_bytes)

    def _connection(
        self, policy: AddressPolicy, owner: str, max_body_bytes: int
    ) -> httpcore2.AsyncConnectionPool:
        """A pool for one request, whose only connection is closed with it."""

        async def judged(host: str, port: int) -> Sequence[str]:
            if self._proxy is not None:
                return [host]  # the proxy itself, which the operator has named
            return await self._judged(host, port, policy, owner)

        max_bytes = max_body_bytes + max_body_bytes // 8 + MAX_FRAMING_BYTES
        return httpcore2.AsyncConnectionPool(
            ssl_context=self._tls,
            proxy=self._proxy,
            network_backend=GuardedBackend(judged, self._dialler, max_bytes),
        )

    def _written(
        self,
        method: str,
        url: httpx2.URL,
        headers: Mapping[str, str],
        body: bytes,
        connect_timeout_s: float,
    ) -> httpcore2.Request:
        host = host_of(url)
        # httpcore2 writes the host as it stands into what it asks of a proxy.
        named = f"[{host}]" if self.has_proxy and ":" in host else host
        length = {"Content-Length": str(len(body))} if method == "POST" else {}
        return httpcore2.Request(
            method,
            httpcore2.URL(scheme=url.raw_scheme, host=named, port=url.port, target=url.raw_path),
            headers=[*{"Host": url.netloc.decode("ascii"), **HEADERS, **headers, **length}.items()],
            content=body,
            extensions={"timeout": {"connect": connect_timeout_s}, "sni_hostname": host},
        )

    async def _judged(
        self, host: str, port: int, policy: AddressPolicy, owner: str
    ) -> Sequence[str]:
        """None of the host's addresses is denied. Raises: AddressDenied, OSError, UnicodeError."""
        addresses = policy.check(host, await self._lookups.find(host, port, owner), port)
        self._refuse_own(host, addresses, port, policy)
        return addresses

    def _check_for_proxy(self, url: httpx2.URL, policy: AddressPolicy) -> None:
        """Judge what can be judged without resolving the name. Raises: AddressDenied, OSError."""
        host, port = host_of(url), port_of(url)
        literals = numeric_addresses(host, port)
        if literals:
            self._refuse_own(host, policy.check(host, literals, port), port, policy)
        elif not policy.allows_port(host, port):
            raise AddressDenied(f"port {port}")

    def _refuse_own(
        self, host: str, addresses: Sequence[str], port: int, policy: AddressPolicy
    ) -> None:
        """Raises: AddressDenied; OSError where the kernel does not tell what is near."""
        for address in addresses:
            if any(listener.is_at(address, port) for listener in self._listeners):
                raise AddressDenied("this server's own address")
            if is_guarded(host, address, policy):
                raise AddressDenied(f"address {address} of this machine or its network")


def is_guarded(host: str, address: str, policy: AddressPolicy) -> bool:
    """Whether an address, public or not, is this machine's or of a network it is attached to, and
    no operator has opened it: what listens there trusts its neighbours. Raises: OSError."""
    dialled = unwrapped(parse_address(address), policy.nat64_prefixes)
    return not policy.opens(host, dialled) and is_nearby(str(dialled))


def proxy_of(url: str) -> httpcore2.Proxy:
    """The proxy of the settings, with the user that its URL names."""
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
    """Certificates are verified against the public authorities, and those of the file.

    Built once: that takes 20 ms. Raises: OSError.
    """
    context = ssl.create_default_context(cafile=certifi.where())
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context

"""The one door to addresses that users name.

Every connection is judged at the moment it is dialled: the name is resolved once, all answers are
judged, and the judged address itself is dialled, so that no second look-up can lead elsewhere.
Redirects pass through the same door, hop by hop.
"""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpcore
import httpx

from server.errors import ImageProblem
from server.settings import FetchSettings, IpNetwork

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host and port."""

MAX_REDIRECTS = 3
MAX_URL_CHARS = 2_048
LOOKUP_TIMEOUT_S = 3.0
USER_AGENT = "inpaint-server"

# Everything that is not unicast on the public internet, from the IANA special-purpose registries,
# and Azure's platform address, which is public by its number only.
DENIED_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 "
        "172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 "
        "192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 "
        "240.0.0.0/4"
    ).split()
]
# IPv6 the other way round: only global unicast is allowed, less its special parts. That leaves out
# translated, tunnelled, local and multicast addresses without naming them.
ALLOWED_IPV6 = ipaddress.IPv6Network("2000::/3")
DENIED_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20".split()
]

# What a cloud machine tells about itself, credentials among it.
METADATA = [ipaddress.ip_address(address) for address in ("169.254.169.254", "fd00:ec2::254")]


NETWORK_ERRORS = (
    httpx.HTTPError,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    OSError,
    UnicodeError,
    TimeoutError,
)
"""All that can go wrong on the way to a host that the policy lets through."""


class Refused(Exception):
    """The policy does not let this URL or address through."""


REFUSALS = (Refused, httpx.InvalidURL)
"""What says no before anything is dialled; the latter comes of a redirect's target."""


class FetchFailed(Exception):
    """kind: what to tell the client."""

    def __init__(self, kind: ImageProblem) -> None:
        self.kind = kind
        super().__init__(kind.value)


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Which addresses may be dialled: public ones, and those an operator allows.

    allow_cidrs: a metadata address is let through only by a network of that address alone.
    allow_hosts: exact host names, in any case, whose addresses are not judged.
    """

    allow_cidrs: Sequence[IpNetwork] = ()
    allow_hosts: Sequence[str] = ()

    def judge(self, host: str, addresses: Iterable[str]) -> str:
        """The address to dial. Raises: Refused when any of them is not allowed."""
        listed = list(addresses)
        if host.lower() not in map(str.lower, self.allow_hosts):
            for address in listed:
                if not self.allows(ipaddress.ip_address(address.partition("%")[0])):
                    raise Refused(address)
        if not listed:
            raise Refused(host)
        return listed[0]

    def allows(self, address: IpAddress) -> bool:
        """One address by itself; an IPv4 address mapped into IPv6 is judged as IPv4."""
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        named = [network for network in self.allow_cidrs if address in network]
        if address in METADATA:
            return any(network.num_addresses == 1 for network in named)
        if named:
            return True
        if isinstance(address, ipaddress.IPv4Address):
            return not any(address in network for network in DENIED_IPV4)
        return address in ALLOWED_IPV6 and not any(address in each for each in DENIED_IPV6)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name. Raises: OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    # getaddrinfo knows no deadline of its own.
    async with asyncio.timeout(LOOKUP_TIMEOUT_S):
        answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(answer[4][0]) for answer in answers]


class JudgingBackend(httpcore.AsyncNetworkBackend):
    """httpcore's network backend with the policy between resolving and dialling."""

    def __init__(self, policy: AddressPolicy, resolver: Resolver = resolve) -> None:
        self._policy = policy
        self._resolver = resolver
        self._dialler = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        address = self._policy.judge(host, await self._resolver(host, port))
        return await self._dialler.connect_tcp(
            address, port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(self, *_args: Any, **_kwargs: Any) -> Any:
        raise Refused("unix socket")

    async def sleep(self, seconds: float) -> None:
        await self._dialler.sleep(seconds)


class JudgingTransport(httpx.AsyncBaseTransport):
    """httpx over a connection pool whose backend judges addresses."""

    def __init__(self, policy: AddressPolicy, max_connections: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False),
            max_connections=max_connections,
            network_backend=JudgingBackend(policy),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        response = await self._pool.handle_async_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=PoolStream(response),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class PoolStream(httpx.AsyncByteStream):
    """A response's body that gives its connection back when closed."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._response.aiter_stream():
            yield chunk

    async def aclose(self) -> None:
        await self._response.aclose()


def open_client(policy: AddressPolicy, max_connections: int, timeout_s: float) -> httpx.AsyncClient:
    """An HTTP client that dials what the policy allows and follows no redirect.

    timeout_s: of connecting, and of each single read and write.
    """
    return httpx.AsyncClient(
        transport=JudgingTransport(policy, max_connections),
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        # One host's cookies would go out with somebody else's request.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        timeout=timeout_s,
        follow_redirects=False,
        trust_env=False,
    )


class Fetcher:
    """Downloads images under limits of address, bytes and time."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        policy = AddressPolicy(settings.allow_cidrs, settings.allow_hosts)
        self._places = asyncio.Semaphore(settings.max_concurrent)
        self._client = open_client(policy, settings.max_concurrent, settings.connect_timeout_s)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def get(self, url: str) -> bytes:
        """The body behind a URL. Raises: FetchFailed."""
        try:
            # One deadline over everything: time-outs of single reads do not stop a drip.
            async with asyncio.timeout(self._settings.total_timeout_s), self._places:
                return await self._get(url)
        except REFUSALS as error:
            raise FetchFailed(ImageProblem.NOT_ALLOWED) from error
        except NETWORK_ERRORS as error:
            raise FetchFailed(ImageProblem.NOT_REACHABLE) from error

    async def _get(self, url: str) -> bytes:
        target = checked_url(url)
        for _ in range(MAX_REDIRECTS + 1):
            async with AsyncExitStack() as stack:
                request = self._client.build_request("GET", target)
                response = await self._client.send(request, stream=True)
                stack.push_async_callback(response.aclose)
                location = response.headers.get("location")
                if not (response.is_redirect and location):
                    return await self._read(response)
                target = checked_url(str(target.join(location)))
        raise FetchFailed(ImageProblem.NOT_REACHABLE)

    async def _read(self, response: httpx.Response) -> bytes:
        limit = self._settings.max_image_bytes
        if response.status_code != 200 or response.headers.get("content-encoding"):
            raise FetchFailed(ImageProblem.NOT_REACHABLE)
        if int(response.headers.get("content-length") or 0) > limit:
            raise FetchFailed(ImageProblem.TOO_LARGE)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                raise FetchFailed(ImageProblem.TOO_LARGE)
        return bytes(body)


def checked_url(url: str) -> httpx.URL:
    """A URL whose form leaves no room for two readings. Raises: Refused."""
    if len(url) > MAX_URL_CHARS or any(ord(char) <= 32 or char in "\\\x7f" for char in url):
        raise Refused(url)
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise Refused(url) from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise Refused(url)
    if "%" in parsed.host or not 0 < (parsed.port or 80) < 65_536:
        raise Refused(url)
    return parsed

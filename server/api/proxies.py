"""`TrustedProxies`: client address, scheme and host of a request behind a trusted proxy.

It reads `X-Forwarded-For`, `-Proto`, `-Host`, `-Port` and `-Prefix`; where a proxy sends none of
these, `Forwarded` (RFC 7239). From other clients these headers are ignored, because anybody can
forge them. The log names such a client, which may be a proxy that is missing in the settings.
"""

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.core.http import HOST, MAX_PORT, is_allowed
from server.core.logs import get_logger

logger = get_logger(__name__)

BASE_URL = "inpaint.base_url"
"""Key of the ASGI scope: scheme, host and prefix under which the client reached the proxy."""

PREFIX = re.compile(r"(/[A-Za-z0-9._~-]{1,100}){1,10}/?")

SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https", "on": "https"}

KINDS = frozenset(("for", "proto", "host", "port", "prefix"))
"""The forwarded values that count."""

FORWARDING = frozenset((b"forwarded", *(f"x-forwarded-{kind}".encode() for kind in KINDS)))
"""The headers that hold them."""

MAX_REPORTED = 100
"""Most clients whose ignored headers are logged, as any client can send some."""

DEFAULT_PORTS = {"http": "80", "https": "443"}

ELEMENT = re.compile(r'(?:[^,"]|"[^"]*")+')

# The name's length is bounded, because a long word without "=" would take quadratic time.
PAIR = re.compile(r'\b([A-Za-z]{1,20})\s?=\s?(?:"([^"]*)"|([^\s;,"]+))')


class TrustedProxies:
    """ASGI middleware: sets client, scheme and base URL of requests from trusted proxies.

    trusted: addresses, networks or `*`. allowed_hosts: as `Settings.allowed_hosts`; other
    forwarded hosts are ignored.
    """

    def __init__(
        self, app: ASGIApp, trusted: Sequence[str], allowed_hosts: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._trusted = trusted
        self._allowed_hosts = tuple(host.lower() for host in allowed_hosts)
        self._reported: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            address = (scope["client"] or ("", 0))[0]
            if is_trusted(address, self._trusted):
                self._read(scope)
            else:
                self._report(address, scope["headers"])
        await self._app(scope, receive, send)

    def _report(self, address: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Log a client whose forwarded headers are ignored, once for each of `MAX_REPORTED`."""
        if address in self._reported or len(self._reported) >= MAX_REPORTED:
            return
        if any(name in FORWARDING for name, _ in headers):
            self._reported.add(address)
            logger.warning(
                "proxy headers ignored",
                detail=f"{address} sends X-Forwarded-* or Forwarded headers and is not in "
                "INPAINT_FORWARDED_ALLOW_IPS; if it is your reverse proxy, name it there",
            )

    def _read(self, scope: Scope) -> None:
        forwarded = forwarded_of(scope["headers"])
        client = client_of(forwarded.get("for", ""), self._trusted)
        if client is not None:
            scope["client"] = client, 0
        scheme = SCHEMES.get(first_of(forwarded.get("proto", "")).lower())
        if scheme is not None:
            scope["scheme"] = scheme
        if forwarded.keys() & {"host", "port", "prefix"}:
            own = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            host = self._host_of(forwarded, own[0] if own else "", scope["scheme"])
            if host is not None:
                prefix = first_of(forwarded.get("prefix", ""))
                prefix = prefix.rstrip("/") if PREFIX.fullmatch(prefix) else ""
                scope[BASE_URL] = f"{scope['scheme']}://{host}{prefix}"

    def _host_of(self, forwarded: Mapping[str, str], own: str, scheme: str) -> str | None:
        """The host name and port that the client used; None where no valid one was forwarded."""
        for each in (first_of(forwarded.get("host", "")), own):
            match = HOST.fullmatch(each.lower())
            if match is not None and is_allowed(each.encode(), self._allowed_hosts):
                break
        else:
            return None
        port = match["port"] or first_of(forwarded.get("port", ""))
        if not (port.isascii() and port.isdigit() and 0 < int(port[:9]) <= MAX_PORT):
            port = ""
        return match["name"] if port in ("", DEFAULT_PORTS[scheme]) else f"{match['name']}:{port}"


def forwarded_of(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """The forwarded values by `for`, `proto`, `host`, `port` and `prefix`; lists stay lists."""
    forwarded: dict[str, str] = {}
    standard = ""
    for name, value in headers:
        if name.startswith(b"x-forwarded-"):
            kind, text = name[12:].decode("latin-1"), value.decode("latin-1").strip()
            forwarded[kind] = f"{forwarded[kind]}, {text}" if kind in forwarded else text
        elif name == b"forwarded":
            standard += ("," if standard else "") + value.decode("latin-1")
    if standard and not forwarded.keys() & KINDS:
        for kind, value_of in elements_of(standard):
            forwarded[kind] = f"{forwarded[kind]}, {value_of}" if kind in forwarded else value_of
    return forwarded


def elements_of(forwarded: str) -> Iterator[tuple[str, str]]:
    """The name-value pairs of a `Forwarded` header, from the first hop to the last."""
    for element in ELEMENT.findall(forwarded):
        for name, quoted, plain in PAIR.findall(element):
            yield name.lower(), quoted or plain


def first_of(value: str) -> str:
    """The first entry of a list, which the proxy nearest to the client wrote."""
    return value.partition(",")[0].strip()


def client_of(chain: str, trusted: Sequence[str]) -> str | None:
    """The client's address: the last one of the chain that is not a trusted proxy's.

    Entries before it were sent by the client and prove nothing. Where all are trusted, it is the
    first one.
    """
    hops = [address for each in chain.split(",") if (address := plain_host(each.strip()))]
    if not hops:
        return None
    if "*" in trusted:
        return hops[0]
    return next((hop for hop in reversed(hops) if not is_trusted(hop, trusted)), hops[0])


def plain_host(text: str) -> str:
    """An address without brackets and port."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def is_trusted(address: str, trusted: Sequence[str]) -> bool:
    """Whether an address or network belongs to a trusted proxy. trusted: as `TrustedProxies`."""
    if "*" in trusted or address in trusted:
        return True
    try:
        ip = ipaddress.ip_network(address)
    except ValueError:
        return False
    networks = [each for each in trusted if "/" in each]
    return any(
        ip.version == network.version and ip.subnet_of(network)  # type: ignore[arg-type]
        for network in map(ipaddress.ip_network, networks)
    )

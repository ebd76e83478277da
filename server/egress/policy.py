"""Which addresses may be dialled, and which URLs are unambiguous. No I/O.

The two checks are separate. `checked_url` checks the text of a URL. `AddressPolicy` checks an
address just before `client` dials it. Checking the host name would not prevent server-side request
forgery (SSRF), because DNS rebinding lets a name resolve to another address a moment later.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httpx2

from server.core.settings.sections import FetchSettings, WebhookSettings
from server.core.settings.values import IpNetwork

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_CHARS = 8_192
"""Limit for images and webhooks. Presigned URLs with a session token have 2,000 to 5,000."""
AUTHORITY_END = re.compile("[/?#]")
USUAL_PORTS = frozenset({80, 443})
PRIVATE_ENDINGS = (".localhost", ".local", ".internal", ".home.arpa")
"""Reserved for private names by RFC 6761, RFC 6762, ICANN in 2024 and RFC 8375."""

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
# For IPv6 only global unicast is allowed, less its special-purpose parts. That excludes translated,
# tunnelled, local and multicast addresses without a list of them.
ALLOWED_IPV6 = ipaddress.IPv6Network("2000::/3")
DENIED_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20".split()
]

# Metadata services of clouds, which answer with credentials: EC2, GCP, Azure and OpenStack; ECS
# tasks; EKS pods; Azure's platform; Oracle; Alibaba; then EC2, EKS and GCP over IPv6.
METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        "169.254.169.254 169.254.170.2 169.254.170.23 168.63.129.16 192.0.0.192 100.100.100.200 "
        "fd00:ec2::254 fd00:ec2::23 fd20:ce::254"
    ).split()
)


class AddressDenied(Exception):
    """The policy denies this URL or address. The message is for the log only."""


class UrlTooLong(AddressDenied):
    """The URL has more than `MAX_URL_CHARS` characters."""


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Which addresses may be dialled: public ones, and those an operator allows.

    allow_cidrs: networks whose every port may be dialled. A metadata address needs a network that
      holds this address alone.
    allow_hosts: exact host names, in any case, whose addresses and ports are not checked. A
      metadata address is allowed only where the URL's host is that literal address.
    allow_ports: ports of public addresses, besides 80 and 443.
    nat64_prefixes: IPv6 networks in which RFC 6052 embeds IPv4 addresses.
    """

    allow_cidrs: Sequence[IpNetwork] = ()
    allow_hosts: Sequence[str] = ()
    allow_ports: Sequence[int] = ()
    nat64_prefixes: Sequence[ipaddress.IPv6Network] = ()

    def check(self, host: str, addresses: Iterable[str], port: int) -> list[str]:
        """The same addresses. Raises: AddressDenied where any is denied, or there is none."""
        listed = list(addresses)
        if not listed:
            raise AddressDenied("no address")
        for text in listed:
            if not self.allows(host, parse_address(text), port):
                raise AddressDenied(f"address {text} port {port}")
        return listed

    def allows(self, host: str, address: IpAddress, port: int) -> bool:
        """Whether one address may be dialled. An embedded IPv4 address is checked as IPv4."""
        address = unwrap_ipv4(address, self.nat64_prefixes)
        networks = self._networks_with(address)
        if address in METADATA:
            is_host = host in self.allow_hosts and host == str(address)
            return is_host or any(network.num_addresses == 1 for network in networks)
        # Never allowed, because the kernel decides where the unspecified address leads.
        if address.is_unspecified:
            return False
        if networks or self.allows_host(host):
            return True
        return is_public(address) and self.allows_port(host, port)

    def allows_explicitly(self, host: str, address: IpAddress) -> bool:
        """Whether `allow_cidrs` holds the address, or `allow_hosts` its host."""
        return bool(self._networks_with(address)) or self.allows_host(host)

    def _networks_with(self, address: IpAddress) -> list[IpNetwork]:
        return [network for network in self.allow_cidrs if address in network]

    def allows_port(self, host: str, port: int) -> bool:
        """Whether this port of a public address may be dialled."""
        return port in USUAL_PORTS or port in self.allow_ports or self.allows_host(host)

    def allows_host(self, host: str) -> bool:
        """Whether `allow_hosts` holds this host."""
        return host.lower() in map(str.lower, self.allow_hosts)


@dataclass(frozen=True, slots=True)
class EgressGrant:
    """What one key may reach. Limits and the image cache count per `key_id`.

    allow_cidrs, allow_hosts: what the key may reach besides what the settings allow to all keys.
    """

    key_id: str = "anonymous"
    allow_cidrs: Sequence[IpNetwork] = ()
    allow_hosts: Sequence[str] = ()

    def policy(
        self,
        settings: FetchSettings | WebhookSettings,
        nat64_prefixes: Sequence[ipaddress.IPv6Network],
    ) -> AddressPolicy:
        """The policy of the settings, widened by this grant."""
        return AddressPolicy(
            (*settings.allow_cidrs, *self.allow_cidrs),
            (*settings.allow_hosts, *self.allow_hosts),
            settings.allow_ports,
            nat64_prefixes,
        )


def is_public(address: IpAddress) -> bool:
    """Whether an address is unicast on the public internet.

    `ipaddress.is_global` does not suffice: it is true for 6to4, NAT64, IPv4-compatible, site-local
    and multicast addresses.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in DENIED_IPV4)
    return address in ALLOWED_IPV6 and not any(address in each for each in DENIED_IPV6)


def parse_address(text: str) -> IpAddress:
    """An address as a resolver writes it, without its zone. Raises: AddressDenied."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError as error:
        raise AddressDenied(f"no address: {text!r}") from error


def unwrap_ipv4(
    address: IpAddress, nat64_prefixes: Sequence[ipaddress.IPv6Network] = ()
) -> IpAddress:
    """The IPv4 address embedded in an IPv6 address, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    for prefix in nat64_prefixes:
        if address in prefix:
            start = prefix.prefixlen // 8
            # RFC 6052, 2.2: the ninth byte is skipped, whatever the prefix's length.
            embedded = [byte for at, byte in enumerate(address.packed) if at >= start and at != 8]
            return ipaddress.IPv4Address(bytes(embedded[:4]))
    return address.ipv4_mapped or address


def checked_url(url: str) -> httpx2.URL:
    """A URL that no two parsers read differently. Blanks around it are dropped, others escaped.

    The returned value alone decides the dialled host, the Host header and the verified name. The
    text is never parsed a second time. Raises: AddressDenied; UrlTooLong.
    """
    check_text(url)
    url = escape_blanks(url)
    try:
        parsed = httpx2.URL(url)
        scheme, host, port = parsed.scheme, parsed.host, parsed.port
    except (httpx2.InvalidURL, ValueError) as error:
        raise AddressDenied("no URL") from error
    if scheme not in ("http", "https") or not host:
        raise AddressDenied("scheme or host of URL")
    if "@" in AUTHORITY_END.split(url.partition("://")[2], maxsplit=1)[0]:
        raise AddressDenied("user in URL")
    # `URL.host` decodes a valid international name; an invalid one stays encoded.
    if host.startswith("xn--"):
        raise AddressDenied("international name")
    if b"%" in parsed.raw_host or not 0 < (80 if port is None else port) < 65_536:
        raise AddressDenied("host or port of URL")
    return parsed


def redirect_target(url: httpx2.URL, location: str) -> httpx2.URL:
    """The URL that a redirect leads to.

    location: the header's bytes as latin-1. Some hosts send UTF-8 or other bytes unescaped.
    Raises: AddressDenied.
    """
    raw = location.encode("latin-1")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in raw)
    check_text(text)
    try:
        return checked_url(str(url.join(escape_blanks(text))))
    except (httpx2.InvalidURL, ValueError) as error:
        raise AddressDenied("redirect to no URL") from error


def escape_blanks(text: str) -> str:
    """Blanks around the text dropped, those within escaped before parsing.

    A blank in the host becomes `%20` too, and `checked_url` refuses a host with `%`.
    """
    return text.strip(" ").replace(" ", "%20")


def check_text(text: str) -> None:
    """Refuse characters that some URL parsers drop or replace. Raises: AddressDenied; UrlTooLong.

    Called before parsing.
    """
    if len(text) > MAX_URL_CHARS:
        raise UrlTooLong("URL too long")
    # Not printable are control and format characters, and all blanks but the ordinary space.
    if "\\" in text or not text.isprintable():
        raise AddressDenied("character in URL")


def host_of(url: httpx2.URL) -> str:
    """The URL's host in ASCII, so that a resolver does not encode an international name again."""
    return url.raw_host.decode("ascii")


def is_localhost(host: str) -> bool:
    """Whether a name is `localhost` or below it, which RFC 6761 resolves to loopback."""
    return f".{host.rstrip('.')}".endswith(".localhost")


def is_private_name(host: str) -> bool:
    """Whether a name has no dot or a reserved ending, and so can only be private."""
    host = host.lower().rstrip(".")
    return "." not in host or host.endswith(PRIVATE_ENDINGS)


def port_of(url: httpx2.URL) -> int:
    """The URL's port, or the default of its scheme."""
    return url.port or (443 if url.scheme == "https" else 80)

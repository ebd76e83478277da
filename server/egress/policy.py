"""Which addresses may be reached, and which URLs have only one reading. Pure judgement, no I/O.

Two questions are kept apart: `checked_url` looks at the text alone, `AddressPolicy` at an address
that is about to be dialled. Nothing here decides by a name, which can mean one address now and
another a moment later.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httpx2

from server.core.settings import FetchSettings, IpNetwork, WebhookSettings

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_CHARS = 8_192
"""Of images and of webhooks: presigned URLs with a session token have 2,000 to 5,000."""
AUTHORITY_END = re.compile("[/?#]")
USUAL_PORTS = frozenset({80, 443})
PRIVATE_ENDINGS = (".localhost", ".local", ".internal", ".home.arpa")
"""Reserved for names that are not public: RFC 6761, RFC 6762, ICANN in 2024, RFC 8375."""

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

# What a cloud machine tells about itself, credentials among it: EC2, GCP, Azure and OpenStack; ECS
# tasks; EKS pods; Azure's platform; Oracle; Alibaba; then EC2, EKS and GCP over IPv6.
METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        "169.254.169.254 169.254.170.2 169.254.170.23 168.63.129.16 192.0.0.192 100.100.100.200 "
        "fd00:ec2::254 fd00:ec2::23 fd20:ce::254"
    ).split()
)


class AddressDenied(Exception):
    """The policy does not let this URL or address through. Its text is for the log alone."""


class UrlTooLong(AddressDenied):
    """More than `MAX_URL_CHARS`."""


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """Which addresses may be dialled: public ones, and those an operator allows.

    allow_cidrs: any port of these may be dialled; a metadata address only where a network of that
      address alone names it.
    allow_hosts: exact host names, in any case, whose addresses and ports are not judged; but a
      metadata address must be the host itself.
    allow_ports: of public addresses, besides 80 and 443.
    nat64_prefixes: IPv6 networks behind which IPv4 addresses stand, as RFC 6052 embeds them.
    """

    allow_cidrs: Sequence[IpNetwork] = ()
    allow_hosts: Sequence[str] = ()
    allow_ports: Sequence[int] = ()
    nat64_prefixes: Sequence[ipaddress.IPv6Network] = ()

    def check(self, host: str, addresses: Iterable[str], port: int) -> list[str]:
        """The addresses of a host, all fit to be dialled. Raises: AddressDenied when any is not."""
        listed = list(addresses)
        if not listed:
            raise AddressDenied("no address")
        for text in listed:
            if not self.allows(host, parse_address(text), port):
                raise AddressDenied(f"address {text} port {port}")
        return listed

    def allows(self, host: str, address: IpAddress, port: int) -> bool:
        """One address by itself; an IPv4 address within IPv6 is judged as IPv4."""
        address = unwrapped(address, self.nat64_prefixes)
        named = self._networks_with(address)
        if address in METADATA:
            is_host = host in self.allow_hosts and host == str(address)
            return is_host or any(network.num_addresses == 1 for network in named)
        # "This machine", whatever is allowed: where that leads is the kernel's choice.
        if address.is_unspecified:
            return False
        if named or self.names(host):
            return True
        return is_public(address) and self.allows_port(host, port)

    def opens(self, host: str, address: IpAddress) -> bool:
        """Whether an operator allows this very address, or its host by name."""
        return bool(self._networks_with(address)) or self.names(host)

    def _networks_with(self, address: IpAddress) -> list[IpNetwork]:
        return [network for network in self.allow_cidrs if address in network]

    def allows_port(self, host: str, port: int) -> bool:
        """A port of a public address, or of a host that is allowed by name."""
        return port in USUAL_PORTS or port in self.allow_ports or self.names(host)

    def names(self, host: str) -> bool:
        """Whether an operator allows this host by name."""
        return host.lower() in map(str.lower, self.allow_hosts)


@dataclass(frozen=True, slots=True)
class EgressGrant:
    """On whose behalf an address is reached: what is limited or kept is told apart by it.

    allow_cidrs, allow_hosts: what this caller may reach besides what the settings allow everybody.
    """

    key_id: str = "anonymous"
    allow_cidrs: Sequence[IpNetwork] = ()
    allow_hosts: Sequence[str] = ()

    def widen(
        self,
        settings: FetchSettings | WebhookSettings,
        nat64_prefixes: Sequence[ipaddress.IPv6Network],
    ) -> AddressPolicy:
        """The policy for this caller."""
        return AddressPolicy(
            (*settings.allow_cidrs, *self.allow_cidrs),
            (*settings.allow_hosts, *self.allow_hosts),
            settings.allow_ports,
            nat64_prefixes,
        )


def is_public(address: IpAddress) -> bool:
    """Unicast on the public internet. `ipaddress.is_global` is not that: it lets 6to4, NAT64,
    compatible, site-local and multicast addresses pass."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in DENIED_IPV4)
    return address in ALLOWED_IPV6 and not any(address in each for each in DENIED_IPV6)


def parse_address(text: str) -> IpAddress:
    """An address as a resolver writes it, perhaps with a zone. Raises: AddressDenied."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError as error:
        raise AddressDenied(f"no address: {text!r}") from error


def unwrapped(
    address: IpAddress, nat64_prefixes: Sequence[ipaddress.IPv6Network] = ()
) -> IpAddress:
    """The IPv4 address that an IPv6 address leads to, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    for prefix in nat64_prefixes:
        if address in prefix:
            start = prefix.prefixlen // 8
            # RFC 6052, 2.2: the ninth byte is left out, whatever the prefix's length.
            embedded = [byte for at, byte in enumerate(address.packed) if at >= start and at != 8]
            return ipaddress.IPv4Address(bytes(embedded[:4]))
    return address.ipv4_mapped or address


def checked_url(url: str) -> httpx2.URL:
    """A URL whose form leaves no room for two readings. Blanks around it are dropped, others
    become `%20`.

    Raises: AddressDenied; UrlTooLong.

    What is dialled, sent as Host and verified in the certificate all come of the one value that
    this returns; nobody parses the text a second time.
    """
    refuse_strange_text(url)
    url = without_blanks(url)
    try:
        parsed = httpx2.URL(url)
        scheme, host, port = parsed.scheme, parsed.host, parsed.port
    except (httpx2.InvalidURL, ValueError) as error:
        raise AddressDenied("no URL") from error
    if scheme not in ("http", "https") or not host:
        raise AddressDenied("scheme or host of URL")
    if "@" in AUTHORITY_END.split(url.partition("://")[2], maxsplit=1)[0]:
        raise AddressDenied("user in URL")
    # Reading an international name decodes it; what stays encoded means nothing.
    if host.startswith("xn--"):
        raise AddressDenied("international name")
    if b"%" in parsed.raw_host or not 0 < (80 if port is None else port) < 65_536:
        raise AddressDenied("host or port of URL")
    return parsed


def redirected(url: httpx2.URL, location: str) -> httpx2.URL:
    """Where a redirect from a URL leads. Raises: AddressDenied.

    location: the header's bytes as latin-1; hosts write UTF-8 or single bytes unescaped.
    """
    raw = location.encode("latin-1")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in raw)
    refuse_strange_text(text)
    try:
        return checked_url(str(url.join(without_blanks(text))))
    except (httpx2.InvalidURL, ValueError) as error:
        raise AddressDenied("redirect to no URL") from error


def without_blanks(text: str) -> str:
    """A text as it is parsed. Escaping comes first, because a host with `%` is refused, and so no
    blank can end one."""
    return text.strip(" ").replace(" ", "%20")


def refuse_strange_text(text: str) -> None:
    """Before a URL is parsed: parsers disagree on what they drop. Raises: AddressDenied."""
    if len(text) > MAX_URL_CHARS:
        raise UrlTooLong("URL too long")
    # Not printable: controls, what only steers the text around it, and blanks but the ordinary one.
    if "\\" in text or not text.isprintable():
        raise AddressDenied("character in URL")


def host_of(url: httpx2.URL) -> str:
    """The URL's host as it is looked up: in ASCII, for a resolver must not translate it again."""
    return url.raw_host.decode("ascii")


def is_localhost(host: str) -> bool:
    """Whether a name is `localhost` or below it, which RFC 6761 leads to loopback."""
    return f".{host.rstrip('.')}".endswith(".localhost")


def is_private_name(host: str) -> bool:
    """Whether a name can only lead into a private network: it has no dot, or a reserved ending."""
    host = host.lower().rstrip(".")
    return "." not in host or host.endswith(PRIVATE_ENDINGS)


def port_of(url: httpx2.URL) -> int:
    """The URL's port, or its scheme's."""
    return url.port or (443 if url.scheme == "https" else 80)

"""Checks of where images may come from and webhooks may go to."""

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from server.core.settings import Settings
from server.core.settings.sections import FetchSettings, WebhookSettings
from server.egress.client import deny_own, listeners_of
from server.egress.policy import (
    USUAL_PORTS,
    AddressDenied,
    EgressGrant,
    checked_url,
    host_of,
    is_public,
    parse_address,
    port_of,
)
from server.egress.resolver import Resolver, numeric_addresses, system_addresses
from server.serving.diagnosis.results import CheckResult, error, note, ok


@dataclass(frozen=True, slots=True)
class Egress:
    """What this server opens connections for, and the policy that decides whether it may.

    check: the name of the check. section: of the settings. leave, refused: words before a host.
    """

    check: str
    section: str
    flag: str
    leave: str
    refused: str

    def section_of(self, settings: Settings) -> FetchSettings | WebhookSettings:
        section: FetchSettings | WebhookSettings = getattr(settings, self.section)
        return section


@dataclass(frozen=True, slots=True)
class Host:
    """The host of a URL. addresses: none where the egress proxy looks the name up."""

    name: str
    port: int
    addresses: Sequence[str]


IMAGES = Egress("images", "fetch", "--image-url", "images may come from", "images of")
WEBHOOKS = Egress("webhooks", "webhook", "--webhook-url", "webhooks may go to", "webhooks to")


def check_egress(
    settings: Settings, egress: Egress, urls: Sequence[str], resolve: Resolver = system_addresses
) -> Iterator[CheckResult]:
    """Where images may come from or webhooks may go to, and whether `urls` are refused."""
    yield policy_result(settings, egress)
    for url in urls:
        yield url_result(url, settings, egress, resolve)


def policy_result(settings: Settings, egress: Egress) -> CheckResult:
    section = egress.section_of(settings)
    cure = f"`inpaint-server doctor {egress.flag} URL` tells whether a host of yours is refused"
    if settings.egress.proxy is not None:
        sentence = "all connections go by egress.proxy, which decides what names lead to"
        return note(egress.check, sentence, cure)
    scheme = " by https alone" if needs_https(section) else ""
    allowed = [*map(str, section.allow_cidrs), *section.allow_hosts]
    if allowed:
        return ok(egress.check, f"{egress.leave} public hosts and {', '.join(allowed)}{scheme}")
    return note(
        egress.check,
        f"{egress.leave} public hosts alone{scheme}, unless a key allows more; private addresses "
        "are refused",
        cure,
    )


def needs_https(section: FetchSettings | WebhookSettings) -> bool:
    """Whether http URLs are refused."""
    return isinstance(section, WebhookSettings) and section.https_only


def url_result(url: str, settings: Settings, egress: Egress, resolve: Resolver) -> CheckResult:
    """Whether a URL is refused. Looks its host up, and connects to nothing."""
    try:
        parsed = checked_url(url)
    except AddressDenied as problem:
        cure = "use a plain http or https URL"
        return error(egress.check, f"{url!r} is refused: {problem}", cure)
    host, port = host_of(parsed), port_of(parsed)
    if needs_https(egress.section_of(settings)) and parsed.scheme != "https":
        cure = "use an https URL, or set INPAINT_WEBHOOK__HTTPS_ONLY=false"
        return error(egress.check, f"{egress.refused} {host} are refused: not https", cure)
    try:
        return host_result(
            Host(host, port, addresses_of(host, port, settings, resolve)), settings, egress
        )
    except (OSError, UnicodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        sentence = f"{host} has no address here: {reason}"
        return error(egress.check, sentence, "check the name and the DNS")


def addresses_of(host: str, port: int, settings: Settings, resolve: Resolver) -> list[str]:
    """A host's addresses; none for a name that the egress proxy looks up.

    Raises: OSError, UnicodeError.
    """
    literals = numeric_addresses(host, port)
    if literals or settings.egress.proxy is not None:
        return [*dict.fromkeys(literals)]
    return [*dict.fromkeys(resolve(host, port))]


def host_result(host: Host, settings: Settings, egress: Egress) -> CheckResult:
    """Whether a host is refused, by the checks of `EgressClient`. Raises: OSError."""
    section = egress.section_of(settings)
    policy = EgressGrant().policy(section, settings.egress.nat64_prefixes)
    is_left_to_proxy = settings.egress.proxy is not None and not host.addresses
    try:
        if not is_left_to_proxy:
            policy.check(host.name, host.addresses, host.port)
            deny_own(host.name, host.addresses, host.port, policy, listeners_of(settings))
        elif not policy.allows_port(host.name, host.port):
            raise AddressDenied(f"port {host.port}")
    except AddressDenied as problem:
        sentence = f"{egress.refused} {host.name} are refused: {problem}"
        return error(egress.check, sentence, permission_of(egress.section, host))
    condition = ", if egress.proxy finds it" if is_left_to_proxy else ""
    return ok(egress.check, f"{egress.leave} {host.name}, port {host.port}{condition}")


def permission_of(section: str, host: Host) -> str:
    """The setting that allows a refused host."""
    prefix = f"INPAINT_{section.upper()}__ALLOW"
    found = [parse_address(each) for each in host.addresses]
    if all(map(is_public, found)) and host.port not in USUAL_PORTS:
        return f"set {prefix}_PORTS={host.port}"
    networks = ",".join(str(ipaddress.ip_network(each)) for each in found)
    return f"set {prefix}_CIDRS={networks} or {prefix}_HOSTS={host.name}"

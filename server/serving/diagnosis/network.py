"""Checks of the ports, the trust in proxies, and what images may be fetched."""

import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from server.api.proxies import is_trusted
from server.core.settings import FetchSettings, Settings, is_loopback
from server.egress.client import Listener, deny_own, listeners_of
from server.egress.interfaces import attached_networks
from server.egress.policy import (
    USUAL_PORTS,
    AddressDenied,
    AddressPolicy,
    checked_url,
    host_of,
    is_public,
    parse_address,
    port_of,
)
from server.egress.resolver import Resolver, numeric_addresses, system_addresses
from server.serving.diagnosis.results import CheckResult, error, note, ok, warning
from server.serving.server import address_of, bind, listen_errors
from server.serving.tls import load_context

PORT, TLS, PROXY, FETCH = "port", "tls", "proxy", "images"

OWN_NAMES = ("inpaint-server", "server.cli.main")
"""In the command line of a server of this program."""


@dataclass(frozen=True, slots=True)
class WantedPort:
    """An address of the settings, and the flag or variable that changes its port."""

    host: str
    port: int
    setting: str


def check_ports(settings: Settings) -> Iterator[CheckResult]:
    """Whether the server's ports are free, and who has them if not."""
    admin = settings.admin
    wanted = [WantedPort(settings.host, settings.port, "--port")]
    if admin.port is not None:
        wanted.append(WantedPort(admin.host, admin.port, "INPAINT_ADMIN__PORT"))
    for each in wanted:
        yield port_result(each)


def port_result(wanted: WantedPort) -> CheckResult:
    where = address_of(wanted.host, wanted.port)
    if wanted.port == 0:
        return ok(PORT, f"{wanted.host}: a free port is taken at the start")
    try:
        with listen_errors(wanted.host, wanted.port, wanted.setting):
            bind(wanted.host, wanted.port).close()
    except ValueError as problem:
        owner = listener_of(wanted.port)
        if owner is not None and is_own(owner):
            return ok(PORT, f"{where} is taken by this program's server, pid {owner.pid}")
        by = "" if owner is None else f"; {owner.name()} has it, pid {owner.pid}"
        stop = "" if owner is None else f"stop process {owner.pid}, or "
        return error(PORT, f"{problem}{by}", f"{stop}choose another with {wanted.setting}")
    return ok(PORT, f"{where} is free")


def listener_of(port: int) -> psutil.Process | None:
    """The process that listens on a port; None where this user may not see it."""
    for connection in psutil.net_connections("tcp"):
        is_there = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        if is_there and connection.pid is not None and psutil.pid_exists(connection.pid):
            return psutil.Process(connection.pid)
    return None


def is_own(process: psutil.Process) -> bool:
    """Whether a process is a server of this program."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "serve" in words and any(os.path.basename(word) in OWN_NAMES for word in words)


def check_tls(settings: Settings) -> Iterator[CheckResult]:
    """Whether the certificate and its key can be used; nothing where the server speaks HTTP."""
    certificate = settings.tls.certificate_file
    if certificate is None:
        return
    try:
        load_context(settings.tls)
    except (ValueError, OSError) as problem:
        yield error(TLS, str(problem), "the server does not start: mend the files or unset `tls`")
    else:
        yield ok(TLS, f"{certificate} and its key fit")


def check_proxies(settings: Settings) -> Iterator[CheckResult]:
    """Whose `X-Forwarded-*` headers are trusted, and whether that fits the other settings."""
    trusted = settings.forwarded_allow_ips
    listed = ", ".join(trusted) or "nobody"
    if "*" in trusted and not is_loopback(settings.host):
        yield warning(
            PROXY,
            f"the server listens on {settings.host} and trusts everybody's X-Forwarded-* headers, "
            "so that any client can forge its address",
            "name the proxy's address in INPAINT_FORWARDED_ALLOW_IPS",
        )
    elif is_loopback(settings.host) or not all(map(is_trusted_here, trusted)):
        yield ok(PROXY, f"X-Forwarded-* headers are trusted from {listed}")
    else:
        yield distant_proxy_result(settings, listed)


def distant_proxy_result(settings: Settings, listed: str) -> CheckResult:
    """A proxy on another machine, or in another container, would not be trusted.

    listed: the addresses that are.
    """
    name_it = "INPAINT_FORWARDED_ALLOW_IPS, by its address or its network"
    shared = "all clients share one address and its limits"
    public = urlsplit(settings.public_url or "").hostname
    if public in (None, settings.host):
        return note(
            PROXY,
            f"the server listens on {settings.host}, and X-Forwarded-* headers are trusted from "
            f"{listed} alone: behind a proxy on another machine or in a container {shared}",
            f"if there is such a proxy, name it in {name_it}{neighbours()}",
        )
    return warning(
        PROXY,
        f"public_url names a proxy, and X-Forwarded-* headers are trusted from {listed} alone: "
        f"behind a proxy elsewhere {shared}",
        f"name the proxy in {name_it}{neighbours()}",
    )


def is_trusted_here(word: str) -> bool:
    """Whether a trusted proxy can only be on this machine."""
    return is_trusted(word, ("127.0.0.0/8", "::1/128"))


def neighbours() -> str:
    """Private networks of this machine, where a proxy probably is."""
    private = [
        str(each)
        for each in attached_networks()
        if each.is_private and not each.is_loopback and not each.is_link_local
    ]
    return f"; this machine is attached to {', '.join(dict.fromkeys(private))}" if private else ""


def check_fetches(
    settings: Settings, urls: Sequence[str], resolve: Resolver = system_addresses
) -> Iterator[CheckResult]:
    """Where images may come from, and whether those of `urls` may."""
    if settings.egress.proxy is not None:
        yield note(
            FETCH, "all downloads go by egress.proxy, which decides what addresses are reached"
        )
        return
    yield policy_result(settings.fetch)
    policy = AddressPolicy(
        settings.fetch.allow_cidrs,
        settings.fetch.allow_hosts,
        settings.fetch.allow_ports,
        settings.egress.nat64_prefixes,
    )
    for url in urls:
        yield url_result(url, policy, listeners_of(settings), resolve)


def policy_result(fetch: FetchSettings) -> CheckResult:
    allowed = [*map(str, fetch.allow_cidrs), *fetch.allow_hosts]
    if allowed:
        return ok(FETCH, f"images may come from public hosts and from {', '.join(allowed)}")
    return note(
        FETCH,
        "images may come from public hosts alone, unless a key allows more; private addresses "
        "are refused",
        "`inpaint-server doctor --image-url URL` tells whether a host of yours is refused",
    )


def url_result(
    url: str, policy: AddressPolicy, listeners: Sequence[Listener], resolve: Resolver
) -> CheckResult:
    """Whether an image of this URL may be fetched. Looks its host up, and connects to nothing."""
    try:
        parsed = checked_url(url)
    except AddressDenied as problem:
        return error(FETCH, f"{url!r} is refused: {problem}", "use a plain http or https URL")
    host, port = host_of(parsed), port_of(parsed)
    try:
        found = numeric_addresses(host, port) or resolve(host, port)
        addresses = [*dict.fromkeys(found)]
        deny_own(host, policy.check(host, addresses, port), port, policy, listeners)
    except (OSError, UnicodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        return error(FETCH, f"{host} has no address here: {reason}", "check the name and the DNS")
    except AddressDenied as problem:
        sentence = f"images of {host} are refused: {problem}"
        return error(FETCH, sentence, permission_of(host, addresses, port))
    return ok(FETCH, f"images may come from {host}, port {port}")


def permission_of(host: str, addresses: Sequence[str], port: int) -> str:
    """The setting that allows a refused host."""
    found = [parse_address(each) for each in addresses]
    if all(map(is_public, found)) and port not in USUAL_PORTS:
        return f"set INPAINT_FETCH__ALLOW_PORTS={port}"
    networks = ",".join(str(ipaddress.ip_network(each)) for each in found)
    return f"set INPAINT_FETCH__ALLOW_CIDRS={networks} or INPAINT_FETCH__ALLOW_HOSTS={host}"

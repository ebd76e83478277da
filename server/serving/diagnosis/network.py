"""Checks of the ports, the certificate, and the trust in proxies."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from server.api.proxies import is_trusted
from server.core.settings import Settings
from server.core.settings.values import is_loopback
from server.egress.interfaces import attached_networks
from server.serving.diagnosis.results import CheckResult, error, note, ok, warning
from server.serving.server import address_of, bind, listen_errors
from server.serving.tls import load_context

PORT, TLS, PROXY = "port", "tls", "proxy"

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

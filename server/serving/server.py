"""The HTTP server around the application: listening sockets, limits, and graceful shutdown."""

import asyncio
import errno
import gc
import resource
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from server.core.settings import Settings
from server.serving.admin import ByPort, create_admin_app
from server.serving.connections import ConnectionLimiter
from server.serving.protocol import GuardedConfig
from server.serving.supervisor import Supervisor
from server.serving.tls import ServerTls
from server.serving.watchdog import CHECK_S, Watchdog

BACKLOG = 2_048
GRACE_S = 4
"""Seconds from the end of the last worker until the remaining connections are cut."""

LISTENING, ADMIN_LISTENING = "listening", "admin listening"
"""Log events of the two sockets, by which `listen` names them."""

RESERVED_FILES = 256
"""File descriptors reserved for the database, pictures, downloads and webhooks."""


class Server(uvicorn.Server):
    """uvicorn with connection limits, a watchdog, and a shutdown that drains.

    After SIGTERM the server goes on answering until its workers have ended: new jobs are refused,
    earlier jobs can be fetched.

    admin_port: connections to it get the admin application, without TLS.
    Raises: ValueError, OSError for unusable TLS files.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        admin_port: int | None = None,
        workers: Supervisor | None = None,
    ) -> None:
        self._app = app
        self._workers = workers
        self._was_told_to_stop = False
        self._watchdog: Watchdog | None = None
        limits = settings.http
        self.limiter = ConnectionLimiter(
            limits,
            min(limits.max_connections, max(open_file_limit() - RESERVED_FILES, RESERVED_FILES)),
            settings.forwarded_allow_ips,
        )
        served: ASGIApp = app
        if admin_port is not None:
            admin_app = create_admin_app(app, self.limiter, settings.admin.allowed_hosts)
            served = ByPort(app, admin_app, admin_port)
        config = GuardedConfig(
            served,
            self.limiter,
            limits,
            settings.max_body_bytes,
            ws="none",
            lifespan="on",
            # uvloop, which Ray brings along, is not what the protocol's tests run on.
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # `proxies.py` reads more of them
            timeout_graceful_shutdown=GRACE_S,
        )
        config.plain_port = admin_port
        if settings.tls.certificate_file is not None:
            config.tls = ServerTls(settings.tls)
        super().__init__(config)

    def run_until_stopped(self, *listeners: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, then return."""
        # A signal that comes before uvicorn has its own handlers is kept until the first tick.
        # After serving, uvicorn raises its signals again for these handlers; with the default ones
        # the process would die here, before its workers are stopped.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_stop)
        with Watchdog() as self._watchdog:
            self.run(sockets=list(listeners))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self._watchdog is not None:
            self._tick(self._watchdog, asyncio.get_running_loop())
            # Else each full collection walks through all that is loaded, and stops the loop for
            # 65 ms.
            gc.collect()
            gc.freeze()

    def _note_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._was_told_to_stop = True

    def _tick(self, watchdog: Watchdog, loop: asyncio.AbstractEventLoop) -> None:
        """Report to the watchdog that the loop runs, twice for each of its checks."""
        watchdog.tick()
        loop.call_later(CHECK_S / 2, self._tick, watchdog, loop)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown: stop the workers, and answer held V3 calls "processing" now."""
        if self._watchdog is not None:
            self._watchdog.expect_end()
        if self._workers is not None:
            self._workers.stop()
        services = getattr(self._app.state, "services", None)
        if services is not None:
            services.watcher.release_all()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to close the listening sockets and end."""
        has_failed = self._workers is not None and self._workers.failure
        if (has_failed or self._was_told_to_stop) and not self.should_exit:
            self.handle_exit(signal.SIGTERM, None)
        must_exit = await super().on_tick(counter)
        have_workers_ended = self._workers is None or self._workers.has_ended
        return must_exit and (have_workers_ended or self.force_exit)


def listen(settings: Settings) -> dict[str, socket.socket]:
    """The listening sockets by their log event. Raises: ValueError."""
    host, port, admin = settings.host, settings.port, settings.admin
    with listen_errors(host, port, "--port"):
        listeners = {LISTENING: bind(host, port)}
    if admin.port is not None:
        try:
            with listen_errors(admin.host, admin.port, "INPAINT_ADMIN__PORT"):
                listeners[ADMIN_LISTENING] = bind(admin.host, admin.port)
        except ValueError:
            listeners[LISTENING].close()
            raise
    return listeners


def with_bound_ports(settings: Settings, listeners: Mapping[str, socket.socket]) -> Settings:
    """The settings with the ports that were taken for 0.

    Egress needs the real ports, because it refuses URLs that lead to the server itself (SSRF).
    """
    admin_port = port_of(listeners.get(ADMIN_LISTENING))
    admin = settings.admin.model_copy(update={"port": admin_port})
    return settings.model_copy(update={"port": port_of(listeners[LISTENING]), "admin": admin})


def port_of(listener: socket.socket | None) -> int | None:
    """The port of a listening socket, None where there is none."""
    return None if listener is None else int(listener.getsockname()[1])


@contextmanager
def listen_errors(host: str, port: int, setting: str) -> Iterator[None]:
    """Turn an OSError of the block into a ValueError that names the address and the setting."""
    try:
        yield
    except OSError as error:
        hint = f"; choose another with {setting}" if error.errno == errno.EADDRINUSE else ""
        where = address_of(host, port)
        raise ValueError(f"cannot listen on {where}: {error.strerror}{hint}") from error


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """The base URL of a listening socket."""
    return f"{scheme}://{address_of(*listener.getsockname()[:2])}"


def address_of(host: str, port: int) -> str:
    """Host and port as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only where the protocol is explicit. With Nagle the second
    # half of an answer would wait 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def open_file_limit() -> int:
    """The number of files and sockets that this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_file_limit() -> None:
    """Raise the limit to the hard limit: shells allow 1,024 files, and each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""The admin port: metrics for Prometheus, and readiness with details for an operator.

It needs no key, so it listens on loopback by default and reports nothing about clients. One process
serves both ports. The local port of the connection decides which application answers, because a
client cannot forge it.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.monitoring.health import Store
from server.api.monitoring.probes import readiness
from server.api.services import Services
from server.core.http import HOST, is_allowed
from server.core.metrics import CONTENT_TYPE
from server.serving.connections import ConnectionLimiter

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class ByPort:
    """ASGI: the admin application for connections to its port, else the main application."""

    def __init__(self, app: ASGIApp, admin_app: ASGIApp, admin_port: int) -> None:
        self._app = app
        self._admin_app = admin_app
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_admin = scope["type"] == "http" and scope["server"][1] == self._admin_port
        await (self._admin_app if is_admin else self._app)(scope, receive, send)


class KnownHosts:
    """ASGI: the Host check of the admin port, against DNS rebinding.

    A web page can make its own name resolve to this machine and then read the answers. It cannot
    do so for an IP address or `localhost`. names: further ones, as `Settings.allowed_hosts`.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self._app = app
        self._names = ("localhost", *(name.lower() for name in names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value for name, value in scope.get("headers", ()) if name == b"host"]
        if not all(names_address(host) or is_allowed(host, self._names) for host in hosts):
            answer = PlainTextResponse("unknown host", 421, HEADERS)
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


def names_address(host: bytes) -> bool:
    """Whether a Host header holds an IP address, with or without a port."""
    match = HOST.fullmatch(host.decode("latin-1").lower())
    try:
        ipaddress.ip_address(match["name"].strip("[]") if match else "")
    except ValueError:
        return False
    return True


def create_admin_app(
    main: Starlette, limiter: ConnectionLimiter, names: Sequence[str] = ()
) -> Starlette:
    """The application of the admin port. main: as `AdminEndpoints`. names: as `KnownHosts`."""
    endpoints = AdminEndpoints(main, limiter)
    return Starlette(
        routes=[
            Route("/metrics", endpoints.metrics),
            Route("/healthz", endpoints.healthz),
            Route("/readyz", endpoints.readyz),
            Route("/readyz/workers", endpoints.readyz),
        ],
        middleware=[Middleware(KnownHosts, names)],
    )


class AdminEndpoints:
    """main: the application whose services are reported, once it has started."""

    def __init__(self, main: Starlette, limiter: ConnectionLimiter) -> None:
        self._main = main
        self._limiter = limiter

    async def metrics(self, _request: Request) -> Response:
        services = self._services
        services.metrics.connections.set(self._limiter.open_count)
        services.metrics.connections_cut.set(self._limiter.cut_count)
        content = await services.in_store_thread(services.metrics.text)
        return Response(content, headers={**HEADERS, "Content-Type": CONTENT_TYPE})

    async def healthz(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=HEADERS)

    async def readyz(self, request: Request) -> Response:
        found = await readiness(self._services)
        is_ready = found.is_ready(needs_worker=request.url.path.endswith("/workers"))
        details = {
            "status": "ok" if is_ready else "unavailable",
            "reason": found.reason,
            "version": version("inpaint-server"),
            "workers": [asdict(worker) for worker in found.workers],
            "queue": await describe_queue(self._services),
            "connections": {"open": self._limiter.open_count, "cut": self._limiter.cut_count},
        }
        return JSONResponse(details, 200 if is_ready else 503, HEADERS)

    @property
    def _services(self) -> Services:
        services: Services = self._main.state.services
        return services


async def describe_queue(services: Services) -> dict[str, float] | None:
    """Waiting and running jobs, and the estimated wait; None while the database does not answer."""
    if Store.DATABASE in services.health.failing:
        return None
    try:
        forecast = await services.in_store_thread(services.estimator.forecast)
    except SQLAlchemyError:
        return None
    return {
        "waiting": forecast.waiting,
        "running": forecast.running,
        "wait_s": round(forecast.wait_s, 1),
    }

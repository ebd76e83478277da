"""The second port: figures for Prometheus and the state of things for an operator.

It asks for no key, so it listens on loopback unless told otherwise, and tells nothing of any
client. One process serves both ports; a connection's own port decides, which nobody can forge.
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

from server.api.health import Store
from server.api.probes import readiness
from server.api.services import Services
from server.core.hosts import HOST, is_allowed
from server.core.metrics import CONTENT_TYPE
from server.serving.connections import ConnectionLimiter

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class ByPort:
    """ASGI: the admin application for connections to its port, the main one for all else."""

    def __init__(self, app: ASGIApp, admin_app: ASGIApp, admin_port: int) -> None:
        self._app = app
        self._admin_app = admin_app
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_admin = scope["type"] == "http" and scope["server"][1] == self._admin_port
        await (self._admin_app if is_admin else self._app)(scope, receive, send)


class KnownHosts:
    """ASGI: refuses names that nobody gave to this port.

    A page in a browser nearby can lead its own name to us; an address, or localhost, it cannot.
    names: as `Settings.allowed_hosts`.
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
    """Whether a Host header is an address, with a port or without."""
    match = HOST.fullmatch(host.decode("latin-1").lower())
    try:
        ipaddress.ip_address(match["name"].strip("[]") if match else "")
    except ValueError:
        return False
    return True


def create_admin_app(
    main: Starlette, limiter: ConnectionLimiter, names: Sequence[str] = ()
) -> Starlette:
    """The application of the second port.

    main: whose services it tells of, once it has started. names: it may be asked by.
    """

    def services() -> Services:
        found: Services = main.state.services
        return found

    async def metrics(_request: Request) -> Response:
        found = services().metrics
        found.connections.set(limiter.open_count)
        found.connections_cut.set(limiter.cut_count)
        content = await services().in_store_thread(found.text)
        return Response(content, headers={**HEADERS, "Content-Type": CONTENT_TYPE})

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=HEADERS)

    async def readyz(request: Request) -> Response:
        found = await readiness(services())
        is_ready = found.is_ready(needs_worker=request.url.path.endswith("/workers"))
        details = {
            "status": "ok" if is_ready else "unavailable",
            "reason": found.reason,
            "version": version("inpaint-server"),
            "workers": [asdict(worker) for worker in found.workers],
            "queue": await queue(),
            "connections": {"open": limiter.open_count, "cut": limiter.cut_count},
        }
        return JSONResponse(details, 200 if is_ready else 503, HEADERS)

    async def queue() -> dict[str, float] | None:
        """None where the database does not answer."""
        if Store.DATABASE in services().health.failing:
            return None  # it would be waited for in vain
        try:
            forecast = await services().in_store_thread(services().estimator.forecast)
        except SQLAlchemyError:
            return None
        return {
            "waiting": forecast.waiting,
            "running": forecast.running,
            "wait_s": round(forecast.wait_s, 1),
        }

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/readyz/workers", readyz),
        ],
        middleware=[Middleware(KnownHosts, names)],
    )

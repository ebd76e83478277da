"""What every request passes before and after its endpoint, as plain ASGI middleware.

TrustedProxies   `proxies.py`: who asks, and by which address, where a proxy says so
RequestContext   id, forgiving path, headers of every answer, one log line
CrossOrigin      CORS; outside of the next, so that pages can read errors too
ErrorAnswers     Host header and free room; any exception becomes an answer
"""

import functools
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from server.api.bodies import refuse_many_fields
from server.core.errors import (
    InvalidHost,
    LoopbackOnly,
    RemoteSign,
    ServerBusy,
    StorageUnavailable,
)
from server.core.hosts import KNOWN_HOSTS, is_allowed
from server.core.logs import get_logger
from server.core.metrics import UNKNOWN_ROUTE, Metrics
from server.core.settings import Settings, is_loopback

logger = get_logger(__name__)

PROBES = ("/healthz", "/readyz", "/readyz/workers")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
"""Of a client's own id that is taken over into answers and log lines."""

ANSWER_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
"""Where the endpoint has not set its own."""

EXPOSED_HEADERS = ("Location", "Retry-After", "Idempotency-Replayed", "X-Request-ID")
"""Answer headers that a page of another origin may read."""

ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]


class RequestContext:
    """Outermost: nothing is answered without an id, the headers and a log line."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope["request_id"] = request_id
        scope["path"] = normal_path(scope["path"])
        # A task of uvicorn's may serve several requests of one connection.
        clear_contextvars()
        bind_contextvars(request_id=request_id)
        started = time.perf_counter()
        status: int | None = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = with_answer_headers(message["headers"], request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            duration_s = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            self._metrics.requests.labels(route, str(status or 0)).inc()
            self._metrics.latency.labels(route).observe(duration_s)
            # Probes come every few seconds and would drown the rest.
            log = logger.debug if scope["path"] in PROBES else logger.info
            log(
                "request",
                method=scope["method"],
                path=ascii(scope["path"])[1:-1],  # JSON needs six for each that is not ASCII
                status=status,
                duration_ms=round(duration_s * 1000, 1),
            )


class CrossOrigin(CORSMiddleware):
    """Starlette's, whose preflight promises no more than the call itself will get.

    origins: as `Settings.cors_origins`. serves_loopback_only: as for `ErrorAnswers`.
    """

    def __init__(
        self, app: ASGIApp, origins: Sequence[str], serves_loopback_only: Callable[[], bool]
    ) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
            allow_private_network=True,
        )
        self._serves_loopback_only = serves_loopback_only

    def is_allowed_origin(self, origin: str) -> bool:
        is_local = is_loopback(host_of(origin)) or origin in self.allow_origins
        return super().is_allowed_origin(origin) and (is_local or not self._serves_loopback_only())


class ErrorAnswers:
    """Refuses what no endpoint should see, and answers what none foresaw.

    serves_loopback_only: whether requests from elsewhere are refused, at the moment. is_closed:
    whether all are.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        serves_loopback_only: Callable[[], bool],
        is_closed: Callable[[], bool],
        answer: ErrorAnswer,
    ) -> None:
        self._app = app
        self._settings = settings
        self._allowed_hosts = tuple(host.lower() for host in settings.allowed_hosts)
        self._serves_loopback_only = serves_loopback_only
        self._is_closed = is_closed
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            # The framework reads the query for every path, probes included.
            refuse_many_fields(scope["query_string"])
            if scope["path"] not in PROBES:
                self._refuse(scope)
            await self._app(scope, receive, send_noting)
        except Exception as error:
            if has_begun:
                raise
            answer = await self._answer(Request(scope), error)
            await answer(scope, receive, send)

    def _refuse(self, scope: Scope) -> None:
        """Raises: ServerBusy, StorageUnavailable, InvalidHost, LoopbackOnly."""
        if self._is_closed():
            raise StorageUnavailable(is_logged=True)
        if "inpaint.busy" in scope.get("extensions", ()):
            raise ServerBusy
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        may_lack = scope["http_version"] == "1.0" and not self._allowed_hosts
        is_missing = not hosts and not may_lack
        is_wrong = not all(is_allowed(host, self._allowed_hosts) for host in hosts)
        if is_missing or is_wrong or len(hosts) > 1:
            raise InvalidHost
        if self._serves_loopback_only():
            evidence = self._remote_sign(scope)
            if evidence is not None:
                raise LoopbackOnly(evidence)

    def _remote_sign(self, scope: Scope) -> RemoteSign | None:
        """What shows that a request comes from another machine, or from a page of elsewhere.

        A browser sends any page's requests to a server on its own machine. It names the page as
        `Origin`, or where it does not, says `cross-site`; or, where the page's name was made to
        lead here (DNS rebinding), it sends that name as `Host`. A link that a person follows is
        cross-site too; the page with the link learns nothing of the answer.
        """
        headers, client = Headers(scope=scope), scope["client"] or ("", 0)
        host, origin = headers.get("host"), headers.get("origin")
        if origin is None and headers.get("sec-fetch-site") == "cross-site":
            if headers.get("sec-fetch-mode") != "navigate" or scope["method"] != "GET":
                return RemoteSign.PAGE
        # Where hosts are listed, it was found there.
        if host is not None and not self._allowed_hosts:
            name = host_of(f"//{host}")
            if not is_loopback(name) and name != host_of(self._settings.public_url or ""):
                return RemoteSign.HOST
        if origin is not None and origin not in self._settings.cors_origins:
            if not is_loopback(host_of(origin)):
                return RemoteSign.PAGE
        return None if is_loopback(client[0]) else RemoteSign.ADDRESS


@functools.lru_cache(KNOWN_HOSTS)
def host_of(url: str) -> str:
    """The host that a URL names, in lower case; `""` for what is no URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def request_id_of(scope: Scope) -> str:
    """The client's own id where it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return f"{random.getrandbits(128):032x}"  # no secret: it need not be hard to guess


def with_answer_headers(
    headers: Sequence[tuple[bytes, bytes]], request_id: str
) -> list[tuple[bytes, bytes]]:
    """An answer's headers, with those that every answer has."""
    names = {name for name, _ in headers}
    missing = [header for header in ANSWER_HEADERS if header[0] not in names]
    return [*headers, *missing, (b"x-request-id", request_id.encode())]


def normal_path(path: str) -> str:
    """One slash between parts and none at the end: clients join URLs carelessly."""
    return re.sub(r"/{2,}", "/", path).rstrip("/") or "/"

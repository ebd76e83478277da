"""The ASGI middleware of every request, from the outermost to the innermost.

TrustedProxies   in `proxies.py`: client address, scheme and host behind a proxy
RequestContext   request id, normal path, headers of every answer, one log line
CrossOrigin      CORS; outside of `ErrorAnswers`, so that pages of other origins can read errors
ErrorAnswers     Host check against DNS rebinding, cross-site requests, overload; turns every
                 exception into an answer
"""

import functools
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from server.api.bodies import refuse_many_fields
from server.core import tracing
from server.core.errors import (
    InvalidHost,
    LoopbackOnly,
    RemoteOrigin,
    ServerBusy,
    StorageUnavailable,
)
from server.core.http import KNOWN_HOSTS, is_allowed
from server.core.logs import get_logger
from server.core.metrics import CLIENT_CLOSED, OUTCOME, UNKNOWN_ROUTE, Metrics, RequestOutcome
from server.core.settings import Settings
from server.core.settings.values import is_loopback

logger = get_logger(__name__)

PROBES = ("/healthz", "/readyz", "/readyz/workers")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
"""A client's own request id is used in answers and log lines where it has this form."""

ANSWER_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
"""Headers of every answer whose endpoint has not set its own."""

EXPOSED_HEADERS = (
    "Allow",
    "Content-Disposition",
    "Idempotency-Replayed",
    "Location",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-ID",
)
"""Answer headers that a web page of another origin may read (CORS), besides those that a dialect
names. Content-Type, Content-Length and Cache-Control are always readable."""

ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]


class RequestContext:
    """Gives every request an id, and every answer its headers, metrics and log line.

    dialects: names by the path of a route; others belong to none.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, dialects: Mapping[str, str]) -> None:
        self._app = app
        self._metrics = metrics
        self._dialects = dialects

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope["request_id"] = request_id
        scope["path"] = normal_path(scope["path"])
        # One task of uvicorn may serve several requests, so the context of the last one is cleared.
        clear_contextvars()
        bind_contextvars(request_id=request_id)
        tracing.follow(Headers(scope=scope))
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
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int | None, duration_s: float) -> None:
        """Count and log a request. status: None where no answer was started."""
        route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
        is_probe = scope["path"] in PROBES
        self._metrics.latency.labels(route).observe(duration_s)
        # Probes come every few seconds. They would hide failing requests of clients, and fill the
        # log. A probe that answers 503 while a model is downloaded has not failed.
        if not is_probe:
            dialect, outcome = self._dialects.get(route, "none"), outcome_of(scope, status)
            self._metrics.requests.labels(route, str(status or 0), dialect, outcome).inc()
        log = logger.debug if is_probe else logger.info
        log(
            "request",
            method=scope["method"],
            path=ascii(scope["path"])[1:-1],  # JSON writes six characters for one that is not ASCII
            status=status,
            duration_ms=round(duration_s * 1000, 1),
        )


def outcome_of(scope: Scope, status: int | None) -> RequestOutcome:
    """What became of a request. status: None where no answer was started."""
    if status is None or status == CLIENT_CLOSED:
        return RequestOutcome.LEFT
    if OUTCOME in scope:
        return RequestOutcome(scope[OUTCOME])
    if status >= 500:
        return RequestOutcome.FAILED
    return RequestOutcome.REFUSED if status >= 400 else RequestOutcome.ANSWERED


class CrossOrigin(CORSMiddleware):
    """Starlette's CORS, which also refuses a preflight whose request `ErrorAnswers` would refuse.

    origins: as `Settings.cors_origins`. exposed_headers: of the dialects.
    serves_loopback_only: as for `ErrorAnswers`.
    """

    def __init__(
        self,
        app: ASGIApp,
        origins: Sequence[str],
        exposed_headers: Sequence[str],
        serves_loopback_only: Callable[[], bool],
    ) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=(*EXPOSED_HEADERS, *exposed_headers),
            allow_private_network=True,
        )
        self._serves_loopback_only = serves_loopback_only

    def is_allowed_origin(self, origin: str) -> bool:
        is_local = is_loopback(host_of(origin)) or origin in self.allow_origins
        return super().is_allowed_origin(origin) and (is_local or not self._serves_loopback_only())


class ErrorAnswers:
    """Refuses requests before their endpoint, and turns every exception into an answer.

    serves_loopback_only: whether remote and cross-site requests are refused now. is_closed: whether
    all requests but probes are refused now.
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
        has_started = False

        async def send_and_mark(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            # FastAPI parses the query of every path, so probes are checked too.
            refuse_many_fields(scope["query_string"])
            if scope["path"] not in PROBES:
                self._refuse(scope)
            await self._app(scope, receive, send_and_mark)
        except Exception as error:
            if has_started:  # the status line is sent; uvicorn closes the connection
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
            remote_origin = self._remote_origin(scope)
            if remote_origin is not None:
                raise LoopbackOnly(remote_origin)

    def _remote_origin(self, scope: Scope) -> RemoteOrigin | None:
        """What shows that a request is remote or cross-site; None for a local program's request.

        A server without keys listens on loopback, where any web page in a local browser can reach
        it. The browser names the page in `Origin`, or marks the request as `cross-site`. After DNS
        rebinding it sends the page's own name as `Host`. A GET navigation is allowed: the page
        with the link cannot read the answer.
        """
        headers, client = Headers(scope=scope), scope["client"] or ("", 0)
        host, origin = headers.get("host"), headers.get("origin")
        if origin is None and headers.get("sec-fetch-site") == "cross-site":
            if headers.get("sec-fetch-mode") != "navigate" or scope["method"] != "GET":
                return RemoteOrigin.PAGE
        # With `allowed_hosts` the Host was checked against that list already.
        if host is not None and not self._allowed_hosts:
            name = host_of(f"//{host}")
            if not is_loopback(name) and name != host_of(self._settings.public_url or ""):
                return RemoteOrigin.HOST
        if origin is not None and origin not in self._settings.cors_origins:
            if not is_loopback(host_of(origin)):
                return RemoteOrigin.PAGE
        return None if is_loopback(client[0]) else RemoteOrigin.ADDRESS


@functools.lru_cache(KNOWN_HOSTS)
def host_of(url: str) -> str:
    """The host of a URL in lower case; `""` for an invalid URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def request_id_of(scope: Scope) -> str:
    """The client's request id where it has the form of `REQUEST_ID`, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return f"{random.getrandbits(128):032x}"  # an id is no secret, so `random` will do


def with_answer_headers(
    headers: Sequence[tuple[bytes, bytes]], request_id: str
) -> list[tuple[bytes, bytes]]:
    """An answer's headers, with the request id and what is missing of `ANSWER_HEADERS`."""
    names = {name for name, _ in headers}
    missing = [header for header in ANSWER_HEADERS if header[0] not in names]
    return [*headers, *missing, (b"x-request-id", request_id.encode())]


def normal_path(path: str) -> str:
    """A path without double and trailing slashes, which clients send when they join URLs."""
    return re.sub(r"/{2,}", "/", path).rstrip("/") or "/"

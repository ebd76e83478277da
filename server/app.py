"""`create_app(settings)`: builds the API process's parts and wires them to the endpoints."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI, Request
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import REFRESH_S, KeyRing
from server.database import migrate, open_engine
from server.deliveries import DeliveryStore
from server.dialects import v3
from server.egress import Fetcher
from server.errors import ApiError, InvalidBody, RouteNotFound, StorageUnavailable
from server.jobs import JobStore
from server.keys import KeyStore
from server.routes import get_services, router
from server.services import DECODE_THREADS, STORE_THREADS, Services
from server.settings import Settings
from server.storage import Storage
from server.telemetry import get_logger
from server.waiters import Waiters
from server.webhooks import WebhookSender

logger = get_logger(__name__)

PROBES = ("/healthz", "/readyz")


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its parts are built when it starts, in `app.state.services`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = open_engine(settings.sqlalchemy_url)
        migrate(engine)
        store = JobStore(engine, max_waiting=settings.queue.max_waiting)
        fetcher = Fetcher(settings.fetch)
        deliveries = DeliveryStore(engine, lease_s=settings.webhook.timeout_s * 4)
        keys = KeyRing(settings.auth, KeyStore(engine), is_open_allowed=settings.may_be_open)
        sender = asyncio.create_task(WebhookSender(settings.webhook, deliveries, store).run())
        with Waiters(store) as waiters:
            services = app.state.services = Services(
                settings=settings,
                keys=keys,
                store=store,
                storage=Storage(settings.storage_url),
                fetcher=fetcher,
                waiters=waiters,
                store_threads=anyio.CapacityLimiter(STORE_THREADS),
                decode_threads=anyio.CapacityLimiter(DECODE_THREADS),
            )
            refreshing = asyncio.create_task(keep_fresh(services))
            yield
        tasks = [sender, refreshing]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await fetcher.aclose()
        engine.dispose()

    # No docs page: it would load its scripts from elsewhere. /openapi.json describes the API.
    app = FastAPI(title="inpaint-server", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(router)
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    app.add_middleware(RequestContext)
    # Outside the other, so that answers to unforeseen errors can be read by a page too.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
        allow_headers=["*"],
    )
    return app


async def keep_fresh(services: Services) -> None:
    """Read the keys again and again; where that fails, the last reading goes on counting."""
    while True:
        await asyncio.sleep(REFRESH_S)
        try:
            await services.in_store_thread(services.keys.refresh)
        except (OSError, ValueError, SQLAlchemyError):
            logger.exception("keys not read")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Every exception becomes a body of the dialect, and nothing else of it goes out."""
    request_id = request.scope.get("request_id", "")
    known = to_api_error(error)
    if type(known) in (ApiError, StorageUnavailable):
        logger.error("request failed", exc_info=error, request_id=request_id)
    seconds = known.retry_after_s
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    status = v3.write_status(known, get_services(request).settings.error_status)
    return JSONResponse(v3.write_error(known, request_id), status, headers)


def to_api_error(error: Exception) -> ApiError:
    """Foreign exceptions as ours; what nobody foresaw becomes a bare `ApiError`."""
    match error:
        case ApiError():
            return error
        case HTTPException(status_code=404 | 405):
            return RouteNotFound()
        case HTTPException():
            return InvalidBody()
        case DBAPIError():
            return StorageUnavailable()
    return ApiError()


class RequestContext:
    """ASGI middleware: a request id, a forgiving path, an answer to any error, one log line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope["request_id"] = request_id
        scope["path"] = normal_path(scope["path"])
        started = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status is not None:
                raise
            answer = await answer_error(Request(scope), error)
            await answer(scope, receive, send_with_id)
        finally:
            # Probes come every few seconds and would drown the rest.
            log = logger.debug if scope["path"] in PROBES else logger.info
            log(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_ms=round((time.perf_counter() - started) * 1000, 1),
            )


def normal_path(path: str) -> str:
    """One slash between parts and none at the end: clients join URLs carelessly."""
    return re.sub(r"/{2,}", "/", path).rstrip("/") or "/"

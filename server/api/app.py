"""`create_app(settings)`: builds the API process's parts and wires them to the endpoints."""

import asyncio
import functools
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from models.imaging.decoding import ImageLimits
from server.api import outputs, probes
from server.api.auth.keyring import REFRESH_S, KeyRing
from server.api.auth.keys import KeyStore
from server.api.dialects.registry import DIALECTS, write_webhook
from server.api.errors import answer_error
from server.api.health import Health, Store, write_nothing
from server.api.metrics import StoredFigures
from server.api.middleware import CrossOrigin, ErrorAnswers, RequestContext
from server.api.proxies import TrustedProxies
from server.api.services import WEBHOOKS, Services
from server.core.background import Background
from server.core.errors import ApiError
from server.core.logs import get_logger
from server.core.metrics import Metrics
from server.core.settings import Settings
from server.egress.client import EgressClient, listeners_of
from server.egress.downloads import ImageDownloader
from server.jobs.estimates import Estimator
from server.jobs.job import INPUT_FOLDER
from server.jobs.leases import CHECK_INTERVAL_S
from server.jobs.retention import Janitor
from server.jobs.store import JobStore
from server.jobs.watcher import JobWatcher
from server.sandbox.pool import DecoderPool
from server.storage.database import migrate, open_engine
from server.storage.files import Storage
from server.webhooks.deliveries import DeliveryStore
from server.webhooks.sender import WebhookSender

logger = get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its parts are built when it starts, in `app.state.services`."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running_services(settings, metrics) as services:
            app.state.services = services
            yield

    # No docs page: it would load its scripts from elsewhere. /openapi.json describes the API.
    app = FastAPI(title="inpaint-server", lifespan=lifespan, openapi_url=None)
    app.add_route("/openapi.json", describing(app), include_in_schema=False)
    for dialect in DIALECTS:
        app.include_router(dialect.router)
    app.include_router(outputs.router)
    app.include_router(probes.router)
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)

    def serves_loopback_only() -> bool:
        services: Services = app.state.services
        return services.keys.serves_loopback_only

    # The last one added is the outermost.
    app.add_middleware(
        ErrorAnswers,
        settings,
        serves_loopback_only,
        lambda: app.state.services.health.is_file_gone,
        answer_error,
    )
    if settings.cors_origins:
        app.add_middleware(CrossOrigin, settings.cors_origins, serves_loopback_only)
    app.add_middleware(RequestContext, metrics)
    app.add_middleware(TrustedProxies, settings.forwarded_allow_ips, settings.allowed_hosts)
    app.state.metrics = metrics
    return app


def describing(app: FastAPI) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of `/openapi.json`: the description is made and encoded once."""

    @functools.cache
    def description() -> bytes:
        return json.dumps(app.openapi()).encode()

    async def openapi(_request: Request) -> Response:
        return Response(description(), media_type="application/json")

    return openapi


@asynccontextmanager
async def running_services(settings: Settings, metrics: Metrics) -> AsyncIterator[Services]:
    """All parts of the API process, at work; leaving ends them, last ones first."""
    async with AsyncExitStack() as stack:
        engine = open_engine(settings.sqlalchemy_url)
        stack.callback(engine.dispose)
        migrate(engine)
        store = JobStore(
            engine,
            max_waiting=settings.queue.max_waiting,
            max_waiting_per_key=settings.queue.max_waiting_per_key,
        )
        estimator = Estimator(lambda: store.forecast(settings.places_on))
        metrics.registry.register(StoredFigures(engine, store, estimator))
        keys = KeyRing(settings.auth, KeyStore(engine), is_open_allowed=settings.may_be_open)
        storage = Storage(settings.storage_url)
        # One each, so that neither waits for the other's look-ups.
        listeners = listeners_of(settings)
        image_client, webhook_client = (EgressClient(settings.egress, listeners) for _ in range(2))
        deliveries = DeliveryStore(engine, lease_s=settings.webhook.timeout_s * 4)
        webhooks = WebhookSender(
            settings.webhook,
            deliveries,
            store,
            write_webhook,
            webhook_client,
            grant_of=lambda key_id: keys.caller_of(key_id).webhook_grant,
        )
        background = await stack.enter_async_context(Background())
        background.start(WEBHOOKS, webhooks.run)
        background.start("janitor", Janitor(engine, storage, settings.retention).run)
        watcher = await stack.enter_async_context(
            JobWatcher(store, settings.http.max_streams_per_key)
        )
        probe_key = f"{INPUT_FOLDER}/probe-{uuid.uuid4()}"
        health = Health(
            {
                Store.DATABASE: lambda: write_nothing(engine),
                Store.FILES: lambda: storage.probe(probe_key),
            },
            store.check_file,
        )
        background.start("health", health.run)
        sandbox = await stack.enter_async_context(
            DecoderPool(ImageLimits(settings.fetch.max_image_bytes))
        )
        sandbox.warm()
        services = Services(
            settings=settings,
            keys=keys,
            store=store,
            estimator=estimator,
            storage=storage,
            fetcher=ImageDownloader(settings.fetch, image_client),
            sandbox=sandbox,
            watcher=watcher,
            deliveries=deliveries,
            webhooks=webhooks,
            background=background,
            metrics=metrics,
            health=health,
        )
        background.start("keys", lambda: keep_fresh(services))
        background.start("watch", lambda: watch_workers(services))
        yield services


async def keep_fresh(services: Services) -> None:
    """Read the keys again and again; where that fails, the last reading goes on counting.

    Event streams of keys that have ended end here. A held call of V3 still gets its answer: the key
    was valid when the call was admitted, and the wait for it is bounded.
    """
    while True:
        await asyncio.sleep(REFRESH_S)
        try:
            await services.in_store_thread(services.keys.refresh)
        except (OSError, ValueError, SQLAlchemyError):
            logger.exception("keys not read")
        services.watcher.end_invalid(services.keys.is_valid)


async def watch_workers(services: Services) -> None:
    """Give back the jobs of workers that have fallen silent, and forget the long dead ones.

    Workers do the first too, but none may be up.
    """
    while True:
        try:
            await services.in_store_thread(services.store.requeue_expired)
            await services.in_store_thread(services.store.workers.remove_dead)
        except SQLAlchemyError:
            logger.exception("workers cannot be watched")
        await asyncio.sleep(CHECK_INTERVAL_S)

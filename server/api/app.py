"""`create_app(settings)`: builds the API process's parts and wires them to the endpoints.

`build_services` constructs the parts; `running_services` starts and ends them.
"""

import asyncio
import functools
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from models.imaging.decoding import ImageLimits
from server.api import outputs
from server.api.auth.keyring import REFRESH_S, KeyRing
from server.api.auth.keys import KeyStore
from server.api.dialects.base import Dialect
from server.api.dialects.document import write_document
from server.api.dialects.registry import enabled_dialects, names_by_route, write_webhook
from server.api.errors import answer_error
from server.api.middleware import CrossOrigin, ErrorAnswers, RequestContext
from server.api.monitoring import probes
from server.api.monitoring.health import Health, Store, write_nothing
from server.api.monitoring.metrics import ProcessFigures, StoredFigures
from server.api.monitoring.status import StatusReader
from server.api.playground.routes import playground_router
from server.api.proxies import TrustedProxies
from server.api.services import WEBHOOKS, Services
from server.api.shadow import Shadow, read_vendor_keys
from server.core.background import Background
from server.core.errors import ApiError, StorageUnavailable
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
from server.storage.database import LEAST_CONNECTIONS, LISTENERS, migrate, open_engine
from server.storage.files import Storage
from server.webhooks.deliveries import DeliveryStore
from server.webhooks.sender import WebhookSender

logger = get_logger(__name__)

SUPERVISOR_CONNECTIONS = LEAST_CONNECTIONS
"""The part of the process's database connections that is left to `cli/serve.py` and the supervisor
of its workers, whose statements are few and short."""


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its parts are built when it starts, in `app.state.services`.

    Raises: ValueError for an unknown name in the setting `dialects`.
    """
    metrics = Metrics()
    dialects = enabled_dialects(settings.dialects)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running_services(settings, metrics) as services:
            app.state.services = services
            yield

    # FastAPI's own `/docs` is off: it loads scripts from another host. The playground has a page.
    app = FastAPI(title="inpaint-server", lifespan=lifespan, openapi_url=None)
    app.state.metrics = metrics
    app.add_route("/openapi.json", openapi_endpoint(app, dialects), include_in_schema=False)
    for dialect in dialects:
        app.include_router(dialect.router, tags=[dialect.name])
    app.include_router(outputs.router, tags=["pictures"])
    app.include_router(probes.router, tags=["health"])
    if settings.playground:
        app.include_router(playground_router())
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    add_middleware(app, settings, metrics)
    return app


def openapi_endpoint(
    app: FastAPI, dialects: Sequence[Dialect]
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of `/openapi.json`: the description is made and encoded once."""

    @functools.cache
    def description() -> bytes:
        return json.dumps(write_document(app, dialects)).encode()

    async def openapi(_request: Request) -> Response:
        content = await to_thread.run_sync(description)  # the first time takes a second
        return Response(content, media_type="application/json")

    return openapi


def add_middleware(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """The middleware of every request, from the innermost to the outermost.

    It is added before the application starts, so it reaches the services through `app.state`.
    """

    def serves_loopback_only() -> bool:
        services: Services = app.state.services
        return services.keys.serves_loopback_only

    def is_closed() -> bool:
        services: Services = app.state.services
        return services.health.is_file_gone

    app.add_middleware(ErrorAnswers, settings, serves_loopback_only, is_closed, answer_error)
    if settings.cors_origins:
        exposed = [
            name for each in enabled_dialects(settings.dialects) for name in each.exposed_headers
        ]
        app.add_middleware(CrossOrigin, settings.cors_origins, exposed, serves_loopback_only)
    app.add_middleware(RequestContext, metrics, names_by_route())
    app.add_middleware(TrustedProxies, settings.forwarded_allow_ips, settings.allowed_hosts)


@asynccontextmanager
async def running_services(settings: Settings, metrics: Metrics) -> AsyncIterator[Services]:
    """The started parts of the API process; leaving ends them in reverse order."""
    async with AsyncExitStack() as stack:
        engine = open_engine(
            settings.sqlalchemy_url,
            connections=settings.database_connections - SUPERVISOR_CONNECTIONS - LISTENERS,
        )
        stack.callback(engine.dispose)
        migrate(engine)
        services = build_services(settings, metrics, engine)
        await stack.enter_async_context(services.background)
        await stack.enter_async_context(services.watcher)
        await stack.enter_async_context(services.sandbox)
        await stack.enter_async_context(services.shadow)
        services.sandbox.warm()
        start_background_tasks(services, engine)
        yield services


def build_services(settings: Settings, metrics: Metrics, engine: Engine) -> Services:
    """All parts, constructed and wired; none has started."""
    store = JobStore(
        engine,
        max_waiting=settings.queue.max_waiting,
        max_waiting_per_key=settings.queue.max_waiting_per_key,
    )
    storage = Storage(settings.storage_url, settings.store_options)
    keys = KeyRing(settings.auth, KeyStore(engine), is_open_allowed=settings.may_be_open)
    estimator = Estimator(functools.partial(store.forecast, settings.places_on))
    figures = StoredFigures(engine, store, estimator, settings.queue.max_waiting)
    metrics.registry.register(figures)
    # A client each, so that images and webhooks do not wait for each other's DNS look-ups.
    listeners = listeners_of(settings)
    image_client, webhook_client, vendor_client = (
        EgressClient(settings.egress, listeners) for _ in range(3)
    )
    deliveries = DeliveryStore(engine, lease_s=settings.webhook.timeout_s * 4)
    webhooks = WebhookSender(
        settings.webhook,
        deliveries,
        store,
        write_webhook,
        webhook_client,
        grant_of=lambda key_id: keys.caller_of(key_id).webhook_grant,
    )
    metrics.registry.register(ProcessFigures(webhooks, settings.data_dir))
    return Services(
        settings=settings,
        keys=keys,
        store=store,
        estimator=estimator,
        storage=storage,
        fetcher=ImageDownloader(settings.fetch, image_client),
        sandbox=DecoderPool(ImageLimits(settings.fetch.max_image_bytes)),
        watcher=JobWatcher(store, settings.http.max_streams_per_key),
        deliveries=deliveries,
        webhooks=webhooks,
        background=Background(),
        metrics=metrics,
        health=build_health(engine, store, storage),
        status=StatusReader(engine, store, estimator, settings.data_dir),
        shadow=Shadow(
            settings.shadow,
            read_vendor_keys(settings.shadow),
            vendor_client,
            lambda outcome: metrics.shadow_calls.labels(outcome).inc(),
        ),
    )


def build_health(engine: Engine, store: JobStore, storage: Storage) -> Health:
    """Health with a probe write for each store."""
    probe_key = f"{INPUT_FOLDER}/probe-{uuid.uuid4()}"
    probe_writes: dict[Store, Callable[[], None]] = {
        Store.DATABASE: lambda: write_nothing(engine),
        Store.FILES: lambda: storage.probe(probe_key),
    }
    return Health(probe_writes, store.check_file)


def start_background_tasks(services: Services, engine: Engine) -> None:
    """Start what runs beside the requests; a task that fails is started again."""
    start = services.background.start
    start(WEBHOOKS, services.webhooks.run)
    start("janitor", Janitor(engine, services.storage, services.settings.retention).run)
    start("health", services.health.run)
    start("keys", lambda: refresh_keys(services))
    start("watch", lambda: requeue_lost_jobs(services))


async def refresh_keys(services: Services) -> None:
    """Read the keys every `REFRESH_S`; a reading that fails leaves the last one in force.

    Event streams whose key is no longer valid end here. A held V3 call still gets its answer: the
    key was valid when the call was admitted, and the hold time is bounded.
    """
    while True:
        await asyncio.sleep(REFRESH_S)
        try:
            await services.in_store_thread(services.keys.refresh)
        except (OSError, ValueError, SQLAlchemyError):
            logger.exception("keys not read")
        services.watcher.end_invalid(services.keys.is_valid)


async def requeue_lost_jobs(services: Services) -> None:
    """Queue jobs again whose lease has expired, and remove the rows of dead workers.

    Workers requeue expired jobs too, but there may be none running. Jobs whose deadline has passed
    are failed here alone: no worker claims them.
    """
    while True:
        try:
            await services.in_store_thread(services.store.requeue_expired)
            await fail_overdue_jobs(services)
            await services.in_store_thread(services.store.workers.remove_dead)
        except SQLAlchemyError:
            logger.exception("lost jobs not requeued")
        await asyncio.sleep(CHECK_INTERVAL_S)


async def fail_overdue_jobs(services: Services) -> None:
    """Fail the waiting jobs whose deadline has passed, and remove their inputs."""
    for key in await services.in_store_thread(services.store.fail_overdue):
        with suppress(StorageUnavailable):  # `Janitor` removes it later
            await services.in_file_thread(services.storage.delete, key)

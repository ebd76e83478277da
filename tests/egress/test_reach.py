"""What a key's images and webhooks may reach besides what the settings allow everybody."""

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

import httpx2
import pytest

from server.api.auth.keys import KeyLimits, KeyStore
from server.core.settings import Settings
from server.storage.database import open_engine
from tests.support.apps import client_of, settings_in, store_of
from tests.support.databases import migrated_sqlite
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.native_calls import BODY
from tests.support.processes import image_host
from tests.support.webhooks import WAIT_S, deliveries_of, finished_job, receiver

pytestmark = pytest.mark.process

LOOPBACK = (ip_network("127.0.0.0/8"),)
REACH = {
    "nothing": KeyLimits(),
    "fetch network": KeyLimits(fetch_networks=LOOPBACK),
    "fetch host": KeyLimits(fetch_hosts=("localhost",)),
    "webhook network": KeyLimits(webhook_networks=LOOPBACK),
    "webhook host": KeyLimits(webhook_hosts=("LOCALHOST",)),
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """The key of each reach."""
    engine = open_engine(migrated_sqlite(tmp_path))
    store = KeyStore(engine)
    made = {name: store.create(name, limits)[0] for name, limits in REACH.items()}
    engine.dispose()
    return made


@pytest.fixture
def app(settings: Settings, keys: dict[str, str]) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@contextmanager
def clients(app: LiveApp, keys: dict[str, str]) -> Iterator[dict[str, httpx2.Client]]:
    opened = {name: client_of(app, key) for name, key in keys.items()}
    yield opened
    for client in opened.values():
        client.close()


def test_images(app: LiveApp, keys: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes())
    with image_host(tmp_path) as url, clients(app, keys) as by_reach:
        url = url.replace("127.0.0.1", "localhost")
        taken = {
            name
            for name, client in by_reach.items()
            if client.post("/api/jobs", json=BODY | {"init_image": f"{url}/a.png"}).is_success
        }
    assert taken == {"fetch network", "fetch host"}


def test_pings(app: LiveApp, keys: dict[str, str]) -> None:
    with receiver() as (url, calls), clients(app, keys) as by_reach:
        body = {"url": url.replace("127.0.0.1", "localhost")}
        told = {
            name: client.post("/api/webhooks/ping", json=body).json()["outcome"]
            for name, client in by_reach.items()
        }
        assert calls.qsize() == 2
    assert {name for name, outcome in told.items() if outcome == "answered"} == {
        *("webhook network", "webhook host")
    }


def test_webhooks_of_jobs(settings: Settings, app: LiveApp, keys: dict[str, str]) -> None:
    with (
        receiver() as (url, calls),
        clients(app, keys) as by_reach,
        store_of(settings) as store,
    ):
        for name, outcome in (("webhook network", "answered"), ("nothing", "no answer")):
            client = by_reach[name]
            call = deliveries_of(client, finished_job(client, store, url), 1)
            assert [each["outcome"] for each in call["attempts"]] == [outcome], name
        calls.get(timeout=WAIT_S)
        assert calls.empty()

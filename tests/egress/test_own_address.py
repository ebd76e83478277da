"""The server does not call itself: its pictures are read where they lie, the rest is refused."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.core.settings import Settings
from server.core.settings.sections import FetchSettings
from server.egress.client import Listener
from server.egress.downloads import FetchFailed, ImageDownloader
from server.egress.policy import AddressDenied
from server.storage.files import Storage
from tests.support.apps import settings_in
from tests.support.egress import egress_client
from tests.support.http_stub import (
    LiveApp,
    answering,
    png_bytes,
    response,
    running_app,
    running_stub,
)
from tests.support.network_of_its_own import ELSEWHERE, NEIGHBOURS, OWN
from tests.support.programs import lacking, program
from tests.support.v3_calls import BODY, post

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[2]
NAME = "0123abcd-0123-4567-89ab-0123456789ab-0.png"
UNKNOWN = "a" * 64 + ".invalid"
"""Refused by every resolver before it asks anybody: a label has at most 63 characters."""
NATIVE_BODY = {name: BODY[name] for name in ("prompt", "init_image", "mask_image", "seed")}
NOT_REACHABLE = {
    "status": "error",
    "message": {"init_image": ["The init image could not be downloaded."]},
}


def with_a_picture(folder: Path, **changes: Any) -> Settings:
    """Settings that let loopback be fetched from, and a finished picture in the store."""
    settings = settings_in(folder, fetch={"allow_cidrs": ["127.0.0.0/8", "::1"]}, **changes)
    Storage(settings.storage_url).put(f"generations/{NAME}", png_bytes())
    return settings


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    with running_app(with_a_picture(tmp_path_factory.mktemp("data"))) as app:
        yield app


def inpaint(app: LiveApp, url: str) -> Any:
    return post(app.client, "inpaint", **(BODY | {"init_image": url}))


def test_own_picture_is_read_from_the_store(app: LiveApp) -> None:
    url = f"http://127.0.0.1:{app.port}/generations/{NAME}"
    assert inpaint(app, url)["status"] == "processing"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:PORT/generations/NAME",
        "http://localhost:PORT/generations/NAME",
        "HTTP://LocalHost:PORT/generations/NAME",
        "http://localhost.:PORT/generations/NAME",
        "https://app.localhost/generations/NAME",
        "http://[::1]:PORT/generations/NAME",
        "http://127.0.0.1:1/generations/NAME",
        "http://127.1/generations/NAME",
        "http://0.0.0.0:PORT/generations/NAME",
        "https://ours.example/generations/NAME",
        "https://cdn.pictures.example/generations/NAME",
        "https://called.example/generations/NAME",
        f"https://{UNKNOWN}/generations/NAME",
        f"https://{UNKNOWN}/sd/generations/NAME",
        f"https://{UNKNOWN}/sd//generations//NAME",
        f"https://{UNKNOWN}/sd/generations/../generations/NAME",
        "http://localhost:PORT/generations/NAME?v=1",
        "http://localhost:PORT/generations/NAME?",
        "http://localhost:PORT/generations/NAME#top",
        "http://localhost:PORT/generations/NAME?a=b c&t=1#x y",
        f"https://{UNKNOWN}/sd/generations/STEM.base64",
        "http://localhost:PORT/generations/STEM.base64?v=1",
    ],
)
def test_own_picture_is_read_under_all_names_of_the_server(url: str, named_app: LiveApp) -> None:
    url = url.replace("PORT", str(named_app.port)).replace("NAME", NAME)
    url = url.replace("STEM", NAME.removesuffix(".png"))
    body = BODY | {"init_image": url}
    called = {"Host": "called.example"}
    answer = named_app.client.post("/api/v3/inpaint", json=body, headers=called)
    assert answer.json()["status"] == "processing"
    answer = named_app.client.post(
        "/api/jobs", json=NATIVE_BODY | {"init_image": url}, headers=called
    )
    assert answer.status_code == 202


@pytest.fixture(scope="module")
def named_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApp]:
    """Nothing may be fetched from a private address, so own pictures come from the store."""
    settings = with_a_picture(
        tmp_path_factory.mktemp("named"),
        public_url=f"https://{UNKNOWN}/sd",
        allowed_hosts=["called.example", "ours.example", "*.pictures.example", "127.0.0.1"],
    )
    closed = settings.model_copy(update={"fetch": FetchSettings()})
    with running_app(closed) as app:
        yield app


def test_own_picture_needs_no_way_to_the_public_address(tmp_path: Path) -> None:
    settings = with_a_picture(tmp_path, public_url=f"https://{UNKNOWN}/sd")
    with running_app(settings) as app:
        url = f"https://{UNKNOWN}/sd/generations/{NAME}"
        assert inpaint(app, url)["status"] == "processing"
        for other in (
            f"https://{UNKNOWN}/generations/{NAME}/",
            f"https://{UNKNOWN}/xgenerations/{NAME}",
            f"https://{UNKNOWN}/generations/{NAME}.png",
            f"https://{UNKNOWN}/sd/generations/{NAME.replace('0123', '9999')}",
            f"https://{UNKNOWN}/?/generations/{NAME}",
            f"https://x.{UNKNOWN}/sd/generations/{NAME}",
        ):
            assert inpaint(app, other) == NOT_REACHABLE, other


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json", "/generations/../healthz", "/"])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f.1", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_own_address_is_refused_though_its_network_is_allowed(
    host: str, path: str, app: LiveApp
) -> None:
    for port in (app.port, app.admin_port):
        assert inpaint(app, f"http://{host}:{port}{path}") == NOT_REACHABLE


@pytest.mark.parametrize(
    ("host", "address", "is_own"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::1", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "127.9.9.9", True),
        ("0.0.0.0", "8.8.8.8", False),
        ("::", "127.0.0.1", True),
        ("::", "::1", True),
        ("::", "2606:4700::1111", False),
        ("localhost", "127.0.0.1", True),
        ("localhost", "8.8.8.8", False),
    ],
)
def test_where_a_listener_is(host: str, address: str, is_own: bool) -> None:
    assert Listener(host, 8000).accepts(address, 8000) is is_own
    assert not Listener(host, 8000).accepts(address, 8001)


@pytest.mark.parametrize("allowed", [{"allow_cidrs": "127.0.0.0/8"}, {"allow_hosts": "localhost"}])
def test_own_address_is_not_dialled_whatever_is_allowed(allowed: dict[str, str]) -> None:
    async def run() -> tuple[int, object]:
        async with running_stub(answering(response("200 OK", body=b"picture"))) as stub:
            client = egress_client(listeners=[Listener("::1", 1), Listener("0.0.0.0", stub.port)])
            fetcher = ImageDownloader(FetchSettings.model_validate(allowed), client)
            with pytest.raises(FetchFailed) as failed:
                await fetcher.get(f"http://localhost:{stub.port}/")
            return stub.connections, type(failed.value.__cause__)

    assert asyncio.run(run()) == (0, AddressDenied)


@pytest.fixture(scope="module")
def on_a_public_network() -> dict[str, Any]:
    """What egress reaches in a network namespace with public addresses."""
    made = [program("unshare"), "--net", program("ip"), "link"]
    if subprocess.run(made, capture_output=True, check=False).returncode != 0:
        lacking("the right to make a network namespace")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "tests.support.network_of_its_own"],
        check=True,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_public_addresses_of_this_machine_and_its_network_are_refused(
    on_a_public_network: dict[str, Any],
) -> None:
    refused = dict.fromkeys((*OWN, *NEIGHBOURS), "AddressDenied")
    dialled = dict.fromkeys(ELSEWHERE, "EgressFailed")
    assert on_a_public_network["nobody"] == refused | dialled
    denied = dict.fromkeys(refused, "address not allowed")
    assert on_a_public_network["webhook"] == denied | dict.fromkeys(dialled, "not reachable")


def test_operator_may_open_this_machines_public_addresses(
    on_a_public_network: dict[str, Any],
) -> None:
    for name in ("named", "by name"):
        assert on_a_public_network[name] == dict.fromkeys(OWN, "admin")
    assert on_a_public_network["nobody after others"] == dict.fromkeys(OWN, "AddressDenied")


def test_networks_are_as_the_kernel_says(on_a_public_network: dict[str, Any]) -> None:
    networks = {*on_a_public_network["networks"]}
    near = {"93.184.216.34/32", "93.184.217.0/24", "2606:4700::34/128", "2606:4700:1::/64"}
    loopback = {"127.0.0.0/8", "::1/128"}
    assert networks - {"fe80::/64"} == near | loopback

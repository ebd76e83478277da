"""Thumbnails: made of stored pictures when they are asked for."""

import asyncio
import base64
import io
import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from server.api import outputs
from server.api.app import running_services
from server.api.auth.keyring import Caller
from server.api.dialects.base import ReadingPolicy
from server.api.dialects.native import checks, reading
from server.api.services import Services
from server.core.errors import ServerBusy
from server.core.metrics import Metrics
from server.core.settings import Settings
from server.storage.files import Storage
from tests.corpora import profiles
from tests.support.apps import settings_in
from tests.support.http_stub import LiveApp, running_app
from tests.support.image_files import saved
from tests.support.jobs import LONG_S

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.fixture(scope="module")
def client(app: LiveApp) -> httpx2.Client:
    return app.client


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings.storage_url)


def store(storage: Storage, picture: bytes, suffix: str = ".png") -> str:
    name = f"{uuid.uuid4()}-0{suffix}"
    storage.put(f"generations/{name}", picture)
    return name


def slope(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.dstack([across, down, 0 * across]).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "suffix", "size", "small"),
    [
        ("PNG", ".png", (1024, 512), (256, 128)),
        ("JPEG", ".jpg", (512, 1000), (131, 256)),
        ("WEBP", ".webp", (2048, 2048), (256, 256)),
        ("PNG", ".png", (64, 72), (64, 72)),
        ("PNG", ".png", (4000, 1), (256, 1)),
    ],
)
def test_thumbnail_shows_the_picture(
    kind: str,
    suffix: str,
    size: tuple[int, int],
    small: tuple[int, int],
    client: httpx2.Client,
    storage: Storage,
) -> None:
    name = store(storage, saved(slope(*size), kind), suffix)
    answer = client.get(f"/thumbnails/{name}.webp")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert answer.headers["cache-control"] == "public, max-age=86400, immutable"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    image = Image.open(io.BytesIO(answer.content))
    assert (image.format, image.size) == ("WEBP", small)
    difference = np.asarray(image, np.int16) - np.asarray(slope(*small), np.int16)
    assert np.abs(difference).mean() < 4
    head = client.head(f"/thumbnails/{name}.webp")
    assert (head.content, head.headers["content-length"]) == (b"", str(len(answer.content)))


def test_profile_is_kept(client: httpx2.Client, storage: Storage) -> None:
    profile = profiles.display_p3()
    name = store(storage, saved(slope(300, 300), icc_profile=profile))
    answer = client.get(f"/thumbnails/{name}.webp")
    assert Image.open(io.BytesIO(answer.content)).info["icc_profile"] == profile


def test_nothing_is_stored_for_it(client: httpx2.Client, storage: Storage) -> None:
    name = store(storage, saved(slope(64, 64)))
    before = [file for files in storage.list("") for file in files]
    assert client.get(f"/thumbnails/{name}.webp").status_code == 200
    assert [file for files in storage.list("") for file in files] == before
    storage.delete(f"generations/{name}")
    assert client.get(f"/thumbnails/{name}.webp").status_code == 404, "also where it is kept"


@pytest.mark.parametrize(
    "name",
    [
        "x.webp",
        "{uuid}-0.webp",
        "{uuid}-0.png",
        "{uuid}-0.png.base64.webp",
        "{uuid}-0.gif.webp",
        "{uuid}-0.png.webp",
        "../inputs/{uuid}.npy.webp",
        "..%2Finputs%2F{uuid}-0.png.webp",
    ],
)
def test_other_names_are_unknown(name: str, client: httpx2.Client) -> None:
    assert client.get(f"/thumbnails/{name.format(uuid=uuid.uuid4())}").status_code == 404


def test_many_at_once_are_all_answered(client: httpx2.Client, storage: Storage) -> None:
    name = store(storage, saved(slope(512, 512)))
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(client.get, [f"/thumbnails/{name}.webp"] * 24)]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


def test_gone_client_costs_no_thumbnail(settings: Settings, storage: Storage) -> None:
    name = store(storage, saved(slope(64, 64)))

    async def ask() -> Response:
        async with running_services(settings, Metrics()) as services:
            request = Request({"type": "http", "method": "GET"}, gone)
            return await outputs.thumbnail(request, services, f"{name}.webp")

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.body) == (499, b"")


async def receive() -> Message:
    return {"type": "http.request"}


async def until(is_so: Callable[[], object]) -> None:
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0)


def request_from(address: str) -> Request:
    return Request({"type": "http", "method": "GET", "client": (address, 1)}, receive)


def test_queue_of_thumbnails_ends(settings: Settings, storage: Storage) -> None:
    name = store(storage, saved(slope(64, 64)))

    async def ask_many() -> list[object]:
        async with running_services(settings, Metrics()) as services:
            slots = services.picture_slots
            async with slots.held_by("others"), slots.held_by("others"):
                calls = [
                    asyncio.create_task(
                        outputs.thumbnail(request_from("192.0.2.1"), services, f"{name}.webp")
                    )
                    for _ in range(outputs.MAX_WAITING + 10)
                ]
                await until(lambda: sum(call.done() for call in calls) == 10)
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(ask_many())
    refused = [answer for answer in answers if isinstance(answer, ServerBusy)]
    made = [answer for answer in answers if isinstance(answer, Response)]
    assert (len(refused), len(made)) == (10, outputs.MAX_WAITING)


def test_crowd_of_one_network_refuses_no_other(settings: Settings, storage: Storage) -> None:
    crowded, name = (store(storage, saved(slope(64, 64))) for _ in range(2))

    async def ask() -> Response:
        async with running_services(settings, Metrics()) as services:
            slots = services.picture_slots
            async with slots.held_by("others"), slots.held_by("others"):
                crowd = [
                    asyncio.create_task(
                        outputs.thumbnail(request_from("2001:db8::1"), services, f"{crowded}.webp")
                    )
                    for _ in range(outputs.MAX_WAITING)
                ]
                owner = "thumbnails 2001:db8::/64"
                await until(lambda: slots.waiting(owner) == outputs.MAX_WAITING)
                asked = asyncio.create_task(
                    outputs.thumbnail(request_from("2001:db8:0:1::1"), services, f"{name}.webp")
                )
                await until(lambda: asked.done() or slots.waiting("thumbnails 2001:db8:0:1::/64"))
            answer = await asked
            await asyncio.gather(*crowd)
            return answer

    assert asyncio.run(ask()).status_code == 200


def test_thumbnail_is_made_once(settings: Settings, storage: Storage) -> None:
    name = store(storage, saved(slope(64, 64)))

    async def ask_twice() -> tuple[Response, Response]:
        async with running_services(settings, Metrics()) as services:
            request, slots = request_from("192.0.2.1"), services.picture_slots
            first = await outputs.thumbnail(request, services, f"{name}.webp")
            async with slots.held_by("others"), slots.held_by("others"), asyncio.timeout(LONG_S):
                return first, await outputs.thumbnail(request, services, f"{name}.webp")

    first, second = asyncio.run(ask_twice())
    assert first.body == second.body


def test_few_and_small_thumbnails_are_kept() -> None:
    kept: dict[str, bytes] = {}
    for index in range(outputs.MAX_KEPT + 1):
        outputs.keep(kept, str(index), b"small")
    outputs.keep(kept, "large", bytes(outputs.MAX_KEPT_BYTES + 1))
    assert [*kept] == [str(index) for index in range(1, outputs.MAX_KEPT + 1)]


def test_key_with_many_checks_delays_no_thumbnails(settings: Settings, storage: Storage) -> None:
    """More checks of one key than thumbnails may wait neither refuse one nor come before it."""
    name = store(storage, saved(slope(64, 64)))
    key, picture, mask = "a-key", slope(64, 64), Image.new("L", (64, 64), 255)
    images = {"init_image": saved(picture), "mask_image": saved(mask)}
    body = {name: base64.b64encode(content).decode() for name, content in images.items()}
    policy = ReadingPolicy(models=["builtin"])
    job_request = reading.read_job(json.dumps(body).encode(), policy, reading.CheckRequest)[0]
    ended: list[str] = []

    async def check(services: Services) -> None:
        caller = Caller(key_id=key)
        await checks.check(services, job_request, caller, "http://here", "http://here")
        ended.append("check")

    async def ask() -> Response:
        async with running_services(settings, Metrics()) as services:
            slots = services.picture_slots
            async with slots.held_by("others"), slots.held_by("others"):
                crowd = [asyncio.create_task(check(services)) for _ in range(outputs.MAX_WAITING)]
                await until(lambda: slots.waiting(key) == outputs.MAX_WAITING)
                request = request_from("192.0.2.1")
                asked = asyncio.create_task(outputs.thumbnail(request, services, f"{name}.webp"))
                asked.add_done_callback(lambda _: ended.append("thumbnail"))
                await until(lambda: asked.done() or slots.waiting("thumbnails 192.0.2.1") == 1)
            answer = await asked
            await asyncio.gather(*crowd)
            return answer

    assert asyncio.run(ask()).status_code == 200
    assert len(ended) == outputs.MAX_WAITING + 1
    assert ended.index("thumbnail") < outputs.MAX_WAITING // 2

"""Uploads: what is stored, how much of it, and who can read it."""

import dataclasses
import uuid
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest

from server.api.app import running_services
from server.api.auth.keyring import Caller
from server.api.dialects.uploads import Upload, store_upload
from server.api.services import Services
from server.core.errors import ImageProblem, ImageUnavailable, RateLimited, ServerBusy
from server.core.metrics import Metrics
from server.core.rate_limits import TokenBuckets
from server.core.settings import Settings
from server.storage.files import Storage
from tests.support.apps import settings_in
from tests.support.clocks import Clock
from tests.support.http_stub import LiveApp, png_bytes, running_app

pytestmark = pytest.mark.process

BASE = "https://ours.example/sd"
PNG = png_bytes()
JPEG = b"\xff\xd8\xff\xe0" + bytes(20)
WEBP = b"RIFF\x10\0\0\0WEBPVP8 " + bytes(20)
FIRST, SECOND = Caller("first"), Caller("second")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    limits = {"uploads_per_minute_per_key": 4, "upload_bytes_per_minute_per_key": 1_000}
    return settings_in(
        tmp_path_factory.mktemp("data"), queue=limits, fetch={"max_image_bytes": 900}
    )


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def services(settings: Settings, clock: Clock) -> AsyncIterator[Services]:
    async with running_services(settings, Metrics()) as services:
        yield dataclasses.replace(
            services, uploads=TokenBuckets(clock), upload_bytes=TokenBuckets(clock)
        )


@pytest.mark.parametrize(
    ("content", "suffix", "media_type"),
    [(PNG, ".png", "image/png"), (JPEG, ".jpg", "image/jpeg"), (WEBP, ".webp", "image/webp")],
)
async def test_picture_is_stored_under_a_name_of_its_own(
    content: bytes, suffix: str, media_type: str, services: Services
) -> None:
    uploads = [await store_upload(services, FIRST, content, BASE) for _ in range(2)]
    for upload in uploads:
        assert uuid.UUID(upload.id).version == 4, "122 random bits, so nobody guesses a name"
        name = f"{upload.id}{suffix}"
        url = f"{BASE}/uploads/{name}"
        assert upload == Upload(upload.id, name, url, media_type, len(content))
        assert services.storage.get(f"uploads/{name}") == content
    assert uploads[0].id != uploads[1].id


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ImageProblem.UNSUPPORTED),
        (b"GIF89a" + bytes(20), ImageProblem.UNSUPPORTED),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ImageProblem.UNSUPPORTED),
        (b"RIFF\x10\0\0\0WAVEfmt ", ImageProblem.UNSUPPORTED),
        (b" " + PNG, ImageProblem.UNSUPPORTED),
        (PNG + bytes(900), ImageProblem.TOO_LARGE),
    ],
)
async def test_other_content_is_refused(
    content: bytes, problem: ImageProblem, services: Services
) -> None:
    with pytest.raises(ImageUnavailable) as refused:
        await store_upload(services, FIRST, content, BASE, "content")
    assert refused.value.problems == {"content": problem}


async def test_each_key_may_upload_so_often(services: Services, clock: Clock) -> None:
    for _ in range(4):
        await store_upload(services, FIRST, JPEG, BASE)
    with pytest.raises(RateLimited) as refused:
        await store_upload(services, FIRST, JPEG, BASE)
    assert (refused.value.limit, refused.value.retry_after_s) == (4, 15)
    await store_upload(services, SECOND, JPEG, BASE)
    clock.now += 15
    await store_upload(services, FIRST, JPEG, BASE)


async def test_each_key_may_upload_so_many_bytes(services: Services, clock: Clock) -> None:
    large = JPEG + bytes(876)
    await store_upload(services, FIRST, large, BASE)
    for _ in range(3):
        with pytest.raises(RateLimited) as refused:
            await store_upload(services, FIRST, large, BASE)
        assert refused.value.retry_after_s == 48
    await store_upload(services, SECOND, large, BASE)
    for _ in range(3):  # the refused ones counted for nothing
        await store_upload(services, FIRST, JPEG, BASE)


async def test_refused_content_counts_for_nothing(services: Services) -> None:
    for _ in range(9):
        with pytest.raises(ImageUnavailable):
            await store_upload(services, FIRST, b"no picture", BASE)
    await store_upload(services, FIRST, PNG, BASE)


async def test_server_that_stops_takes_none(services: Services) -> None:
    services.watcher.release_all()
    with pytest.raises(ServerBusy):
        await store_upload(services, FIRST, PNG, BASE)


def stored(settings: Settings, content: bytes, suffix: str = ".png") -> str:
    """The path of an upload that is there."""
    name = f"uploads/{uuid.uuid4()}{suffix}"
    Storage(settings.storage_url).put(name, content)
    return f"/{name}"


@pytest.mark.parametrize(
    ("suffix", "media_type"),
    [(".png", "image/png"), (".jpg", "image/jpeg"), (".webp", "image/webp")],
)
def test_upload_is_served_as_nothing_else(
    suffix: str, media_type: str, app: LiveApp, settings: Settings
) -> None:
    path = stored(settings, PNG, suffix)
    for answer in (app.client.get(path), app.client.head(path)):
        assert answer.status_code == 200
        assert answer.headers["content-type"] == media_type
        assert answer.headers["content-length"] == str(len(PNG))
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert answer.headers["cache-control"] == "no-store"
    assert app.client.get(path).content == PNG


@pytest.mark.parametrize(
    "target",
    [
        "/uploads",
        "/uploads/",
        "/uploads/00000000-0000-4000-8000-000000000000.png",
        "/uploads/{name}.base64",
        "/uploads/{name}%00",
        "/uploads/{name}%0a",
        "/uploads/x/{name}",
        "/uploads/%2e%2e/uploads/{name}",
        "/uploads/..%2fuploads%2f{name}",
        "/uploads/..%5c{name}",
        "/uploads/..%2f..%2finpaint.db",
        "/uploads/%2fetc%2fpasswd",
        "/generations/{name}",
        "/generations/..%2fuploads%2f{name}",
    ],
)
def test_other_names_are_not_found(target: str, app: LiveApp, settings: Settings) -> None:
    name = stored(settings, PNG).removeprefix("/uploads/")
    target = target.format(name=name)
    answer = app.client.get(httpx2.URL(scheme="http", host="127.0.0.1", port=app.port).join(target))
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_uploads_are_only_read(method: str, app: LiveApp, settings: Settings) -> None:
    path = stored(settings, PNG)
    assert app.client.request(method, path).status_code == 405
    assert app.client.get(path).content == PNG


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0"])
def test_upload_is_an_image_of_a_request(host: str, app: LiveApp, settings: Settings) -> None:
    """Its own port is private to it, so a download would be refused."""
    images = {
        name: f"http://{host}:{app.port}{stored(settings, png_bytes(shade=shade))}"
        for name, shade in (("init_image", 90), ("mask_image", 255))
    }
    answer = app.client.post("/api/jobs", json={"prompt": "a cat", "seed": 1} | images)
    assert answer.status_code == 202, answer.text


def test_removed_upload_is_no_image_of_a_request(app: LiveApp, settings: Settings) -> None:
    gone = f"http://127.0.0.1:{app.port}/uploads/{uuid.uuid4()}.png"
    images = {"init_image": gone, "mask_image": gone}
    answer = app.client.post("/api/jobs", json={"prompt": "a cat", "seed": 1} | images)
    assert answer.status_code == 422
    assert {each["field"] for each in answer.json()["errors"]} == {*images}

"""IOPaint's API behind the real HTTP server, without a worker: the tests do its work."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from server.core.settings import Settings
from server.jobs.job import Job
from server.jobs.store import JobStore
from tests.support.apps import FIRST, KEYS, settings_in
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.iopaint_calls import page_call
from tests.support.v3_calls import PICTURE, finish, submit
from tests.support.waiting import until

pytestmark = pytest.mark.process

IMAGE = png_bytes()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS}, wait_s=30)


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@contextmanager
def working(settings: Settings, client: httpx2.Client) -> Iterator[list[Job]]:
    """A worker that ends the next job; gives it once the block is left."""
    next_id, ended = submit(client) + 1, []
    worker = threading.Thread(target=lambda: ended.append(finish(settings, next_id)))
    worker.start()
    try:
        yield ended
    finally:
        worker.join()


def paint(client: httpx2.Client, **changes: Any) -> httpx2.Response:
    return client.post("/api/v1/inpaint", json=page_call(IMAGE, IMAGE, **changes))


def test_answer_is_the_picture(client: httpx2.Client, settings: Settings) -> None:
    with working(settings, client) as ended:
        answer = paint(client)
    assert (answer.status_code, answer.content) == (200, PICTURE)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == str(ended[0].params.seed)
    assert "x-warnings" not in answer.headers
    assert "x-ignored-fields" not in answer.headers


def test_headers_tell_what_was_not_applied(client: httpx2.Client, settings: Settings) -> None:
    with working(settings, client):
        answer = paint(client, sd_sampler="LMS", enable_brushnet=True)
    assert answer.status_code == 200
    assert answer.headers["x-warnings"] == "scheduler_ignored, fields_ignored"
    assert answer.headers["x-ignored-fields"] == "enable_brushnet"


def test_pages_of_other_origins_read_the_seed(client: httpx2.Client) -> None:
    answer = client.get("/api/v1/samplers", headers={"origin": "https://page.example"})
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    assert {"X-Seed", "X-Warnings", "X-Ignored-Fields"} < {*exposed}


def test_only_dialects_that_are_on_expose_headers(settings: Settings) -> None:
    other = settings.model_copy(update={"dialects": ("native",)})
    with running_app(other) as app:
        headers = {"origin": "https://page.example", "key": FIRST}
        answer = app.client.get("/api/jobs", headers=headers)
    assert "X-Seed" not in answer.headers["access-control-expose-headers"]


def test_job_that_fails(client: httpx2.Client, store: JobStore) -> None:
    def fail() -> None:
        failed: list[bool] = []

        def look() -> bool:
            failed.extend(
                store.fail(job, "The model cannot be loaded now") for job in store.claim("test", 10)
            )
            return any(failed)

        until(look, 20, "the job")

    worker = threading.Thread(target=fail)
    worker.start()
    answer = paint(client)
    worker.join()
    assert (answer.status_code, answer.json()["errors"]) == (500, "The model cannot be loaded now.")
    assert answer.json()["error"] == "model_unavailable"


def test_faults_of_a_call(client: httpx2.Client) -> None:
    answer = paint(client, mask=None, sd_steps=0)
    assert (answer.status_code, answer.json()["errors"]) == (
        422,
        "The mask field is required. The sd steps must be between 1 and 150.",
    )
    answer = client.post("/api/v1/inpaint", content=b"{")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_body")


def test_start_of_the_page(client: httpx2.Client) -> None:
    config = client.get("/api/v1/server-config").json()
    model = client.get("/api/v1/model").json()
    assert config["modelInfos"] == [model]
    assert (model["name"], model["need_prompt"]) == ("builtin", True)
    assert config["samplers"] == client.get("/api/v1/samplers").json()
    assert (config["plugins"], config["disableModelSwitch"]) == ([], True)
    image = client.get("/api/v1/inputimage")
    assert (image.status_code, image.headers["content-type"]) == (200, "application/json")


def test_model_is_not_switched(client: httpx2.Client) -> None:
    assert client.post("/api/v1/model", json={"name": "builtin"}).json()["name"] == "builtin"
    answer = client.post("/api/v1/model", json={"name": "lama"})
    assert (answer.status_code, answer.json()["errors"]) == (422, "The name must be builtin.")


def test_prompts_of_a_file(client: httpx2.Client) -> None:
    answer = client.post("/api/v1/gen-info", files={"file": ("a.png", IMAGE, "image/png")})
    assert answer.json() == {"prompt": "", "negative_prompt": ""}
    answer = client.post("/api/v1/gen-info", json={})
    assert (answer.status_code, answer.json()["error"]) == (422, "image_unavailable")


@pytest.mark.parametrize(
    "path",
    ["inpaint", "server-config", "model", "samplers", "inputimage", "gen-info"],
)
def test_every_call_asks_for_the_key(path: str, app: LiveApp) -> None:
    method = "POST" if path in ("inpaint", "gen-info") else "GET"
    answer = app.client.request(method, f"/api/v1/{path}")
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "path", ["adjust_mask", "run_plugin_gen_mask", "save_image", "switch_plugin_model", "x"]
)
def test_calls_that_there_are_not(path: str, client: httpx2.Client) -> None:
    answer = client.post(f"/api/v1/{path}", json={})
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


def test_paths_of_the_vendor_are_the_vendors(client: httpx2.Client) -> None:
    answer = client.get("/api/v1/enterprise/nothing")
    assert answer.status_code == 404
    assert answer.json().keys() & {"status", "message"} == {"status", "message"}

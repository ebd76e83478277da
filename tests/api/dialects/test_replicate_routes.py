"""Replicate's API behind the real HTTP server, without a worker: the tests do its work."""

import base64
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.core.settings import Settings
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.storage.files import Storage
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.jobs import claim_job
from tests.support.replicate_calls import MODEL, VERSION, file_of
from tests.support.v3_calls import PICTURE, finish, submit
from tests.support.webhooks import receiver

pytestmark = pytest.mark.process

IMAGE = f"data:image/png;base64,{base64.b64encode(png_bytes()).decode()}"
INPUTS = {"prompt": "a cat", "image": IMAGE, "mask": IMAGE, "seed": 5}
BODY = {"version": VERSION, "input": INPUTS}
OUTPUT = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


def create(client: httpx2.Client, body: Any = None, **headers: str) -> dict[str, Any]:
    answer = client.post("/v1/predictions", json=body or BODY, headers=headers)
    assert answer.status_code == 201, answer.text
    prediction: dict[str, Any] = answer.json()
    return prediction


def read(client: httpx2.Client, prediction: dict[str, Any]) -> dict[str, Any]:
    answer = client.get(prediction["urls"]["get"])
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


class TestPredictions:
    def test_life_of_a_prediction(self, client: httpx2.Client, settings: Settings) -> None:
        first = create(client)
        assert (first["status"], first["output"], first["error"]) == ("starting", None, None)
        assert (first["model"], first["started_at"]) == ("inpaint-server/builtin", None)
        finish(settings, int(first["id"]))
        last = read(client, first)
        assert (last["status"], last["output"]) == ("succeeded", [OUTPUT])
        assert last["completed_at"] >= last["started_at"] >= last["created_at"]
        assert file_of(last["output"][0]) == PICTURE

    def test_model_of_the_path(self, client: httpx2.Client) -> None:
        for path, replaced in ((MODEL, True), ("any/builtin", False)):
            answer = client.post(f"/v1/models/{path}/predictions", json={"input": INPUTS})
            assert answer.status_code == 201
            assert ("is not offered here" in answer.json()["logs"]) is replaced

    def test_https_gives_urls(self, client: httpx2.Client, settings: Settings) -> None:
        headers = {"x-forwarded-proto": "https", "host": "pictures.example"}
        first = create(client, **headers)
        job = finish(settings, int(first["id"]))
        answer = client.get(f"/v1/predictions/{job.id}", headers=headers)
        assert answer.json()["output"] == [
            f"https://pictures.example/generations/{job.output_names[0]}"
        ]

    def test_other_formats_have_their_media_type(
        self, client: httpx2.Client, settings: Settings
    ) -> None:
        first = create(client, {**BODY, "input": {**INPUTS, "output_format": "webp"}})
        finish(settings, int(first["id"]))
        (output,) = read(client, first)["output"]
        assert output.startswith("data:image/webp;base64,")

    def test_wait_ends_with_the_job(self, client: httpx2.Client, settings: Settings) -> None:
        before = client.get("/v1/predictions").json()["results"]
        newest = max((int(each["id"]) for each in before), default=0)
        worker = threading.Thread(target=finish, args=(settings, newest + 1))
        worker.start()
        answer = create(client, prefer="wait")
        worker.join()
        assert (answer["status"], answer["output"]) == ("succeeded", [OUTPUT])

    def test_wait_that_is_over_says_starting(self, client: httpx2.Client, store: JobStore) -> None:
        """Also of a job that runs: any other status would end the Python client's run."""
        store.claim("test", 100)
        answer = create(client, prefer="wait=1")
        assert (answer["status"], answer["output"]) == ("starting", None)

    def test_running_job_shows_its_progress(self, client: httpx2.Client, store: JobStore) -> None:
        first = create(client)
        claim_job(store, int(first["id"]))
        assert read(client, first)["status"] == "processing"

    def test_failed_job(self, client: httpx2.Client, store: JobStore) -> None:
        first = create(client)
        store.fail(claim_job(store, int(first["id"])), "The model cannot be loaded now")
        last = read(client, first)
        assert (last["status"], last["error"]) == ("failed", "The model cannot be loaded now")

    def test_cancel(self, client: httpx2.Client, settings: Settings) -> None:
        first = create(client)
        for _ in range(2):
            answer = client.post(first["urls"]["cancel"])
            assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
        ended = create(client)
        finish(settings, int(ended["id"]))
        assert client.post(ended["urls"]["cancel"]).json()["status"] == "succeeded"

    def test_files_that_somebody_removed(self, client: httpx2.Client, settings: Settings) -> None:
        first = create(client)
        job = finish(settings, int(first["id"]))
        Storage(settings.storage_url).delete(job.output_keys[0])
        last = read(client, first)
        assert (last["status"], last["output"]) == ("succeeded", None)

    def test_others_see_nothing(self, client: httpx2.Client, app: LiveApp) -> None:
        first = create(client)
        with client_of(app, SECOND) as other:
            for method, path in (("GET", ""), ("POST", "/cancel")):
                answer = other.request(method, f"/v1/predictions/{first['id']}{path}")
                assert (answer.status_code, answer.json()["status"]) == (404, 404)
            assert first["id"] not in [
                each["id"] for each in other.get("/v1/predictions").json()["results"]
            ]

    @pytest.mark.parametrize("scheme", ["Bearer", "Token"])
    def test_both_forms_of_the_token(self, scheme: str, app: LiveApp) -> None:
        headers = {"authorization": f"{scheme} {FIRST}"}
        assert app.client.get("/v1/account", headers=headers).json()["type"] == "user"
        headers = {"authorization": f"{scheme} key-of-nobody-at-all"}
        answer = app.client.get("/v1/account", headers=headers)
        assert (answer.status_code, answer.json()["status"]) == (401, 401)

    def test_errors_of_a_body(self, client: httpx2.Client) -> None:
        answer = client.post("/v1/predictions", content=b"[]")
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/problem+json"
        answer = client.post("/v1/predictions", json={"version": VERSION, "input": {}})
        assert answer.json() == {
            "title": "Fields are missing or wrong",
            "detail": "The prompt field is required.",
            "status": 422,
        }

    @pytest.mark.parametrize("path", ["/v1/predictions/x/y/z", "/v1/models/a/b/c", "/v1/files/a/b"])
    def test_unknown_paths(self, path: str, client: httpx2.Client) -> None:
        answer = client.get(path)
        assert (answer.status_code, answer.json()["status"]) == (404, 404)

    def test_webhook(self, tmp_path: Path) -> None:
        hook = {"allow_hosts": ["127.0.0.1"]}
        with receiver() as (url, calls), running_app(settings_in(tmp_path, webhook=hook)) as app:
            fields = {"webhook": url, "webhook_events_filter": ["start", "completed"]}
            first = create(app.client, {**BODY, **fields})
            settings = settings_in(tmp_path)
            finish(settings, int(first["id"]))
            _, body = calls.get(timeout=20)
        assert (body["id"], body["status"]) == (first["id"], "succeeded")
        assert body["output"][0].startswith(f"{app.client.base_url}/generations/")
        assert "not for: start" in body["logs"]


class TestPages:
    def test_pages_forwards_and_backwards(self, tmp_path: Path) -> None:
        with running_app(settings_in(tmp_path)) as app:
            client = app.client
            ids = [submit(client) for _ in range(45)]
            newest_first = [str(each) for each in reversed(ids)]
            pages, url = [], "/v1/predictions"
            while url is not None:
                pages.append(client.get(url).json())
                url = pages[-1]["next"]
            shown = [[each["id"] for each in page["results"]] for page in pages]
            assert [*map(len, shown)] == [20, 20, 5]
            assert sum(shown, []) == newest_first
            assert pages[0]["previous"] is None
            second = client.get(pages[2]["previous"]).json()
            assert second["results"] == pages[1]["results"]
            first = client.get(second["previous"]).json()
            assert first["results"] == pages[0]["results"]
            assert (first["previous"], first["next"]) == (None, pages[0]["next"])

    @pytest.mark.parametrize("cursor", ["", "x", "before-", "before--1", "after-" + "9" * 30])
    def test_other_cursors_mean_the_first_page(self, cursor: str, client: httpx2.Client) -> None:
        create(client)
        page = client.get("/v1/predictions", params={"cursor": cursor}).json()
        assert page["previous"] is None
        assert page["results"]

    def test_end_has_no_neighbours(self, client: httpx2.Client) -> None:
        page = client.get("/v1/predictions?cursor=before-1").json()
        assert page == {"previous": None, "next": None, "results": []}


class TestFiles:
    def test_file_is_the_image_of_a_prediction(
        self, client: httpx2.Client, store: JobStore
    ) -> None:
        content = png_bytes(shade=90)
        metadata = (None, b"{}", "application/json")
        answer = client.post(
            "/v1/files",
            files={
                "content": ("buffer_1732800000000", content, "application/octet-stream"),
                "metadata": metadata,
            },
        )
        file = answer.json()
        assert answer.status_code == 201
        assert (file["size"], file["content_type"]) == (len(content), "image/png")
        assert file["checksums"] == {"sha256": hashlib.sha256(content).hexdigest()}
        assert file["expires_at"] > file["created_at"]
        assert client.get(file["urls"]["get"]).content == content
        again = client.get(f"/v1/files/{file['id']}").json()
        assert again | {"created_at": "", "expires_at": ""} == file | {
            "created_at": "",
            "expires_at": "",
        }

        prediction = create(client, {**BODY, "input": {**INPUTS, "image": file["urls"]["get"]}})
        assert prediction["input"]["image"] == file["urls"]["get"]
        job = store.get(int(prediction["id"]))
        assert job is not None
        assert job.request.intake is not None
        assert job.request.intake.init_image_sha256 == file["checksums"]["sha256"]

    @pytest.mark.parametrize(
        ("how", "status"),
        [
            ({"files": {"content": ("a.txt", b"hello", "text/plain")}}, 422),
            ({"files": {"file": ("a.png", png_bytes(), "image/png")}}, 422),
            ({"json": {"content": "hello"}}, 422),
            ({"content": b"\x00"}, 400),
        ],
    )
    def test_other_bodies_are_refused(
        self, how: dict[str, Any], status: int, client: httpx2.Client
    ) -> None:
        answer = client.post("/v1/files", **how)
        assert (answer.status_code, answer.json()["status"]) == (status, status)

    def test_key_is_asked_before_the_body_is_read(self, app: LiveApp) -> None:
        answer = app.client.post("/v1/files", content=b"\x00")
        assert answer.status_code == 401

    @pytest.mark.parametrize(
        "name", ["x", "0" * 36 + ".png", "..%2finputs%2fx.npy", "%2e%2e", "a" * 36 + ".gif"]
    )
    def test_unknown_files(self, name: str, client: httpx2.Client) -> None:
        assert client.get(f"/v1/files/{name}").status_code == 404


class TestModels:
    def test_model_and_its_version(self, client: httpx2.Client) -> None:
        model = client.get("/v1/models/inpaint-server/builtin").json()
        assert (model["owner"], model["name"]) == ("inpaint-server", "builtin")
        version = model["latest_version"]
        assert version.keys() == {"id", "created_at", "cog_version", "openapi_schema"}
        versions = client.get("/v1/models/inpaint-server/builtin/versions").json()
        assert versions == {"previous": None, "next": None, "results": [version]}
        prediction = create(client, {**BODY, "version": version["id"]})
        assert (prediction["version"], prediction["model"]) == (
            version["id"],
            "inpaint-server/builtin",
        )
        assert "is not offered" not in prediction["logs"]

    def test_version_that_the_python_client_asks_for(self, client: httpx2.Client) -> None:
        answer = client.get(f"/v1/models/{MODEL}/versions/{VERSION}")
        assert (answer.status_code, answer.json()["id"]) == (200, VERSION)


def test_job_of_another_dialect_is_a_prediction(client: httpx2.Client) -> None:
    job_id = submit(client)
    found = client.get(f"/v1/predictions/{job_id}").json()
    assert (found["status"], found["model"]) == ("starting", "inpaint-server/default")
    assert found["input"]["num_outputs"] == 2


def test_cancelled_job_is_canceled(client: httpx2.Client, store: JobStore) -> None:
    first = create(client)
    client.post(f"/api/jobs/{first['id']}/cancel")
    job = store.get(int(first["id"]))
    assert job is not None
    assert job.state is JobState.CANCELLED
    assert read(client, first)["status"] == "canceled"

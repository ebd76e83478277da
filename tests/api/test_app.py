"""The API process behind its real HTTP server, without a worker: the tests do its work."""

import base64
import json
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from models.params import OutputFormat
from server.api.auth.keys import KeyLimits, KeyStore
from server.api.dialects.registry import DIALECTS
from server.core.settings import Settings
from server.jobs.estimates import START_S
from server.jobs.job import output_names_of
from server.jobs.retention import HOUR_S, Janitor
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.storage.database import migrate, open_engine
from server.storage.files import Storage
from tests.corpora.hostile_pictures import noise
from tests.support.apps import FIRST, KEYS, SECOND, settings_in, store_of
from tests.support.http_stub import ANSWER_S, LiveApp, png_bytes, running_app
from tests.support.image_files import saved
from tests.support.jobs import new_job, seen_now, waiting_in, worker_status
from tests.support.native_calls import BODY as NATIVE_BODY
from tests.support.v3_calls import BODY, IMAGE, PICTURE, finish, post, submit
from tests.support.waiting import until

pytestmark = pytest.mark.process

TALL = base64.b64encode(png_bytes(64, 92)).decode()
NOISE = saved(noise(), "PNG")
needs_both_families = pytest.mark.skipif(
    not socket.has_dualstack_ipv6(), reason="this machine has no IPv6"
)
NOT_FOUND = {
    "status": "failed",
    "id": "",
    "message": "Request not found",
    "messege": "Request not found",
    "output": "",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    """One open server for all tests that only send requests; nothing is held."""
    with running_app(settings) as app:
        yield app


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A server with two keys."""
    settings = settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})
    with running_app(settings) as app:
        yield app.client


@pytest.fixture(scope="module")
def url(app: LiveApp, settings: Settings) -> str:
    """A finished picture's address."""
    job_id = submit(app.client)
    finish(settings, job_id)
    return str(post(app.client, f"fetch/{job_id}")["output"][0])


@pytest.fixture
def client(app: LiveApp) -> httpx2.Client:
    return app.client


def expire(settings: Settings, now: float) -> None:
    """What the janitor does when the clock says `now`."""
    engine = open_engine(settings.sqlalchemy_url)
    janitor = Janitor(engine, Storage(settings.storage_url), settings.retention, clock=lambda: now)
    assert janitor.expire().outputs == 1
    engine.dispose()


def request_raw(port: int, target: str, method: str = "POST") -> bytes:
    """An answer to a request line that no HTTP library would write."""
    headers = "Host: localhost\r\nContent-Length: 0\r\nConnection: close\r\n"
    head = f"{method} {target} HTTP/1.1\r\n{headers}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
        connection.sendall(head.encode())
        with connection.makefile("rb") as answer:
            return answer.read()


class TestLifeOfAJob:
    def test_processing_then_success(self, client: httpx2.Client, settings: Settings) -> None:
        first = post(client, "inpaint", **BODY)
        job_id = first["id"]
        assert first["status"] == "processing"
        assert first["fetch_result"] == f"{client.base_url}/api/v3/fetch/{job_id}"
        assert (first["output"], first["meta"]["n_samples"]) == ([], 2)
        assert first["meta"]["init_image"] == f"(base64, {len(IMAGE)} bytes)"

        second = client.post(first["fetch_result"]).json()
        assert (second["status"], second["id"], second["output"]) == ("processing", job_id, "")
        assert second["eta"] > 0

        job = finish(settings, job_id)
        third = post(client, "fetch", request_id=job_id)
        assert list(third) == ["status", "id", "output", "generationTime", "meta"]
        assert third["meta"] == first["meta"]
        assert third["output"] == [f"{client.base_url}/generations/{n}" for n in job.output_names]
        assert [client.get(url).content for url in third["output"]] == [PICTURE, PICTURE]

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("fetch/ID", {}),
            ("fetch/ID/", BODY),
            ("fetch", {"request_id": "ID"}),
            ("inpaint", {"key": "", "request_id": "ID"}),
        ],
    )
    def test_every_way_to_fetch(
        self, path: str, fields: dict[str, str], client: httpx2.Client
    ) -> None:
        job_id = submit(client)
        if "request_id" in fields:
            fields = fields | {"request_id": str(job_id)}
        assert post(client, path.replace("ID", str(job_id)), **fields)["id"] == job_id

    @pytest.mark.parametrize("job_id", ["999999", "0", "x", "-1", "1.5", "9" * 30, "%00", "١"])
    def test_unknown_job(self, job_id: str, client: httpx2.Client) -> None:
        assert post(client, f"fetch/{job_id}") == NOT_FOUND
        assert post(client, "fetch", request_id=job_id) == NOT_FOUND

    def test_fetch_without_an_id(self, client: httpx2.Client) -> None:
        assert post(client, "fetch")["message"] == {
            "request_id": ["The request id field is required."]
        }

    def test_failed_job(self, client: httpx2.Client, settings: Settings) -> None:
        job_id = submit(client)
        with store_of(settings) as store:
            for job in store.claim("test", 10):
                store.fail(job, "No room")
        sentence = "Failed, Try Again. No room"
        assert post(client, f"fetch/{job_id}") == {
            "status": "failed",
            "id": job_id,
            "message": sentence,
            "messege": sentence,
            "output": "",
        }

    def test_base64_inline(self, client: httpx2.Client, settings: Settings) -> None:
        job_id = submit(client, base64="yes")
        finish(settings, job_id)
        text = base64.b64encode(PICTURE).decode()
        assert post(client, f"fetch/{job_id}")["output"] == [text, text]

    @pytest.mark.parametrize("base64", ["yes", "no"])
    def test_pictures_that_expired(self, base64: str, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        with running_app(settings) as app:
            job = finish(settings, submit(app.client, base64=base64))
            assert post(app.client, f"fetch/{job.id}")["status"] == "success"
            expire(settings, time.time() + (settings.retention.outputs_h + 1) * HOUR_S)
            gone = post(app.client, f"fetch/{job.id}")
            told = app.client.get(f"/api/jobs/{job.id}").json()
            sentence = "Failed, Try Again. The pictures are no longer there"
        assert gone == {
            "status": "failed",
            "id": job.id,
            "message": sentence,
            "messege": sentence,
            "output": "",
        }
        assert (told["state"], told["outputs"]) == ("finished", [])
        assert told["expired_at"] is not None

    def test_link_to_a_picture_that_was_removed_by_hand(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        with running_app(settings) as app:
            job = finish(settings, submit(app.client))
            Storage(settings.storage_url).delete(job.output_keys[0])
            gone, there = post(app.client, f"fetch/{job.id}")["output"]
            assert app.client.get(gone).status_code == 404
            assert app.client.get(there).status_code == 200

    def test_text_of_a_picture_that_was_removed_by_hand(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        with running_app(settings) as app:
            job = finish(settings, submit(app.client, base64="yes"))
            Storage(settings.storage_url).delete(job.output_keys[0])
            gone = post(app.client, f"fetch/{job.id}")
        assert gone["message"] == "Failed, Try Again. The pictures are no longer there"

    def test_base64_as_links(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, base64_output="link")
        with running_app(settings) as app:
            job_id = submit(app.client, base64="yes")
            job = finish(settings, job_id)
            (url, _) = post(app.client, f"fetch/{job_id}")["output"]
            assert url.endswith(f"/generations/{job.file_prefix}-0.base64")
            answer = app.client.get(url)
        assert answer.headers["content-type"].startswith("text/plain")
        assert base64.b64decode(answer.text) == PICTURE

    def test_half_a_surrogate_pair_harms_nobody(self, client: httpx2.Client) -> None:
        body = json.dumps(BODY | {"prompt": "a \ud800 cat", "key": "\udfff", "track_id": "\ud800"})
        answer = client.post("/api/v3/inpaint", content=body).json()
        assert answer["meta"]["prompt"].startswith("a ? cat ")

    def test_forms(self, client: httpx2.Client) -> None:
        fields = {name: str(value) for name, value in BODY.items()}
        files = {"init_image": ("a.png", PICTURE), "mask_image": ("b.png", PICTURE)}
        urlencoded = client.post("/api/v3/inpaint", data=fields).json()
        multipart = client.post("/api/v3/inpaint", data={"prompt": "a cat"}, files=files).json()
        in_query = client.post("/api/v3/inpaint", params=fields).json()
        answers = [urlencoded, multipart, in_query]
        assert [answer["status"] for answer in answers] == ["processing"] * 3


class TestForgivingReading:
    """What clients send that is not quite right, over HTTP and as far as the stored inputs."""

    @pytest.mark.parametrize(
        ("sent", "used"),
        [
            ({"width": "1170.0", "height": "2532.0"}, (472, 1024)),
            ({"width": 1920, "height": 1080}, (1024, 576)),
            ({"width": 8}, (64, 88)),
            ({"height": 8}, (64, 64)),
            ({"height": "1500"}, (712, 1024)),
            ({}, (64, 88)),
        ],
    )
    def test_sizes(
        self, sent: dict[str, object], used: tuple[int, int], client: httpx2.Client
    ) -> None:
        images = dict.fromkeys(["init_image", "mask_image"], TALL)
        meta = post(client, "inpaint", **(BODY | images | sent))["meta"]
        assert (meta["W"], meta["H"]) == used

    def test_words_for_nothing(self, client: httpx2.Client) -> None:
        absent = {"seed": "undefined", "negative_prompt": "None", "webhook": "none", "key": "null"}
        given = {"seed": -1, "scheduler": "LMS", "strength": 0, "enhance_prompt": "no"}
        first, second = (
            post(client, "inpaint", **(BODY | each)) for each in (absent, absent | given)
        )
        assert first["meta"]["seed"] != second["meta"]["seed"]
        assert second["meta"]["negative_prompt"] == ""
        assert second["meta"]["strength"] == 0.001

    def test_unescaped_plus_in_a_form(self, client: httpx2.Client) -> None:
        noise = base64.b64encode(NOISE).decode()
        assert "+" in noise
        form = f"prompt=a+cat&init_image={noise}&mask_image=data:image/png;base64,{noise}"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = client.post("/api/v3/inpaint", content=form, headers=headers).json()
        assert (answer["status"], answer["meta"]["W"]) == ("processing", 64)
        assert answer["meta"]["prompt"].startswith("a cat ")

    def test_multipart_parts_without_file_names(self, client: httpx2.Client) -> None:
        head = "--b\r\nContent-Disposition: form-data; name="
        parts = [
            head.encode() + b'"prompt"\r\n\r\na cat\r\n',
            head.encode() + b'"init_image"\r\n\r\n' + NOISE + b"\r\n",
            head.encode() + b"\"mask_image\"; filename*=UTF-8''m.png\r\n\r\n" + NOISE,
            b"\r\n--b--\r\n",
        ]
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = client.post("/api/v3/inpaint", content=b"".join(parts), headers=headers).json()
        assert answer["status"] == "processing"
        assert answer["meta"]["mask_image"] == f"(file, {len(NOISE)} bytes)"

    def test_line_breaks_in_json(self, client: httpx2.Client) -> None:
        body = json.dumps(BODY | {"prompt": "PROMPT", "enhance_prompt": "no"})
        content = body.replace("PROMPT", "a cat\n\ton a mat")
        answer = client.post("/api/v3/inpaint", content=content).json()
        assert answer["meta"]["prompt"] == "a cat\n\ton a mat"
        strict = client.post("/api/jobs", content=content)
        assert (strict.status_code, strict.json()["code"]) == (400, "invalid_body")

    @pytest.mark.parametrize(
        ("content", "content_type", "tip"),
        [
            ("prompt", "application/json", "Send the parameters as a JSON object in UTF-8."),
            (
                "--b",
                "multipart/form-data",
                "Send the form in UTF-8 and whole, a multipart form with its boundary.",
            ),
        ],
    )
    def test_tip_fits_the_body(
        self, content: str, content_type: str, tip: str, client: httpx2.Client
    ) -> None:
        headers = {"Content-Type": content_type}
        answer = client.post("/api/v3/inpaint", content=content, headers=headers).json()
        assert (answer["message"], answer["tip"]) == ("Invalid API Request", tip)

    def test_number_of_many_digits_names_its_field(self, client: httpx2.Client) -> None:
        content = json.dumps(BODY).replace('"seed": 5', '"seed": ' + "9" * 5_000)
        answer = client.post("/api/v3/inpaint", content=content).json()
        assert answer["message"] == {"seed": ["The seed must be a number."]}


class TestHolding:
    @pytest.fixture
    def held(self, tmp_path: Path) -> Iterator[tuple[LiveApp, Settings, Future[Any]]]:
        """A server that holds calls for long, and one call that it holds."""
        settings = settings_in(tmp_path, hold_s=60)
        with running_app(settings) as app, ThreadPoolExecutor(1) as threads:
            app.client.get("/healthz")  # it has started, and made its tables
            call = threads.submit(app.client.post, "/api/v3/inpaint", json=BODY, timeout=60)
            with store_of(settings) as store:
                while not waiting_in(store):
                    assert not call.done()
            yield app, settings, call

    def test_finished_within_the_hold_time(
        self, held: tuple[LiveApp, Settings, Future[Any]]
    ) -> None:
        _, settings, call = held
        job = finish(settings, 1)
        answer = call.result().json()
        assert list(answer) == ["status", "generationTime", "id", "output", "meta"]
        assert (answer["status"], answer["id"], len(answer["output"])) == ("success", job.id, 2)

    def test_failed_within_the_hold_time(self, held: tuple[LiveApp, Settings, Future[Any]]) -> None:
        _, settings, call = held
        with store_of(settings) as store:
            store.cancel(1)
        assert call.result().json()["status"] == "failed"

    def test_stopping_server_lets_held_calls_go(
        self, held: tuple[LiveApp, Settings, Future[Any]]
    ) -> None:
        app, settings, call = held
        app.stop()
        answer = call.result().json()
        assert (answer["status"], answer["id"]) == ("processing", 1)
        with store_of(settings) as store:
            assert waiting_in(store) == 1


class TestPaths:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/api/v3/inpaintt"),
            ("POST", "/api/v4/inpaint"),
            ("GET", "/api/v3/inpaint"),
            ("GET", "/api/v3/fetch/1"),
            ("PUT", "/api/v3/inpaint"),
            ("DELETE", "/api/v3/fetch/1"),
            ("GET", "/api/v3/%2e%2e/%2e%2e/etc/passwd"),
        ],
    )
    def test_wrong_path_of_the_vendor(self, method: str, path: str, client: httpx2.Client) -> None:
        answer = client.request(method, path)
        assert answer.status_code == 404
        expected = {
            "status": "error",
            "message": "Not found",
            "tip": "Pictures are made at POST /api/v3/inpaint.",
        }
        assert answer.json() | expected == answer.json()

    @pytest.mark.parametrize(
        ("method", "path", "status", "code"),
        [
            ("POST", "/", 405, "method_not_allowed"),
            ("GET", "/redoc", 404, "not_found"),
            ("GET", "/generations/x.png", 404, "not_found"),
            ("POST", "/generations/x.png", 405, "method_not_allowed"),
            ("POST", "/readyz", 405, "method_not_allowed"),
        ],
    )
    def test_wrong_path_elsewhere(
        self, method: str, path: str, status: int, code: str, client: httpx2.Client
    ) -> None:
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["cache-control"] == "no-store"

    @pytest.mark.parametrize(
        "target",
        [
            "/api/v3/fetch/999",
            "/api/v3/fetch/999/",
            "//api//v3///fetch/999//",
            "http://stablediffusionapi.com/api/v3/fetch/999",
            "https://stablediffusionapi.com//api/v3/fetch/999/",
            "http://h:80/api/v3/fetch/999?key=k",
        ],
    )
    def test_careless_targets(self, target: str, app: LiveApp) -> None:
        answer = request_raw(app.port, target)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == NOT_FOUND

    def test_every_answer_has_its_own_request_id(self, client: httpx2.Client) -> None:
        answers = [client.get("/healthz"), client.get("/nowhere"), client.post("/api/v3/fetch/1")]
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3
        assert not any("server" in answer.headers for answer in answers)

    def test_api_describes_itself(self, client: httpx2.Client) -> None:
        described = client.get("/openapi.json").json()
        assert "/api/v3/inpaint" in described["paths"]

    def test_urls_follow_the_host_and_a_trusted_proxy(self, locked: httpx2.Client) -> None:
        headers = {"host": "pictures.example", "x-forwarded-proto": "https", "key": FIRST}
        answer = locked.post("/api/v3/inpaint", json=BODY, headers=headers).json()
        assert answer["fetch_result"].startswith("https://pictures.example/api/v3/fetch/")

    @needs_both_families
    def test_a_proxy_is_known_on_a_socket_of_both_families(self, tmp_path: Path) -> None:
        with running_app(settings_in(tmp_path), "::") as app:
            headers = {"x-forwarded-proto": "https"}
            answer = app.client.post("/api/v3/inpaint", json=BODY, headers=headers).json()
        assert answer["fetch_result"].startswith("https://")

    def test_urls_follow_the_configured_address(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, public_url="https://pictures.example/sd/")
        with running_app(settings) as app:
            answer = post(app.client, "inpaint", **BODY)
        assert answer["fetch_result"] == "https://pictures.example/sd/api/v3/fetch/1"


class TestBrowsers:
    PREFLIGHT = {
        "origin": "https://site.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,key",
    }

    @pytest.mark.parametrize("path", ["/api/v3/inpaint", "/api/v3/fetch/5", "/api/v3/system_load"])
    def test_preflight(self, path: str, locked: httpx2.Client) -> None:
        answer = locked.options(path, headers=self.PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert {"content-type", "key"} <= set(
            answer.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
        )
        assert "access-control-allow-credentials" not in answer.headers

    @pytest.mark.parametrize("path", ["/api/v3/inpaint", "/api/v3/fetch/5", "/nowhere"])
    def test_answers_may_be_read(self, path: str, client: httpx2.Client) -> None:
        answer = client.post(path, headers={"origin": "https://site.example"})
        assert answer.headers["access-control-allow-origin"] == "*"

    def test_pages_may_read_what_answers_tell_in_headers(self, locked: httpx2.Client) -> None:
        answer = locked.post("/api/v3/inpaint", headers={"origin": "https://site.example"})
        exposed = set(answer.headers["access-control-expose-headers"].lower().split(", "))
        of_dialects = {name.lower() for each in DIALECTS for name in each.exposed_headers}
        assert exposed - of_dialects == {
            *("allow", "content-disposition", "idempotency-replayed", "location"),
            *("retry-after", "www-authenticate", "x-request-id"),
        }
        assert of_dialects
        assert of_dialects < exposed
        assert answer.headers["x-request-id"]

    def test_headers_that_are_sent_are_exposed(
        self, client: httpx2.Client, locked: httpx2.Client
    ) -> None:
        page = {"origin": "http://localhost:3000"}
        created = client.post("/api/jobs", json=NATIVE_BODY, headers=page)
        assert created.status_code == 202, created.text
        picture = client.get(f"/generations/{uuid.uuid4()}-0.png", headers=page)
        refused = locked.post("/api/jobs", headers=page)
        wrong = client.put("/api/jobs", headers=page)
        readable = {"cache-control", "content-length", "content-type", "date", "server", "vary"}
        for answer in (created, picture, refused, wrong):
            exposed = set(answer.headers["access-control-expose-headers"].lower().split(", "))
            others = {name for name in answer.headers if not name.startswith("access-control-")}
            assert others - readable - {"x-content-type-options", "connection"} <= exposed

    @pytest.mark.parametrize("path", ["/api/jobs", "/api/v3/inpaint"])
    def test_pages_may_send_what_clients_send(self, path: str, locked: httpx2.Client) -> None:
        names = "authorization,content-type,idempotency-key,key,last-event-id,prefer,x-api-key"
        asked = {**self.PREFLIGHT, "access-control-request-headers": names}
        answer = locked.options(path, headers=asked)
        assert answer.status_code == 200
        # Named, because `*` does not stand for `Authorization` (Fetch, 3.3.3).
        allowed = answer.headers["access-control-allow-headers"].lower().replace(" ", "")
        assert {*names.split(",")} <= {*allowed.split(",")}

    @pytest.mark.parametrize(
        ("origin", "status"), [("https://site.example", 400), ("http://localhost:3000", 200)]
    )
    def test_a_preflight_promises_what_the_call_will_get(
        self, origin: str, status: int, client: httpx2.Client
    ) -> None:
        preflight = client.options("/api/v3/inpaint", headers={**self.PREFLIGHT, "origin": origin})
        call = client.post("/api/jobs", headers={"origin": origin})
        assert (preflight.status_code, call.status_code == 403) == (
            status,
            status == 400,
        )

    def test_origins_can_be_restricted(self, tmp_path: Path) -> None:
        with running_app(settings_in(tmp_path, cors_origins=["https://ours.example"])) as app:
            ours = {**self.PREFLIGHT, "origin": "https://ours.example"}
            answer = app.client.options("/api/v3/inpaint", headers=ours)
            assert answer.headers["access-control-allow-origin"] == "https://ours.example"
            answer = app.client.options("/api/v3/inpaint", headers=self.PREFLIGHT)
            assert "access-control-allow-origin" not in answer.headers


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client without a key of a server with keys, which one page elsewhere may call."""
    origins = ["*", "https://ours.example"]
    folder = tmp_path_factory.mktemp("data")
    settings = settings_in(folder, auth={"keys": KEYS}, cors_origins=origins)
    with running_app(settings) as app:
        yield app.client


class TestPagesOfElsewhere:
    """A server without keys, on loopback: every browser of the machine can reach it."""

    CALLS = [
        ("POST", "/api/v3/fetch/1"),
        ("POST", "/api/v3/inpaint"),
        ("GET", "/api/jobs"),
        ("POST", "/api/jobs"),
        ("GET", "/generations/x.png"),
    ]

    @pytest.mark.parametrize(("method", "path"), CALLS)
    @pytest.mark.parametrize(
        "headers",
        [
            {"origin": "https://site.example"},
            {"origin": "http://localhost.site.example"},
            {"origin": "http://127.0.0.1.site.example:8000"},
            {"origin": "null"},
            {"origin": "http://["},
            {"host": "site.example"},
            {"host": "site.example:8000", "origin": "http://site.example:8000"},
            {"host": "localhost.site.example"},
            {"x-forwarded-for": "192.0.2.1"},
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        ],
        ids=str,
    )
    def test_are_refused(
        self, method: str, path: str, headers: dict[str, str], client: httpx2.Client
    ) -> None:
        answer = client.request(method, path, headers=headers)
        assert "serves its own machine only" in answer.text
        is_page = {"origin", "sec-fetch-site"} & headers.keys() and "host" not in headers
        shown = "page of another origin" if is_page else "Host" if "host" in headers else "address"
        assert shown in answer.text or (shown == "address" and path.startswith("/api/v3"))
        assert answer.status_code == (200 if path.startswith("/api/v3/") else 403)

    @pytest.mark.parametrize(
        "headers",
        [
            {"origin": "http://localhost:3000"},
            {"origin": "http://127.0.0.1:3000"},
            {"origin": "https://[::1]"},
            {"host": "LOCALHOST:8000"},
            {"host": "127.0.0.9"},
            {"host": "[::1]:8000"},
            {"x-forwarded-for": "127.0.0.1"},
            {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
            {"sec-fetch-site": "cross-site", "origin": "http://localhost:3000"},
        ],
        ids=str,
    )
    def test_programs_of_the_machine_are_served(
        self, headers: dict[str, str], client: httpx2.Client
    ) -> None:
        answer = client.post("/api/v3/system_load", headers=headers)
        assert answer.json()["status"] == "ok"

    def test_a_link_of_elsewhere_may_be_followed(self, client: httpx2.Client) -> None:
        headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        assert client.get("/api/jobs", headers=headers).status_code == 200
        assert client.post("/api/jobs", headers=headers).status_code == 403

    def test_named_pages_and_hosts_are_served(self, tmp_path: Path) -> None:
        page, headers = "https://ours.example", {"host": "front.example"}
        named = {"cors_origins": [page, "null"], "public_url": "https://front.example/sd"}
        with running_app(settings_in(tmp_path, **named)) as app:
            for origin in (page, "null"):
                answer = app.client.get("/api/jobs", headers=headers | {"origin": origin})
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == origin
            headers["host"] = "back.example"
            assert app.client.get("/api/jobs", headers=headers).status_code == 403

    @pytest.mark.parametrize("auth", [{"keys": KEYS}, {"allow_anonymous": True}], ids=str)
    def test_all_are_served_with_a_key_or_where_that_is_meant(
        self, auth: dict[str, Any], tmp_path: Path
    ) -> None:
        headers = {
            "origin": "https://site.example",
            "host": "pictures.example",
            "x-forwarded-for": "192.0.2.1",
            "key": FIRST,
        }
        with running_app(settings_in(tmp_path, auth=auth)) as app:
            answer = app.client.post("/api/v3/system_load", headers=headers)
            assert answer.json()["status"] == "ok"
            assert answer.headers["access-control-allow-origin"] == "*"
            probe = app.client.get("/healthz", headers=headers)
            assert probe.status_code == 200

    BASIC = {"authorization": "Basic " + base64.b64encode(f"user:{FIRST}".encode()).decode()}

    @pytest.mark.parametrize(
        "path",
        [
            *("/sdapi/v1/interrupt", "/api/jobs/1/cancel", "/v1/predictions/1/cancel"),
            *("/api/v3/system_load", "/api/v6/images/text2img"),
        ],
    )
    @pytest.mark.parametrize(
        "headers",
        [
            {"origin": "https://site.example"},
            {"origin": "https://front.example:8443", "sec-fetch-site": "same-site"},
            {"origin": "https://front.example.site.example"},
            {"origin": "null"},
            {"origin": "http://["},
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
            {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
        ],
        ids=str,
    )
    def test_key_that_the_browser_has_stored_is_refused(
        self, path: str, headers: dict[str, str], closed: httpx2.Client
    ) -> None:
        """A form of any page would send it: that is CSRF."""
        headers = {"host": "front.example", **headers}
        answer = closed.post(path, headers={**headers, **self.BASIC})
        assert "key that the browser has stored" in answer.text
        assert answer.status_code == (200 if path.startswith("/api/v") else 403)
        sent = closed.post(path, headers={**headers, **self.BASIC, "key": SECOND})
        assert "stored" not in sent.text, "a page that knows a key may send it"

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"sec-fetch-site": "same-origin"},
            {"origin": "https://front.example"},
            {"origin": "https://back.example", "sec-fetch-site": "same-origin"},
            {"origin": "https://ours.example", "sec-fetch-site": "cross-site"},
        ],
        ids=str,
    )
    def test_programs_and_own_pages_may_use_basic(
        self, headers: dict[str, str], closed: httpx2.Client
    ) -> None:
        headers = {"host": "front.example", **headers, **self.BASIC}
        assert closed.post("/sdapi/v1/interrupt", headers=headers).status_code == 200

    def test_link_may_be_followed_with_basic(self, closed: httpx2.Client) -> None:
        headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", **self.BASIC}
        assert closed.get("/sdapi/v1/progress", headers=headers).status_code == 200

    @pytest.mark.parametrize("path", ["/healthz", "/readyz", "/readyz/workers"])
    def test_probes_come_under_any_name(self, path: str, client: httpx2.Client) -> None:
        answer = client.get(path, headers={"host": "10.0.0.7"})
        assert answer.status_code in (200, 503)


class TestOutputs:
    def test_picture_is_served_as_nothing_else(self, url: str, client: httpx2.Client) -> None:
        answer = client.get(url)
        assert (answer.status_code, answer.content) == (200, PICTURE)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        assert answer.headers["content-disposition"] == "inline"
        assert "immutable" in answer.headers["cache-control"]

    @pytest.mark.parametrize("suffix", [".png", ".base64"])
    def test_head_tells_the_length(self, suffix: str, url: str, client: httpx2.Client) -> None:
        whole, answer = (method(url[:-4] + suffix) for method in (client.get, client.head))
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == str(len(whole.content))
        assert answer.headers["content-type"] == whole.headers["content-type"]

    @pytest.mark.parametrize("size", [0, 1, 2, 3, 65_535, 65_536, 65_537, 200_001, 200_002])
    def test_pictures_come_whole_in_pieces(
        self, size: int, client: httpx2.Client, settings: Settings
    ) -> None:
        content = random.Random(size).randbytes(size)
        name = f"generations/{uuid.UUID(int=size + 1)}-0"
        Storage(settings.storage_url).put(f"{name}.png", content)
        assert client.get(f"/{name}.png").content == content
        assert client.get(f"/{name}.base64").content == base64.b64encode(content)

    @pytest.mark.parametrize("output_format", OutputFormat)
    def test_picture_of_each_format_has_its_media_type(
        self, output_format: OutputFormat, client: httpx2.Client, settings: Settings
    ) -> None:
        (name,) = output_names_of(str(uuid.uuid4()), 1, 3, output_format)
        Storage(settings.storage_url).put(f"generations/{name}", PICTURE)
        answer = client.get(f"/generations/{name}")
        assert (answer.content, answer.headers["content-type"]) == (
            PICTURE,
            output_format.media_type,
        )
        text = client.get(f"/generations/{name}.base64")
        assert text.content == base64.b64encode(PICTURE)
        assert text.headers["content-type"].startswith("text/plain")

    def test_query_string_is_ignored(self, url: str, client: httpx2.Client) -> None:
        assert client.get(f"{url}?v=1").content == PICTURE

    def test_ranges_are_not_served(self, url: str, client: httpx2.Client) -> None:
        answer = client.get(url, headers={"range": "bytes=" + ",".join(["0-1"] * 1_000)})
        assert (answer.status_code, answer.content) == (200, PICTURE)

    @pytest.mark.parametrize(
        "name",
        [
            "00000000-0000-0000-0000-000000000000-0.png",
            "x.png",
            ".png",
            "",
            "..%2finpaint.db",
            "%2e%2e/inpaint.db",
            "..%5c..%5cinpaint.db",
            "../../inpaint.db",
            "....//inpaint.db",
            "%2fetc%2fpasswd",
            "..%252finpaint.db",
            "../inputs/{prefix}.npy",
            "{prefix}-0.png%00",
            "{prefix}-0.png%0a",
            "{prefix}-0.PNG",
            "{prefix}-9.png",
            "{prefix}-0-" + "1" * 300 + ".png",
            "{prefix}-0",
            "{prefix}-0.html",
            "{prefix}-0.jpg",
            "{prefix}-0.webp.base64",
            "{prefix}-0.base64.png",
            "./x/../{prefix}-0.png",
            "%2e/{prefix}-0.png",
        ],
    )
    def test_other_names_are_not_found(self, name: str, url: str, app: LiveApp) -> None:
        prefix = url.rpartition("/")[2].removesuffix("-0.png")
        target = "/generations/" + name.format(prefix=prefix)
        answer = request_raw(app.port, target, "GET")
        assert answer.startswith(b"HTTP/1.1 404")
        assert b"application/problem+json" in answer


class TestKeys:
    @pytest.mark.parametrize(
        "how",
        [
            {"json": {"key": FIRST}},
            {"data": {"key": FIRST}},
            {"params": {"key": FIRST}},
            {"headers": {"key": FIRST}},
            {"headers": {"authorization": f"Bearer {FIRST}"}},
            {"headers": {"key": FIRST}, "json": {"key": ""}},
            {"params": {"key": FIRST}, "json": {"key": None}},
        ],
    )
    def test_places_for_a_key(self, how: dict[str, Any], locked: httpx2.Client) -> None:
        assert locked.post("/api/v3/system_load", **how).json()["status"] == "ok"

    @pytest.mark.parametrize("path", ["inpaint", "fetch/1", "fetch", "system_load"])
    @pytest.mark.parametrize("key", [None, "", "three", f"{FIRST} ' --"])
    def test_other_keys_are_refused(
        self, key: str | None, path: str, locked: httpx2.Client
    ) -> None:
        answer = post(locked, path, **(BODY | {"key": key}))
        assert (answer["status"], answer["message"]) == ("error", "Invalid Api Key")

    def test_job_of_another_key_is_not_found(self, locked: httpx2.Client) -> None:
        job_id = submit(locked, key=FIRST)
        assert post(locked, f"fetch/{job_id}", key=FIRST)["status"] == "processing"
        assert post(locked, f"fetch/{job_id}", key=SECOND) == NOT_FOUND
        assert post(locked, "fetch", key=SECOND, request_id=job_id) == NOT_FOUND
        assert post(locked, "inpaint", key=SECOND, request_id=job_id) == NOT_FOUND


class TestStoredKeys:
    """A running server and `inpaint-server keys` beside it."""

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Iterator[KeyStore]:
        engine = open_engine(settings_in(tmp_path).sqlalchemy_url)
        migrate(engine)
        yield KeyStore(engine)
        engine.dispose()

    def test_a_key_may_have_a_hold_of_its_own(self, keys: KeyStore, tmp_path: Path) -> None:
        hasty, _ = keys.create("hasty", KeyLimits(hold_s=0))
        with running_app(settings_in(tmp_path, hold_s=600)) as app:
            answer = post(app.client, "inpaint", **BODY, key=hasty)
        assert answer["status"] == "processing"

    def test_making_and_revoking_counts_within_seconds(
        self, keys: KeyStore, tmp_path: Path
    ) -> None:
        def ask_until(expected: str, client: httpx2.Client, key: str) -> None:
            limit = time.monotonic() + 30
            while post(client, "system_load", key=key)["status"] != expected:
                assert time.monotonic() < limit

        with running_app(settings_in(tmp_path)) as app:
            client = app.client
            assert post(client, "system_load")["status"] == "ok"
            key, row = keys.create("team")
            ask_until("error", client, "")  # no longer open
            ask_until("ok", client, key)
            keys.revoke(row.key_id)
            ask_until("error", client, key)
            assert post(client, "system_load", key=key) == post(client, "system_load", key="x")

    def test_calls_over_the_limit(self, keys: KeyStore, tmp_path: Path) -> None:
        key, _ = keys.create("team", KeyLimits(requests_per_minute=2))
        with running_app(settings_in(tmp_path)) as app:
            answers = [app.client.post("/api/v3/system_load", headers={"key": key}) for _ in "abc"]
        assert [answer.json()["status"] for answer in answers] == ["ok", "ok", "error"]
        refused = answers[2].json()
        assert list(refused) == ["status", "message", "tips", "retry_after"]
        assert refused["message"] == "Rate limit exceeded. Maximum 2 requests per minute allowed."
        assert answers[2].headers["retry-after"] == str(refused["retry_after"])
        # A token in half a minute, of which some has passed.
        assert 10 <= refused["retry_after"] <= 30

    def test_guessing_is_slowed_down(self, keys: KeyStore, tmp_path: Path) -> None:
        keys.create("team")
        with running_app(settings_in(tmp_path, auth={"wrong_keys_per_minute": 2})) as app:
            messages = [
                post(app.client, "system_load", key=f"guess {n}")["message"] for n in range(3)
            ]
        assert messages[:2] == ["Invalid Api Key"] * 2
        assert messages[2] == "Rate limit exceeded. Too many wrong keys came from this address."

    @needs_both_families
    def test_ipv4_clients_of_a_socket_of_both_families_are_told_apart(
        self, keys: KeyStore, tmp_path: Path
    ) -> None:
        keys.create("team")
        settings = settings_in(tmp_path, host="::", auth={"wrong_keys_per_minute": 1})
        elsewhere = httpx2.HTTPTransport(local_address="127.0.0.2")
        with (
            running_app(settings, "::") as app,
            httpx2.Client(
                base_url=app.client.base_url, timeout=ANSWER_S, transport=elsewhere
            ) as other,
        ):
            messages = [
                post(client, "system_load", key="guess")["message"]
                for client in (app.client, app.client, other)
            ]
        assert [message.startswith("Rate limit") for message in messages] == [False, True, False]


class TestErrors:
    @pytest.mark.parametrize("content", ["{", "[]", '{"a": NaN}', "\x00", "[" * 100_000])
    def test_unreadable_body(self, content: str, client: httpx2.Client) -> None:
        answer = client.post("/api/v3/inpaint", content=content).json()
        assert (answer["status"], answer["message"]) == ("error", "Invalid API Request")

    def test_all_fields_at_fault_at_once(self, client: httpx2.Client) -> None:
        assert post(client, "inpaint", samples=5) == {
            "status": "error",
            "message": {
                "prompt": ["The prompt field is required."],
                "init_image": ["The init image field is required."],
                "mask_image": ["The mask image field is required."],
                "samples": ["The samples must be between 1 and 4."],
            },
        }

    @pytest.mark.parametrize(
        ("image", "sentence"),
        [
            (
                "http://127.0.0.1:1/a.png",
                "The init image is at a private address; the server's operator can allow it with "
                "INPAINT_FETCH__ALLOW_CIDRS or INPAINT_FETCH__ALLOW_HOSTS.",
            ),
            (
                "http://example.org/?token=" + "a" * 8_192,
                "The init image URL may not be greater than 8192 characters.",
            ),
            ("http://169.254.169.254/", "The init image could not be downloaded."),
            ("http://user@pictures.example/", "The init image must be a valid URL."),
            ("file:///etc/passwd", "The init image must be a URL, base64 or a file."),
            ("/images/a.png", "The init image must be a URL, base64 or a file."),
            ("AAAA", "The init image is not a PNG, JPEG or WEBP image."),
            ("A" * 14_000_000, "The init image is too large."),
        ],
        ids=lambda value: value[:40],
    )
    def test_image_that_cannot_be_had(
        self, image: str, sentence: str, client: httpx2.Client
    ) -> None:
        answer = post(client, "inpaint", **(BODY | {"init_image": image}))
        assert answer == {"status": "error", "message": {"init_image": [sentence]}}

    def test_body_over_the_limit(self, tmp_path: Path) -> None:
        with running_app(settings_in(tmp_path, max_body_bytes=10_000)) as app:
            for content in (b"x" * 10_001, iter([b"x" * 6_000] * 2)):
                answer = app.client.post("/api/v3/inpaint", content=content).json()
                assert answer["message"] == "Invalid API Request"
            assert post(app.client, "system_load")["status"] == "ok"

    @pytest.mark.parametrize("error_status", ["legacy", "http"])
    def test_status_codes(self, error_status: str, tmp_path: Path) -> None:
        def codes_of(*answers: httpx2.Response) -> list[tuple[int, str | None]]:
            return [(each.status_code, each.headers.get("retry-after")) for each in answers]

        settings = settings_in(
            tmp_path, error_status=error_status, auth={"keys": KEYS}, queue={"max_waiting": 0}
        )
        with running_app(settings) as app:
            post = app.client.post
            codes = codes_of(
                post("/api/v3/inpaint", content="{"),
                post("/api/v3/inpaint", json={"key": FIRST}),
                post("/api/v3/inpaint", json=BODY),
                post("/api/v3/fetch/5", json={"key": FIRST}),
                post("/api/v3/inpaint", json=BODY | {"key": FIRST}),
                post("/nowhere"),
            )
        http = [(400, None), (400, None), (401, None), (404, None), (429, "30"), (404, None)]
        legacy = [(200, None)] * 4 + [(200, "30"), (404, None)]
        assert codes == (http if error_status == "http" else legacy)

    def test_full_queue_is_said_before_images_are_fetched(self, tmp_path: Path) -> None:
        with running_app(settings_in(tmp_path, queue={"max_waiting": 1})) as app:
            submit(app.client)
            answer = post(app.client, "inpaint", **(BODY | {"init_image": "http://127.0.0.1:1/"}))
        assert answer["message"] == "Rate limit exceeded. Maximum 1 queued requests allowed."
        assert answer["retry_after"] == 30

    @pytest.mark.parametrize(
        ("damage", "code", "message"),
        [
            ("ALTER TABLE jobs RENAME TO canary", 503, "The server cannot store requests now"),
            (
                """UPDATE jobs SET params = '{"canary": 1}'""",
                500,
                "Something went wrong on the server",
            ),
        ],
    )
    def test_our_own_faults_tell_nothing(
        self, damage: str, code: int, message: str, tmp_path: Path
    ) -> None:
        settings = settings_in(tmp_path, error_status="http")
        with running_app(settings) as app:
            engine = open_engine(settings.sqlalchemy_url)
            JobStore(engine).submit(new_job(key_id="anonymous"))
            with engine.begin() as connection:
                connection.execute(text(damage))
            engine.dispose()
            answer = app.client.post("/api/v3/fetch/1")
        assert (answer.status_code, answer.json()["message"]) == (code, message)
        assert "canary" not in answer.text

    @pytest.mark.parametrize("path", ["/readyz", "/api/jobs/1", "/api/v3/fetch/1"])
    def test_only_the_vendors_paths_have_errors_with_status_200(
        self, path: str, tmp_path: Path
    ) -> None:
        settings = settings_in(tmp_path)
        with running_app(settings) as app:
            engine = open_engine(settings.sqlalchemy_url)
            with engine.begin() as connection:
                for table in ("jobs", "workers"):
                    connection.execute(text(f"ALTER TABLE {table} RENAME TO canary_{table}"))
            engine.dispose()
            answer = app.client.request("POST" if "v3" in path else "GET", path)
        assert answer.status_code == (200 if "v3" in path else 503)
        assert answer.headers["retry-after"] == ("5" if path == "/readyz" else "10")
        assert answer.headers["cache-control"] == "no-store"


class TestHealth:
    def test_process_is_alive_without_workers(self, client: httpx2.Client) -> None:
        assert client.get("/healthz").json() == {"status": "ok"}

    def test_readiness_follows_the_workers(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, workers=None)
        loading = WorkerStatus("w", "cpu", "builtin", "loading", "loading model 40%", 0)
        failed = WorkerStatus("v", "cpu", "builtin", "failed", "/srv/canary: no such file", 0)
        with running_app(settings) as app, store_of(settings) as store:
            for worker, code, reason in [
                (None, 503, "0/1 workers ready"),
                (loading, 503, "0/1 workers ready; loading model 40%"),
                (worker_status("w", 0), 200, "1/1 workers ready"),
                (failed, 200, "1/2 workers ready; 1 failed"),
            ]:
                if worker is not None:
                    store.workers.report(seen_now(worker))
                answer = app.client.get("/readyz/workers")
                assert (answer.status_code, answer.json()["reason"]) == (code, reason)
                # A request is taken all the same, and waits.
                answer = app.client.get("/readyz")
                assert (answer.status_code, answer.json()["reason"]) == (200, reason)

    def test_load_is_told_in_integers(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        with running_app(settings) as app, store_of(settings) as store:
            nothing = {"queue_num": 0, "status": "ok"}
            load = post(app.client, "system_load")
            assert load == {**nothing, "queue_time": START_S}, "nobody works yet"
            assert isinstance(load["queue_time"], int)
            store.workers.report(seen_now(worker_status("w", 0)))

            def is_told(**load: int) -> bool:
                return bool(post(app.client, "system_load") == {**nothing, **load})

            # A forecast that took long to make counts for a moment.
            until(lambda: is_told(queue_time=0), ANSWER_S, "a worker is ready")
            for _ in range(20):  # more than a worker makes side by side
                submit(app.client)
            until(lambda: post(app.client, "system_load")["queue_num"] == 20, ANSWER_S, "20 wait")
            load = post(app.client, "system_load")
        assert isinstance(load["queue_time"], int)
        assert load["queue_time"] > 0


def test_serve_without_workers_starts_and_stops_and_logs_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_HOLD_S", "0")
    command = [
        sys.executable,
        "-P",
        "-m",
        "server.cli.main",
        "serve",
        "--port",
        "0",
        "--workers",
        "0",
    ]
    folder = tmp_path / "data"
    with subprocess.Popen(
        [*command, "--data-dir", str(folder)], stderr=subprocess.PIPE, text=True, umask=0o022
    ) as process:
        assert process.stderr is not None
        try:
            lines = map(json.loads, process.stderr)
            url = next(line["url"] for line in lines if line["event"] == "listening")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "others can read it"
            with httpx2.Client(base_url=url, timeout=ANSWER_S, trust_env=False) as client:
                call = {"prompt": "canary", "key": "canary", "webhook": "http://canary"}
                assert submit(client, **call, scheduler="canary") == 1
                client.post("/api/v3/system_load?key=canary", headers={"key": "canary"})
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
            assert len([line for line in rest if line["event"] == "request"]) == 2
            assert not any("exception" in line for line in rest)
            (ignored,) = [line for line in rest if line["event"] == "parameters ignored"]
            assert (ignored["job_id"], ignored["detail"]) == (1, "scheduler_ignored")
            assert "canary" not in str(rest)
        finally:
            process.kill()  # without effect once it has ended
    assert process.returncode == 0

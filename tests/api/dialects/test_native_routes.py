"""The native API behind the real HTTP server, without a worker: the tests do its work."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update

from models.imaging.mask_reading import MaskReading
from server.core.notices import Notice
from server.core.settings import Settings
from server.jobs.job import Failure, Heartbeat
from server.jobs.receipts import Model, PictureReceipt, Receipt, RunTimes
from server.jobs.store import MAX_ATTEMPTS, JobStore
from server.sandbox.decoded import DecodedPair
from server.storage.database import open_engine
from server.storage.files import Storage
from server.storage.tables import idempotency_keys, jobs
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in
from tests.support.clocks import Clock
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.jobs import claim_job, get
from tests.support.native_calls import BODY, PICTURE, create, problem_of
from tests.support.v3_calls import post

pytestmark = pytest.mark.process

OUTPUT = png_bytes(shade=200)
RECEIPT = Receipt(
    model=Model("builtin", "ab" * 32, "cpu", "float32"),
    versions={"server": "1", "torch": "2", "diffusers": "3"},
    times=RunTimes(10.0, 20.0, 30.0, 40.0, 50.0),
    coverage=0.25,
    box=(0, 0, 32, 32),
    pictures=(
        PictureReceipt("cd" * 32, 5, False, 0, 0),
        PictureReceipt("ef" * 32, 6, True, None, None),
    ),
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    """A server with two keys."""
    with running_app(settings) as app:
        yield app


def inline(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def read(client: httpx2.Client, job_id: int) -> dict[str, Any]:
    answer = client.get(f"/api/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


class TestLifeOfAJob:
    def test_accepted(self, client: httpx2.Client, settings: Settings) -> None:
        answer = client.post("/api/jobs", json=BODY)
        job = answer.json()
        assert answer.status_code == 202
        assert answer.headers["location"] == f"{client.base_url}/api/jobs/{job['id']}"
        assert (job["state"], job["attempts"], job["error"]) == ("queued", 0, None)
        assert job["position"] >= 1
        assert job["eta_s"] > 0
        assert job["progress"] == {"step": 0, "total_steps": 0}
        assert (job["outputs"], job["receipt"], job["warnings"]) == ([], None, [])
        assert job["mask"] == {"read_as": "white", "coverage": None, "box": None}
        assert job["params"]["num_inference_steps"] == 20, "what was left open is told"
        assert (job["params"]["width"], job["params"]["seed"]) == (64, 5)
        assert (job["track_id"], job["samples"]) == (7, 2)
        assert job["timings_ms"]["fetch"] >= 0
        assert job["timings_ms"]["decode_images"] > 0
        assert job["timings_ms"]["queued"] is None

    def test_extended(self, client: httpx2.Client, settings: Settings, store: JobStore) -> None:
        sides = {"left": 64, "bottom": 32}
        job = create(client, extend=sides, mask_image=None)
        assert (job["params"]["width"], job["params"]["height"]) == (128, 96)
        assert job["warnings"] == []
        stored = Storage(settings.storage_url).get(get(store, job["id"]).input_key)
        assert stored is not None
        mask = DecodedPair.from_bytes(stored).mask
        assert not mask[:64, 64:].any()
        assert (mask.sum() // 255) == 128 * 96 - 64 * 64
        masked = create(client, extend=sides, only_masked=True, width=256)
        assert (masked["params"]["width"], masked["params"]["height"]) == (256, 512)
        nothing = client.post("/api/jobs", json=BODY | {"mask_image": None})
        assert problem_of(nothing) == (422, "invalid_fields")

    def test_what_was_not_applied_is_told(self, client: httpx2.Client) -> None:
        assert create(client)["warnings"] == []
        job = create(client, prompt="a cat <lora:x:1>", negative_prompt="[fog|rain]")
        told = job["warnings"]
        assert [each["code"] for each in told] == ["lora_tag_ignored", "prompt_syntax_unsupported"]
        assert all(each["message"] for each in told)
        assert read(client, job["id"])["warnings"] == told
        assert job["params"]["prompt"] == "a cat <lora:x:1>"

    def test_what_a_vendors_call_had_ignored_is_told(self, client: httpx2.Client) -> None:
        call = BODY | {"key": FIRST, "scheduler": "LMSDiscreteScheduler"}
        answer = post(client, "inpaint", **call)
        assert answer["status"] == "processing"
        told = read(client, answer["id"])
        assert [each["code"] for each in told["warnings"]] == ["scheduler_ignored"]
        assert told["params"]["scheduler"] is None

    def test_job_of_an_earlier_version_has_no_warnings(
        self, client: httpx2.Client, settings: Settings
    ) -> None:
        job_id = create(client, prompt="a <lora:x:1>")["id"]
        engine = open_engine(settings.sqlalchemy_url)
        with engine.begin() as connection:
            row = connection.execute(select(jobs.c.request).where(jobs.c.id == job_id)).one()
            earlier = {name: value for name, value in row.request.items() if name != "warnings"}
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(request=earlier))
        engine.dispose()
        assert read(client, job_id)["warnings"] == []

    def test_running_with_progress(self, client: httpx2.Client, store: JobStore) -> None:
        job = claim_job(store, create(client)["id"])
        store.heartbeat(job, 3, 14)
        told = read(client, job.id)
        assert (told["state"], told["position"], told["attempts"]) == ("running", None, 1)
        assert told["progress"] == {"step": 3, "total_steps": 14}
        assert told["eta_s"] > 0
        assert told["timings_ms"]["queued"] >= 0

    def test_finished_with_receipt(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        job = claim_job(store, create(client)["id"])
        for key in job.output_keys:
            Storage(settings.storage_url).put(key, OUTPUT)
        store.finish(job, [False, True], RECEIPT)
        told = read(client, job.id)
        assert (told["state"], told["position"], told["eta_s"]) == ("finished", None, None)
        assert told["mask"] == {"read_as": "white", "coverage": 0.25, "box": [0, 0, 32, 32]}
        assert told["receipt"] == {
            "model": {
                "id": "builtin",
                "weights_sha256": "ab" * 32,
                "device": "cpu",
                "dtype": "float32",
                "loras": [],
            },
            "versions": RECEIPT.versions,
            "inputs": {
                "init_image_sha256": hashlib.sha256(PICTURE).hexdigest(),
                "mask_image_sha256": hashlib.sha256(PICTURE).hexdigest(),
            },
        }
        first, second = told["outputs"]
        assert (first["sha256"], first["seed"], first["changed_outside"]) == ("cd" * 32, 5, 0)
        assert (second["is_flagged"], second["seed"], second["changed_outside"]) == (True, 6, None)
        assert client.get(first["url"]).content == OUTPUT
        stages = [told["timings_ms"][name] for name in ("prepare", "denoise", "decode")]
        assert stages == [10.0, 20.0, 30.0]
        assert told["timings_ms"]["total"] > 0

    def test_empty_mask_is_told_at_once(self, client: httpx2.Client) -> None:
        black = inline(png_bytes(shade=100))
        cases: list[tuple[dict[str, Any], list[str]]] = [
            ({"mask_image": black}, ["mask_is_empty"]),
            ({"mask_image": black, "soft_mask": True}, []),
            ({"mask_image": black, "invert_mask": True}, []),
            ({"mask_image": inline(png_bytes(shade=255)), "invert_mask": True}, ["mask_is_empty"]),
            ({"mask_image": black, "only_masked": True}, ["mask_is_empty"]),
        ]
        for changes, codes in cases:
            job = read(client, create(client, **changes)["id"])
            assert [each["code"] for each in job["warnings"]] == codes, changes
        assert "no pixel" in create(client, mask_image=black)["warnings"][0]["message"]

    def test_mask_that_shrank_to_nothing_is_told_at_the_end(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        job = claim_job(store, create(client, mask_grow=-64)["id"])
        assert read(client, job.id)["warnings"] == []
        for key in job.output_keys:
            Storage(settings.storage_url).put(key, OUTPUT)
        store.finish(job, [False, False], replace(RECEIPT, coverage=0.0, box=None))
        told = read(client, job.id)
        assert [each["code"] for each in told["warnings"]] == ["mask_is_empty"]
        assert told["mask"] == {"read_as": "white", "coverage": 0.0, "box": None}

    def test_mask_of_other_proportions_is_told(self, client: httpx2.Client) -> None:
        wide, odd = inline(png_bytes(256, 192)), inline(png_bytes(101, 67))
        cases: list[tuple[dict[str, Any], bool]] = [
            ({"init_image": wide, "mask_image": inline(png_bytes(192, 256))}, True),
            ({"init_image": wide, "mask_image": inline(png_bytes(128, 96))}, False),
            ({"init_image": wide, "mask_image": inline(png_bytes(129, 96))}, False),
            ({"init_image": odd}, True),
            ({"init_image": odd, "mask_image": inline(png_bytes(96, 64))}, False),
            # Drawn at the size of the result.
            ({"init_image": wide, "width": 64, "height": 64}, False),
        ]
        for changes, is_told in cases:
            told = create(client, **changes)["warnings"]
            expected = ["mask_proportions_differ"] if is_told else []
            assert [each["code"] for each in told] == expected, changes

    def test_warnings_are_described(self, client: httpx2.Client) -> None:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
        assert schemas["Notice"]["enum"] == list(Notice)
        assert schemas["MaskReading"]["enum"] == list(MaskReading)
        assert schemas["JobAnswer"]["properties"]["warnings"]["items"]["$ref"].endswith("Answer")

    def test_job_of_the_version_before_is_told(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        job = create(client)
        row = store.get(job["id"])
        assert row is not None
        facts = row.request.to_json()
        del facts["warnings"], facts["intake"]["mask_read_as"]
        engine = open_engine(settings.sqlalchemy_url)
        with engine.begin() as connection:
            statement = update(jobs).where(jobs.c.id == job["id"])
            connection.execute(statement.values(request=facts))
        engine.dispose()
        told = read(client, job["id"])
        assert told["warnings"] == []
        assert told["mask"] == {"read_as": None, "coverage": None, "box": None}

    def test_failed_and_lost_are_told_apart(self, client: httpx2.Client, store: JobStore) -> None:
        failed = claim_job(store, create(client)["id"])
        store.fail(failed, Failure.OUT_OF_MEMORY.sentence)
        assert read(client, failed.id)["error"]["code"] == "out_of_memory"
        lost = create(client)["id"]
        for _ in range(MAX_ATTEMPTS):
            claim_job(store, lost)
            store.requeue_of("test")
        told = read(client, lost)
        assert (told["state"], told["attempts"]) == ("failed", MAX_ATTEMPTS)
        assert told["error"] == {
            "code": "worker_lost",
            "message": "The worker was lost too often while making this picture",
        }

    def test_job_of_the_vendors_path_is_told_too(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        fields = {key: BODY[key] for key in ("prompt", "init_image", "mask_image")}
        job_id = post(client, "inpaint", **fields)["id"]
        job = claim_job(store, job_id)
        Storage(settings.storage_url).put(job.output_keys[0], OUTPUT)
        store.finish(job, [False])
        told = read(client, job_id)
        assert (told["state"], told["receipt"], len(told["outputs"])) == ("finished", None, 1)

    def test_finished_job_is_told_on_the_vendors_path_too(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        job = claim_job(store, create(client)["id"])
        for key in job.output_keys:
            Storage(settings.storage_url).put(key, OUTPUT)
        assert store.finish(job, [None, None])
        answer = client.post(f"/api/v3/fetch/{job.id}").json()
        assert (answer["status"], len(answer["output"])) == ("success", 2)

    @pytest.mark.parametrize("shift_s", [108_000, -86_400])
    def test_jump_of_the_workers_clock_lengthens_no_job(
        self, shift_s: float, client: httpx2.Client, settings: Settings
    ) -> None:
        wall, engine = Clock(), open_engine(settings.sqlalchemy_url)
        wall.now = time.time()
        worker = JobStore(engine, clock=wall)
        job = claim_job(worker, create(client)["id"])
        for key in job.output_keys:
            Storage(settings.storage_url).put(key, OUTPUT)
        wall.now += shift_s
        assert worker.finish(job, [None, None])
        engine.dispose()

        timings = read(client, job.id)["timings_ms"]
        took_in = timings["fetch"] + timings["decode_images"]
        assert 0 <= timings["queued"] < 60_000
        assert 0 <= timings["total"] - took_in - timings["queued"] < 60_000
        answer = client.post(f"/api/v3/fetch/{job.id}").json()
        assert 0 <= answer["generationTime"] < 60

    def test_only_masked_keeps_the_pictures_size(
        self, client: httpx2.Client, settings: Settings, store: JobStore
    ) -> None:
        image = base64.b64encode(png_bytes(1_203, 77)).decode()
        job_id = create(client, init_image=image, only_masked=True)["id"]
        job = store.get(job_id)
        assert job is not None
        assert (job.params.width, job.params.height) == (512, 512)
        stored = Storage(settings.storage_url).get(job.input_key)
        assert stored is not None
        assert len(stored) > 1_203 * 77 * 4


class TestList:
    def test_pages_of_ones_own_jobs(self, app: LiveApp, store: JobStore) -> None:
        with client_of(app, FIRST) as one, client_of(app, SECOND) as two:
            mine = [create(two)["id"] for _ in range(5)]
            create(one)
            first = two.get("/api/jobs", params={"limit": 2}).json()
            assert [job["id"] for job in first["jobs"]] == mine[:2:-1]
            rest = two.get("/api/jobs", params={"limit": 5, "before": first["next_before"]}).json()
            assert [job["id"] for job in rest["jobs"]] == mine[2::-1]
            assert rest["next_before"] is None
            store.cancel(mine[1])
            some = two.get("/api/jobs", params={"state": "cancelled"}).json()["jobs"]
            assert [(job["id"], job["state"]) for job in some] == [(mine[1], "cancelled")]

    def test_entry_shows_prompt_and_pictures(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        job = claim_job(store, create(client, prompt="a red cat", output_format="webp")["id"])

        def entry() -> dict[str, Any]:
            found: dict[str, Any] = client.get("/api/jobs", params={"limit": 1}).json()["jobs"][0]
            return found

        assert (entry()["id"], entry()["prompt"], entry()["outputs"]) == (job.id, "a red cat", [])
        for key in job.output_keys:
            Storage(settings.storage_url).put(key, OUTPUT)
        store.finish(job, [False, False], RECEIPT)
        outputs = entry()["outputs"]
        assert len(outputs) == 2
        assert [*outputs[0]] == ["url", "thumbnail_url"]
        assert client.get(outputs[0]["url"]).content == OUTPUT
        assert client.get(outputs[1]["thumbnail_url"]).headers["content-type"] == "image/webp"
        told = read(client, job.id)["outputs"]
        assert [each["thumbnail_url"] for each in told] == [
            each["thumbnail_url"] for each in outputs
        ]

    @pytest.mark.parametrize(
        ("name", "value", "code"),
        [
            ("state", "lost", "not_a_choice"),
            ("limit", "0", "out_of_range"),
            ("limit", "101", "out_of_range"),
            ("limit", "x", "wrong_type"),
            ("before", "-1", "out_of_range"),
        ],
    )
    def test_query_at_fault(self, name: str, value: str, code: str, client: httpx2.Client) -> None:
        answer = client.get("/api/jobs", params={name: value})
        assert problem_of(answer) == (422, "invalid_fields")
        assert [(each["field"], each["code"]) for each in answer.json()["errors"]] == [(name, code)]


class TestRefusals:
    @pytest.mark.parametrize("job_id", ["999999", "0", "x", "-1", "1.5", "9" * 30, "%00", "١"])
    def test_unknown_job(self, job_id: str, client: httpx2.Client) -> None:
        assert problem_of(client.get(f"/api/jobs/{job_id}")) == (404, "job_not_found")
        cancel = client.post(f"/api/jobs/{job_id}/cancel")
        assert problem_of(cancel) == (404, "job_not_found")

    def test_somebody_elses_job_is_unknown(self, client: httpx2.Client, app: LiveApp) -> None:
        job_id = create(client)["id"]
        with client_of(app, SECOND) as other:
            for answer in (
                other.get(f"/api/jobs/{job_id}"),
                other.post(f"/api/jobs/{job_id}/cancel"),
                other.get(f"/api/jobs/{job_id}/deliveries"),
                other.post(f"/api/jobs/{job_id}/deliveries/redeliver"),
            ):
                assert problem_of(answer) == (404, "job_not_found")
        assert read(client, job_id)["state"] == "queued"

    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer x"}, {"X-API-Key": "x"}])
    def test_key(self, headers: dict[str, str], app: LiveApp) -> None:
        for path in ("/api/jobs", "/api/jobs/1", "/api/deliveries"):
            answer = app.client.get(path, headers=headers)
            assert problem_of(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        answer = app.client.post("/api/jobs", json=BODY | {"key": FIRST}, headers=headers)
        assert problem_of(answer) == (401, "invalid_api_key")

    def test_key_in_its_own_header(self, app: LiveApp) -> None:
        assert app.client.get("/api/jobs", headers={"X-API-Key": FIRST}).status_code == 200

    def test_fields(self, client: httpx2.Client) -> None:
        answer = client.post("/api/jobs", json={"prompt": 1, "init_image": "x", "extra": 1})
        assert problem_of(answer) == (422, "invalid_fields")
        assert answer.json()["errors"] == [
            {"field": "prompt", "code": "wrong_type", "message": "has the wrong JSON type"},
            {"field": "mask_image", "code": "required", "message": "is required"},
            {"field": "extra", "code": "unknown_field", "message": "is not a field of this call"},
        ]

    @pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"a":1}' * 30_000])
    def test_body(self, content: str, client: httpx2.Client) -> None:
        assert problem_of(client.post("/api/jobs", content=content)) == (400, "invalid_body")

    def test_image(self, client: httpx2.Client) -> None:
        cases = {
            "http://127.0.0.1:1/a.png": "private_address",
            "http://8.8.8.8:1/a.png": "port_not_allowed",
            "http://user@example.org/a.png": "invalid_url",
            "http://example.org/" + "a" * 8_192: "url_too_long",
            "AAAA": "not_an_image",
        }
        for image, code in cases.items():
            changes = {"init_image": image, "mask_image": image}
            answer = client.post("/api/jobs", json=BODY | changes)
            assert problem_of(answer) == (422, "image_unavailable")
            fields = [(each["field"], each["code"]) for each in answer.json()["errors"]]
            assert fields == [("init_image", code), ("mask_image", code)]

    def test_path_and_method(self, client: httpx2.Client) -> None:
        assert problem_of(client.get("/api/jobs/1/nothing")) == (404, "not_found")
        answer = client.put("/api/jobs")
        assert problem_of(answer) == (405, "method_not_allowed")
        assert answer.headers["allow"]

    def test_size_and_full_queue(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, max_body_bytes=1_000, queue={"max_waiting": 0})
        with running_app(settings) as app:
            answer = app.client.post("/api/jobs", content=b"x" * 1_001)
            assert problem_of(answer) == (413, "body_too_large")
            small = {"prompt": "", "init_image": "AAAA", "mask_image": "AAAA"}
            answer = app.client.post("/api/jobs", json=small)
            assert problem_of(answer) == (429, "queue_full")
            assert answer.headers["retry-after"] == "30"
            assert answer.json()["retry_after_s"] == 30

    def test_our_own_faults_tell_nothing(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        with running_app(settings) as app:
            job_id = app.client.post("/api/jobs", json=BODY).json()["id"]
            engine = open_engine(settings.sqlalchemy_url)
            with engine.begin() as connection:
                connection.exec_driver_sql("ALTER TABLE jobs RENAME TO canary")
            engine.dispose()
            answer = app.client.get(f"/api/jobs/{job_id}")
            assert problem_of(answer) == (503, "storage_unavailable")
            assert "canary" not in answer.text


class TestIdempotency:
    def test_replay(self, client: httpx2.Client, store: JobStore) -> None:
        headers = {"Idempotency-Key": "replay"}
        body = {name: value for name, value in BODY.items() if name != "seed"}
        first = client.post("/api/jobs", json=body, headers=headers)
        assert first.status_code == 202
        assert "idempotency-replayed" not in first.headers
        again = client.post("/api/jobs", content=json.dumps(body, indent=1), headers=headers)
        assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")
        assert again.headers["location"] == first.headers["location"]
        assert again.json()["params"] == first.json()["params"], "the seed that was drawn too"
        store.cancel(first.json()["id"])
        third = client.post("/api/jobs", json=body, headers=headers)
        assert (third.status_code, third.json()["state"]) == (200, "cancelled")

    def test_other_body(self, client: httpx2.Client) -> None:
        headers = {"Idempotency-Key": "other-body"}
        client.post("/api/jobs", json=BODY, headers=headers)
        answer = client.post("/api/jobs", json=BODY | {"seed": 6}, headers=headers)
        assert problem_of(answer) == (422, "idempotency_key_reused")

    def test_keys_of_two_owners_are_apart(self, client: httpx2.Client, app: LiveApp) -> None:
        headers = {"Idempotency-Key": "shared"}
        mine = client.post("/api/jobs", json=BODY, headers=headers).json()
        with client_of(app, SECOND) as other:
            theirs = other.post("/api/jobs", json=BODY | {"seed": 9}, headers=headers)
        assert theirs.status_code == 202
        assert theirs.json()["id"] != mine["id"]

    def test_bad_key(self, client: httpx2.Client) -> None:
        answer = client.post("/api/jobs", json=BODY, headers={"Idempotency-Key": "two words"})
        assert problem_of(answer) == (422, "invalid_fields")
        assert answer.json()["errors"][0]["field"] == "Idempotency-Key"

    def test_forgotten_after_a_day(self, client: httpx2.Client, settings: Settings) -> None:
        headers = {"Idempotency-Key": "old"}
        first = client.post("/api/jobs", json=BODY, headers=headers).json()
        engine = open_engine(settings.sqlalchemy_url)
        with engine.begin() as connection:
            created_at = idempotency_keys.c.created_at
            connection.execute(update(idempotency_keys).values(created_at=created_at - 86_401))
        engine.dispose()
        second = client.post("/api/jobs", json=BODY | {"seed": 9}, headers=headers)
        assert second.status_code == 202
        assert second.json()["id"] != first["id"]

    def test_replay_passes_a_full_queue(self, tmp_path: Path) -> None:
        with running_app(settings_in(tmp_path, queue={"max_waiting": 1})) as app:
            headers = {"Idempotency-Key": "full"}
            first = app.client.post("/api/jobs", json=BODY, headers=headers)
            again = app.client.post("/api/jobs", json=BODY, headers=headers)
            assert (first.status_code, again.status_code) == (202, 200)

    def test_refused_request_leaves_its_key_free(self, client: httpx2.Client) -> None:
        headers = {"Idempotency-Key": "refused"}
        refused = client.post("/api/jobs", json=BODY | {"mask_image": "AAAA"}, headers=headers)
        assert refused.status_code == 422
        assert client.post("/api/jobs", json=BODY, headers=headers).status_code == 202

    def test_hundred_at_once_are_one_job(
        self, client: httpx2.Client, app: LiveApp, settings: Settings
    ) -> None:
        ready = threading.Barrier(20)

        def send(_index: int) -> list[tuple[int, int]]:
            with client_of(app, FIRST) as own:
                ready.wait(30)
                answers = [
                    own.post("/api/jobs", json=BODY, headers={"Idempotency-Key": "hundred"})
                    for _ in range(5)
                ]
            return [(each.status_code, each.json()["id"]) for each in answers]

        inputs = Path(settings.data_dir, "files", "inputs")
        before = len([*inputs.iterdir()])
        with ThreadPoolExecutor(20) as threads:
            answers = [each for some in threads.map(send, range(20)) for each in some]
        assert len({job_id for _, job_id in answers}) == 1
        assert sorted(status for status, _ in answers) == [200] * 99 + [202]
        assert len([*inputs.iterdir()]) == before + 1, "the others' inputs are gone"


class TestCancel:
    def test_queued_and_running_and_again(self, client: httpx2.Client, store: JobStore) -> None:
        queued = create(client)["id"]
        running = claim_job(store, create(client)["id"])
        for job_id in (queued, running.id):
            for _ in range(2):
                answer = client.post(f"/api/jobs/{job_id}/cancel")
                assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert store.heartbeat_all([Heartbeat(running, 1, 2)]) == [running], "its worker is told"

    def test_input_is_dropped(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        job_id = create(client)["id"]
        client.post(f"/api/jobs/{job_id}/cancel")
        job = store.get(job_id)
        assert job is not None
        assert Storage(settings.storage_url).get(job.input_key) is None

    def test_ended_job(self, client: httpx2.Client, store: JobStore) -> None:
        job = claim_job(store, create(client)["id"])
        store.finish(job, [False, False])
        assert problem_of(client.post(f"/api/jobs/{job.id}/cancel")) == (409, "job_ended")
        assert read(client, job.id)["state"] == "finished"


@pytest.mark.parametrize("path", ["/api/jobs", "/api/masks/check", "/api/webhooks/ping"])
def test_description_of_a_body_stands_by_itself(path: str, client: httpx2.Client) -> None:
    call = client.get("/openapi.json").json()["paths"][path]["post"]
    assert "$ref" not in json.dumps(call["requestBody"]["content"]["application/json"]["schema"])


def test_description_names_every_answer(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    declared = {
        (path, method): {*call["responses"]}
        for path, methods in paths.items()
        if path.startswith(("/api/jobs", "/api/masks", "/api/deliveries", "/api/webhooks"))
        for method, call in methods.items()
    }
    always = {"401", "403", "429", "500", "503", "default"}
    assert declared[("/api/jobs", "post")] == {"200", "202", "400", "409", "413", "422"} | always
    assert declared[("/api/masks/check", "post")] == {"200", "400", "413", "422"} | always
    assert declared[("/api/jobs", "get")] == {"200", "422"} | always
    assert declared[("/api/jobs/{job_id}", "get")] == {"200", "404"} | always
    assert declared[("/api/jobs/{job_id}/replay", "post")] == {
        *("200", "202", "404", "409", "422"),
        *always,
    }
    assert declared[("/api/jobs/{job_id}/cancel", "post")] == {"200", "404", "409"} | always

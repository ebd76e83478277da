"""A1111's endpoints behind the real HTTP server, without a worker: the tests do its work."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from models.params import OutputFormat
from server.core.settings import Settings
from server.jobs.job import Heartbeat, Job, JobState
from server.jobs.store import JobStore
from server.storage.files import Storage
from tests.support.a1111_calls import (
    CALLS,
    ERROR_FIELDS,
    IMAGE,
    NPM,
    PREFIX,
    SD_BACKEND,
    WEBUIAPI,
    PendingCall,
)
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.native_calls import create
from tests.support.v3_calls import PICTURE

pytestmark = pytest.mark.process

PREVIEW = png_bytes(8, 8)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS}, loras=["ink"])


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    """A server with two keys."""
    with running_app(settings) as app:
        app.client.get("/healthz")  # once it answers, its tables are there
        yield app


def call(settings: Settings, client: httpx2.Client, path: str, body: dict[str, Any]) -> PendingCall:
    return PendingCall(settings, lambda: client.post(f"{PREFIX}/{path}", json=body))


def answer_of(
    settings: Settings, client: httpx2.Client, path: str, body: dict[str, Any]
) -> dict[str, Any]:
    pending = call(settings, client, path, body)
    pending.finish()
    answer = pending.answer()
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def get(client: httpx2.Client, path: str) -> Any:
    answer = client.get(f"{PREFIX}/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def start(store: JobStore, job_id: int) -> Job:
    """What a worker does first."""
    (job,) = [job for job in store.claim("w", 10) if job.id == job_id]
    return job


def state_of(store: JobStore, job_id: int) -> JobState:
    job = store.get(job_id)
    assert job is not None
    return job.state


class TestPictures:
    @pytest.mark.parametrize("body", [WEBUIAPI, SD_BACKEND], ids=["webuiapi", "sd-backend-client"])
    def test_recorded_calls_get_their_pictures(
        self, body: dict[str, Any], client: httpx2.Client, settings: Settings
    ) -> None:
        answer = answer_of(settings, client, "img2img", body)
        assert [base64.b64decode(text) for text in answer["images"]] == [PICTURE] * 2
        assert answer["parameters"]["steps"] == body["steps"]
        assert not {"init_images", "mask"} & {*answer["parameters"]}
        info = json.loads(answer["info"])
        assert info["all_seeds"] == [5, 6]
        assert (info["width"], info["height"]) == (256, 192)
        assert info["sd_model_name"] == "builtin"
        assert info["extra_generation_params"] == {"Mask blur": 4}

    def test_call_without_a_mask(self, client: httpx2.Client, settings: Settings) -> None:
        answer = answer_of(settings, client, "img2img", NPM)
        assert len(answer["images"]) == 1
        assert json.loads(answer["info"])["denoising_strength"] == 0.5

    def test_text_to_image(
        self, client: httpx2.Client, settings: Settings, store: JobStore
    ) -> None:
        pending = call(settings, client, "txt2img", {"prompt": "a cat", "width": 64, "height": 64})
        job = pending.finish()
        assert (job.params.strength, job.params.width, job.request.init_image) == (1, 64, "")
        assert pending.answer().json()["images"] == [base64.b64encode(PICTURE).decode()]

    def test_every_field_reaches_the_row(self, client: httpx2.Client, settings: Settings) -> None:
        body = WEBUIAPI | {
            "prompt": "a cat <lora:ink:0.5>",
            "inpaint_full_res": "True",
            "override_settings": {"CLIP_stop_at_last_layers": 2, "samples_format": "webp"},
        }
        pending = call(settings, client, "img2img", body)
        job = pending.finish()
        assert pending.answer().status_code == 200
        params = job.params
        assert (params.clip_skip, params.output_format) == (1, OutputFormat.WEBP)
        assert [(lora.name, lora.scale) for lora in params.loras] == [("ink", 0.5)]
        assert (params.only_masked, params.width, params.height) == (True, 256, 192)
        assert job.request.previews

    def test_what_is_not_applied_is_told(self, client: httpx2.Client, settings: Settings) -> None:
        body = NPM | {"tiling": True, "prompt": "a <lora:x:1>", "alwayson_scripts": {"y": [1]}}
        info = json.loads(answer_of(settings, client, "img2img", body)["info"])
        extra = info["extra_generation_params"]
        assert extra["Not applied"] == "alwayson_scripts.y, tiling"
        assert "<lora:name:0.8>" in extra["Warnings"]

    def test_pictures_may_be_declined_and_repeated(
        self, client: httpx2.Client, settings: Settings
    ) -> None:
        body = NPM | {"send_images": False, "include_init_images": True}
        answer = answer_of(settings, client, "img2img", body)
        assert answer["images"] == []
        assert answer["parameters"]["init_images"] == [IMAGE]

    def test_failed_job_is_an_error(
        self, client: httpx2.Client, settings: Settings, store: JobStore
    ) -> None:
        pending = call(settings, client, "img2img", NPM)
        store.fail(start(store, pending.job_id), "The model cannot be loaded now")
        answer = pending.answer()
        assert answer.status_code == 500
        assert answer.json()["detail"] == "The model cannot be loaded now."

    def test_odd_values_are_repeated_as_far_as_json_can(
        self, client: httpx2.Client, settings: Settings
    ) -> None:
        text = json.dumps(NPM | {"comments": {"a": "\ud800"}})[:-1] + ', "eta": 1e999}'
        pending = PendingCall(
            settings, lambda: client.post(f"{PREFIX}/img2img", content=text.encode())
        )
        pending.finish()
        answer = pending.answer()
        assert answer.status_code == 200
        assert answer.json()["parameters"]["eta"] is None


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "status", "words"),
        [
            ({"init_images": ["AAAA"]}, 422, "Invalid encoded image: The init image"),
            ({"mask": "AAAA"}, 422, "Invalid encoded image: The mask image"),
            ({"init_images": []}, 422, "init images field is required"),
            ({"sampler_name": "DPM fast"}, 422, "Sampler not found"),
            ({"override_settings": {"sd_model_checkpoint": "x"}}, 422, "Model not found"),
            ({"batch_size": 9}, 422, "4 pictures"),
        ],
    )
    def test_wrong_fields(
        self, changes: dict[str, Any], status: int, words: str, client: httpx2.Client
    ) -> None:
        answer = client.post(f"{PREFIX}/img2img", json=WEBUIAPI | changes)
        assert answer.status_code == status
        assert {*answer.json()} == ERROR_FIELDS
        assert words in answer.json()["detail"]
        assert CALLS.is_refused(answer)

    @pytest.mark.parametrize(
        ("content", "status"), [(b"{", 400), (b'{"a":' + b"[" * 9 + b"]" * 9 + b"}", 400)]
    )
    def test_broken_bodies(self, content: bytes, status: int, client: httpx2.Client) -> None:
        answer = client.post(f"{PREFIX}/img2img", content=content)
        assert answer.status_code == status
        assert CALLS.is_refused(answer)

    @pytest.mark.parametrize("path", ["interrogate", "extra-single-image", "nothing"])
    def test_what_is_missing_is_not_found(self, path: str, client: httpx2.Client) -> None:
        for answer in (client.get(f"{PREFIX}/{path}"), client.post(f"{PREFIX}/{path}", json={})):
            assert answer.status_code == 404
            assert CALLS.is_refused(answer)

    def test_wrong_method(self, client: httpx2.Client) -> None:
        answer = client.get(f"{PREFIX}/img2img")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")

    def test_server_is_no_comfyui(self, client: httpx2.Client) -> None:
        assert client.get("/system_stats").status_code == 404


class TestKeys:
    @pytest.mark.parametrize("auth", [("user", FIRST), (FIRST, "")])
    def test_basic_is_read(self, auth: tuple[str, str], app: LiveApp) -> None:
        assert app.client.get(f"{PREFIX}/options", auth=auth).status_code == 200

    @pytest.mark.parametrize("auth", [None, ("user", "wrong")])
    @pytest.mark.parametrize("path", ["options", "progress", "samplers", "memory", "sd-models"])
    def test_every_call_needs_a_key(
        self, path: str, auth: tuple[str, str] | None, app: LiveApp
    ) -> None:
        answer = app.client.get(f"{PREFIX}/{path}", auth=auth)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert CALLS.is_refused(answer)

    def test_strangers_body_is_not_read(self, app: LiveApp) -> None:
        assert app.client.post(f"{PREFIX}/img2img", content=b"{").status_code == 401


class TestProgressAndInterrupt:
    def test_idle(self, client: httpx2.Client) -> None:
        told = get(client, "progress?skip_current_image=true")
        assert (told["progress"], told["state"]["job_count"]) == (0, 0)

    def test_progress_and_preview_of_the_own_job(
        self, client: httpx2.Client, settings: Settings, store: JobStore, app: LiveApp
    ) -> None:
        pending = call(settings, client, "img2img", SD_BACKEND)
        assert get(client, "progress")["textinfo"] == "Waiting..."
        job = start(store, pending.job_id)
        Storage(settings.storage_url).put(job.preview_key, PREVIEW)
        store.heartbeat_all([Heartbeat(job, 4, 16, 4)])
        told = get(client, "progress")
        assert told["progress"] == 0.25
        assert told["eta_relative"] > 0
        assert told["state"]["job"] == SD_BACKEND["force_task_id"]
        assert base64.b64decode(told["current_image"]) == PREVIEW
        assert get(client, "progress?skip_current_image=true")["current_image"] is None
        named = {"id_task": SD_BACKEND["force_task_id"]}
        assert client.get(f"{PREFIX}/progress", params=named).json()["progress"] == 0.25
        assert get(client, "progress?id_task=another")["progress"] == 0
        with client_of(app, SECOND) as other:
            assert get(other, "progress")["state"]["job_count"] == 0
        client.post(f"{PREFIX}/interrupt")
        pending.answer()

    @pytest.mark.parametrize(("path", "body"), [("interrupt", {}), ("skip", None)])
    @pytest.mark.parametrize("is_running", [True, False])
    def test_interrupted_call_is_answered_without_pictures(
        self,
        path: str,
        body: Any,
        is_running: bool,
        client: httpx2.Client,
        settings: Settings,
        store: JobStore,
    ) -> None:
        pending = call(settings, client, "img2img", SD_BACKEND)
        if is_running:
            start(store, pending.job_id)
        interrupted = client.post(f"{PREFIX}/{path}", json={})
        assert (interrupted.status_code, interrupted.json()) == (200, body)
        answer = pending.answer()
        assert answer.status_code == 200
        assert answer.json()["images"] == []
        assert json.loads(answer.json()["info"])["all_seeds"] == [5, 6]
        assert state_of(store, pending.job_id) is JobState.CANCELLED

    def test_jobs_of_others_and_of_other_dialects_go_on(
        self, client: httpx2.Client, settings: Settings, store: JobStore, app: LiveApp
    ) -> None:
        native = create(client)["id"]
        with client_of(app, SECOND) as other:
            others = call(settings, other, "img2img", SD_BACKEND)
            assert client.post(f"{PREFIX}/interrupt").status_code == 200
            assert state_of(store, others.job_id) is JobState.QUEUED
            assert state_of(store, native) is JobState.QUEUED
            other.post(f"{PREFIX}/interrupt")
            assert others.answer().json()["images"] == []
        client.post(f"/api/jobs/{native}/cancel")

    def test_running_jobs_go_before_waiting_ones(
        self, client: httpx2.Client, settings: Settings, store: JobStore
    ) -> None:
        running = call(settings, client, "img2img", SD_BACKEND)
        start(store, running.job_id)
        waiting = call(settings, client, "img2img", SD_BACKEND)
        assert get(client, "progress")["state"]["sampling_steps"] == 0
        client.post(f"{PREFIX}/interrupt")
        assert running.answer().json()["images"] == []
        assert state_of(store, waiting.job_id) is JobState.QUEUED
        client.post(f"{PREFIX}/interrupt")
        waiting.answer()


class TestCatalogue:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            *((name, list) for name in ("sd-models", "samplers", "schedulers", "upscalers")),
            *((name, list) for name in ("loras", "sd-vae", "hypernetworks", "face-restorers")),
            *((name, list) for name in ("prompt-styles", "latent-upscale-modes", "script-info")),
            *((name, dict) for name in ("options", "embeddings", "scripts", "memory")),
            ("cmd-flags", dict),
        ],
    )
    def test_lists_have_their_kind(self, path: str, kind: type, client: httpx2.Client) -> None:
        assert isinstance(get(client, path), kind)

    def test_models_and_loras_are_those_of_the_server(self, client: httpx2.Client) -> None:
        (model,) = get(client, "sd-models")
        assert model["title"] == get(client, "options")["sd_model_checkpoint"] == "builtin"
        assert [each["name"] for each in get(client, "loras")] == ["ink"]

    def test_the_present_model_may_be_set(self, client: httpx2.Client) -> None:
        answer = client.post(f"{PREFIX}/options", json={"sd_model_checkpoint": "builtin"})
        assert (answer.status_code, answer.json()) == (200, None)

    def test_no_other_option_may_be_set(self, client: httpx2.Client) -> None:
        for options in ({"sd_model_checkpoint": "x"}, {"CLIP_stop_at_last_layers": 2}):
            answer = client.post(f"{PREFIX}/options", json=options)
            assert answer.status_code == 422
            assert "override_settings" in answer.json()["detail"]

    @pytest.mark.parametrize("what", ["checkpoints", "vae", "loras"])
    def test_refreshing_changes_nothing(self, what: str, client: httpx2.Client) -> None:
        assert client.post(f"{PREFIX}/refresh-{what}", json={}).json() is None

    def test_png_info(self, client: httpx2.Client) -> None:
        answer = client.post(f"{PREFIX}/png-info", json={"image": IMAGE})
        assert answer.json() == {"info": "", "items": {}, "parameters": {}}
        wrong = client.post(f"{PREFIX}/png-info", json={"image": "http://x/a.png"})
        assert wrong.status_code == 422
        assert CALLS.is_refused(wrong)
        assert client.post(f"{PREFIX}/png-info", json={}).status_code == 422

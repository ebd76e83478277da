"""OpenAI's endpoints behind the real HTTP server, without a worker: the tests do its work."""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from models.imaging.mask_reading import MaskReading
from models.params import OutputFormat
from server.core.settings import Settings
from server.jobs.job import Heartbeat, Job, JobState
from server.jobs.store import JobStore
from server.sandbox.decoded import DecodedPair
from server.storage.files import Storage
from tests.support.a1111_calls import PendingCall, newest_id
from tests.support.apps import KEYS, settings_in, store_of
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.jobs import LONG_S, claim_job, get, state_of
from tests.support.native_calls import Event
from tests.support.openai_calls import (
    CALLS,
    EDITS,
    GENERATIONS,
    INIT,
    MASK,
    RECORDED,
    Recorded,
    edit,
    error_of,
    events_in,
    hole_png,
)
from tests.support.v3_calls import PICTURE
from tests.support.waiting import until

pytestmark = pytest.mark.process

PREVIEW = png_bytes(8, 8)
TEXT = base64.b64encode(INIT).decode()
STREAM = {"stream": "true", "partial_images": "2"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(
        tmp_path_factory.mktemp("data"), auth={"keys": KEYS}, model_aliases={"sd": "builtin"}
    )


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        app.client.get("/healthz")  # once it answers, its tables are there
        yield app


def finished(settings: Settings, send: Callable[[], httpx2.Response]) -> tuple[Job, dict[str, Any]]:
    """The job of a call, and its answer."""
    pending = PendingCall(settings, send)
    job = pending.finish()
    answer = pending.answer()
    assert answer.status_code == 200, answer.text
    return job, answer.json()


def input_of(settings: Settings, job_id: int) -> DecodedPair:
    """What a worker would read."""
    with store_of(settings) as store:
        content = Storage(settings.storage_url).get(get(store, job_id).input_key)
    assert content is not None
    return DecodedPair.from_bytes(content)


class TestEdits:
    @pytest.mark.parametrize("recorded", RECORDED.values(), ids=[*RECORDED])
    def test_recorded_calls_get_their_pictures(
        self, recorded: Recorded, client: httpx2.Client, settings: Settings
    ) -> None:
        pending = PendingCall(settings, lambda: recorded.send(client))
        mask = input_of(settings, pending.job_id).mask
        assert (mask[:, :32] == 255).all()
        assert (mask[:, 32:] == 0).all()
        job = pending.finish()
        answer = pending.answer()
        assert CALLS.pictures(client, answer) == [PICTURE, PICTURE]
        body = answer.json()
        assert [each["seed"] for each in body["data"]] == [*map(job.params.sample_seed, range(2))]
        assert client.get(body["data"][1]["url"]).content == PICTURE
        assert type(body["created"]) is int
        assert (body["size"], "warnings" in body) == ("64x64", False)
        assert job.request.intake is not None
        assert job.request.intake.mask_read_as is MaskReading.TRANSPARENT

    @pytest.mark.parametrize(
        ("image", "repainted"),
        [(INIT, np.s_[:, :]), (hole_png(), np.s_[:, :32])],
        ids=["opaque", "with a hole"],
    )
    def test_edit_without_a_mask(
        self,
        image: bytes,
        repainted: tuple[slice, slice],
        client: httpx2.Client,
        settings: Settings,
    ) -> None:
        data, files = {"prompt": "a cat"}, {"image[]": ("a.png", image)}
        pending = PendingCall(settings, lambda: client.post(EDITS, data=data, files=files))
        expected = np.zeros((64, 64), np.uint8)
        expected[repainted] = 255
        assert (input_of(settings, pending.job_id).mask == expected).all()
        pending.finish()
        assert pending.answer().status_code == 200

    @pytest.mark.parametrize(
        "image",
        [
            TEXT,
            f"data:image/png;base64,{TEXT}",
            [{"image_url": f"data:image/png;base64,{TEXT}"}],
        ],
        ids=["base64", "data URI", "object"],
    )
    def test_json_instead_of_a_form(
        self, image: Any, client: httpx2.Client, settings: Settings
    ) -> None:
        mask = f"data:image/png;base64,{base64.b64encode(MASK).decode()}"
        body = {"prompt": "a cat", "images": image, "mask": {"image_url": mask}, "n": 1}
        job, answer = finished(settings, lambda: client.post(EDITS, json=body))
        assert len(answer["data"]) == 1
        assert job.request.intake is not None
        assert job.request.intake.mask_read_as is MaskReading.TRANSPARENT

    def test_own_output_as_an_image(self, client: httpx2.Client, settings: Settings) -> None:
        _, first = finished(settings, lambda: edit(client, response_format="url"))
        (item,) = first["data"]
        assert {*item} == {"url", "seed"}
        body = {"prompt": "a cat", "image": item["url"]}
        job, _ = finished(settings, lambda: client.post(EDITS, json=body))
        assert job.request.init_image == item["url"]

    def test_fields_reach_the_row(self, client: httpx2.Client, settings: Settings) -> None:
        fields = {"seed": "5", "model": "sd", "output_format": "webp", "size": "128x64"}
        job, answer = finished(settings, lambda: edit(client, **fields, markup="x", quality="high"))
        params = job.params
        assert (params.seed, params.model, params.output_format) == (
            5,
            "builtin",
            OutputFormat.WEBP,
        )
        assert (params.width, params.height) == (128, 64)
        assert (answer["size"], answer["quality"]) == ("128x64", "auto")
        (warning,) = answer["warnings"]
        assert (warning["code"], warning["fields"]) == ("fields_ignored", ["quality", "markup"])
        assert answer["data"][0]["url"].endswith(".webp")


class TestGenerations:
    def test_picture_of_a_text(self, client: httpx2.Client, settings: Settings) -> None:
        body = {"prompt": "a cat", "model": "dall-e-3", "n": 2, "response_format": "b64_json"}
        job, answer = finished(settings, lambda: client.post(GENERATIONS, json=body))
        assert (job.request.init_image, job.params.width, job.params.height) == ("", 512, 512)
        assert [base64.b64decode(each["b64_json"]) for each in answer["data"]] == [PICTURE] * 2
        assert "url" not in answer["data"][0]


class TestModels:
    def test_list(self, client: httpx2.Client) -> None:
        answer = client.get("/v1/models").json()
        assert [each["id"] for each in answer["data"]] == ["builtin", "sd"]

    def test_one(self, client: httpx2.Client) -> None:
        assert client.get("/v1/models/sd").json()["id"] == "sd"
        answer = client.get("/v1/models/gpt-image-1")
        assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")

    def test_key_is_needed(self, app: LiveApp) -> None:
        answer = app.client.get("/v1/models")
        assert (answer.status_code, error_of(answer)["type"]) == (401, "authentication_error")


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "param", "words"),
        [
            ({"image": b"no picture"}, "image", "The image is not a picture."),
            ({"mask": b"no picture"}, "mask", "The mask is not a picture."),
            ({"mask": INIT}, "mask", "no transparent pixel"),
            ({"image": b"no picture", "mask": None}, "image", "The image is not a picture."),
        ],
        ids=["image", "mask", "opaque mask", "image without a mask"],
    )
    def test_pictures_that_cannot_be_used(
        self, changes: dict[str, bytes | None], param: str, words: str, client: httpx2.Client
    ) -> None:
        sent = {"image": INIT, "mask": MASK} | changes
        files = {name: ("upload", content) for name, content in sent.items() if content}
        answer = client.post(EDITS, data={"prompt": "a cat"}, files=files)
        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, param)
        assert error["message"].count(".") == 1
        assert words in error["message"]

    def test_two_images(self, client: httpx2.Client) -> None:
        files = [("image[]", ("a.png", INIT)), ("image[]", ("b.png", MASK))]
        answer = client.post(EDITS, data={"prompt": "a cat"}, files=files)
        assert answer.status_code == 400
        assert "2 were sent" in error_of(answer)["message"]

    def test_path_and_method(self, client: httpx2.Client) -> None:
        for answer, status in (
            (client.post("/v1/images/variations"), 404),
            (client.get(EDITS), 405),
            (client.post(EDITS, content=b"[]"), 400),
        ):
            assert answer.status_code == status
            assert error_of(answer)["type"] == "invalid_request_error"

    def test_wrong_field_of_a_stream_has_a_status(self, client: httpx2.Client) -> None:
        assert edit(client, **STREAM, n="9").status_code == 400


@contextmanager
def streaming(
    client: httpx2.Client, store: JobStore, **fields: str
) -> Iterator[tuple[Job, Iterator[Event]]]:
    """A call's job, which a worker holds, and the call's events."""
    body = {"prompt": "a cat", "n": 2, **STREAM, **fields}
    with client.stream("POST", GENERATIONS, json=body, timeout=LONG_S) as answer:
        assert answer.status_code == 200
        yield claim_job(store, newest_id(store)), events_in(answer)


class TestStream:
    def test_previews_are_spread_over_the_steps(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        storage = Storage(settings.storage_url)
        with streaming(client, store) as (job, events):
            storage.put(job.preview_key, PREVIEW)
            for step, preview_step in ((2, 1), (10, 8), (12, 11), (22, 20), (28, 27)):
                store.heartbeat_all([Heartbeat(job, step, 30, preview_step=preview_step)])
                if preview_step in (11, 20):
                    name, data = next(events)
                    assert name == "image_generation.partial_image"
                    assert base64.b64decode(data["b64_json"]) == PREVIEW
                    assert data["partial_image_index"] == (0 if preview_step == 11 else 1)
            for key in job.output_keys:
                storage.put(key, PICTURE)
            assert store.finish(job, [False, False])
            ends = [*events]
        assert [name for name, _ in ends] == ["image_generation.completed"] * 2
        assert [base64.b64decode(data["b64_json"]) for _, data in ends] == [PICTURE] * 2
        assert [data["seed"] for _, data in ends] == [*map(job.params.sample_seed, range(2))]
        assert state_of(store, job.id) is JobState.FINISHED

    def test_edit(self, client: httpx2.Client, settings: Settings) -> None:
        pending = PendingCall(settings, lambda: edit(client, stream="true"))
        assert not pending.finish().request.previews
        ((name, data),) = events_in(pending.answer())
        assert name == "image_edit.completed"
        assert base64.b64decode(data["b64_json"]) == PICTURE

    def test_failed_job_is_an_event(self, client: httpx2.Client, store: JobStore) -> None:
        with streaming(client, store) as (job, events):
            store.fail(job, "The model cannot be loaded now")
            ((name, data),) = events
        assert name == "error"
        assert data["error"] == {
            "message": "The model cannot be loaded now.",
            "type": "server_error",
            "param": None,
            "code": "model_unavailable",
        }

    def test_client_that_leaves_has_its_job_cancelled(
        self, client: httpx2.Client, store: JobStore
    ) -> None:
        with streaming(client, store) as (job, _):
            pass
        until(lambda: state_of(store, job.id) is JobState.CANCELLED, LONG_S, "the cancelling")

    def test_job_that_takes_too_long_is_cancelled(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, wait_s=0.2)
        with running_app(settings) as app:
            ((name, data),) = events_in(edit(app.client, stream="true"))
            assert (name, data["error"]["code"]) == ("error", "job_too_slow")
            with store_of(settings) as store:
                until(lambda: state_of(store, 1) is JobState.CANCELLED, LONG_S, "the cancelling")

    def test_streams_of_a_key_are_limited(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, http={"max_streams_per_key": 1})
        with running_app(settings) as app, store_of(settings) as store:
            app.client.get("/healthz")  # once it answers, its tables are there
            pending = PendingCall(settings, lambda: edit(app.client, stream="true"))
            answer = edit(app.client, stream="true")
            assert (answer.status_code, error_of(answer)["code"]) == (429, "too_many_streams")
            until(lambda: state_of(store, 2) is JobState.CANCELLED, LONG_S, "the cancelling")
            pending.finish()
            assert pending.answer().status_code == 200

    def test_stopping_server_ends_streams(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        with running_app(settings) as app:
            app.client.get("/healthz")  # once it answers, its tables are there
            pending = PendingCall(settings, lambda: edit(app.client, stream="true"))
            watcher = app.app.state.services.watcher
            until(lambda: len(watcher) == 1, LONG_S, "the stream")
            app.stop()
            ((name, data),) = events_in(pending.answer())
        assert (name, data["error"]["code"]) == ("error", "server_busy")
        with store_of(settings) as store:
            assert state_of(store, pending.job_id) is JobState.CANCELLED

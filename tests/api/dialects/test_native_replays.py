"""Replays of finished jobs: accepted, refused, and compared. The tests do the worker's work."""

import hashlib
import io
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import update

from server.api.dialects.native.replays import compare_files
from server.core.settings import Settings
from server.jobs.job import Job
from server.jobs.receipts import Model, PictureReceipt, Receipt, RunTimes
from server.jobs.store import JobStore
from server.sandbox.decoded import DecodedPair
from server.storage.database import open_engine
from server.storage.files import Storage
from server.storage.tables import jobs
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.image_files import saved
from tests.support.jobs import claim_job, get
from tests.support.native_calls import PICTURE, create, problem_of

pytestmark = pytest.mark.process

RECEIPT = Receipt(
    model=Model("the-model-of-then", "ab" * 32, "cpu", "float32"),
    versions={"server": "1"},
    times=RunTimes(1.0, 1.0, 1.0, 1.0, 1.0),
    coverage=0.25,
    box=(0, 0, 32, 32),
    pictures=(),
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings.storage_url)


def finish(store: JobStore, storage: Storage, job_id: int, files: Sequence[bytes]) -> Job:
    """As a worker that keeps the input does."""
    job = claim_job(store, job_id)
    for key, file in zip(job.output_keys, files, strict=True):
        storage.put(key, file)
    pictures = [PictureReceipt("cd" * 32, index, None, 0, 0) for index, _ in enumerate(files)]
    assert store.finish(job, [None] * len(files), replace(RECEIPT, pictures=tuple(pictures)))
    return job


def replay(client: httpx2.Client, job_id: int, **headers: str) -> httpx2.Response:
    return client.post(f"/api/jobs/{job_id}/replay", headers=headers)


def read(client: httpx2.Client, job_id: int) -> dict[str, Any]:
    told: dict[str, Any] = client.get(f"/api/jobs/{job_id}").json()
    return told


def test_replay_is_a_job_with_the_same_input_and_parameters(
    client: httpx2.Client, store: JobStore, storage: Storage
) -> None:
    made = create(
        client, samples=1, negative_prompt="fog", webhook="http://127.0.0.1:9/hook", previews=True
    )
    original = finish(store, storage, made["id"], [PICTURE])
    answer = replay(client, original.id)
    told = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"].endswith(f"/api/jobs/{told['id']}")
    assert told["replay"] == {"of": original.id, "pictures": None}
    assert told["timings_ms"]["fetch"] == 0
    again = get(store, told["id"])
    assert again.params == replace(original.params, model="the-model-of-then")
    assert (again.webhook, again.track_id, again.wants_previews) == (None, None, False)
    assert again.file_prefix != original.file_prefix
    assert storage.get(again.input_key) == storage.get(original.input_key)
    assert DecodedPair.from_bytes(storage.get(again.input_key) or b"").mask.shape == (64, 64)
    finish(store, storage, again.id, [PICTURE])
    told = read(client, again.id)
    digest = hashlib.sha256(PICTURE).hexdigest()
    assert told["receipt"]["inputs"]["init_image_sha256"] == digest
    assert told["replay"]["pictures"] == [
        {"is_identical": True, "changed": 0, "largest_difference": 0}
    ]
    assert read(client, original.id)["replay"] is None
    second = replay(client, again.id).json()
    assert second["replay"]["of"] == again.id, "a replay can be replayed"


def test_differing_pictures_are_measured(
    client: httpx2.Client, store: JobStore, storage: Storage, settings: Settings
) -> None:
    plain = Image.new("RGB", (64, 64), (10, 20, 30))
    other = plain.copy()
    other.putpixel((3, 4), (10, 20, 37))
    other.putpixel((5, 6), (0, 20, 30))
    files = [saved(plain), saved(plain)]
    original = finish(store, storage, create(client)["id"], files)
    again = get(store, replay(client, original.id).json()["id"])
    finish(store, storage, again.id, [saved(other), saved(plain, compress_level=0)])
    assert read(client, again.id)["replay"]["pictures"] == [
        {"is_identical": False, "changed": 2, "largest_difference": 10},
        {"is_identical": False, "changed": 0, "largest_difference": 0},
    ]
    expire(settings, original)
    assert read(client, again.id)["replay"] == {"of": original.id, "pictures": None}


def test_missing_and_damaged_files_leave_the_answer(
    client: httpx2.Client, store: JobStore, storage: Storage
) -> None:
    original = finish(store, storage, create(client, samples=1)["id"], [PICTURE])
    again = get(store, replay(client, original.id).json()["id"])
    (key,) = finish(store, storage, again.id, [b"no picture"]).output_keys
    assert read(client, again.id)["replay"]["pictures"] is None
    storage.delete(key)
    assert read(client, again.id)["replay"]["pictures"] is None
    assert read(client, again.id)["state"] == "finished"


def expire(settings: Settings, job: Job) -> None:
    engine = open_engine(settings.sqlalchemy_url)
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(expired_at=1.0))
    engine.dispose()


def test_what_cannot_be_replayed(
    client: httpx2.Client, store: JobStore, storage: Storage, app: LiveApp
) -> None:
    waiting = create(client)["id"]
    assert problem_of(replay(client, waiting)) == (409, "job_not_finished")
    store.cancel(waiting)
    assert problem_of(replay(client, waiting)) == (409, "job_not_finished")
    original = finish(store, storage, create(client, samples=1)["id"], [PICTURE])
    with client_of(app, SECOND) as another:
        assert problem_of(replay(another, original.id)) == (404, "job_not_found")
    before = {file.key for files in storage.list("inputs") for file in files}
    storage.delete(original.input_key)
    refused = replay(client, original.id)
    assert problem_of(refused) == (409, "input_gone")
    assert "INPAINT_RETENTION__KEEP_INPUTS" in refused.json()["title"]
    after = {file.key for files in storage.list("inputs") for file in files}
    assert after == before - {original.input_key}


def test_idempotency_key_gives_one_replay(
    client: httpx2.Client, store: JobStore, storage: Storage
) -> None:
    original = finish(store, storage, create(client, samples=1)["id"], [PICTURE])
    other = finish(store, storage, create(client, samples=1)["id"], [PICTURE])
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first, second = (replay(client, original.id, **key) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 200)
    assert second.headers["idempotency-replayed"] == "true"
    assert first.json()["id"] == second.json()["id"]
    assert problem_of(replay(client, other.id, **key)) == (422, "idempotency_key_reused")


def test_forced_safety_check_holds_for_replays(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, auth={"keys": KEYS})
    storage = Storage(settings.storage_url)
    with running_app(settings) as app, client_of(app, FIRST) as client:
        made = create(client, samples=1, safety_check=False)
        engine = open_engine(settings.sqlalchemy_url)
        finish(JobStore(engine), storage, made["id"], [PICTURE])
        engine.dispose()
    forced = settings.model_copy(
        update={"safety": settings.safety.model_copy(update={"force": True})}
    )
    with running_app(forced) as app, client_of(app, FIRST) as client:
        params = replay(client, made["id"]).json()["params"]
    assert (params["safety_check"], params["must_be_checked"]) == (True, True)


def test_full_queue_takes_no_replay(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, auth={"keys": KEYS}, queue={"max_waiting": 1})
    storage = Storage(settings.storage_url)
    with running_app(settings) as app, client_of(app, FIRST) as client:
        engine = open_engine(settings.sqlalchemy_url)
        original = finish(JobStore(engine), storage, create(client, samples=1)["id"], [PICTURE])
        engine.dispose()
        assert replay(client, original.id).status_code == 202
        assert problem_of(replay(client, original.id)) == (429, "queue_full")


def test_files_of_all_formats_are_compared() -> None:
    picture = Image.effect_noise((64, 64), 30).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP"):
        other = io.BytesIO()
        picture.save(other, kind, quality=60)
        found = compare_files(saved(picture, kind, quality=90), other.getvalue())
        assert found is not None
        assert (found.largest_difference == 0) == (found.changed == 0) == (kind == "PNG")
    assert compare_files(png_bytes(), b"x") is None
    dark, light = (
        saved(Image.fromarray(np.full((2, 2, 3), level, np.uint8))) for level in (0, 255)
    )
    found = compare_files(dark, light)
    assert found is not None
    assert (found.changed, found.largest_difference) == (4, 255)

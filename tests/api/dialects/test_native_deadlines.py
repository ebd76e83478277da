"""Deadlines over the native API and V3: refused at once, or failed when they have passed."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from server.core.settings import Settings
from server.jobs.store import JobStore
from server.storage.files import Storage
from tests.support.apps import KEYS, settings_in
from tests.support.http_stub import ANSWER_S, LiveApp, running_app
from tests.support.jobs import claim_job, get, worker_status
from tests.support.native_calls import BODY, create, problem_of
from tests.support.waiting import until

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


def inputs_in(settings: Settings) -> list[Path]:
    return [*(settings.data_dir / "files" / "inputs").glob("*.npy")]


def test_job_that_waits_too_long_fails(
    client: httpx2.Client, settings: Settings, store: JobStore
) -> None:
    called_at = time.time()
    kept = create(client, deadline_s=600)
    deadline_at = get(store, kept["id"]).deadline_at
    assert deadline_at is not None
    assert called_at + 590 < deadline_at < time.time() + 600
    assert kept["deadline_at"] is not None
    job_id = create(client, deadline_s=0.1)["id"]
    until(
        lambda: client.get(f"/api/jobs/{job_id}").json()["state"] == "failed",
        ANSWER_S,
        "the deadline's end",
    )
    error = client.get(f"/api/jobs/{job_id}").json()["error"]
    assert error["code"] == "deadline_exceeded"
    storage, ended = Storage(settings.storage_url), get(store, job_id)
    until(lambda: not storage.has(ended.input_key), ANSWER_S, "the removed input")
    assert create(client)["deadline_at"] is None
    assert client.post(f"/api/jobs/{kept['id']}/cancel").json()["state"] == "cancelled"


def test_job_that_cannot_end_in_time_is_refused(
    client: httpx2.Client, settings: Settings, store: JobStore
) -> None:
    job = claim_job(store, create(client)["id"])
    store.workers.report(worker_status("test", time.time()))
    store.finish(job, [False, False])
    before = [*inputs_in(settings)]
    endless = {"num_inference_steps": 150, "width": 1024, "height": 1024, "strength": 1.0}
    refused = client.post("/api/jobs", json=BODY | endless | {"deadline_s": 0.1})
    assert problem_of(refused) == (409, "deadline_unmeetable")
    assert refused.json()["eta_s"] > 0.1
    assert inputs_in(settings) == before, "nothing is stored for it"
    assert client.post("/api/jobs", json=BODY | endless | {"deadline_s": 604_800}).is_success


@pytest.mark.parametrize("deadline_s", [0, -1, 604_801, "5", True])
def test_deadline_that_is_none(client: httpx2.Client, deadline_s: object) -> None:
    answer = client.post("/api/jobs", json=BODY | {"deadline_s": deadline_s})
    assert problem_of(answer) == (422, "invalid_fields")
    assert [each["field"] for each in answer.json()["errors"]] == ["deadline_s"]

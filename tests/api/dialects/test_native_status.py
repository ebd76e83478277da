"""`GET /api/status`: an operator's figures over HTTP, and what they never hold."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from server.api.auth.keys import KeyLimits, KeyStore
from server.api.monitoring.status import KEPT_S
from server.core.settings import Settings
from server.jobs.job import Failure
from server.jobs.workers import WorkerStatus
from server.storage.database import open_engine
from server.storage.tables import deliveries
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in, store_of
from tests.support.databases import migrated_sqlite, rename_table
from tests.support.http_stub import ANSWER_S, LiveApp, running_app
from tests.support.jobs import claim_job, seen_now, worker_status
from tests.support.native_calls import create, problem_of
from tests.support.waiting import until

pytestmark = pytest.mark.process


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path, auth={"keys": KEYS}, models=["other"])


@pytest.fixture
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.fixture
def client(app: LiveApp) -> Iterator[httpx2.Client]:
    with client_of(app, FIRST) as client:
        yield client


def status_of(client: httpx2.Client) -> dict[str, Any]:
    answer = client.get("/api/status")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_new_server(client: httpx2.Client) -> None:
    found = status_of(client)

    assert found["version"] == version("inpaint-server")
    assert (found["model"], found["models"]) == ("builtin", ["builtin", "other"])
    assert found["workers"] == []
    assert (found["queue"]["waiting"], found["queue"]["oldest_s"]) == (0, None)
    hour = found["last_hour"]
    assert len(hour["minutes"]) == 60
    assert {each["finished"] for each in hour["minutes"]} == {0}
    assert (hour["finished"], hour["latency_s"], hour["failures"]) == (0, None, [])
    assert found["webhooks"] == {"delivered": 0, "untried": 0, "retrying": 0, "dead": 0}
    assert 0 < found["disk"]["free_bytes"] <= found["disk"]["total_bytes"]


def test_figures_follow_what_happens(app: LiveApp, settings: Settings) -> None:
    """Of all keys together."""
    with client_of(app, FIRST) as first, client_of(app, SECOND) as second:
        ids = [create(each)["id"] for each in (first, second, first, second, first)]
    with store_of(settings) as store:
        store.cancel(ids[4])
        held = {job.id: job for job in store.claim("gone", 10)}
        store.finish(held[ids[0]], [False, False])
        store.fail(held[ids[1]], Failure.NOT_STORED.sentence)
        store.fail(held[ids[2]], Failure.OUT_OF_MEMORY.sentence)
        store.workers.report(seen_now(worker_status("box-7f00", 0)))
        loading = WorkerStatus("box-7f01", "cuda:1", "builtin", "loading", "loading model 40%", 0)
        store.workers.report(seen_now(loading))

        with client_of(app, FIRST) as client:
            found = status_of(client)

    hour = found["last_hour"]
    assert (hour["finished"], hour["failed"], hour["cancelled"]) == (1, 2, 1)
    assert sum(each["finished"] for each in hour["minutes"][-2:]) == 1
    assert 0 <= hour["run_s"]["p50"] <= hour["latency_s"]["p95"] + 1
    assert {each["code"]: (each["count"], each["message"]) for each in hour["failures"]} == {
        "not_stored": (1, Failure.NOT_STORED.sentence),
        "out_of_memory": (1, Failure.OUT_OF_MEMORY.sentence),
    }
    assert (found["queue"]["waiting"], found["queue"]["running"]) == (0, 1)
    assert [(each["name"], each["state"], each["loading"]) for each in found["workers"]] == [
        ("7f00", "ready", None),
        ("7f01", "loading", "loading model 40%"),
    ]
    assert [each["jobs"] for each in found["workers"]] == [0, 0]


def test_worker_tells_what_it_runs(client: httpx2.Client, settings: Settings) -> None:
    create(client)
    with store_of(settings) as store:
        store.workers.report(seen_now(worker_status("box-7f00", 0)))
        (job,) = store.claim("box-7f00", 1)
        store.heartbeat(job, 3, 40)
        (worker,) = status_of(client)["workers"]

    assert (worker["device"], worker["model"], worker["jobs"]) == ("cpu", "builtin", 1)
    assert worker["progress"] == {"step": 3, "total_steps": 40}


def test_nothing_tells_of_a_client_or_a_machine(client: httpx2.Client, settings: Settings) -> None:
    secrets = ("canary-prompt", "canary-track", "canary.example", "canary-host", "/srv/canary")
    hook = f"http://{secrets[2]}/hook"
    job_id = create(client, prompt=secrets[0], track_id=secrets[1], webhook=hook)["id"]
    with store_of(settings) as store:
        failed = WorkerStatus(f"{secrets[3]}-1", "cpu", "builtin", "failed", secrets[4], 0)
        store.workers.report(seen_now(failed))
        store.finish(claim_job(store, job_id), [False, False])
    engine = open_engine(settings.sqlalchemy_url)
    with engine.begin() as connection:
        connection.execute(update(deliveries).values(state="dead"))
    engine.dispose()

    text = client.get("/api/status").text

    assert '"dead":1' in text
    assert '"state":"failed"' in text
    for secret in (*secrets, *KEYS, "127.0.0.1", str(settings.data_dir)):
        assert secret not in text


def test_key_is_needed(app: LiveApp) -> None:
    for headers in ({}, {"X-API-Key": "a-key-that-is-wrong"}):
        answer = app.client.get("/api/status", headers=headers)
        assert problem_of(answer) == (401, "invalid_api_key")


def test_calls_are_limited_as_others_are(tmp_path: Path) -> None:
    engine = open_engine(migrated_sqlite(tmp_path))
    key, _ = KeyStore(engine).create("a page", KeyLimits(requests_per_minute=2))
    engine.dispose()
    with running_app(settings_in(tmp_path)) as app, client_of(app, key) as client:
        answers = [client.get("/api/status") for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert int(answers[2].headers["retry-after"]) > 0


def test_database_that_fails(client: httpx2.Client, settings: Settings) -> None:
    engine = open_engine(settings.sqlalchemy_url)
    rename_table(engine, "jobs", "away")
    assert problem_of(client.get("/api/status")) == (503, "storage_unavailable")
    rename_table(engine, "away", "jobs")
    engine.dispose()

    def is_back() -> bool:
        return client.get("/api/status").status_code == 200

    until(is_back, ANSWER_S + KEPT_S, "the next look finds the table")


def test_description(client: httpx2.Client) -> None:
    call = client.get("/openapi.json").json()["paths"]["/api/status"]["get"]

    reference = call["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert reference.endswith("/StatusAnswer")
    assert {"401", "429", "503"} <= call["responses"].keys()

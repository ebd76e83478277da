"""Webhook calls as their owner and the operator meet them: over HTTP and on the command line."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import update
from svix.webhooks import Webhook

from server.cli.main import main
from server.core.settings import Settings
from server.core.settings.sections import RetentionSettings
from server.jobs.retention import Janitor
from server.jobs.store import JobStore
from server.storage.database import open_engine
from server.storage.files import Storage
from server.storage.tables import jobs
from server.webhooks.deliveries import DeliveryStore
from server.webhooks.sender import MANUAL_CALLS_PER_MINUTE
from tests.corpora.hostile_urls import URLS_OF_TWO_READINGS
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in, store_of
from tests.support.http_stub import LiveApp, running_app
from tests.support.native_calls import BODY, create, problem_of
from tests.support.v3_calls import BODY as V3_BODY
from tests.support.webhooks import WAIT_S, attempt, deliveries_of, finished_job, receiver

pytestmark = pytest.mark.process

SECRET = "whsec_" + "A" * 32


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    webhook = {"allow_cidrs": "127.0.0.0/8", "secret": [SecretStr(SECRET)], "timeout_s": WAIT_S}
    return settings_in(tmp_path, auth={"keys": KEYS}, webhook=webhook)


@pytest.fixture
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


def test_call_is_told_of_and_made_again(client: httpx2.Client, store: JobStore) -> None:
    with receiver(500) as (url, calls):
        job_id = finished_job(client, store, url)
        call = deliveries_of(client, job_id, 1)
        assert (call["job_id"], call["url"], call["state"]) == (job_id, url, "pending")
        assert call["next_attempt_at"] is not None
        assert call["is_held"] is False
        (attempt,) = call["attempts"]
        assert (attempt["attempt"], attempt["status"], attempt["outcome"]) == (1, 500, "answered")
        assert attempt["duration_ms"] >= 0
        again = client.post(f"/api/jobs/{job_id}/deliveries/redeliver")
        assert (again.status_code, again.json()["deliveries"][0]["state"]) == (202, "pending")
        call = deliveries_of(client, job_id, 2)
        assert (call["state"], call["next_attempt_at"]) == ("delivered", None)
        ids = {calls.get(timeout=WAIT_S)[0]["webhook-id"] for _ in range(2)}
    assert ids == {call["webhook_id"]}


def test_no_call_to_make_again(client: httpx2.Client, store: JobStore) -> None:
    silent = finished_job(client, store, None)
    live = create(client, webhook="http://127.0.0.1:1/hook")["id"]
    for job_id in (silent, live):
        assert client.get(f"/api/jobs/{job_id}/deliveries").json()["deliveries"] == []
        refused = client.post(f"/api/jobs/{job_id}/deliveries/redeliver")
        assert problem_of(refused) == (409, "no_delivery")


def test_dead_letters_are_listed_for_their_owner(
    client: httpx2.Client, app: LiveApp, store: JobStore
) -> None:
    with receiver(410) as (url, _calls):
        job_id = finished_job(client, store, url)
        deliveries_of(client, job_id, 1)
    listed = client.get("/api/deliveries", params={"state": "dead"}).json()
    assert [call["job_id"] for call in listed["deliveries"]] == [job_id]
    assert listed["next_before"] is None
    assert client.get("/api/deliveries", params={"state": "pending"}).json()["deliveries"] == []
    page = client.get("/api/deliveries", params={"limit": 1}).json()
    assert page["next_before"] == job_id
    with client_of(app, SECOND) as other:
        assert other.get("/api/deliveries").json()["deliveries"] == []
    assert problem_of(client.get("/api/deliveries?state=lost")) == (422, "invalid_fields")


def test_ping(client: httpx2.Client) -> None:
    with receiver(204, 302) as (url, calls):
        told = client.post("/api/webhooks/ping", json={"url": url}).json()
        moved = client.post("/api/webhooks/ping", json={"url": url}).json()
        headers, body = calls.get(timeout=WAIT_S)
    assert (told["is_received"], told["status"], told["outcome"]) == (True, 204, "answered")
    assert headers["webhook-id"] == told["webhook_id"]
    Webhook(SECRET).verify('{"type": "ping"}', headers)
    assert body == {"type": "ping"}
    assert (moved["is_received"], moved["status"]) == (False, 302)


def test_nobody_is_told_why_a_ping_had_no_answer(tmp_path: Path) -> None:
    """Denied with or without anybody there, unknown, closed, silent, unreadable: all the same."""
    webhook = {"allow_cidrs": "127.0.0.0/8", "timeout_s": 0.5}
    with (
        running_app(settings_in(tmp_path, auth={"keys": KEYS}, webhook=webhook)) as app,
        client_of(app, FIRST) as client,
        socket.create_server(("127.0.0.1", 0)) as silent,
        receiver() as (url, calls),
    ):
        told = [
            client.post("/api/webhooks/ping", json={"url": each}).json()
            for each in (
                "http://169.254.169.254/latest",
                "http://10.0.0.1/",
                url.replace("127.0.0.1", "0.0.0.0"),
                f"http://{'a' * 64}.invalid/",
                "http://127.0.0.1:1/",
                f"http://127.0.0.1:{silent.getsockname()[1]}/",
            )
        ]
        assert calls.empty()
    assert all(each.pop("webhook_id") for each in told)
    nothing = {"is_received": False, "status": None, "outcome": "no answer", "duration_ms": None}
    assert told == [nothing] * len(told)


def test_owner_of_a_delivery_is_not_told_why_there_was_no_answer(
    client: httpx2.Client, store: JobStore, settings: Settings
) -> None:
    told = []
    for url in ("http://10.0.0.1/", "http://127.0.0.1:1/"):
        (attempt,) = deliveries_of(client, finished_job(client, store, url), 1)["attempts"]
        told.append([attempt[name] for name in ("status", "outcome", "duration_ms")])
    assert told == [[None, "no answer", None]] * 2
    engine = open_engine(settings.sqlalchemy_url)
    reasons = {
        attempt.outcome
        for each in DeliveryStore(engine).list_of(None, state=None, limit=10)
        for _, attempt in each.attempts
    }
    engine.dispose()
    assert reasons == {"address not allowed", "not reachable"}, "operators are"


def test_pings_of_a_key_are_limited(app: LiveApp, client: httpx2.Client) -> None:
    body = {"url": "http://127.0.0.1:1/"}
    for _ in range(20 * MANUAL_CALLS_PER_MINUTE):  # tokens come back meanwhile
        answer = client.post("/api/webhooks/ping", json=body)
        if answer.status_code != 200:
            break
    assert problem_of(answer) == (429, "rate_limited")
    with client_of(app, SECOND) as other:
        assert other.post("/api/webhooks/ping", json=body).status_code == 200


def test_redeliveries_count_as_pings(app: LiveApp, client: httpx2.Client, store: JobStore) -> None:
    job_id = finished_job(client, store, "http://127.0.0.1:1/")
    for _ in range(20 * MANUAL_CALLS_PER_MINUTE):  # tokens come back meanwhile
        answer = client.post(f"/api/jobs/{job_id}/deliveries/redeliver")
        if answer.status_code != 202:
            break
    assert problem_of(answer) == (429, "rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    ping = {"url": "http://127.0.0.1:1/"}
    assert client.post("/api/webhooks/ping", json=ping).status_code == 429
    with client_of(app, SECOND) as other:
        assert other.post("/api/webhooks/ping", json=ping).status_code == 200


def test_no_call_is_made_again_once_the_pictures_are_gone(
    client: httpx2.Client, store: JobStore, settings: Settings
) -> None:
    with receiver() as (url, calls):
        job_id = finished_job(client, store, url)
        deliveries_of(client, job_id, 1)
        engine = open_engine(settings.sqlalchemy_url)
        retention = RetentionSettings(outputs_h=1e-9)
        Janitor(engine, Storage(settings.storage_url), retention).expire()
        engine.dispose()
        refused = client.post(f"/api/jobs/{job_id}/deliveries/redeliver")
        assert problem_of(refused) == (409, "pictures_expired")
        call = deliveries_of(client, job_id, 1)
        assert (call["state"], call["attempts_total"], calls.qsize()) == ("delivered", 1, 1)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "required"),
        ({"url": "x"}, "not_a_url"),
        *[({"url": url}, "not_a_url") for url in URLS_OF_TWO_READINGS],
        ({"url": "http://x/" + "a" * 8_192}, "too_long"),
        ({"url": "http://x/", "key": "one"}, "unknown_field"),
    ],
)
def test_ping_of_no_url(body: dict[str, str], code: str, client: httpx2.Client) -> None:
    refused = client.post("/api/webhooks/ping", json=body)
    assert problem_of(refused) == (422, "invalid_fields")
    assert [each["code"] for each in refused.json()["errors"]] == [code]


def test_only_https_where_that_is_wanted(tmp_path: Path) -> None:
    """Said at once; and calls that were accepted before are not made."""
    webhook: dict[str, Any] = {"allow_cidrs": "127.0.0.0/8"}
    url = "http://127.0.0.1:1/hook"
    with running_app(settings_in(tmp_path, webhook=webhook)) as app:
        earlier = create(app.client, webhook=url)["id"]
    webhook["https_only"] = True
    settings = settings_in(tmp_path, webhook=webhook)
    with running_app(settings) as app, store_of(settings) as store:
        for path, body in (
            ("/api/jobs", BODY | {"webhook": url}),
            ("/api/webhooks/ping", {"url": url}),
        ):
            refused = app.client.post(path, json=body)
            assert [each["code"] for each in refused.json()["errors"]] == ["not_https"]
        told = app.client.post("/api/v3/inpaint", json=V3_BODY | {"webhook": url}).json()
        assert told["message"] == {"webhook": ["The webhook must be an https URL."]}
        create(app.client, webhook="HTTPS://127.0.0.1:1/hook")
        store.cancel(earlier)
        deliveries_of(app.client, earlier, 1)
        engine = open_engine(settings.sqlalchemy_url)
        (call,) = DeliveryStore(engine).of_job(earlier)
        engine.dispose()
        assert [each.outcome for _, each in call.attempts] == ["address not allowed"]


class TestCommandLine:
    def test_list_and_redeliver(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INPAINT_DATA_DIR", str(tmp_path))
        settings = settings_in(tmp_path)
        with running_app(settings) as app:
            job_id = create(app.client, webhook="http://127.0.0.1:1/hook")["id"]
        with store_of(settings) as store:
            store.cancel(job_id)
        engine = open_engine(settings.sqlalchemy_url)
        deliveries = DeliveryStore(engine)
        (due,) = deliveries.claim_due(1)
        deliveries.record(due, attempt(410))
        assert main(["webhooks", "list"]) == 0
        line = f"{job_id}\tdead\t1\t410 answered\thttp://127.0.0.1:1/hook\n"
        header = "job\tstate\ttries\tlast outcome\taddress\n"
        assert capsys.readouterr().out == header + line
        assert main(["webhooks", "redeliver", str(job_id)]) == 0
        assert main(["webhooks", "list"]) == 0
        assert capsys.readouterr() == ("", "no dead webhook calls\n")
        assert main(["webhooks", "list", "--state", "pending"]) == 0
        assert capsys.readouterr().out.startswith(f"{header}{job_id}\tpending\t1\t")
        assert main(["webhooks", "redeliver", "999"]) == 1
        assert capsys.readouterr().err == (
            "error: job 999: The job has no webhook call to make again\n"
        )
        with engine.begin() as connection:
            connection.execute(update(jobs).values(expired_at=1.0))
        assert main(["webhooks", "redeliver", str(job_id)]) == 1
        assert capsys.readouterr().err == (
            f"error: job {job_id}: The job's pictures have been removed\n"
        )
        engine.dispose()

    def test_ping(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INPAINT_WEBHOOK__ALLOW_CIDRS", "127.0.0.0/8")
        with receiver(200, 500) as (url, calls):
            assert main(["webhooks", "ping", url]) == 0
            assert main(["webhooks", "ping", url]) == 1
            headers, _ = calls.get(timeout=WAIT_S)
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"{headers['webhook-id']}\t200\tanswered"
        assert second.endswith("\t500\tanswered")

"""Calls that wait for their pictures, over a dialect that cannot be polled."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from server.core.settings import Settings
from server.jobs.job import JobState
from server.jobs.store import JobStore
from server.storage.files import Storage
from tests.support.a1111_calls import PendingCall, newest_id
from tests.support.apps import KEYS, settings_in, store_of
from tests.support.http_stub import LiveApp, running_app
from tests.support.jobs import LONG_S, claim_job, get, state_of
from tests.support.openai_calls import CALLS, GENERATIONS, edit, error_of
from tests.support.v3_calls import PICTURE
from tests.support.waiting import until

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        app.client.get("/healthz")  # once it answers, its tables are there
        yield app


def pending_edit(settings: Settings, client: httpx2.Client) -> PendingCall:
    return PendingCall(settings, lambda: edit(client))


def test_finished_job_is_answered(client: httpx2.Client, settings: Settings) -> None:
    pending = pending_edit(settings, client)
    pending.finish()
    assert CALLS.pictures(client, pending.answer()) == [PICTURE]


def test_failed_job_is_answered_with_its_sentence(
    client: httpx2.Client, settings: Settings, store: JobStore
) -> None:
    pending = pending_edit(settings, client)
    store.fail(
        claim_job(store, pending.job_id), "The picture is too large for this server's memory"
    )
    answer = pending.answer()
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (500, "out_of_memory")
    assert error["message"] == "The picture is too large for this server's memory."


def test_cancelled_job_is_answered(
    client: httpx2.Client, settings: Settings, store: JobStore
) -> None:
    pending = pending_edit(settings, client)
    store.cancel(pending.job_id)
    answer = pending.answer()
    assert (answer.status_code, error_of(answer)["code"]) == (500, "cancelled")


def test_pictures_that_are_gone(client: httpx2.Client, settings: Settings, store: JobStore) -> None:
    pending = pending_edit(settings, client)
    job = claim_job(store, pending.job_id)
    assert store.finish(job, [False])  # without a file
    answer = pending.answer()
    assert answer.status_code == 500
    assert "no longer there" in error_of(answer)["message"]


@pytest.mark.parametrize("is_running", [False, True], ids=["queued", "running"])
def test_client_that_leaves_has_its_job_cancelled(
    is_running: bool, client: httpx2.Client, settings: Settings, store: JobStore, app: LiveApp
) -> None:
    before = newest_id(store)
    request = client.build_request("POST", GENERATIONS, json={"prompt": "a cat"})
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", app.port), LONG_S) as connection:
        connection.sendall(f"POST {GENERATIONS} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        until(lambda: newest_id(store) > before, LONG_S, "the job")
        if is_running:
            store.claim("w", 10)
    job_id = newest_id(store)
    until(lambda: state_of(store, job_id) is JobState.CANCELLED, LONG_S, "the cancelling")
    storage, key = Storage(settings.storage_url), get(store, job_id).input_key
    until(lambda: storage.get(key) is None, LONG_S, "the end of its input")


def test_job_that_takes_too_long_is_cancelled(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, wait_s=0.2)
    with running_app(settings) as app, store_of(settings) as store:
        answer = edit(app.client)
        assert (answer.status_code, error_of(answer)["code"]) == (504, "job_too_slow")
        assert answer.headers["Retry-After"] == "60"
        assert state_of(store, 1) is JobState.CANCELLED


def test_stopping_server_answers(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running_app(settings) as app:
        app.client.get("/healthz")  # once it answers, its tables are there
        pending = pending_edit(settings, app.client)
        watcher = app.app.state.services.watcher
        until(lambda: len(watcher) == 1, LONG_S, "the call to wait")
        app.stop()
        answer = pending.answer()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "server_busy")
    with store_of(settings) as store:
        assert state_of(store, pending.job_id) is JobState.CANCELLED

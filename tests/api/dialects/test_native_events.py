"""Following jobs: who is told what, that nothing stays behind, and that it ends."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import Engine

from server.api.auth.keys import KeyStore
from server.api.dialects.native import events as native_events
from server.api.dialects.native.writing import JobAnswer
from server.jobs.job import Heartbeat, JobProgress, JobState
from server.jobs.store import JobStore
from server.jobs.watcher import JobWatcher
from server.storage.database import open_engine
from server.storage.files import Storage
from tests.support.apps import FIRST, KEYS, SECOND, client_of, settings_in, store_of
from tests.support.databases import migrated_sqlite
from tests.support.http_stub import LiveApp, running_app
from tests.support.jobs import LONG_S, claim_job, new_job, run_with
from tests.support.native_calls import BODY, Event, events_of
from tests.support.waiting import until

pytestmark = pytest.mark.process


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)


def test_skipped_states_are_made_up_for() -> None:
    queued = JobProgress(JobState.QUEUED, 0, 0, 0, 1)
    late = JobProgress(JobState.RUNNING, 1, 5, 14, None)
    again = JobProgress(JobState.RUNNING, 2, 0, 0, None)

    def names(last: JobProgress | None, now: JobProgress) -> list[str]:
        return [name for name, _ in native_events.events_between(last, now)]

    assert names(None, late) == ["started", "step"]
    assert names(queued, late) == ["started", "step"]
    assert names(late, late) == ["step"]
    assert names(late, again) == ["started"], "another worker has it"
    assert names(late, queued) == ["queued"]
    assert names(late, JobProgress(JobState.FAILED, 1, 5, 14, None)) == []


def test_preview_is_told_of_once() -> None:
    plain = JobProgress(JobState.RUNNING, 1, 5, 14, None)
    shown = replace(plain, preview_step=5)
    later = replace(shown, step=6)
    again = replace(shown, attempt=2)
    ended = replace(shown, state=JobState.FINISHED)

    steps = native_events.new_preview_step
    assert (steps(None, plain), steps(None, shown), steps(plain, shown)) == (None, 5, 5)
    assert (steps(shown, later), steps(shown, again), steps(plain, ended)) == (None, 5, None)


def test_silence_is_filled_with_comments(store: JobStore) -> None:
    job_id = store.submit(new_job()).id

    async def never() -> JobAnswer:
        raise AssertionError("the job has not ended")

    async def nothing() -> None:
        raise AssertionError("there is no preview")

    async def body(watcher: JobWatcher) -> list[bytes]:
        with watcher.subscribe(job_id, "a holder") as subscription:
            events = native_events.write_events(subscription, never, nothing, heartbeat_s=0.05)
            # The job is looked up first, and there may be silence meanwhile.
            while (first := await anext(events)).startswith(b":"):
                pass
            return [first, await anext(events), await anext(events)]

    first, *rest = run_with(store, body)
    assert first.startswith(b"event: queued\n")
    assert [chunk[:1] for chunk in rest] == [b":", b":"]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[LiveApp]:
    with running_app(settings_in(tmp_path)) as app:
        yield app


@pytest.fixture
def live_store(tmp_path: Path) -> Iterator[JobStore]:
    with store_of(settings_in(tmp_path)) as store:
        yield store


@contextmanager
def following(
    app: LiveApp, job_id: int, client: httpx2.Client | None = None
) -> Iterator[Iterator[Event]]:
    """A job's events, one by one as they come."""
    path = f"/api/jobs/{job_id}/events"
    with (client or app.client).stream("GET", path, timeout=LONG_S) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events_of(answer.iter_lines())


def create(app: LiveApp) -> int:
    return int(app.client.post("/api/jobs", json=BODY).json()["id"])


class TestStream:
    def test_whole_life(self, app: LiveApp, live_store: JobStore) -> None:
        job_id = create(app)
        with following(app, job_id) as events:
            assert next(events) == ("queued", {"position": 1})
            job = claim_job(live_store, job_id)
            assert next(events) == ("started", {"attempt": 1})
            live_store.heartbeat(job, 7, 14)
            assert next(events) == ("step", {"step": 7, "total_steps": 14})
            live_store.finish(job, [False, False])
            name, told = next(events)
            assert (name, told["state"], len(told["outputs"])) == ("finished", "finished", 2)
            assert [*events] == [], "the stream ends with the job"

    def test_streams_of_a_key_are_limited(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path, auth={"keys": KEYS}, http={"max_streams_per_key": 2})
        with running_app(settings) as app, ExitStack() as stack:
            clients = {key: stack.enter_context(client_of(app, key)) for key in KEYS}
            jobs = {key: clients[key].post("/api/jobs", json=BODY).json()["id"] for key in KEYS}

            def follow(key: str) -> httpx2.Response:
                path = f"/api/jobs/{jobs[key]}/events"
                return stack.enter_context(clients[key].stream("GET", path))

            streams = [follow(FIRST) for _ in range(3)]
            assert [each.status_code for each in streams] == [200, 200, 429]
            assert streams[2].headers["retry-after"] == "5"
            assert json.loads(streams[2].read())["code"] == "too_many_streams"
            assert follow(SECOND).status_code == 200
            with store_of(settings) as store:
                store.cancel(jobs[FIRST])
            assert all("event: cancelled" in streams[n].read().decode() for n in (0, 1))
            watcher: JobWatcher = app.app.state.services.watcher
            until(lambda: len(watcher) == 1, LONG_S, "the ended streams give their places back")
            assert follow(FIRST).status_code == 200

    def test_preview_comes_with_its_step(
        self, app: LiveApp, live_store: JobStore, tmp_path: Path
    ) -> None:
        job = claim_job(live_store, create(app))
        storage = Storage(settings_in(tmp_path).storage_url)
        with following(app, job.id) as events:
            assert next(events)[0] == "started"
            live_store.heartbeat_all([Heartbeat(job, 3, 14, preview_step=2)])
            assert next(events) == ("step", {"step": 3, "total_steps": 14})
            # Told once the first preview has been looked for.
            live_store.heartbeat_all([Heartbeat(job, 4, 14, preview_step=2)])
            assert next(events) == ("step", {"step": 4, "total_steps": 14})
            storage.put(job.preview_key, b"\x89PNG")
            live_store.heartbeat_all([Heartbeat(job, 6, 14, preview_step=5)])
            assert next(events)[0] == "step", "the first one was gone before it could be read"
            image = "data:image/png;base64,iVBORw=="
            shown = {"step": 5, "total_steps": 14, "image": image}
            assert next(events) == ("preview", shown)
            live_store.heartbeat_all([Heartbeat(job, 7, 14, preview_step=5)])
            assert next(events)[0] == "step"
            live_store.cancel(job.id)
            assert [name for name, _ in events] == ["cancelled"]
        late = claim_job(live_store, create(app))
        live_store.heartbeat_all([Heartbeat(late, 3, 14, preview_step=2)])
        storage.put(late.preview_key, b"\x89PNG")
        with following(app, late.id) as events:
            assert [next(events)[0] for _ in range(3)] == ["started", "step", "preview"]

    @pytest.mark.parametrize("state", ["failed", "cancelled"])
    def test_other_ends(self, state: str, app: LiveApp, live_store: JobStore) -> None:
        job = claim_job(live_store, create(app))
        with following(app, job.id) as events:
            assert next(events) == ("started", {"attempt": 1})
            if state == "failed":
                live_store.fail(job, "No")
            else:
                live_store.cancel(job.id)
            assert [name for name, _ in events] == [state]

    def test_coming_back(self, app: LiveApp, live_store: JobStore) -> None:
        job = claim_job(live_store, create(app))
        live_store.heartbeat(job, 7, 14)
        with following(app, job.id) as events:
            assert next(events)[0] == "started"
            assert next(events) == ("step", {"step": 7, "total_steps": 14})
        live_store.cancel(job.id)
        with following(app, job.id) as events:
            assert [name for name, _ in events] == ["cancelled"]
        path = f"/api/jobs/{job.id}/events"
        assert app.client.get(path, headers={"Last-Event-ID": "cancelled"}).status_code == 204

    def test_clients_that_go_away_leave_nothing(self, app: LiveApp, live_store: JobStore) -> None:
        job_id = create(app)
        watcher: JobWatcher = app.app.state.services.watcher
        head = f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        clients = [socket.create_connection(("127.0.0.1", app.port), LONG_S) for _ in range(200)]
        for client in clients:
            client.sendall(head)
        for client in clients:
            received = b""
            while b"queued" not in received:
                piece = client.recv(4_096)
                assert piece, "it was cut"
                received += piece
        assert len(watcher) == 200
        for client in clients:
            client.close()
        with following(app, job_id) as events:
            assert next(events)[0] == "queued"
            until(lambda: len(watcher) == 1, LONG_S, "the server notices")

    def test_stopping_server_ends_streams(self, app: LiveApp) -> None:
        with following(app, create(app)) as events:
            assert next(events)[0] == "queued"
            app.stop()
            assert [*events] == []

    @pytest.mark.parametrize("end", ["revoked", "rotated"])
    def test_stream_ends_with_its_key(self, end: str, tmp_path: Path) -> None:
        engine = open_engine(migrated_sqlite(tmp_path))
        keys = KeyStore(engine)
        (ending, stored), (staying, _) = keys.create("ending"), keys.create("staying")
        with running_app(settings_in(tmp_path)) as app, ExitStack() as stack:
            streams = []
            for key in (ending, staying):
                client = stack.enter_context(client_of(app, key))
                job_id = client.post("/api/jobs", json=BODY).json()["id"]
                streams.append(stack.enter_context(following(app, job_id, client)))
                assert next(streams[-1])[0] == "queued"
            if end == "revoked":
                keys.revoke(stored.key_id)
            else:
                # The holder has another key then; the one that the stream came with has expired.
                keys.rotate(stored.key_id, 0.0)
            assert [*streams[0]] == [("unauthorized", {"code": "invalid_api_key"})]
            with store_of(settings_in(tmp_path)) as store:
                store.cancel(job_id)
            assert [name for name, _ in streams[1]] == ["cancelled"]
        engine.dispose()

    def test_stream_without_a_key_ends_with_the_first_key(self, tmp_path: Path) -> None:
        engine = open_engine(migrated_sqlite(tmp_path))
        with running_app(settings_in(tmp_path)) as app, following(app, create(app)) as events:
            assert next(events)[0] == "queued"
            KeyStore(engine).create("first")
            assert [name for name, _ in events] == ["unauthorized"]
        engine.dispose()

    def test_unknown_job(self, app: LiveApp) -> None:
        answer = app.client.get("/api/jobs/999/events")
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")

"""Data folders of earlier versions are taken over: what was promised to their clients is kept.

`tests/corpora/data_dirs` has one folder for each schema since the release of 0.1.0 and the last one
before it, and for each database. The code of that time wrote it.

**Before a commit adds a migration**, its author records the schema that it replaces:

    python -m tests.corpora.record_data_dir HEAD

and commits the two new folders with the migration. `test_every_replaced_schema_is_recorded` fails
otherwise. The newest schema needs none: no version is upgraded from it yet.
"""

import hashlib
import io
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from PIL import Image

from server.core.settings import Settings, load_settings
from server.storage.database import known_schemas
from server.worker.loop import run as run_worker
from tests.corpora.record_data_dir import DATA_DIRS, PUBLIC_URL, RECEIVER, Facts
from tests.support.http_stub import running_app
from tests.support.waiting import until
from tests.support.webhooks import receiver

END_S = 120
"""Limit for two small pictures and two webhooks on a busy machine."""

FOREVER_H = 1e6
"""The recorded jobs ended long ago."""

SCHEMAS = sorted({folder.name.partition("_")[0] for folder in DATA_DIRS.iterdir()})

BACKENDS = ("sqlite", pytest.param("postgres", marks=pytest.mark.postgres))


class TakenOver:
    """The present server in an old data folder, once the waiting jobs have ended.

    webhooks: the bodies that the receiver got, by job.
    """

    def __init__(self, facts: Facts, client: httpx2.Client) -> None:
        self.facts = facts
        self.client = client
        self.webhooks: dict[int, dict[str, Any]] = {}

    def fetch(self, job: int) -> Any:
        return self.client.post(f"/api/v3/fetch/{job}", json={"key": self.facts.key}).json()

    def native(self, job: int) -> Any:
        return self.client.get(f"/api/jobs/{job}").json()

    def picture(self, link: str) -> bytes:
        assert link.startswith(PUBLIC_URL)
        return self.client.get(link.removeprefix(PUBLIC_URL)).raise_for_status().content


def test_every_replaced_schema_is_recorded() -> None:
    newest_first = known_schemas()
    replaced = [each for each in newest_first[1:] if each >= SCHEMAS[0]]
    recorded = {folder.name for folder in DATA_DIRS.iterdir()}
    assert recorded >= {
        f"{each}_{backend}" for each in replaced for backend in ("sqlite", "postgres")
    }


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=SCHEMAS)
def old(
    request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TakenOver]:
    recorded = DATA_DIRS / f"{request.param}_{backend}"
    facts = Facts(**json.loads((recorded / "facts.json").read_text(encoding="utf-8")))
    data_dir = tmp_path_factory.mktemp("old")
    shutil.copytree(recorded / "files", data_dir / "files")
    with receiver() as (url, calls):
        host = url.removeprefix("http://").partition("/")[0]
        sql = (recorded / "database.sql").read_text(encoding="utf-8").replace(RECEIVER, host)
        with restored(request, backend, sql, data_dir) as database_url:
            settings = load_settings(
                data_dir=data_dir,
                database_url=database_url,
                public_url=PUBLIC_URL,
                retention={"outputs_h": FOREVER_H, "rows_h": FOREVER_H},
                webhook={"allow_cidrs": ["127.0.0.0/8"]},
            )
            with running_app(settings) as live, running_worker(settings):
                live.client.headers["X-API-Key"] = facts.key
                taken_over = TakenOver(facts, live.client)
                while len(taken_over.webhooks) < 2:
                    _, body = calls.get(timeout=END_S)
                    taken_over.webhooks[body["id"]] = body
                native = facts.queued_native
                until(lambda: bool(taken_over.native(native)["finished_at"]), END_S, "its end")
                yield taken_over


@contextmanager
def restored(
    request: pytest.FixtureRequest, backend: str, sql: str, data_dir: Path
) -> Iterator[str | None]:
    """The recorded database; its URL, None for the SQLite file of the data folder."""
    if backend == "sqlite":
        with closing(sqlite3.connect(data_dir / "inpaint.db")) as database:
            database.executescript(sql)
        yield None
        return
    server = request.getfixturevalue("postgres_server")
    name = server.create_database()
    url = server.url(name)
    with psycopg.connect(url.render_as_string().replace("+psycopg", "")) as connection:
        connection.execute(sql.encode())
    yield str(url)
    server.drop(name)


@contextmanager
def running_worker(settings: Settings) -> Iterator[None]:
    """A worker with the built-in model, in a thread of its own."""
    stopping = threading.Event()
    thread = threading.Thread(target=run_worker, args=(settings, "w", "cpu", stopping))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(END_S)


def test_link_of_a_finished_job_leads_to_the_same_picture(old: TakenOver) -> None:
    answer = old.fetch(old.facts.finished)
    assert (answer["status"], answer["output"]) == ("success", [old.facts.finished_link]), answer
    picture = old.picture(old.facts.finished_link)
    assert hashlib.sha256(picture).hexdigest() == old.facts.finished_sha256


def test_waiting_jobs_end_with_a_picture(old: TakenOver) -> None:
    answer = old.fetch(old.facts.queued_v3)
    assert answer["status"] == "success", answer
    job = old.native(old.facts.queued_native)
    assert (job["state"], job["params"]["seed"]) == ("finished", 7), job
    for link in (*answer["output"], job["outputs"][0]["url"]):
        assert Image.open(io.BytesIO(old.picture(link))).size == (64, 64)


def test_webhooks_of_ended_and_of_waiting_jobs_are_sent(old: TakenOver) -> None:
    sent = {job: (body["status"], body["track_id"]) for job, body in old.webhooks.items()}
    assert sent == {
        old.facts.finished: ("success", "recorded-1"),
        old.facts.queued_v3: ("success", "recorded-2"),
    }


def test_key_is_still_needed_and_valid(old: TakenOver) -> None:
    listed = old.client.get("/api/jobs")
    assert [job["id"] for job in listed.json()["jobs"]] == [3, 2, 1]
    assert old.client.get("/api/jobs", headers={"X-API-Key": "of-nobody"}).status_code == 401

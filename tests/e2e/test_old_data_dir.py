"""A data folder of an earlier version is taken over: its waiting jobs are finished.

`tests/corpora/data_dir_0010` was made with commit ccfa5e5, whose newest migration is 0010:
`serve --workers 0` with `INPAINT_HOLD_S=0` and `INPAINT_WEBHOOK__ALLOW_CIDRS=127.0.0.0/8` was sent
one call of V3 with a webhook and one native job, both with inline images of 64×64, and was stopped.
`inpaint.sql` is what `iterdump` of Python's sqlite3 wrote of a `VACUUM INTO` copy of the database;
`files` is the folder as it was left.
"""

import io
import json
import queue
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.processes import START_TIMEOUT_S, ServerProcess, serving
from tests.support.repository import REPOSITORY

OLD = REPOSITORY / "tests" / "corpora" / "data_dir_0010"
RECORDED_RECEIVER = "127.0.0.1:45678"
"""Host and port of the webhook in the old row."""

V3_JOB, NATIVE_JOB = 1, 2

Calls = queue.Queue[dict[str, Any]]


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[str, Calls]]:
    """Host and port of a receiver of webhooks, and the bodies it has got."""
    calls: Calls = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    host = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    yield f"127.0.0.1:{host.server_address[1]}", calls
    host.shutdown()
    host.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, receiver: tuple[str, Calls]
) -> Iterator[ServerProcess]:
    """The present server and its worker, started in the old folder, once both jobs have ended."""
    folder = tmp_path_factory.mktemp("old")
    restore(folder, receiver[0])
    with serving(folder, {"INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8"}) as process:
        while len(process.events("job finished")) < 2:
            process.wait_for("job finished")
        yield process


def restore(folder: Path, receiver: str) -> None:
    """The old data folder, with the receiver's address of this run in the row."""
    shutil.copytree(OLD / "files", folder / "files")
    sql = (OLD / "inpaint.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(folder / "inpaint.db")) as database:
        database.executescript(sql.replace(RECORDED_RECEIVER, receiver))


def assert_picture(server: ServerProcess, url: str) -> None:
    answer = server.client.get(url[url.index("/", len("http://")) :])
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)


def test_old_v3_job_is_fetched_with_its_picture(server: ServerProcess) -> None:
    answer = server.client.post(f"/api/v3/fetch/{V3_JOB}").json()
    assert answer["status"] == "success", answer
    (url,) = answer["output"]
    assert_picture(server, url)


def test_old_native_job_is_read_with_its_picture(server: ServerProcess) -> None:
    job = server.client.get(f"/api/jobs/{NATIVE_JOB}").json()
    assert job["state"] == "finished", job
    assert (job["params"]["seed"], job["mask"]["read_as"]) == (7, "white")
    (output,) = job["outputs"]
    assert_picture(server, output["url"])
    assert [each["id"] for each in server.client.get("/api/jobs").json()["jobs"]] == [2, 1]


def test_old_webhook_is_sent(server: ServerProcess, receiver: tuple[str, Calls]) -> None:
    body = receiver[1].get(timeout=START_TIMEOUT_S)
    assert (body["status"], body["id"], body["track_id"]) == ("success", V3_JOB, "old-1")

"""Object stores: S3 by a server that checks signatures, the others as far as a stub can tell."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from sqlalchemy import insert, update

from server.core.errors import StorageUnavailable
from server.core.settings.sections import RetentionSettings
from server.jobs.job import OUTPUT_FOLDER
from server.jobs.retention import Janitor
from server.jobs.store import JobStore
from server.storage.database import open_engine
from server.storage.files import Storage
from server.storage.tables import jobs
from tests.chaos.bucket import running_bucket
from tests.support.apps import settings_in
from tests.support.databases import migrated_sqlite
from tests.support.http_stub import running_app
from tests.support.jobs import ROW, claim_one, new_job
from tests.support.proxies import LoopThread
from tests.support.s3 import SECRET, S3Server, counted_calls, running_s3

pytestmark = pytest.mark.process

KEY = "generations/0a6c3f5e-2f0e-4f3a-9d53-3a3c9b6f0d11-0.png"
CONTENT = b"a picture" * 1_000


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_credentials_of_the_desk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def storage(s3: S3Server, tmp_path: Path) -> Storage:
    """By settings alone, without a variable of the environment."""
    settings = settings_in(tmp_path, storage=s3_settings(s3, tmp_path))
    return Storage(settings.storage_url, settings.store_options)


def s3_settings(s3: S3Server, folder: Path, **changes: object) -> dict[str, object]:
    """The section `storage`, with the keys in a file."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    file = folder / "bucket-keys"
    lines = [f"{name}={s3.environment[name]}" for name in names]
    file.write_text("\n".join(["# of the bucket", *lines, ""]))
    file.chmod(0o600)
    return {
        "url": s3.environment["INPAINT_STORAGE__URL"],
        "endpoint": s3.environment["AWS_ENDPOINT"],
        "region": s3.environment["AWS_REGION"],
        "credentials_file": file,
        **changes,
    }


def test_files_come_and_go(storage: Storage) -> None:
    keys = [f"inputs/{number}.npy" for number in range(5)]
    for key in keys:
        storage.put(key, CONTENT)
    assert storage.get(keys[0]) == CONTENT
    assert {file.key for files in storage.list("inputs") for file in files} == {*keys}

    storage.delete_all(["inputs/missing.npy", *keys[1:], "inputs/missing-too.npy"])

    assert [storage.has(key) for key in keys] == [True, False, False, False, False]
    storage.delete_all([])


def test_files_of_a_folder_are_deleted_past_missing_ones(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    for key in ("a", "b"):
        storage.put(key, CONTENT)
    storage.delete_all(["missing", "a", "missing too", "b"])
    assert not storage.has("a")
    assert not storage.has("b")


def test_wrong_secret_is_refused_by_the_store(s3: S3Server, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, storage=s3_settings(s3, tmp_path))
    options = {**settings.store_options, "AWS_SECRET_ACCESS_KEY": f"{SECRET}!"}
    with pytest.raises(StorageUnavailable):
        Storage(settings.storage_url, options).put(KEY, CONTENT)


def test_signed_link_opens_one_file_of_a_private_bucket(storage: Storage) -> None:
    storage.put(KEY, CONTENT)
    link = storage.sign(KEY, "GET", 60)

    assert ask(link) == (200, CONTENT)
    assert ask(link.partition("?")[0])[0] in (400, 403), "the bucket is not private"
    assert ask(link.replace("-0.png", "-1.png"))[0] == 403
    assert ask(link, "PUT")[0] == 403


def test_pictures_are_redirected_by_setting(s3: S3Server, tmp_path: Path) -> None:
    section = s3_settings(s3, tmp_path, redirect=True, redirect_s=120)
    settings = settings_in(tmp_path, storage=section)
    Storage(settings.storage_url, settings.store_options).put(KEY, CONTENT)
    with running_app(settings) as app:
        answer = app.client.get(f"/{KEY}")
        assert answer.status_code == 302
        assert answer.headers["cache-control"] == "no-store"
        link = answer.headers["location"]
        assert "X-Amz-Expires=120" in link
        assert SECRET not in link
        assert ask(link) == (200, CONTENT)
        head = app.client.head(f"/{KEY}")
        assert ask(head.headers["location"], "HEAD")[0] == 200

        missing = app.client.get(f"/{KEY.replace('-0.png', '-1.png')}")
        assert missing.status_code == 404
        own_page = app.client.get(f"/{KEY}", headers={"Sec-Fetch-Site": "same-origin"})
        assert (own_page.status_code, own_page.content) == (200, CONTENT)
        text = app.client.get(f"/{KEY.replace('.png', '.base64')}")
        assert (text.status_code, text.headers["content-type"]) == (200, "text/plain")


def test_pictures_are_streamed_by_default(s3: S3Server, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, storage=s3_settings(s3, tmp_path))
    Storage(settings.storage_url, settings.store_options).put(KEY, CONTENT)
    with running_app(settings) as app:
        answer = app.client.get(f"/{KEY}")
        assert (answer.status_code, answer.content) == (200, CONTENT)
        assert answer.headers["content-type"] == "image/png"


def test_expired_pictures_are_removed_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(migrated_sqlite(tmp_path))
    store = JobStore(engine)
    with LoopThread() as thread, running_bucket(thread) as bucket:
        for name, value in bucket.environment.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        storage = Storage(bucket.environment["INPAINT_STORAGE__URL"])
        for number in range(20):
            store.submit(new_job(file_prefix=f"{number:036}"))
            job = claim_one(store)
            for key in job.output_keys:
                storage.put(key, CONTENT)
            store.finish(job, [False])
        with engine.begin() as connection:
            connection.execute(update(jobs).values(finished_at=0))

        removed = Janitor(engine, storage, RetentionSettings()).expire()

        assert removed.outputs == 20
        assert bucket.files == {}
        assert bucket.calls["POST"] == 1
        assert bucket.calls["DELETE"] == 0
    engine.dispose()


@pytest.fixture
def fresh_s3(tmp_path: Path) -> Iterator[S3Server]:
    """One that has listed nothing yet: it remembers folders, and would miss files put there."""
    with running_s3(tmp_path / "s3") as server:
        yield server


def test_requests_for_many_pictures_are_few(fresh_s3: S3Server, tmp_path: Path) -> None:
    """A listing asks for none of its pictures, and a request removes a thousand of them."""
    engine = open_engine(migrated_sqlite(tmp_path))
    folder = fresh_s3.bucket / "fleet" / OUTPUT_FOLDER
    folder.mkdir(parents=True)
    now = time.time()
    ended = {"state": "finished", "finished_at": now, "params": {"samples": 1}}
    rows = [ROW | ended | {"file_prefix": str(uuid.uuid4())} for _ in range(2_100)]
    with engine.begin() as connection:
        connection.execute(insert(jobs), rows)
    for row in rows:
        (folder / f"{row['file_prefix']}-0.png").touch()
    orphans = [folder / f"{uuid.uuid4()}-0.png" for _ in range(3)]
    for orphan in orphans:
        orphan.touch()
        os.utime(orphan, (0, 0))
    with LoopThread() as thread, counted_calls(thread, fresh_s3.port) as (endpoint, calls):
        settings = settings_in(tmp_path, storage=s3_settings(fresh_s3, tmp_path, endpoint=endpoint))
        storage = Storage(settings.storage_url, settings.store_options)

        assert Janitor(engine, storage, settings.retention).sweep().files == len(orphans)
        assert calls == {"GET": 2 + 3, "POST": 1}, "two folders are empty, the third has 3 pages"

        calls.clear()
        later = Janitor(engine, storage, settings.retention, lambda: now + 1e6)
        assert later.expire().outputs == len(rows)
        assert calls == {"POST": 3}
        assert not [*folder.glob("*.png")]
    engine.dispose()


@contextmanager
def recording_stub() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """An HTTP server that takes everything; its URL, and method, path and scheme of each call."""
    calls: list[tuple[str, str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            scheme = self.headers.get("authorization", "").partition(" ")[0]
            calls.append((self.command, unquote(self.path.partition("?")[0]), scheme))
            self.send_response(201)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_azure_by_url() -> None:
    with recording_stub() as (url, calls):
        options = {
            "AZURE_STORAGE_ACCOUNT_NAME": "pictures",
            "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0",
            "AZURE_ENDPOINT": url,
            "AZURE_ALLOW_HTTP": "true",
        }
        Storage("az://container/prefix", options).put(KEY, CONTENT)
    assert calls == [("PUT", f"/container/prefix/{KEY}", "SharedKey")]


def test_google_by_url(tmp_path: Path) -> None:
    with recording_stub() as (url, calls):
        account = {
            "gcs_base_url": url,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
        }
        file = tmp_path / "account.json"
        file.write_text(json.dumps({**account, "private_key_id": ""}))
        options = {"GOOGLE_SERVICE_ACCOUNT": str(file), "GOOGLE_ALLOW_HTTP": "true"}
        Storage("gs://bucket/prefix", options).put(KEY, CONTENT)
    assert [(method, path) for method, path, _ in calls] == [("PUT", f"/bucket/prefix/{KEY}")]


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ({"url": "ftp://host/folder"}, "must begin with file://, s3://, gs:// or az://"),
        ({"url": "s3:///prefix"}, "names no bucket"),
        (
            {"url": "s3://id:secret@bucket"},
            "^storage.url must hold no keys: name their file in [a-z_.]+$",
        ),
        ({"redirect": True}, "needs an object store"),
        ({"url": "gs://bucket", "region": "x"}, "are for s3:// alone"),
        ({"url": "s3://bucket", "redirect": True, "redirect_s": 1}, "at least 60"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    storage: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        settings_in(tmp_path, storage=storage)


def test_options_that_the_store_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="file store s3://bucket cannot be used"):
        Storage("s3://bucket", {"AWS_NONSENSE": "1"})
    with pytest.raises(ValueError, match="Account must be specified"):
        Storage("az://container")


def test_file_of_credentials_is_private_and_plain(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    settings = settings_in(tmp_path, storage={"url": "s3://bucket", "credentials_file": str(file)})
    file.write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY = b=c\n")
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        _ = settings.store_options
    file.chmod(0o600)
    assert settings.store_options == {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b=c"}
    assert "b=c" in settings.secrets
    file.write_text(
        "aws_secret_access_key=lower\nAWS_SSE_CUSTOMER_KEY_BASE64=sse\n"
        "AZURE_CLIENT_SECRET=azure\nAWS_PROXY_URL=http://u:proxy@proxy\nAWS_ALLOW_HTTP=true\n"
    )
    assert {"lower", "sse", "azure", "proxy"} <= {*settings.secrets}
    assert "true" not in settings.secrets
    file.write_text("no pair")
    with pytest.raises(ValueError, match="not NAME=value"):
        _ = settings.store_options


def ask(url: str, method: str = "GET") -> tuple[int, bytes]:
    """Status and body, as a client without credentials gets them."""
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""

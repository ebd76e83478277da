"""Answers that hold pictures: whole for those who read them, and small in memory for all."""

import base64
import json
import os
import socket
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from server.api.auth.keys import digest_of
from server.api.dialects.inline import InlinePicture, split
from server.api.dialects.vendor.reading import VendorFacts
from server.core.settings import Settings
from server.jobs.job import Job, RequestFacts
from server.jobs.store import JobStore
from server.storage.files import CHUNK_BYTES, Storage
from tests.support.a1111_calls import newest_id
from tests.support.apps import FIRST, KEYS, settings_in
from tests.support.http_stub import ANSWER_S, LiveApp, running_app
from tests.support.jobs import PARAMS, claim_job, new_job
from tests.support.openai_calls import GENERATIONS

pytestmark = pytest.mark.process

MB = 1_000_000
CLIENTS = 16
ODD_SIZES = (1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), auth={"keys": KEYS})


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        app.client.get("/healthz")  # once it answers, its tables are there
        yield app


@pytest.fixture(scope="module")
def storage(settings: Settings) -> Storage:
    return Storage(settings.storage_url)


def make(store: JobStore, storage: Storage, *pictures: bytes, dialect: str = "replicate") -> Job:
    """A finished job of the first key with these pictures, which V3 gives as base64."""
    facts = RequestFacts(base_url="http://x", own=VendorFacts(wants_base64=True).to_json())
    new = new_job(
        key_id=digest_of(FIRST)[:12],
        dialect=dialect,
        params=replace(PARAMS, samples=len(pictures)),
        request=facts if dialect == "v3" else RequestFacts(base_url="http://x"),
    )
    return finish(store, storage, store.submit(new, None).id, pictures)


def finish(store: JobStore, storage: Storage, job_id: int, pictures: tuple[bytes, ...]) -> Job:
    job = claim_job(store, job_id)
    for key, picture in zip(job.output_keys, pictures, strict=True):
        storage.put(key, picture)
    assert store.finish(job, [False] * len(pictures))
    return job


def request_of(path: str, method: str = "GET") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {FIRST}")
    return "\r\n".join([*lines, "Content-Length: 0", "", ""]).encode()


@contextmanager
def traced_memory() -> Iterator[list[int]]:
    """The most bytes that Python has allocated since the beginning of the block, at its end."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


class TestMemory:
    @pytest.mark.parametrize(
        ("method", "path", "dialect"),
        [
            ("GET", "/v1/predictions/{}", "replicate"),
            ("POST", "/v1/predictions/{}/cancel", "replicate"),
            ("POST", "/api/v3/fetch/{}", "v3"),
        ],
        ids=["prediction", "cancel", "fetch"],
    )
    def test_answers_that_nobody_reads_are_small(
        self,
        method: str,
        path: str,
        dialect: str,
        app: LiveApp,
        store: JobStore,
        storage: Storage,
    ) -> None:
        picture = os.urandom(5 * MB)
        job = make(store, storage, picture, picture, dialect=dialect)
        with ExitStack() as stack, traced_memory() as peak:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", app.port), ANSWER_S))
                for _ in range(CLIENTS)
            ]
            for client in clients:
                client.sendall(request_of(path.format(job.id), method))
            for client in clients:
                assert client.recv(12) == b"HTTP/1.1 200"
        assert peak[0] < CLIENTS * MB, "less than a tenth of a picture's base64 for each"

    def test_facts_about_a_file_need_not_its_content(
        self, client: httpx2.Client, storage: Storage
    ) -> None:
        content = b"\x89PNG\r\n\x1a\n" + os.urandom(9 * MB)
        made = client.post("/v1/files", files={"content": ("a.png", content)}).json()
        with ThreadPoolExecutor(CLIENTS) as pool, traced_memory() as peak:
            answers = [*pool.map(client.get, [f"/v1/files/{made['id']}"] * CLIENTS)]
        assert {answer.status_code for answer in answers} == {200}
        assert all(answer.json()["checksums"] == made["checksums"] for answer in answers)
        assert peak[0] < len(content)


def test_pictures_of_any_size_come_whole(
    client: httpx2.Client, store: JobStore, storage: Storage
) -> None:
    pictures = [os.urandom(size) for size in ODD_SIZES]
    job = make(store, storage, *pictures)
    answer = client.get(f"/v1/predictions/{job.id}")
    assert answer.headers.get_list("content-length") == [str(len(answer.content))]
    texts = [uri.partition(",")[2] for uri in answer.json()["output"]]
    assert [base64.b64decode(text, validate=True) for text in texts] == pictures


def test_picture_that_goes_while_it_is_sent(
    client: httpx2.Client, store: JobStore, storage: Storage
) -> None:
    """The answer breaks off, so that no client takes it for whole."""
    job = make(store, storage, os.urandom(16 * MB), b"second")
    with client.stream("GET", f"/v1/predictions/{job.id}") as answer:
        storage.delete(job.output_keys[1])
        with pytest.raises(httpx2.RemoteProtocolError):
            answer.read()


def test_picture_that_goes_while_its_event_is_sent(
    client: httpx2.Client, store: JobStore, storage: Storage
) -> None:
    body: dict[str, Any] = {"prompt": "a cat", "n": 2, "stream": True}
    with client.stream("POST", GENERATIONS, json=body) as answer:
        job = finish(store, storage, newest_id(store), (os.urandom(16 * MB), b"second"))
        lines = answer.iter_lines()
        next(line for line in lines if line.startswith("event:"))
        storage.delete(job.output_keys[1])
        events: list[str] = []
        with pytest.raises(httpx2.RemoteProtocolError):
            events += lines
    assert not [line for line in events if line.startswith("event: error")]


def test_marks_are_replaced_in_order() -> None:
    first, second, unused = (InlinePicture(name, 5) for name in ("a", "b", "c"))
    body = json.dumps([first.mark, "x", second.mark]).encode()
    parts = split(body, [first, second, unused])
    assert parts == [b'["', first, b'", "x", "', second, b'"]']

"""The examples of `/openapi.json` on a real server: each works, and its answer is described."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.support.openapi import Call, Document, as_form, calls_of, faults
from tests.support.processes import ServerProcess, serving

pytestmark = [pytest.mark.process, pytest.mark.slow]

JSON, MULTIPART, FORM = (
    "application/json",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> Document:
    found: Document = server.client.get("/openapi.json").json()
    return found


def sent(client: httpx2.Client, call: Call, media_type: str, example: Any) -> httpx2.Response:
    """The answer to an example in one form."""
    path = call.path.replace("{owner}", "inpaint-server").replace("{name}", "builtin")
    match media_type:
        case "multipart/form-data":
            arguments = as_form(call, example)
        case "application/x-www-form-urlencoded":
            arguments = {"data": example}
        case _:
            arguments = {"json": example}
    return client.request(call.method, path, timeout=300, **arguments)


def wrongs(call: Call, answer: httpx2.Response) -> list[str]:
    """What the description says against an answer."""
    if not answer.is_success or '"status":"error"' in answer.text:
        return [answer.text]
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = call.answer_schema(answer.status_code, media_type)
    if schema is None or media_type != JSON:
        return []
    return faults(call.document, schema, answer.json(), is_closed=True)


def test_every_example_works_and_its_answer_is_described(
    server: ServerProcess, document: Document
) -> None:
    seen: set[tuple[str, str]] = set()
    for call in calls_of(document):
        for media_type, form in call.content.items():
            # The vendor's families share schemas, and all of them read forms in the same way.
            schema = form["schema"].get("$ref", call.path)
            is_vendor_form = call.tag in ("v3", "vendor") and media_type != JSON
            kind = (call.tag if is_vendor_form else schema, media_type)
            if kind in seen:
                continue
            seen.add(kind)
            for name, example in call.examples(media_type).items():
                found = wrongs(call, sent(server.client, call, media_type, example))
                assert found == [], (call.path, media_type, name)
    assert {media_type for _, media_type in seen} == {JSON, MULTIPART, FORM}


@pytest.fixture(scope="module")
def values(server: ServerProcess, document: Document) -> dict[str, str]:
    """Values of the parameters in paths: a finished job and its picture."""
    example = document["components"]["examples"]["v3_inpaint"]["value"]
    job = server.inpaint(**example)
    name = job["output"][0].rpartition("/")[2]
    return {"job_id": str(job["id"]), "prediction_id": str(job["id"]), "name": name}


def test_answers_about_what_was_made_are_described(
    server: ServerProcess, document: Document, values: dict[str, str]
) -> None:
    model = {"owner": "inpaint-server", "name": "builtin", "version": "1"}
    asked = 0
    for call in calls_of(document):
        is_picture = call.tag == "pictures"
        known = values if is_picture or "{owner}" not in call.path else model
        if call.path == "/v1/models/{name}":
            known = model
        is_other = call.path.startswith(("/uploads", "/v1/files")) or "events" in call.path
        if call.content or is_other or call.path.endswith(("/replay", "/redeliver", "/cancel")):
            continue
        path = call.path.format_map(known)
        path += ".webp" if path.startswith("/thumbnails") else ""
        found = wrongs(call, server.client.request(call.method, path))
        assert found == [], path
        asked += 1
    assert asked > 40


def test_fetches_of_finished_jobs_are_described(
    server: ServerProcess, document: Document, values: dict[str, str]
) -> None:
    job_id = values["job_id"]
    for call in calls_of(document):
        if call.path.endswith(("/fetch", "/fetch/{job_id}")):
            path = call.path.format(job_id=job_id)
            answer = server.client.post(path, json={"request_id": job_id})
            assert wrongs(call, answer) == [], path


def test_refusals_are_described(server: ServerProcess, document: Document) -> None:
    for call in calls_of(document):
        if call.content and "{" not in call.path:
            answer = server.client.request(call.method, call.path, content=b"[")
            schema = call.answer_schema(
                answer.status_code, answer.headers["content-type"].partition(";")[0]
            )
            assert call.tag in ("v3", "vendor") or answer.status_code in (400, 422), call.path
            assert faults(document, schema, answer.json(), is_closed=True) == [], call.path

"""The API reference in Chromium, against a server with the built-in model."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.browsers import Line, browser_program
from tests.support.openapi import Call, calls_of
from tests.support.processes import ServerProcess

pytestmark = [pytest.mark.process, pytest.mark.slow]

KEY = "key-of-the-reference"
MAX_BYTES = 85_000
"""All files of the page; 25 kB of them are the playground's too."""
UNSAFE = {"/api/webhooks/ping", "/sdapi/v1/interrupt", "/sdapi/v1/skip"}
"""It calls other servers; they cancel the jobs of other tests."""


def chosen_calls(server: ServerProcess) -> dict[str, str]:
    """The tag of one call of each kind, by its place in the page."""
    chosen: dict[str, Call] = {}
    for call in calls_of(server.client.get("/openapi.json").json()):
        if call.path in UNSAFE or "_id}" in call.path or "{name}" in call.path:
            continue
        examples = [each for form in call.content for each in call.examples(form)]
        # The vendor's families have the same examples.
        chosen.setdefault(examples[0] if examples else call.method + call.path, call)
    return {f"{call.method}{call.path}": call.tag for call in chosen.values() if is_safe(call)}


def is_safe(call: Call) -> bool:
    """Whether a call works without anything but its example."""
    return call.method == "get" or any(call.examples(form) for form in call.content)


@pytest.fixture(scope="module")
def seen(
    server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    home = tmp_path_factory.mktemp("docs")
    Image.new("RGB", (256, 256), "navy").save(home / "navy.png")
    calls = chosen_calls(server)
    call = {"base": server.url + "/", "shots": str(home), "picture": str(home / "navy.png")}
    with browser_program("docs.py", home, calls=[*calls], **call) as browser:
        views = {view: browser.next() for view in ("light", "dark", "phone")}
        yield {**views, "tags": calls, "all": browser.next(), "sizes": browser.next()["sizes"]}


@pytest.mark.parametrize("view", ["light", "dark", "phone"])
def test_call_is_found_and_sent(view: str, seen: dict[str, Line]) -> None:
    line = seen[view]
    assert any("/v1/images/edits" in each for each in line["found"])
    assert len(line["found"]) < 5
    assert line["url"].endswith("docs#post/v1/images/edits")
    assert (line["answer"]["status"], line["answer"]["pictures"]) == (200, 1)
    assert line["wrong"] == []
    assert line["errors"] == []
    assert line["overflow"] <= 0


def test_every_safe_example_works_from_the_page(seen: dict[str, Any]) -> None:
    answers = seen["all"]["answers"]
    for answer in answers:
        is_refused = '"status": "error"' in answer["text"]
        assert answer["status"] in (200, 201, 202), answer
        assert not is_refused, answer
    assert {seen["tags"][each["call"]] for each in answers} >= {
        *("native", "v3", "vendor", "openai", "a1111", "replicate", "iopaint", "health")
    }
    with_pictures = {each["call"] for each in answers if each["pictures"]}
    assert {"post/sdapi/v1/img2img", "post/api/v1/inpaint", "post/api/v3/inpaint"} <= with_pictures
    assert seen["all"]["errors"] == []


def test_pictures_are_chosen_as_files_and_broken_json_is_told(seen: dict[str, Any]) -> None:
    assert "This is not JSON" in seen["all"]["file"]["refusal"]


def test_page_is_small(seen: dict[str, Any]) -> None:
    assert 8 < len(seen["sizes"])
    assert sum(seen["sizes"]) < MAX_BYTES


def test_key_is_asked_for_and_kept_for_the_tab(tmp_path: Path, shots: str) -> None:
    # No worker is needed, and so none is waited for.
    server = ServerProcess(tmp_path / "data", {"INPAINT_AUTH__KEYS": KEY}, "--workers", "0")
    try:
        call = {"base": server.url + "/", "shots": shots, "key": KEY}
        with browser_program("docs_key.py", tmp_path, **call) as browser:
            line = browser.next()
    finally:
        server.stop()
        server.client.close()

    assert "asks for an API key" in line["said"][0]
    assert "unknown, expired or revoked" in line["said"][1]
    assert line["said"][2] == ""
    assert line["status"] == "200"
    assert KEY not in line["curl"]
    local, session = json.loads(line["stored"])
    assert (local, session) == ({}, {"inpaint-key": KEY})
    overview = [f"inpaint-server {version('inpaint-server')}"]
    assert line["headings"] == 5 * [overview], "an odd address leaves the page empty"
    assert line["wrong"] == []
    assert line["errors"] == []

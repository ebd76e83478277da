"""The status page in Chromium, against a server with the built-in model."""

from pathlib import Path

import pytest

from tests.support.browsers import BrowserProgram, Line, browser_program
from tests.support.native_calls import BODY, create
from tests.support.processes import ServerProcess, serving
from tests.support.webhooks import receiver

pytestmark = [pytest.mark.process, pytest.mark.slow]

MAX_BYTES = 150_000
KEY = "key-of-the-operator"
PROMPT = "a canary of a prompt"


def submit_jobs(server: ServerProcess, webhook: str) -> None:
    """One that takes a while, one that ends soon and one that fails; a receiver that is gone."""
    # Longer than the page pauses between two questions.
    large = {"width": 512, "height": 512, "samples": 2}
    small = {"width": 128, "height": 128, "samples": 1, "num_inference_steps": 2}
    create(server.client, prompt=PROMPT, num_inference_steps=100, **large)
    create(server.client, prompt=PROMPT, webhook=webhook, **small)
    create(server.client, prompt=PROMPT, clip_skip=8, **small)


def next_of(browser: BrowserProgram, step: str) -> Line:
    line = browser.next()
    assert line["step"] == step
    return line


def test_page_follows_its_server(tmp_path: Path, shots: str) -> None:
    data_dir = tmp_path / "data"
    environment = {"INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8"}
    with serving(data_dir, environment) as server, receiver(410) as (webhook, _):
        port = server.url.rsplit(":", 1)[1]
        with browser_program("status.py", tmp_path, base=server.url, shots=shots) as browser:
            idle = next_of(browser, "idle")
            submit_jobs(server, webhook)
            busy = next_of(browser, "busy")
            hidden = next_of(browser, "hidden")
            views = [next_of(browser, "dark"), next_of(browser, "phone")]
            server.kill()
            browser.go_on()
            away = next_of(browser, "away")
            with serving(data_dir, environment, "--port", port):
                browser.go_on()
                back = next_of(browser, "back")

    assert any("No job has ended" in each for each in idle["tiles"])
    assert len(views[0]["sizes"]) > 5
    assert sum(views[0]["sizes"]) <= MAX_BYTES
    assert any(each.startswith("Finished in the last hour\n2\n") for each in busy["tiles"])
    assert any("33 % of those that ended" in each for each in busy["tiles"])
    assert "clip_skip_too_large" in busy["failures"]
    assert "2 jobs finished, 1 failed, 0 were cancelled" in busy["summary"]
    assert "Half of the finished jobs took at most" in busy["latency"]
    assert busy["rows"] >= 1
    assert busy["values"] == ["58", "0"]
    assert "finished 0, failed 0, cancelled 0" in busy["told"]
    assert busy["wrong"] == []
    assert hidden["is_asked"] is False
    for view in views:
        assert (view["wrong"], view["errors"]) == ([], [])
        assert view["overflow"] <= 0
    assert "The figures below are of" in away["old"]
    assert away["tiles"][2:] == busy["tiles"][2:]
    assert away["wrong"] == []
    assert any(each.startswith("Finished in the last hour\n2\n") for each in back["tiles"])
    assert back["errors"] == []


def test_key_is_asked_for(tmp_path: Path, shots: str) -> None:
    environment = {"INPAINT_AUTH__KEYS": KEY}
    server = ServerProcess(tmp_path / "data", environment, "--workers", "0")
    try:
        server.client.headers["X-API-Key"] = KEY
        assert server.client.post("/api/jobs", json=BODY | {"prompt": PROMPT}).status_code == 202
        call = {"base": server.url, "shots": shots, "key": KEY}
        with browser_program("status_keys.py", tmp_path, **call) as browser:
            seen = browser.next()
    finally:
        server.stop()
        server.client.close()

    assert seen["is_shown"] is False
    assert "unknown, expired or revoked" in seen["refused"]
    assert "No worker has reported lately" in seen["text"]
    assert KEY not in seen["text"]
    assert PROMPT not in seen["text"]
    assert seen["wrong"] == []
    assert seen["errors"] == []

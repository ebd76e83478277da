"""What log lines hold, and what they never hold. Each test is a process: logging is set up once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

PREPARE = """
import logging
from server.core.logs import configure_logging, get_logger
logger = get_logger("server.test")
configure_logging(secrets=["configured-canary", "k"])
"""


def lines_of(program: str) -> list[dict[str, Any]]:
    """The log lines of a program, which must end well and print nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + program], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_lines_are_json_of_listed_fields() -> None:
    listed, unlisted = lines_of("""
logger.info("job claimed", job_id=7, worker_id="w")
logger.info("request", path="/x", prompt="canary", key="canary", body=b"canary", headers={})
""")
    assert (listed["event"], listed["level"], listed["job_id"]) == ("job claimed", "info", 7)
    assert listed["timestamp"].endswith("Z")
    assert set(unlisted) == {"event", "level", "timestamp", "path"}


def test_tracebacks_are_one_line() -> None:
    (line,) = lines_of("""
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("pictures not stored", job_id=7)
""")
    assert "ZeroDivisionError" in line["exception"]


def test_libraries_write_in_the_same_form_and_only_what_matters() -> None:
    (line,) = lines_of("""
logging.getLogger("uvicorn.error").warning("odd %s", "thing", extra={"key": "canary"})
logging.getLogger("httpx2").info("GET http://x/?key=canary")
logging.getLogger("uvicorn.access").info("GET /?key=canary")
logging.getLogger("uvicorn.error").debug("quiet")
""")
    assert (line["event"], line["level"]) == ("odd thing", "warning")
    assert "canary" not in str(line)


def test_line_breaks_of_strangers_stay_inside_the_line() -> None:
    (line,) = lines_of("""logger.info("request", path="/a\\n{\\"event\\": \\"forged\\"}")""")
    assert line["event"] == "request"


def test_what_looks_like_a_secret_is_taken_out() -> None:
    (line, trace) = lines_of("""
logger.info("sent", url="https://user:canary@h.example/a.png?sig=canary&x=1", path="/a?key=canary",
            detail="a whsec_canary/canary= and sd_canarycanary and Bearer canary " + "canary" * 40,
            error="configured-canary", reason="unlisted")
try:
    raise ValueError("GET https://h.example/a?token=canary failed for sd_canarycanary")
except ValueError:
    logger.exception("not fetched")
""")
    assert line["url"] == "https://(user)@h.example/a.png?(query)"
    assert line["path"] == "/a?(query)"
    assert line["detail"] == "a (webhook secret) and (key) and Bearer (credentials) (base64)"
    assert line["error"] == "(secret)"
    assert "GET https://h.example/a?(query) failed for (key)" in trace["exception"]
    assert "canary" not in str([line, trace])


def test_ordinary_lines_stay_as_they_are() -> None:
    text = "worker h-1a2b3c-0 took job 7, asked why? http://127.0.0.1:8000 /generations/x-0.png"
    (line,) = lines_of(f"""logger.info({text!r}, detail="k", path={"/a" * 90!r})""")
    assert (line["event"], line["detail"], line["path"]) == (text, "k", "/a" * 90)


def test_one_field_does_not_fill_the_disk() -> None:
    (line,) = lines_of("""logger.info("x", detail="a " * 1_000_000)""")
    assert len(line["detail"]) == 2_000


def test_a_cut_shows_no_part_of_a_secret() -> None:
    (line,) = lines_of("""logger.info("x", path="/" + "a." * 148 + "/sd_canarycanary/b")""")
    assert line["path"] == ("/" + "a." * 148 + "/(key)/b")[:300]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_full_disk_under_the_log_fails_nobody() -> None:
    program = (
        PREPARE
        + """
for level in ("debug", "info", "warning", "error", "critical", "exception"):
    getattr(logger, level)("lost")
logging.getLogger("uvicorn.error").warning("lost too")
print("goes on", flush=True)
import os
os._exit(0)
"""
    )
    with Path("/dev/full").open("w") as full:
        answer = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=60,
            check=True,
        )
    assert answer.stdout == "goes on\n"


def test_asyncio_repeats_itself_once_a_second_at_most() -> None:
    lines = lines_of("""
from server.core.logs import RepeatFilter
asyncio = logging.getLogger("asyncio")
now = 100.0
asyncio.filters[:] = [RepeatFilter(lambda: now)]
for _ in range(5_000):
    asyncio.error("out of system resource")
asyncio.error("something else")
now += 2
asyncio.error("something else")
""")
    assert [line["event"] for line in lines] == [
        "out of system resource",
        "something else",
        "something else",
    ]
    lines = lines_of("""
for _ in range(200):
    logging.getLogger("asyncio").error("at the same time")
""")
    # One, but where the machine stood still for a second.
    assert 1 <= len(lines) < 20
    assert {line["event"] for line in lines} == {"at the same time"}


def test_keys_that_a_file_gets_later_are_taken_out(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    early, late = lines_of(f"""
from pathlib import Path
from server.api.auth.keyring import KeyRing
from server.storage.database import migrate, open_engine
from server.api.auth.keys import KeyStore
from server.core.settings.sections import AuthSettings
engine = open_engine("sqlite:///{tmp_path}/inpaint.db")
migrate(engine)
file = Path("{file}")
ring = KeyRing(AuthSettings(keys_file=file), KeyStore(engine), is_open_allowed=True)
logger.info("before", detail="late-canary-of-the-file")
for keys in ("late-canary-of-the-file", ""):
    file.write_text(keys)
    ring.refresh()
logger.info("after", detail="its late-canary-of-the-file")
""")
    assert (early["detail"], late["detail"]) == ("late-canary-of-the-file", "its (secret)")

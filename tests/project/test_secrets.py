"""One server's whole life with marked secrets, which then stand where they may and nowhere else."""

import base64
import io
import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import MetaData, select

from server.cli.main import main
from server.storage.database import open_engine
from tests.support.processes import ServerProcess, image_host, serving

pytestmark = pytest.mark.process

PLAIN_KEY = "canary-plain-key"
FILE_KEY = "canary-file-key-7"
WEBHOOK_SECRET = base64.b64encode(b"canary webhook secret of 32 byte").decode()

COLUMNS = {
    "prompt": {"jobs.params"},
    "negative prompt": {"jobs.params"},
    "image query": {"jobs.request"},
    "webhook query": {"jobs.webhook", "deliveries.url"},
}
"""The only columns in which a secret may stand. All others may stand in none."""


@contextmanager
def receiver() -> Iterator[tuple[str, "queue.Queue[int]"]]:
    """A webhook receiver whose first answer is 500; its address, and the statuses it gave."""
    given: queue.Queue[int] = queue.Queue()
    calls = [True] * 100 + [False]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status = 200 if calls.pop() else 500
            self.send_response(status)
            self.end_headers()
            given.put(status)

        def log_message(self, *_arguments: Any) -> None:
            """Quiet."""

    host = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{host.server_address[1]}", given
    finally:
        host.shutdown()
        host.server_close()
        thread.join()


def noise_png() -> bytes:
    """A picture whose base64 text is like no other."""
    pixels = np.random.default_rng(7).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def stored_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Made as an operator makes it."""
    assert main(["keys", "create", "team", "--data-dir", str(tmp_path / "data")]) == 0
    return capsys.readouterr().out.strip()


def test_secrets_stay_where_they_may_be(tmp_path: Path, stored_key: str) -> None:
    picture = base64.b64encode(noise_png()).decode()
    secrets = {
        "plain key": PLAIN_KEY,
        "file key": FILE_KEY,
        "stored key": stored_key,
        "wrong key": "canary-wrong-key",
        "prompt": "canaryprompt",
        "negative prompt": "canarynegative",
        "picture": picture[2_000:2_060],
        "image query": "canaryimagequery",
        "webhook query": "canarywebhookquery",
        "webhook secret": WEBHOOK_SECRET,
        "body": "canarybody",
    }
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(noise_png())
    keys_file = tmp_path / "keys"
    keys_file.write_text(FILE_KEY)
    keys_file.chmod(0o600)
    environment = {
        "INPAINT_AUTH__KEYS": PLAIN_KEY,
        "INPAINT_AUTH__KEYS_FILE": str(keys_file),
        "INPAINT_WEBHOOK__SECRET": f"whsec_{WEBHOOK_SECRET}",
        "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8",
        "INPAINT_ADMIN__PORT": "0",
        "INPAINT_HOLD_S": "0",
    }
    with image_host(images) as host, receiver() as (hook, statuses):
        good = {
            "key": stored_key,
            "prompt": f"{secrets['prompt']} of a circle",
            "negative_prompt": secrets["negative prompt"],
            "init_image": f"{host}/a.png?X-Signature={secrets['image query']}",
            "mask_image": picture,
            "width": 64,
            "height": 64,
            "webhook": f"{hook}/hook?token={secrets['webhook query']}",
        }
        # Without a worker first, so that an input can be damaged before it is read.
        waiting = ServerProcess(tmp_path / "data", environment, "--workers", "0")
        with waiting.client:
            run_into_refusals(waiting, good, secrets)
            first, second = (waiting.inpaint(**good) for _ in range(2))
            assert (first["status"], second["status"]) == ("processing", "processing")
            figures = admin_pages(waiting)
            waiting.stop()
        damaged = tmp_path / "data" / "files" / "inputs" / f"{second['meta']['file_prefix']}.npy"
        damaged.write_bytes(b"damaged")
        with serving(tmp_path / "data", environment) as server:
            # The first call of all is refused: three calls are two jobs' and one retry.
            assert sorted(statuses.get(timeout=60) for _ in range(3)) == [200, 200, 500]
            assert fetch(server, first, good)["status"] == "success"
            reason = fetch(server, second, good)["message"]
            assert reason == "Failed, Try Again. The stored images are gone"
            figures += admin_pages(server)
    columns = columns_with(secrets, tmp_path / "data" / "inpaint.db")

    log = "".join(waiting.log + server.log)
    assert "job finished" in log
    assert [line for line in server.log if '"status": 500' in line and "webhook" in line]
    for name, secret in secrets.items():
        assert secret not in log, name
        assert secret not in figures, name
        assert columns[name] == COLUMNS.get(name, set()), name


def run_into_refusals(server: ServerProcess, good: dict[str, Any], secrets: dict[str, str]) -> None:
    """Every kind of refusal, with the secrets in every place a client may put them."""
    query = f"?sig={secrets['image query']}"
    port = httpx2.URL(good["init_image"]).port
    for changes in (
        {"key": secrets["wrong key"]},
        {"samples": 9, "guidance_scale": secrets["body"]},
        {"init_image": f"http://127.0.0.1:{port}/none.png{query}"},
        {"init_image": f"http://10.0.0.1/a.png{query}"},
        {"init_image": f"http://user:{secrets['image query']}@127.0.0.1:1/a.png{query}"},
        {"init_image": good["mask_image"][:-400]},
        {"webhook": f"ftp://h/{secrets['webhook query']}"},
        {"request_id": 999, "prompt": None, "track_id": secrets["body"]},
    ):
        assert server.inpaint(**(good | changes))["status"] != "processing", changes
    send = server.client.post
    send("/api/v3/inpaint", content=f'{{"key": "{good["key"]}", "prompt": "{secrets["body"]}",')
    send("/api/v3/system_load", params={"key": PLAIN_KEY, "x": secrets["body"]})
    send("/api/v3/system_load", headers={"key": FILE_KEY, "x-other": secrets["body"]})
    send("/api/v3/system_load", headers={"authorization": f"Bearer {stored(good)}"})
    send("/api/v3/system_load", headers={"x-request-id": "bad id " + secrets["body"]})
    send(f"/api/v3/nowhere/{stored(good)}?key={PLAIN_KEY}")


def stored(good: dict[str, Any]) -> str:
    """The key of a good request."""
    return str(good["key"])


def fetch(server: ServerProcess, job: dict[str, Any], good: dict[str, Any]) -> dict[str, Any]:
    """What became of a job."""
    answer: dict[str, Any] = server.client.post(
        f"/api/v3/fetch/{job['id']}", json={"key": good["key"]}
    ).json()
    return answer


def admin_pages(server: ServerProcess) -> str:
    """All that the second port tells."""
    lines = [json.loads(line) for line in server.log if '"admin listening"' in line]
    return "".join(
        httpx2.get(f"{lines[0]['url']}/{page}", timeout=60, trust_env=False).text
        for page in ("metrics", "readyz")
    )


def columns_with(secrets: dict[str, str], database: Path) -> dict[str, set[str]]:
    """For each secret the columns, `table.column`, of which any value holds it."""
    engine = open_engine(f"sqlite:///{database}")
    tables = MetaData()
    tables.reflect(engine)
    found: dict[str, set[str]] = {name: set() for name in secrets}
    with engine.connect() as connection:
        for table in tables.tables.values():
            for row in connection.execute(select(table)).mappings():
                for column, value in row.items():
                    for name, secret in secrets.items():
                        if secret in str(value):
                            found[name].add(f"{table.name}.{column}")
    engine.dispose()
    return found

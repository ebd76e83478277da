"""A server that keeps inputs makes a finished job's pictures again, byte for byte."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from server.cli.demo import EXAMPLES
from tests.support.dialect_calls import polled, text_of
from tests.support.processes import ServerProcess, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    environment = {"INPAINT_RETENTION__KEEP_INPUTS": "true", "INPAINT_REPRODUCIBLE": "true"}
    with serving(tmp_path_factory.mktemp("server"), environment) as process:
        yield process


def ended(client: httpx2.Client, job_id: int) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        job: dict[str, Any] = client.get(f"/api/jobs/{job_id}").json()
        return job

    job: dict[str, Any] = polled(read, lambda job: job["finished_at"] is not None)
    assert job["state"] == "finished", job
    return job


def test_extended_picture_is_made_again(server: ServerProcess) -> None:
    client = server.client
    fields = {
        "prompt": "a red circle",
        "init_image": text_of((EXAMPLES / "clouds.png").read_bytes()),
        "extend": {"left": 64, "bottom": 32},
        "width": 192,
        "num_inference_steps": 4,
        "strength": 1.0,
        "samples": 2,
        "output_format": "webp",
        "deadline_s": 600,
    }
    answer = client.post("/api/jobs", json=fields)
    assert answer.status_code == 202, answer.text
    original = ended(client, answer.json()["id"])
    assert original["mask"]["coverage"] > 0
    again = client.post(f"/api/jobs/{original['id']}/replay")
    assert again.status_code == 202, again.text
    replay = ended(client, again.json()["id"])
    same = {"is_identical": True, "changed": 0, "largest_difference": 0}
    assert replay["replay"] == {"of": original["id"], "pictures": [same, same]}
    assert replay["params"] == original["params"] | {"model": "builtin"}
    assert [each["sha256"] for each in replay["outputs"]] == [
        each["sha256"] for each in original["outputs"]
    ]
    small = client.get(replay["outputs"][0]["thumbnail_url"])
    assert (small.status_code, small.headers["content-type"]) == (200, "image/webp")

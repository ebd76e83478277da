"""Calls in the vendor's dialect, and the pictures a worker would store for them."""

import base64
import time
from typing import Any

import httpx2

from server.core.settings import Settings
from server.jobs.job import Job
from server.storage.files import Storage
from tests.support.apps import store_of
from tests.support.http_stub import ANSWER_S, png_bytes

IMAGE = base64.b64encode(png_bytes()).decode()

BODY: dict[str, Any] = {
    "prompt": "a cat",
    "init_image": IMAGE,
    "mask_image": f"data:image/png;base64,{IMAGE}",
    "seed": 5,
    "samples": "2",
}

PICTURE = png_bytes(shade=200)


def post(client: httpx2.Client, path: str, **fields: Any) -> Any:
    """A JSON call under the vendor's rule that everything answers 200."""
    answer = client.post(f"/api/v3/{path}", json=fields)
    assert answer.status_code == 200
    return answer.json()


def submit(client: httpx2.Client, **changes: Any) -> int:
    answer = post(client, "inpaint", **(BODY | changes))
    assert answer["status"] == "processing", answer
    return int(answer["id"])


def finish(settings: Settings, job_id: int, *, is_flagged: bool = False) -> Job:
    """What a worker does: claim, store the pictures, finish. is_flagged: the checker's verdict."""
    storage = Storage(settings.storage_url)
    limit = time.monotonic() + ANSWER_S
    with store_of(settings) as store:
        while time.monotonic() < limit:
            for job in store.claim("test", 10):
                for key in job.output_keys:
                    storage.put(key, PICTURE)
                assert store.finish(job, [is_flagged] * len(job.output_keys))
                if job.id == job_id:
                    return job
    raise AssertionError(f"no job {job_id} waits")

"""Calls of the native API, its problems and its event streams."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx2

from tests.support.http_stub import png_bytes

PICTURE = png_bytes()

IMAGE = base64.b64encode(PICTURE).decode()

BODY: dict[str, Any] = {
    "prompt": "a cat",
    "init_image": IMAGE,
    "mask_image": IMAGE,
    "seed": 5,
    "samples": 2,
    "track_id": 7,
}


def create(client: httpx2.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post("/api/jobs", json=BODY | changes)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def problem_of(answer: httpx2.Response) -> tuple[int, str]:
    """Status and code, after a look at the form."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, problem["code"]


Event = tuple[str, dict[str, Any]]


def events_of(lines: Iterator[str]) -> Iterator[Event]:
    name = ""
    for line in lines:
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)

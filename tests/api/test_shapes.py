"""The shapes of two answers: what counts as a difference, and that no value is shown."""

import json
from typing import Any

import pytest

from server.api.shapes import MAX_DIFFERENCES, Answer, compare

PROCESSING = {"status": "processing", "id": 7, "eta": 2.5, "output": [], "meta": {"H": 512}}


def answer(body: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(body).encode())


def found(ours: Any, theirs: Any) -> list[str]:
    return compare(answer(ours), answer(theirs))


def test_values_do_not_count() -> None:
    theirs = {"status": "processing", "id": 99.5, "eta": 1, "output": ["x"], "meta": {"H": 64}}
    assert found(PROCESSING, theirs) == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"tip": "x"}, "body.tip: only there"),
        ({"id": "7"}, "body.id: number here, text there"),
        ({"eta": None}, "body.eta: number here, null there"),
        ({"id": True}, "body.id: number here, boolean there"),
        ({"meta": []}, "body.meta: object here, list there"),
        ({"meta": {}}, "body.meta.H: only here"),
        ({"meta": {"H": "512"}}, "body.meta.H: number here, text there"),
        ({"status": "success"}, "status: processing here, success there"),
        ({"status": "sk-secret"}, "status: processing here, none there"),
        ({"https://x/?token=1": 1}, "body.(odd name): only there"),
    ],
)
def test_difference_is_named(change: dict[str, Any], difference: str) -> None:
    assert found(PROCESSING, PROCESSING | change) == [difference]


def test_first_elements_of_lists_are_compared() -> None:
    ours, theirs = ({"output": [element, None]} for element in ("link", {"url": "link"}))
    assert found(ours, theirs) == ["body.output[]: text here, object there"]


def test_names_of_other_states_are_not_compared() -> None:
    theirs = {"status": "error", "message": "no"}
    assert found(PROCESSING, theirs) == ["status: processing here, error there"]


def test_http_status_counts() -> None:
    assert compare(answer(PROCESSING), answer(PROCESSING, 503)) == [
        "HTTP status: 200 here, 503 there"
    ]


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b"\xff", b"[" * 9_000, b"[" + b"[]," * 9_000 + b"1]"]
)
def test_body_that_is_no_json(body: bytes) -> None:
    assert compare(answer(PROCESSING), Answer(200, body)) == ["body: not JSON, or too large"]


def test_differences_are_limited() -> None:
    many = {f"name{number}": 1 for number in range(10 * MAX_DIFFERENCES)}
    assert len(found({}, many)) == MAX_DIFFERENCES

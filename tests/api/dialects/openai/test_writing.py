"""OpenAI's answers: pictures, events, models and errors, without a server."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from starlette.requests import Request

from models.params import OutputFormat
from server.api.dialects.base import ReadingPolicy
from server.api.dialects.explanations import explain
from server.api.dialects.inline import InlinePicture
from server.api.dialects.openai import writing
from server.api.dialects.openai.reading import Call
from server.api.dialects.openai.routes import owns
from server.api.dialects.registry import dialect_of
from server.core.errors import (
    ApiError,
    ImageProblem,
    ImageUnavailable,
    InvalidApiKey,
    JobFailed,
    QueueFull,
    RouteNotFound,
)
from server.core.notices import Notice
from server.jobs.job import Job, RequestFacts
from tests.support.api_errors import error_classes, sample_of
from tests.support.jobs import PARAMS, ROW
from tests.support.openai_calls import EDITS

CALL = Call("image_edit", None, False, 0, ())
JOB = Job.from_row(
    {
        **dict.fromkeys(("webhook", "track_id", "started_at", "worker_id", "run_s", "error")),
        **ROW,
        "id": 1,
        "state": "finished",
        "dialect": "openai",
        "request": RequestFacts(base_url="http://here").to_json(),
        "params": PARAMS.to_json(),
        "finished_at": 12.75,
        "flagged": [False, True],
        "attempt": 1,
        "step": 0,
        "total_steps": 0,
        "heartbeat_at": None,
        "submitted_s": None,
    }
)
FIRST, SECOND = PICTURES = [InlinePicture("a", 5), InlinePicture("b", 6)]


def written(
    call: Call, job: Job = JOB, pictures: Sequence[InlinePicture] = PICTURES
) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(writing.write_pictures(call, job, pictures))
    return answer


def test_answer_has_both_forms_of_a_picture() -> None:
    answer = written(CALL)
    assert answer["created"] == 12
    assert answer["data"] == [
        {
            "url": "http://here/generations/p-0.png",
            "b64_json": FIRST.mark,
            "seed": 7,
        },
        {
            "url": "http://here/generations/p-1.png",
            "b64_json": SECOND.mark,
            "seed": 8,
            "flagged": True,
        },
    ]
    facts = {name: answer[name] for name in ("background", "output_format", "quality", "size")}
    assert facts == {
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
        "size": "512x512",
    }
    assert answer["usage"]["total_tokens"] == 0
    assert "warnings" not in answer


@pytest.mark.parametrize(
    ("response_format", "names"),
    [("url", {"url", "seed"}), ("b64_json", {"b64_json", "seed"})],
)
def test_response_format(response_format: str, names: set[str]) -> None:
    call = replace(CALL, response_format=response_format)
    assert writing.needs_files(call) is (response_format != "url")
    answer = written(call, pictures=PICTURES if writing.needs_files(call) else [])
    assert {*answer["data"][0]} == names


def test_large_pictures_are_sent_by_their_urls_alone() -> None:
    half = writing.MAX_INLINE_BYTES // 2
    large = [InlinePicture("a", half), InlinePicture("b", half + 1)]
    assert {*written(CALL, pictures=large)["data"][0]} == {"url", "seed"}
    as_asked = replace(CALL, response_format="b64_json")
    assert {*written(as_asked, pictures=large)["data"][0]} == {"b64_json", "seed"}


def test_ignored_fields_are_listed() -> None:
    request = replace(JOB.request, warnings=(Notice.FIELDS_IGNORED, Notice.MODEL_REPLACED))
    answer = written(replace(CALL, ignored=("markup",)), replace(JOB, request=request))
    first, second = answer["warnings"]
    assert (first["code"], first["fields"]) == ("fields_ignored", ["markup"])
    assert second == {"code": "model_replaced", "message": Notice.MODEL_REPLACED.sentence}


def test_events_have_the_fields_that_clients_require() -> None:
    webp = replace(JOB, params=replace(PARAMS, output_format=OutputFormat.WEBP))
    common = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}
    partial = writing.write_partial(CALL, webp, 1, b"preview")
    assert {*partial} == common | {"partial_image_index"}
    assert (partial["type"], partial["partial_image_index"]) == ("image_edit.partial_image", 1)
    assert partial["output_format"] == "png", "previews are PNG files"
    completed = writing.write_completed(CALL, webp, 1, SECOND)
    assert {*completed} == common | {"usage", "url", "seed", "flagged"}
    assert (completed["type"], completed["output_format"]) == ("image_edit.completed", "webp")
    assert completed["b64_json"] == SECOND.mark


def test_size_of_a_picture_that_keeps_its_own_is_left_open() -> None:
    job = replace(JOB, params=replace(PARAMS, only_masked=True))
    assert written(CALL, job)["size"] == "auto"


def test_models() -> None:
    policy = ReadingPolicy(models=["a/b", "/models/c"], aliases={"d": "a/b"})
    answer = writing.write_models(policy)
    assert answer["object"] == "list"
    assert [each["id"] for each in answer["data"]] == ["a/b", "c", "d"]
    assert all({*each} == {"id", "object", "created", "owned_by"} for each in answer["data"])


def refusal(error: ApiError, path: str = EDITS) -> tuple[int, dict[str, Any], Any]:
    response = writing.write_error(error, Request({"type": "http", "path": path}))
    body = json.loads(bytes(response.body))
    assert {*body} == {"error"}
    return response.status_code, body["error"], response.headers


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_has_openais_form(kind: type[ApiError]) -> None:
    error = sample_of(kind)
    status, told, _ = refusal(error)
    assert {*told} == {"message", "type", "param", "code"}
    assert status == (400 if explain(error).status == 422 else explain(error).status)
    assert told["message"].endswith(".")
    assert "canary" not in json.dumps(told)
    assert writing.write_stream_error(error)["error"]["code"] == told["code"]


@pytest.mark.parametrize(
    ("error", "status", "kind", "param"),
    [
        (InvalidApiKey(), 401, "authentication_error", None),
        (QueueFull(5), 429, "rate_limit_error", None),
        (JobFailed("out_of_memory", "No"), 500, "server_error", None),
        (RouteNotFound(), 404, "invalid_request_error", None),
        (
            ImageUnavailable({"mask_image": ImageProblem.NO_TRANSPARENCY}),
            *(400, "invalid_request_error", "mask"),
        ),
        (
            ImageUnavailable({"init_image": ImageProblem.DAMAGED}),
            *(400, "invalid_request_error", "image"),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ApiError) else "",
)
def test_type_and_param(error: ApiError, status: int, kind: str, param: str | None) -> None:
    found, told, _ = refusal(error)
    assert (found, told["type"], told["param"]) == (status, kind, param)


def test_failed_job_is_not_repeated_by_the_clients() -> None:
    assert refusal(JobFailed("unknown", "No"))[2]["x-should-retry"] == "false"
    assert "x-should-retry" not in refusal(QueueFull(5))[2]


def test_unknown_model_is_told_of_as_such() -> None:
    _, told, _ = refusal(RouteNotFound(), "/v1/models/gpt-4")
    assert (told["code"], told["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "is_own"),
    [
        *((EDITS, True), ("/v1/images/variations", True), ("/v1/models", True)),
        *(("/v1/models/a", True), ("/v1/models/a/b", False), ("/v1/images", False)),
        *(("/v1/predictions", False), ("/v1/chat/completions", False), ("/api/jobs", False)),
    ],
)
def test_owned_paths(path: str, is_own: bool) -> None:
    assert owns(path) is is_own
    assert (dialect_of(path).name == "openai") is is_own


def test_webhook_of_a_row_that_has_one() -> None:
    assert writing.write_webhook(JOB) == {"id": 1, "state": "finished", "error": None}

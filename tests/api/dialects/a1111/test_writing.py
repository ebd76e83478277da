"""Answers and errors in A1111's form."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fastapi import Request

from models.params import InpaintParams, SchedulerName
from server.api.dialects.a1111 import catalogue, writing
from server.api.dialects.a1111.reading import Call
from server.api.dialects.base import ReadingPolicy
from server.api.dialects.inline import InlinePicture
from server.core.errors import (
    ApiError,
    ImageProblem,
    ImageUnavailable,
    InvalidApiKey,
    InvalidRequest,
    RouteNotFound,
)
from server.core.notices import Notice
from server.jobs.job import Job, JobState, RequestFacts
from tests.support.api_errors import error_classes, sample_of
from tests.support.http_stub import png_bytes
from tests.support.jobs import ROW

PICTURE = png_bytes()
PARAMS = InpaintParams(
    prompt="a cat", seed=2**32 - 1, samples=2, scheduler=SchedulerName.EULER, clip_skip=1
)
JOB = Job.from_row(
    {
        **{"started_at": None, "finished_at": None, "attempt": 0, "worker_id": None, "step": 0},
        **{"total_steps": 0, "run_s": None, "flagged": None, "error": None, "webhook": None},
        **{"track_id": None, "heartbeat_at": None, "submitted_s": None},
        **ROW,
        "id": 7,
        "dialect": "a1111",
        "created_at": 86_400.0,
        "request": {},
        "params": PARAMS.to_json(),
    }
)
CALL = Call(
    sampler="Euler", batch_size=2, not_applied=(), sends_images=True, parameters={"steps": 20}
)
NOWHERE = Request({"type": "http", "method": "GET", "path": "/sdapi/v1/x", "headers": []})

FIELDS = {
    *("prompt", "all_prompts", "negative_prompt", "all_negative_prompts", "seed", "all_seeds"),
    *("subseed", "all_subseeds", "subseed_strength", "width", "height", "sampler_name"),
    *("cfg_scale", "steps", "batch_size", "restore_faces", "face_restoration_model"),
    *("sd_model_name", "sd_model_hash", "sd_vae_name", "sd_vae_hash", "seed_resize_from_w"),
    *("seed_resize_from_h", "denoising_strength", "extra_generation_params"),
    *("index_of_first_image", "infotexts", "styles", "job_timestamp", "clip_skip"),
    *("is_using_inpainting_conditioning", "version"),
}
"""What A1111 1.9 writes into `info`."""


def job_with(**facts: Any) -> Job:
    return replace(JOB, request=RequestFacts(**facts))


def info_of(job: Job, call: Call = CALL, *, is_interrupted: bool = False) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(written(call, job, None if is_interrupted else ())["info"])
    return info


def written(
    call: Call = CALL, job: Job = JOB, pictures: Sequence[InlinePicture] | None = ()
) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        bytes(writing.write_pictures(call, job, "sd15", pictures).body)
    )
    return body


def test_pictures_are_base64_without_a_prefix() -> None:
    pictures = [InlinePicture("a", 5), InlinePicture("b", 5)]
    body = written(pictures=pictures)
    assert body["images"] == [each.mark for each in pictures]
    assert body["parameters"] == {"steps": 20}
    assert isinstance(body["info"], str)


def test_info_has_every_field() -> None:
    info = info_of(job_with(init_image="http://x/a.png"))
    assert {*info} == FIELDS
    assert info["all_seeds"] == [2**32 - 1, 0]
    assert info["all_prompts"] == ["a cat", "a cat"]
    assert (info["clip_skip"], info["batch_size"]) == (2, 2)
    assert info["denoising_strength"] == 0.7
    assert info["job_timestamp"] == "19700102000000"
    assert info["infotexts"][1] == (
        "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 0, Size: 512x512, Model: sd15, "
        "Denoising strength: 0.7, Clip skip: 2"
    )


def test_text_to_image_has_no_strength() -> None:
    assert info_of(JOB)["denoising_strength"] is None


def test_what_is_not_applied_is_told() -> None:
    assert info_of(JOB)["extra_generation_params"] == {}
    job = job_with(mask_image="x", warnings=(Notice.MASK_IS_EMPTY,))
    call = replace(CALL, not_applied=("eta", "tiling"))
    assert info_of(job, call)["extra_generation_params"] == {
        "Mask blur": 0,
        "Not applied": "eta, tiling",
        "Warnings": Notice.MASK_IS_EMPTY.sentence,
    }


def test_client_may_decline_the_pictures() -> None:
    body = written(replace(CALL, sends_images=False), pictures=[InlinePicture("a", 5)])
    assert body["images"] == []
    assert len(json.loads(body["info"])["infotexts"]) == 2


def test_interrupted_job_has_no_pictures() -> None:
    info = info_of(JOB, is_interrupted=True)
    assert info["infotexts"] == []
    assert info["extra_generation_params"] == {"Interrupted": True}


@pytest.mark.parametrize(
    ("sent", "repeated"),
    [
        ({"a": float("inf")}, {"a": None}),
        ({"a": [float("nan"), {"b": -float("inf")}]}, {"a": [None, {"b": None}]}),
        ({"a": "\ud800"}, {"a": "\ud800"}),
    ],
)
def test_any_value_can_be_repeated(sent: dict[str, Any], repeated: dict[str, Any]) -> None:
    assert written(replace(CALL, parameters=sent))["parameters"] == repeated


def test_progress_of_a_running_job() -> None:
    job = replace(
        JOB,
        state=JobState.RUNNING,
        step=10,
        total_steps=40,
        request=RequestFacts(own={"task_id": "task(7)"}),
    )
    body = writing.write_progress(job, 12.5, PICTURE)
    assert (body["progress"], body["eta_relative"], body["textinfo"]) == (0.25, 12.5, None)
    assert base64.b64decode(body["current_image"]) == PICTURE
    assert body["state"] == {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "task(7)",
        "job_count": 1,
        "job_timestamp": "19700102000000",
        "job_no": 0,
        "sampling_step": 10,
        "sampling_steps": 40,
    }


def test_progress_of_a_waiting_job() -> None:
    body = writing.write_progress(JOB, 30.0, None)
    assert (body["progress"], body["current_image"], body["textinfo"]) == (0.0, None, "Waiting...")
    assert body["state"]["job"] == "7"
    assert {*body["state"]} == {*writing.IDLE["state"]}
    assert {*body} == {*writing.IDLE}


@pytest.mark.parametrize("kind", error_classes())
def test_every_error_has_a1111s_form(kind: type[ApiError]) -> None:
    error = sample_of(kind)
    answer = writing.write_error(error, NOWHERE)
    body = json.loads(bytes(answer.body))
    assert {*body} == {"error", "detail", "body", "errors"}
    assert answer.status_code >= 400
    assert body["detail"] == body["errors"]
    assert (body["error"] == "internal_error") == (kind is ApiError)


def test_error_names_the_image() -> None:
    error = ImageUnavailable({"mask_image": ImageProblem.DAMAGED})
    body = json.loads(bytes(writing.write_error(error, NOWHERE).body))
    assert body["detail"] == "Invalid encoded image: The mask image is damaged or incomplete."


def test_missing_key_asks_for_basic() -> None:
    answer = writing.write_error(InvalidApiKey(), NOWHERE)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")


def test_wrong_method_names_the_right_one() -> None:
    answer = writing.write_error(RouteNotFound("POST"), NOWHERE)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


POLICY = ReadingPolicy(models=["/srv/models/sd15.safetensors", "xl"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sd_model_checkpoint": "sd15"},
        {"sd_model_checkpoint": "sd15.safetensors [0123abcd]"},
        {"clip_stop_at_last_layers": 1, "samples_format": "png"},
    ],
)
def test_options_that_hold_already_are_no_change(options: dict[str, Any]) -> None:
    catalogue.refuse_changes(options, POLICY)


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({"sd_model_checkpoint": "xl"}, "sd_model_checkpoint", "override_settings"),
        ({"sd_model_checkpoint": 7}, "sd_model_checkpoint", "override_settings"),
        ({"clip_stop_at_last_layers": 2}, "CLIP_stop_at_last_layers", "override_settings"),
        ({"show_progressbar": True}, "show_progressbar", "no such option"),
    ],
)
def test_options_of_all_clients_cannot_be_set(
    options: dict[str, Any], name: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalogue.refuse_changes(options, POLICY)
    ((refused, (sentence,)),) = caught.value.fields.items()
    assert refused == name
    assert name in sentence
    assert words in sentence


def test_titles_tell_no_folder() -> None:
    models = ["/srv/models/sd15.safetensors", "a/xl", "b/xl"]
    titles = [model["title"] for model in catalogue.list_models(models)]
    assert titles == ["sd15", "a/xl", "b/xl"]
    assert catalogue.write_options(models)["sd_model_checkpoint"] == "sd15"

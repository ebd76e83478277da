"""The native dialect by itself: what is read strictly, and how errors are written."""

import dataclasses
import json
from typing import Any

import pytest

from models.imaging.extension import NO_EXTENSION, Extension
from models.params import CHOICES, RANGES, InpaintParams, Lora, SchedulerName
from server.api.dialects import explanations
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.native import problems as native_problems
from server.api.dialects.native import reading as native
from server.api.dialects.native.reading import FieldProblem
from server.core.errors import (
    ApiError,
    Conflict,
    ConflictKind,
    ImageProblem,
    ImageUnavailable,
    InvalidBody,
    InvalidRequest,
    RouteNotFound,
)
from tests.corpora.hostile_urls import URLS_OF_TWO_READINGS
from tests.support import api_errors
from tests.support.api_errors import error_classes

LEAST = {"prompt": "a cat", "init_image": "http://x/a.png", "mask_image": "http://x/b.png"}


POLICY = ReadingPolicy(models=["sd15", "sdxl"], loras=["ink", "glow"])


def read(**changes: Any) -> JobRequest:
    return native.read_job(json.dumps(LEAST | changes).encode(), POLICY)[0]


def problems(**changes: Any) -> dict[str, Any]:
    with pytest.raises(InvalidRequest) as caught:
        read(**changes)
    return {name: sentences[0] for name, sentences in caught.value.fields.items()}


def test_what_is_left_open_is_as_in_the_parameters_themselves() -> None:
    asked = read()
    assert asked.params == InpaintParams(prompt="a cat", seed=asked.params.seed)


def test_every_parameter_reaches_the_job() -> None:
    given: dict[str, Any] = {
        "negative_prompt": "a dog",
        "width": 640,
        "height": 320,
        "samples": 3,
        "num_inference_steps": 31,
        "guidance_scale": 3,
        "guidance_end": 0.5,
        "strength": 0.5,
        "seed": 2**32 - 1,
        "model": "sdxl",
        "clip_skip": 2,
        "safety_check": False,
        "invert_mask": True,
        "soft_mask": True,
        "mask_grow": -3,
        "only_masked": True,
        "only_masked_padding": 7,
        "mask_blur": 4,
        "match_colours": True,
        "fill": "zero",
        "noise_spacing": "karras",
        "flagged_as": "text",
        "output_format": "webp",
        "output_quality": 7,
        "loras": [{"name": "ink", "scale": -0.5}, {"name": "glow"}],
    }
    given["scheduler"] = "EulerDiscreteScheduler"
    asked = read(**given)
    assert (asked.width, asked.height) == (640, 320)
    params = dataclasses.replace(asked.params, width=640, height=320)
    loras = (Lora("ink", -0.5), Lora("glow", 1.0))
    chosen: dict[str, Any] = {name: kind(given[name]) for name, kind in CHOICES.items()}
    assert params == InpaintParams(prompt="a cat", **(given | chosen | {"loras": loras}))
    operators = {"must_be_checked"}
    assert given.keys() == params.to_json().keys() - {"prompt"} - operators, "none was forgotten"


def test_previews_are_for_the_worker_and_no_parameter() -> None:
    assert [read().previews, read(previews=True).previews] == [False, True]
    assert problems(previews="yes") == {"previews": FieldProblem.WRONG_TYPE}
    plain, shown = (read(seed=1, previews=each).params for each in (False, True))
    assert plain == shown


def test_extension_may_replace_the_mask() -> None:
    plain = {"prompt": "a cat", "init_image": "http://x/a.png"}

    def read_body(**more: Any) -> JobRequest:
        return native.read_job(json.dumps(plain | more).encode(), POLICY)[0]

    assert read().extension == NO_EXTENSION
    asked = read_body(extend={"left": 64, "bottom": 512})
    assert asked.mask_image is None
    assert asked.extension == Extension(left=64, bottom=512)
    assert read(extend={"top": 1}).mask_image is not None
    inverted = read_body(extend={"left": 1}, invert_mask=True)
    assert inverted.extension.mask_level == 0, "black is repainted"
    nothings: list[dict[str, Any]] = [{}, {"extend": None}, {"extend": {}}, {"mask_image": None}]
    for none in nothings:
        with pytest.raises(InvalidRequest) as caught:
            read_body(**none)
        assert caught.value.fields == {"mask_image": [FieldProblem.REQUIRED]}


def test_sides_at_fault_are_named() -> None:
    found = problems(extend={"left": 513, "top": -1, "right": 1.5, "up": 1})
    assert found == {
        "extend.left": FieldProblem.OUT_OF_RANGE,
        "extend.top": FieldProblem.OUT_OF_RANGE,
        "extend.right": FieldProblem.WRONG_TYPE,
        "extend.up": FieldProblem.UNKNOWN,
    }
    sentence = native.write_field_problem("extend.left", FieldProblem.OUT_OF_RANGE)
    assert sentence == "must be between 0 and 512"
    assert problems(extend=[64]) == {"extend": FieldProblem.WRONG_TYPE}


def test_model_that_is_not_offered_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(model="another")
    assert caught.value.fields == {"model": [native.FieldProblem.NOT_A_CHOICE]}


@pytest.mark.parametrize(
    "name", [each for each in RANGES if each in native.NativeRequest.model_fields]
)
def test_ends_of_each_range(name: str) -> None:
    allowed = RANGES[name]
    kind = float if name in ("strength", "guidance_scale", "guidance_end") else int
    for end in (allowed.minimum, allowed.maximum):
        assert read(**{name: kind(end)})
    beyond = kind(allowed.maximum) + (8 if name in ("width", "height") else 1)
    below = kind(allowed.minimum) - (8 if name in ("width", "height") else 1)
    assert problems(**{name: beyond}) == {name: FieldProblem.OUT_OF_RANGE}
    assert problems(**{name: below}) == {name: FieldProblem.OUT_OF_RANGE}


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("prompt", None, FieldProblem.WRONG_TYPE),
        ("prompt", 7, FieldProblem.WRONG_TYPE),
        ("prompt", "x" * 16_001, FieldProblem.TOO_LONG),
        ("init_image", "", FieldProblem.EMPTY),
        ("width", 100, FieldProblem.NOT_A_MULTIPLE),
        ("width", "512", FieldProblem.WRONG_TYPE),
        ("samples", 1.0, FieldProblem.WRONG_TYPE),
        ("samples", True, FieldProblem.WRONG_TYPE),
        ("strength", "0.5", FieldProblem.WRONG_TYPE),
        ("strength", float("nan"), FieldProblem.OUT_OF_RANGE),
        ("safety_check", "yes", FieldProblem.WRONG_TYPE),
        ("safety_check", 1, FieldProblem.WRONG_TYPE),
        ("scheduler", "Euler", FieldProblem.NOT_A_CHOICE),
        ("webhook", "ftp://x/hook", FieldProblem.NOT_A_URL),
        ("webhook", "/hook", FieldProblem.NOT_A_URL),
        *[("webhook", url, FieldProblem.NOT_A_URL) for url in URLS_OF_TWO_READINGS],
        ("webhook", "http://x/" + "a" * 8_192, FieldProblem.TOO_LONG),
        ("track_id", ["x"], FieldProblem.WRONG_TYPE),
        ("prompt", "a " * 2_401, FieldProblem.TOO_LONG),
        ("negative_prompt", "BREAK " * 33, FieldProblem.TOO_LONG),
        ("track_id", "x" * 1_025, FieldProblem.TOO_LONG),
        ("track_id", 10**1_024, FieldProblem.TOO_LONG),
        ("track_id", -(10**1_023), FieldProblem.TOO_LONG),
        ("steps", 20, FieldProblem.UNKNOWN),
        ("Seed", 20, FieldProblem.UNKNOWN),
    ],
)
def test_field_at_fault(field: str, value: Any, problem: FieldProblem) -> None:
    assert problems(**{field: value}) == {field: problem}


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "prompt",
            "x" * 16_001,
            "must have at most 16000 characters, and need at most 32 chunks of",
        ),
        ("model", "x" * 256, "must have at most 255 characters"),
        ("webhook", "http://x/" + "a" * 8_192, "must have at most 8192 characters"),
        ("track_id", 10**1_024, "must have at most 1024 characters"),
    ],
)
def test_limit_of_a_text_is_told(field: str, value: Any, sentence: str) -> None:
    found = problems(**{field: value})
    assert native.write_field_problem(field, found[field]).startswith(sentence)


def test_every_limited_text_has_its_limit_told() -> None:
    models = (native.NativeRequest, native.PingRequest)
    schemas = [model.model_json_schema()["properties"] for model in models]
    limited = {
        name
        for fields in schemas
        for name, schema in fields.items()
        if any("maxLength" in each for each in [schema, *schema.get("anyOf", [])])
    }
    assert limited == native.MAX_CHARS.keys()


@pytest.mark.parametrize(
    ("loras", "problem"),
    [
        ([{"name": "mist"}], {"loras.0.name": FieldProblem.NOT_A_CHOICE}),
        ([{"name": "ink"}, {"name": "Ink"}], {"loras.1.name": FieldProblem.NOT_A_CHOICE}),
        ([{"name": "ink", "scale": 2.1}], {"loras.0.scale": FieldProblem.OUT_OF_RANGE}),
        ([{"name": "ink", "scale": "1"}], {"loras.0.scale": FieldProblem.WRONG_TYPE}),
        ([{"scale": 1}], {"loras.0.name": FieldProblem.REQUIRED}),
        ([{"name": "ink", "weight": 1}], {"loras.0.weight": FieldProblem.UNKNOWN}),
        ([{"name": "ink"}] * 2, {"loras": FieldProblem.REPEATED}),
        ([{"name": "ink"}] * 5, {"loras": FieldProblem.TOO_LONG}),
        (["ink"], {"loras.0": FieldProblem.WRONG_TYPE}),
        ({"ink": 1}, {"loras": FieldProblem.WRONG_TYPE}),
    ],
)
def test_loras_at_fault(loras: Any, problem: dict[str, FieldProblem]) -> None:
    assert problems(loras=loras) == problem
    sentences = [native.write_field_problem(*each) for each in problem.items()]
    assert "is out of range" not in sentences
    assert "is too long" not in sentences


def test_spacing_that_the_scheduler_does_not_know() -> None:
    asked = {"scheduler": "DDIMScheduler", "noise_spacing": "karras"}
    assert problems(**asked) == {"noise_spacing": FieldProblem.NOT_OF_SCHEDULER}
    assert read(noise_spacing="exponential").params.noise_spacing == "exponential"


@pytest.mark.parametrize(
    "name", ["fill", "noise_spacing", "flagged_as", "output_format", "scheduler"]
)
def test_choice_is_one_of_its_names(name: str) -> None:
    schema = native.NativeRequest.model_json_schema()["properties"][name]
    (names,) = [each["enum"] for each in schema.get("anyOf", [schema]) if "enum" in each]
    for choice in names:
        assert getattr(read(**{name: choice}).params, name) == choice
    assert problems(**{name: "another"}) == {name: FieldProblem.NOT_A_CHOICE}
    assert problems(**{name: 1}) == {name: FieldProblem.NOT_A_CHOICE}


def test_random_seed_is_null_and_nothing_else() -> None:
    assert problems(seed=-1) == {"seed": FieldProblem.OUT_OF_RANGE}
    sentence = native.write_field_problem("seed", FieldProblem.OUT_OF_RANGE)
    assert sentence == "must be between 0 and 4294967295, or null for a random one"


def test_all_fields_at_fault_are_named_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        native.read_job(b'{"samples": 9, "x": 1, "track_id": {}}', POLICY)
    required = dict.fromkeys(LEAST, [FieldProblem.REQUIRED])
    assert caught.value.fields == required | {
        "samples": [FieldProblem.OUT_OF_RANGE],
        "x": [FieldProblem.UNKNOWN],
        "track_id": [FieldProblem.WRONG_TYPE],
    }


def test_fields_that_exclude_each_other_are_found_before_anything_is_fetched() -> None:
    found = problems(scheduler=SchedulerName.LCM, num_inference_steps=60)
    assert found == {"num_inference_steps": FieldProblem.TOO_MANY_STEPS}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"null", b'{"prompt": "\\ud800"}', b"{}}", b'{"a": 1,}']
)
def test_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(InvalidBody):
        native.read_job(body, POLICY)


@pytest.mark.parametrize(
    "track_id", [7, "7", "", 1.0, 0.5, True, False, None, 2**70, 10**1_023, "žluť\x00"]
)
def test_track_id_keeps_its_type(track_id: Any) -> None:
    kept = read(track_id=track_id).track_id
    assert (kept, type(kept)) == (track_id, type(track_id))


def test_operator_may_force_the_safety_check() -> None:
    body = json.dumps(LEAST | {"safety_check": False}).encode()
    params = native.read_job(body, ReadingPolicy(force_safety_check=True))[0].params
    assert (params.safety_check, params.must_be_checked) == (True, True)


def test_same_wish_in_other_words_is_the_same_body() -> None:
    body = json.dumps(LEAST | {"seed": 5})
    other = json.dumps({"seed": 5} | LEAST, indent=2)
    third = json.dumps(LEAST | {"seed": 6})
    digests = [digest_of(each) for each in (body, other, third)]
    assert digests[0] == digests[1] != digests[2]
    random_seed = json.dumps(LEAST)
    assert digest_of(random_seed) == digest_of(random_seed), "whatever seed was drawn"


def digest_of(body: str) -> str:
    return native.read_job(body.encode(), POLICY)[1].body_sha256


@pytest.mark.parametrize("key", ["", "two words", "ž", "x" * 256])
def test_idempotency_key_that_is_none(key: str) -> None:
    with pytest.raises(InvalidRequest):
        native.read_idempotency(key, digest_of(json.dumps(LEAST)))


SAMPLES = {
    **api_errors.SAMPLES,
    InvalidRequest: InvalidRequest({"prompt": [FieldProblem.REQUIRED]}),
}


@pytest.mark.parametrize("kind", error_classes())
def test_every_error_has_a_code_of_its_own(kind: type[ApiError]) -> None:
    error = SAMPLES.get(kind) or kind()
    problem = native_problems.write_problem(error, "request-1")
    assert (problem.code == "internal_error") == (kind is ApiError)
    assert problem.status >= 400
    assert kind is Conflict or kind in explanations.EXPLANATIONS


def test_codes_are_distinct() -> None:
    codes = [code for _, code, _ in explanations.EXPLANATIONS.values()]
    codes += [*ConflictKind]
    assert len({*codes}) == len(codes)


@pytest.mark.parametrize("problem", FieldProblem)
def test_every_field_problem_has_a_sentence(problem: FieldProblem) -> None:
    error = InvalidRequest({"samples": [problem]})
    (field,) = native_problems.write_problem(error, "").errors
    assert (field.field, field.code) == ("samples", problem)
    if problem is FieldProblem.OUT_OF_RANGE:
        assert field.message == "must be between 1 and 4"


def test_long_unknown_name_is_cut() -> None:
    error = InvalidRequest({"x" * 5_000: [FieldProblem.UNKNOWN]})
    (field,) = native_problems.write_problem(error, "").errors
    assert field.field == "x" * 100


@pytest.mark.parametrize("kind", ConflictKind)
def test_every_conflict_has_a_status(kind: ConflictKind) -> None:
    problem = native_problems.write_problem(Conflict(kind), "")
    assert (problem.status in (409, 422), problem.code) == (True, kind)


def test_method_that_a_path_does_not_know() -> None:
    error = RouteNotFound("GET")
    assert native_problems.write_problem(error, "").status == 405
    assert explanations.headers_of(error) == {"Allow": "GET"}


@pytest.mark.parametrize(
    ("path", "is_ours"),
    [
        ("/api/jobs", True),
        ("/api/jobs/5/cancel", True),
        ("/api/webhooks/ping", True),
        ("/api/masks/check", True),
        ("/api/deliveries", True),
        ("/api/status", True),
        ("/api/v3/inpaint", False),
        ("/api/jobsx", False),
    ],
)
def test_whose_errors_are_problems(path: str, is_ours: bool) -> None:
    assert native_problems.is_native(path) is is_ours


@pytest.mark.parametrize("problem", ImageProblem)
def test_every_image_problem_has_a_sentence(problem: ImageProblem) -> None:
    written = native_problems.write_problem(ImageUnavailable({"mask_image": problem}), "")
    assert [(each.field, each.code) for each in written.errors] == [("mask_image", problem.value)]

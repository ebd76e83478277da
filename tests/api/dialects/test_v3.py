"""The V3 dialect: lenient reading and exact writing, without a server."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from models.params import RANGES, SEED_MODULUS, InpaintParams, SchedulerName
from server.api.accept import facts_of
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.vendor import description, problems
from server.api.dialects.vendor import reading as v3
from server.api.dialects.vendor import writing as v3_writing
from server.api.dialects.vendor.families import V3_FAMILY, Task
from server.core.errors import (
    ApiError,
    ImageProblem,
    ImageUnavailable,
    InvalidApiKey,
    InvalidBody,
    InvalidRequest,
    JobNotFound,
    QueueFull,
    RouteNotFound,
    StorageUnavailable,
)
from server.core.notices import Notice
from server.core.settings.sections import EnhanceSettings, ErrorStatus, StepsPolicy
from server.core.settings.values import MAX_KEY_CHARS
from server.egress.sources import ImageSource
from server.jobs.job import Job, JobState, RequestFacts
from tests.corpora.hostile_urls import URLS_OF_TWO_READINGS
from tests.support.api_errors import SAMPLES, error_classes, sample_of

POLICY = ReadingPolicy(enhancement=EnhanceSettings(suffix="and more", negative_list="and less"))
INIT = "https://x.example/init.png"
MASK = "https://x.example/mask.png"
REQUIRED = {"prompt": "a cat", "init_image": INIT, "mask_image": MASK}


NOTHING = ["", "  ", None, "null", " NULL\n", "none", "None", "undefined", "\ufeff", "\u200bnone "]


def read(policy: ReadingPolicy = POLICY, /, **fields: Any) -> JobRequest:
    return v3.read_job(REQUIRED | fields, policy, V3_FAMILY, Task.INPAINT)


def errors_of(fields: dict[str, Any]) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as refused:
        v3.read_job(fields, POLICY, V3_FAMILY, Task.INPAINT)
    return refused.value.fields


class TestReading:
    @pytest.mark.parametrize(
        ("asked", "model"),
        [("other", "other"), ("mj", "other"), ("midjourney", None), (None, None), (7, None)],
    )
    def test_only_offered_models_can_be_asked_for(self, asked: Any, model: str | None) -> None:
        policy = replace(POLICY, models=("builtin", "other"), aliases={"mj": "other"})
        request = read(policy, model_id=asked)
        assert request.params.model == model

    def test_required_fields_alone_give_the_defaults(self) -> None:
        request = read()
        assert 0 <= request.params.seed < SEED_MODULUS
        assert request == JobRequest(
            dialect="v3",
            params=InpaintParams(
                prompt="a cat and more", negative_prompt=" and less", seed=request.params.seed
            ),
            init_image=ImageSource(INIT),
            mask_image=ImageSource(MASK),
            own_facts=v3.VendorFacts().to_json(),
        )

    @pytest.mark.parametrize("nothing", NOTHING)
    @pytest.mark.parametrize("name", sorted(set(description.FIELDS) - set(REQUIRED)))
    def test_nothing_means_absent(self, name: str, nothing: str | None) -> None:
        absent, given = read(seed=5), read(**({"seed": 5} | {name: nothing}))
        assert replace(given, params=replace(given.params, seed=5)) == absent

    @pytest.mark.parametrize("nothing", NOTHING)
    def test_nothing_is_not_enough_for_required_fields(self, nothing: str | None) -> None:
        assert errors_of(dict.fromkeys(REQUIRED, nothing)) == {
            "prompt": ["The prompt field is required."],
            "init_image": ["The init image field is required."],
            "mask_image": ["The mask image field is required."],
        }

    def test_texts_are_trimmed(self) -> None:
        request = read(prompt=" a cat\n", init_image=f" {INIT} ", enhance_prompt=" no ")
        assert (request.params.prompt, request.init_image) == ("a cat", ImageSource(INIT))

    def test_numbers_are_texts_too(self) -> None:
        assert read(prompt=2001, enhance_prompt=False).params.prompt == "2001"

    @pytest.mark.parametrize("value", ["yes", "YES", "True", True, 1, "1", " Yes "])
    def test_flags_that_say_yes(self, value: object) -> None:
        assert read(base64=value).own_facts["wants_base64"]

    @pytest.mark.parametrize("value", ["no", "No", "FALSE", False, 0, "0", " no "])
    def test_flags_that_say_no(self, value: object) -> None:
        request = read(safety_checker=value, enhance_prompt=value)
        assert not request.params.safety_check
        assert request.params.prompt == "a cat"

    @pytest.mark.parametrize(
        ("negative_prompt", "enhanced", "plain"),
        [("fog", "fog and less", "fog"), (None, " and less", ""), ("null", " and less", "")],
    )
    def test_enhancement(self, negative_prompt: str | None, enhanced: str, plain: str) -> None:
        request = read(negative_prompt=negative_prompt)
        assert request.params.prompt == "a cat and more"
        assert request.params.negative_prompt == enhanced
        request = read(negative_prompt=negative_prompt, enhance_prompt="no")
        assert (request.params.prompt, request.params.negative_prompt) == ("a cat", plain)

    def test_operator_can_force_the_safety_checker(self) -> None:
        forced = replace(POLICY, force_safety_check=True)
        assert read(forced, safety_checker="no").params.safety_check

    @pytest.mark.parametrize(
        ("sent", "used"),
        [(512, 512), ("512", 512), (" 720 ", 720), (512.0, 512), ("512.0", 512), (64, 64)]
        + [(1080, 1024), ("4096", 1024), (10**30, 1024), (1023, 1016), (519, 512), (65, 64)]
        + [(8, 64), ("1", 64), (63.9, 64), ("519.5", 512)],
    )
    @pytest.mark.parametrize("side", ["width", "height"])
    def test_side_alone_is_made_to_fit(self, side: str, sent: object, used: int) -> None:
        assert getattr(read(**{side: sent}), side) == used

    @pytest.mark.parametrize(
        ("sent", "used"),
        [
            (("1170.0", "2532.0"), (472, 1024)),
            ((1920, 1080), (1024, 576)),
            (("720", "1080"), (680, 1024)),
            ((2048, 2048), (1024, 1024)),
            ((8, 8), (64, 64)),
            ((10**30, 10**30), (1024, 1024)),
        ],
    )
    def test_both_sides_are_scaled_down_by_one_factor(
        self, sent: tuple[object, object], used: tuple[int, int]
    ) -> None:
        request = read(width=sent[0], height=sent[1])
        assert (request.width, request.height) == used

    @pytest.mark.parametrize(
        ("sent", "run"),
        [(20, 20), (21, 20), (30, 20), ("30", 20), (31, 30), (40, 30), (41, 40), (50, 40)]
        + [(51, 50), (100, 50), (1, 20), (0, 20), (-5, 20), (10**9, 50)],
    )
    def test_vendors_steps(self, sent: object, run: int) -> None:
        assert read(num_inference_steps=sent).params.num_inference_steps == run

    @pytest.mark.parametrize(("sent", "run"), [(1, 1), ("20", 20), (150, 150), (None, 21)])
    def test_exact_steps(self, sent: object, run: int) -> None:
        exact = replace(POLICY, steps_policy=StepsPolicy.EXACT)
        assert read(exact, num_inference_steps=sent).params.num_inference_steps == run
        with pytest.raises(InvalidRequest):
            read(exact, num_inference_steps=151)

    @pytest.mark.parametrize(
        ("sent", "used"),
        [(0, 0), ("42", 42), ("+42", 42), (2**32 - 1, 2**32 - 1), (2**32, 0), (-2, 2**32 - 2)]
        + [("-5", 2**32 - 5), (2**53 + 1, 1), (str(2**64 + 3), 3), (7.0, 7), ("7.0", 7)],
    )
    def test_seed_is_taken_modulo(self, sent: object, used: int) -> None:
        assert read(seed=sent).params.seed == used

    @pytest.mark.parametrize("nothing", [None, "none", -1, "-1", -1.0, " -1 "])
    def test_seed_is_random_where_absent_or_minus_one(self, nothing: object) -> None:
        seeds = {read(seed=nothing).params.seed for _ in range(3)}
        assert len(seeds) == 3
        assert all(0 <= seed < SEED_MODULUS for seed in seeds)

    @pytest.mark.parametrize("word", ["nobody", "a none", "null and void", "undefined behaviour"])
    def test_absent_words_within_a_text_are_text(self, word: str) -> None:
        assert read(prompt=word, enhance_prompt="no").params.prompt == word

    @pytest.mark.parametrize("name", ["strength", "prompt_strength"])
    @pytest.mark.parametrize("value", [0, "0", 0.0, "0.0001"])
    def test_strength_of_nothing_is_the_smallest(self, name: str, value: object) -> None:
        request = read(**{name: value})
        assert request.params.strength == RANGES["strength"].minimum

    @pytest.mark.parametrize("value", [0.3, "0.3", " .3 "])
    def test_older_name_of_strength(self, value: object) -> None:
        assert read(prompt_strength=value).params.strength == 0.3
        assert read(prompt_strength=value, strength="").params.strength == 0.3
        assert read(prompt_strength=value, strength=0.5).params.strength == 0.5

    @pytest.mark.parametrize(("sent", "used"), [(1, 1.0), ("20", 20.0), (" 7.5 ", 7.5)])
    def test_guidance_scale_is_a_number(self, sent: object, used: float) -> None:
        scale = read(guidance_scale=sent).params.guidance_scale
        assert scale == used
        assert isinstance(scale, float)

    @pytest.mark.parametrize("samples", [1, "4", 4.0])
    def test_samples(self, samples: Any) -> None:
        assert read(samples=samples).params.samples == int(samples)

    @pytest.mark.parametrize("url", ["http://x/hook?a=b", "HTTPS://x/hook"])
    def test_webhook(self, url: str) -> None:
        assert read(webhook=url).webhook == url

    @pytest.mark.parametrize("track_id", [7, "7", 1.5, True, False, 0, "x" * 1_024])
    def test_track_id_keeps_its_type(self, track_id: object) -> None:
        kept = read(track_id=track_id).track_id
        assert (kept, type(kept)) == (track_id, type(track_id))

    @pytest.mark.parametrize(
        ("name", "scheduler", "notices"),
        [
            ("DDIMScheduler", SchedulerName.DDIM, ()),
            (" Euler a\n", SchedulerName.EULER_ANCESTRAL, ()),
            ("DPM++ 2M Karras", SchedulerName.DPM_MULTISTEP, (Notice.NOISE_SPACING_IGNORED,)),
            ("LMSDiscreteScheduler", None, (Notice.SCHEDULER_IGNORED,)),
            ("x" * 1_000_000, None, (Notice.SCHEDULER_IGNORED,)),
            (["DDIM"], None, (Notice.SCHEDULER_IGNORED,)),
            (7, None, (Notice.SCHEDULER_IGNORED,)),
            (None, None, ()),
        ],
    )
    def test_scheduler_by_any_of_its_names(
        self, name: object, scheduler: SchedulerName | None, notices: tuple[Notice, ...]
    ) -> None:
        request = read(scheduler=name)
        assert (request.params.scheduler, request.notices) == (scheduler, notices)

    def test_prompts_are_kept_as_sent_and_what_is_not_applied_is_noted(self) -> None:
        request = read(prompt="a cat <lora:x:1>", negative_prompt="[fog|rain]", enhance_prompt="no")
        assert (request.params.prompt, request.params.negative_prompt) == (
            "a cat <lora:x:1>",
            "[fog|rain]",
        )
        assert request.notices == (
            Notice.LORA_TAG_IGNORED,
            Notice.PROMPT_SYNTAX_UNSUPPORTED,
        )

    def test_images_may_be_uploads_or_base64(self) -> None:
        request = read(init_image=b"\x89PNG", mask_image=" data:image/png;base64,AAAA ")
        assert request.init_image == ImageSource(b"\x89PNG")
        assert request.mask_image == ImageSource("data:image/png;base64,AAAA")

    def test_unknown_parameters_are_ignored(self) -> None:
        leftovers = {
            "multi_lingual": "no",
            "panorama": {"a": [1]},
            "self_attention": None,
            "upscale": 2,
            "embeddings_model": "x",
        }
        assert read(seed=1, **leftovers) == read(seed=1)

    def test_half_a_surrogate_pair_is_replaced(self) -> None:
        request = read(prompt="a \ud800 cat", enhance_prompt="no", track_id="\udfff")
        assert (request.params.prompt, request.track_id) == ("a ? cat", "?")

    def test_row_keeps_what_the_answers_echo(self) -> None:
        request = read(init_image=b"\x89PNG", base64="yes")
        facts = facts_of(request, "http://h", [], None)
        assert facts == RequestFacts(
            base_url="http://h",
            init_image="(file, 4 bytes)",
            mask_image=MASK,
            own=v3.VendorFacts(wants_base64=True).to_json(),
        )
        assert RequestFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_description_has_the_ranges_that_are_read() -> None:
    schema = description.V3_DESCRIPTION.schemas["V3Inpaint"]
    described = schema["properties"]
    assert (described["strength"]["minimum"], described["strength"]["maximum"]) == (0, 1)
    assert (described["samples"]["minimum"], described["samples"]["maximum"]) == (1, 4)
    for name in ("width", "height", "seed"):
        assert "minimum" not in described[name], "they are made to fit"


class TestFieldErrors:
    @pytest.mark.parametrize(
        ("name", "values", "sentence"),
        [
            ("samples", [0, 5, "5", -1], "The samples must be between 1 and 4."),
            ("samples", ["two", True, [1], {}, "+-2", "0x2"], "The samples must be a number."),
            ("samples", [1.5, "1.5"], "The samples must be an integer."),
            (
                "guidance_scale",
                [0, 0.99, 20.1, "21"],
                "The guidance scale must be between 1 and 20.",
            ),
            ("guidance_scale", ["nan", "inf", "-inf"], "The guidance scale must be a number."),
            ("strength", [-0.5, 1.01, "2"], "The strength must be between 0 and 1."),
            ("prompt_strength", [2], "The prompt strength must be between 0 and 1."),
            ("width", [0, "0.9", -512], "The width must be at least 1."),
            ("height", ["tall", False, 10**400], "The height must be a number."),
            ("num_inference_steps", ["many", []], "The num inference steps must be a number."),
            ("seed", ["random", True, "+-5", "-"], "The seed must be a number."),
            ("seed", [0.5], "The seed must be an integer."),
            ("enhance_prompt", ["maybe", 2, []], "The enhance prompt field must be yes or no."),
            ("prompt", [True, ["a"], b"a"], "The prompt must be a string."),
            ("prompt", ["x" * 8_001], "The prompt may not be greater than 8000 characters."),
            (
                "prompt",
                ["a " * 2_401, "BREAK " * 33],
                "The prompt may not need more than 32 chunks of 75 tokens.",
            ),
            ("negative_prompt", [{}], "The negative prompt must be a string."),
            ("init_image", [5, ["a"]], "The init image must be a URL, base64 or a file."),
            ("webhook", ["ftp://x", "x", 5], "The webhook must be a valid URL."),
            ("webhook", URLS_OF_TWO_READINGS, "The webhook must be a valid URL."),
            ("track_id", [["x"], {}, b"x"], "The track id must be a string or a number."),
            (
                "track_id",
                ["x" * 1_025, 10**1_024],
                "The track id may not be greater than 1024 characters.",
            ),
        ],
    )
    def test_sentence(self, name: str, values: list[Any], sentence: str) -> None:
        for value in values:
            assert errors_of(REQUIRED | {name: value}) == {name: [sentence]}, value

    def test_all_errors_come_at_once(self) -> None:
        fields = {"samples": 9, "width": "x", "strength": 5, "mask_image": MASK, "seed": "y"}
        assert set(errors_of(fields)) == {
            *("prompt", "init_image", "samples", "width", "strength", "seed")
        }

    @hypothesis_settings(deadline=None, derandomize=True)
    @given(
        st.dictionaries(
            st.sampled_from(sorted({*description.FIELDS})),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(st.characters(codec=None), max_size=12)
            | st.from_regex(r"\A[+\-0-9eE._ ]{1,6}\Z")
            | st.binary(max_size=3)
            | st.lists(st.integers(), max_size=2)
            | st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
        )
    )
    def test_any_value_is_understood_or_refused(self, fields: dict[str, Any]) -> None:
        try:
            request = v3.read_job(REQUIRED | fields, POLICY, V3_FAMILY, Task.INPAINT)
        except InvalidRequest as error:
            at_fault = set(error.fields)
        else:
            at_fault = set()
            params = request.params
            json.dumps(params.to_json(), allow_nan=False, ensure_ascii=False).encode()
        assert at_fault <= set(fields)


class TestKey:
    @pytest.mark.parametrize(
        ("fields", "headers", "key"),
        [
            ({"key": "body"}, {}, "body"),
            ({"key": " body\n"}, {"key": "header", "authorization": "Bearer b"}, "body"),
            ({"key": ""}, {"key": " header "}, "header"),
            ({"key": None}, {"Key": "header"}, "header"),
            ({"key": "null"}, {"authorization": "Bearer bearer"}, "bearer"),
            ({"key": "None"}, {"key": "undefined", "authorization": "Bearer bearer"}, "bearer"),
            ({}, {"authorization": "bearer bearer"}, "bearer"),
            ({}, {"authorization": "Basic dTpw"}, "p"),
            ({}, {"authorization": "Basic dTo="}, "u"),
            ({}, {"authorization": "Basic !"}, None),
            ({}, {"authorization": "Token k"}, "k"),
            ({}, {"authorization": "bare-key"}, "bare-key"),
            ({}, {"x-api-key": "k", "authorization": "Bearer foreign"}, "k"),
            ({}, {"authorization": "Digest x"}, None),
            ({}, {"authorization": "Bearer"}, None),
            ({"key": ["list"]}, {}, None),
            ({"key": "half \ud800"}, {}, "half ?"),
            ({}, {}, None),
        ],
    )
    def test_places(self, fields: dict[str, Any], headers: dict[str, str], key: str | None) -> None:
        assert v3.read_key(fields, Headers(headers)) == key

    @pytest.mark.parametrize("character", ["a", "é", " "])
    def test_of_a_long_text_only_the_beginning_is_read(self, character: str) -> None:
        """It stands for no header's key, and is longer than a key that is let in."""
        key = v3.read_key({"key": character * 5_000}, Headers({"key": "header"}))
        assert key == character * (MAX_KEY_CHARS + 1)


class TestFetchReading:
    @pytest.mark.parametrize("value", [12, "12", " 12 ", "012"])
    def test_id_may_be_number_or_text(self, value: object) -> None:
        assert v3.read_job_id({"request_id": value}) == 12

    @pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "١٢", "1" * 19, "1/2", "\x00"])
    def test_what_was_never_an_id_is_not_found(self, text: str) -> None:
        with pytest.raises(JobNotFound):
            v3.parse_job_id(text)

    @pytest.mark.parametrize("value", [None, "", "null"])
    def test_missing_id_is_a_field_error(self, value: str | None) -> None:
        with pytest.raises(InvalidRequest) as refused:
            v3.read_job_id({"request_id": value})
        assert refused.value.fields == {"request_id": ["The request id field is required."]}

    def test_inpaint_call_with_an_id_and_no_prompt_is_a_fetch(self) -> None:
        assert v3.is_fetch({"key": "k", "request_id": 5})
        assert not v3.is_fetch({"key": "k", "request_id": 5, "prompt": "a cat"})
        assert not v3.is_fetch({"key": "k", "request_id": ""})


PREFIX = "e67183ee-73c1-45c4-84e7-0dec6f657d33"
EXAMPLES = (
    "https://raw.githubusercontent.com/CompVis/stable-diffusion/main/data/inpainting_examples"
)

# As the page prints it, byte for byte.
VENDOR_ANSWER = """{
"status": "success",
"generationTime": 1.9110066890716553,
"id": 12384052,
"output": [
"https://pub-8b49af329fae499aa563997f5d4068a4.r2.dev/generations/e67183ee-73c1-45c4-84e7-0dec6f657d33-0.png"
],
"meta": {
"H": 512,
"W": 512,
"file_prefix": "e67183ee-73c1-45c4-84e7-0dec6f657d33",
"guidance_scale": 7.5,
"init_image": "https://raw.githubusercontent.com/CompVis/stable-diffusion/main/data/inpainting_examples/overture-creations-5sI6fQgYIuo.png",
"mask_image": "https://raw.githubusercontent.com/CompVis/stable-diffusion/main/data/inpainting_examples/overture-creations-5sI6fQgYIuo_mask.png",
"n_samples": 1,
"negative_prompt": " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra legs))",
"outdir": "out",
"prompt": "a cat sitting on a bench DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, in-frame",
"safetychecker": "no",
"seed": 3163825381,
"steps": 20,
"strength": 0.7
}
}"""  # noqa: E501

VENDOR_REQUEST = {
    "key": "",
    "prompt": "a cat sitting on a bench",
    "negative_prompt": None,
    "init_image": f"{EXAMPLES}/overture-creations-5sI6fQgYIuo.png",
    "mask_image": f"{EXAMPLES}/overture-creations-5sI6fQgYIuo_mask.png",
    "width": "512",
    "height": "512",
    "samples": "1",
    "num_inference_steps": "30",
    "safety_checker": "no",
    "enhance_prompt": "yes",
    "guidance_scale": 7.5,
    "strength": 0.7,
    "base64": "no",
    "seed": 3163825381,
    "webhook": None,
    "track_id": None,
}


@pytest.fixture
def job() -> Job:
    """The job of the page's example."""
    policy = ReadingPolicy()
    request = v3.read_job(VENDOR_REQUEST, policy, V3_FAMILY, Task.INPAINT)
    assert (request.width, request.height) == (512, 512)
    return Job(
        id=12384052,
        state=JobState.FINISHED,
        key_id="anonymous",
        dialect=V3_FAMILY.dialect,
        request=facts_of(request, "http://h", [], None),
        params=InpaintParams.from_json(json.loads(json.dumps(request.params.to_json()))),
        file_prefix=PREFIX,
        work=1.0,
        webhook=None,
        track_id=None,
        created_at=0.0,
        started_at=1.0,
        finished_at=2.0,
        attempt=1,
        fencing_token=1,
        worker_id=None,
        step=14,
        total_steps=14,
        run_s=1.9110066890716553,
        flagged=[None],
        error=None,
    )


class TestWriting:
    def test_vendors_example_answer_field_by_field(self, job: Job) -> None:
        base = "https://pub-8b49af329fae499aa563997f5d4068a4.r2.dev/generations"
        answer = v3_writing.write_success(job, [f"{base}/{name}" for name in job.output_names])
        assert json.dumps(answer) == json.dumps(json.loads(VENDOR_ANSWER))

    def test_processing(self, job: Job) -> None:
        answer = v3_writing.write_processing(job, 35.9, "https://h")
        sentence = "Try to fetch request after given estimated time"
        assert json.dumps(answer) == json.dumps(
            {
                "status": "processing",
                "tip": answer["tip"],
                "eta": 35.9,
                "messege": sentence,
                "message": sentence,
                "fetch_result": "https://h/api/v3/fetch/12384052",
                "id": 12384052,
                "output": [],
                "meta": json.loads(VENDOR_ANSWER)["meta"],
            }
        )

    def test_fetched_success(self, job: Job) -> None:
        answer = v3_writing.write_fetch_success(job, ["https://h/a.png"])
        assert json.dumps(answer) == json.dumps(
            {
                "status": "success",
                "id": 12384052,
                "output": ["https://h/a.png"],
                "generationTime": 1.9110066890716553,
                "meta": json.loads(VENDOR_ANSWER)["meta"],
            }
        )

    def test_fetched_too_early(self, job: Job) -> None:
        assert json.dumps(v3_writing.write_fetch_processing(job, 4.2)) == (
            '{"status": "processing", "id": 12384052, "messege": "Request processing", '
            '"message": "Request processing", "output": "", "eta": 4.2}'
        )

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"state": JobState.FAILED, "error": "No room"}, "No room"),
            ({"state": JobState.CANCELLED}, "The job was cancelled"),
            ({"expired_at": 1.0}, "The pictures are no longer there"),
        ],
    )
    def test_failed(self, changes: dict[str, Any], reason: str, job: Job) -> None:
        assert json.dumps(v3_writing.write_failed(replace(job, **changes))) == (
            f'{{"status": "failed", "id": 12384052, "message": "Failed, Try Again. {reason}", '
            f'"messege": "Failed, Try Again. {reason}", "output": ""}}'
        )

    def test_system_load(self) -> None:
        assert json.dumps(v3_writing.write_system_load(3, 4.2)) == (
            '{"queue_num": 3, "queue_time": 5, "status": "ok"}'
        )

    def test_final_answers_have_no_fetch_result(self, job: Job) -> None:
        for answer in (v3_writing.write_success(job, []), v3_writing.write_fetch_success(job, [])):
            assert "fetch_result" not in answer


class TestErrors:
    @pytest.mark.parametrize("kind", error_classes())
    def test_every_class_has_a_shape_and_a_status(self, kind: type[ApiError]) -> None:
        error = sample_of(kind)
        body = problems.write_error(error, "request-1")
        assert body["status"] in ("error", "failed")
        assert isinstance(body["message"], str | dict)
        assert "canary" not in json.dumps(body)
        legacy = problems.write_status(error, ErrorStatus.LEGACY)
        assert legacy == (404 if kind is RouteNotFound else 200)

    def test_only_what_nobody_foresaw_reads_as_such(self) -> None:
        said = {json.dumps(problems.write_error(sample_of(kind), "")) for kind in error_classes()}
        assert len(said) == len(error_classes())

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (InvalidBody(), 400),
            (SAMPLES[InvalidRequest], 400),
            (SAMPLES[ImageUnavailable], 400),
            (InvalidApiKey(), 401),
            (JobNotFound(), 404),
            (RouteNotFound(), 404),
            (QueueFull(5), 429),
            (StorageUnavailable(), 503),
            (ApiError(), 500),
        ],
    )
    def test_http_status(self, error: ApiError, status: int) -> None:
        assert problems.write_status(error, ErrorStatus.HTTP) == status

    @pytest.mark.parametrize(
        ("error", "message"),
        [(InvalidApiKey(), "Invalid Api Key"), (InvalidBody(), "Invalid API Request")],
    )
    def test_vendors_sentences(self, error: ApiError, message: str) -> None:
        body = problems.write_error(error, "")
        assert list(body) == ["status", "message", "tip"]
        assert (body["status"], body["message"]) == ("error", message)

    def test_field_errors(self) -> None:
        fields = {
            "prompt": ["The prompt field is required."],
            "samples": ["The samples must be between 1 and 4."],
        }
        body = problems.write_error(InvalidRequest(fields), "")
        assert json.dumps(body) == json.dumps({"status": "error", "message": fields})

    @pytest.mark.parametrize(
        ("problem", "sentence"),
        [
            (ImageProblem.NOT_REACHABLE, "The init image could not be downloaded."),
            (ImageProblem.NOT_FOUND, "The init image was not found: its host answers 404 or 410."),
            (
                ImageProblem.FORBIDDEN,
                "The init image is not given out: its host answers 401 or 403.",
            ),
            (
                ImageProblem.HOST_FAILED,
                "The init image could not be downloaded: its host answers with an error.",
            ),
            (
                ImageProblem.COMPRESSED,
                "The init image is sent by its host in a compression other than gzip and deflate.",
            ),
            (ImageProblem.INVALID_URL, "The init image must be a valid URL."),
            (
                ImageProblem.URL_TOO_LONG,
                "The init image URL may not be greater than 8192 characters.",
            ),
            (
                ImageProblem.PRIVATE_ADDRESS,
                "The init image is at a private address; the server's operator can allow it with "
                "INPAINT_FETCH__ALLOW_CIDRS or INPAINT_FETCH__ALLOW_HOSTS.",
            ),
            (
                ImageProblem.PORT_NOT_ALLOWED,
                "The init image is at a port other than 80 and 443; the server's operator can "
                "allow it with INPAINT_FETCH__ALLOW_PORTS.",
            ),
            (ImageProblem.TOO_LARGE, "The init image is too large."),
            (ImageProblem.NOT_A_SOURCE, "The init image must be a URL, base64 or a file."),
            (ImageProblem.NOT_AN_IMAGE, "The init image is not a PNG, JPEG or WEBP image."),
        ],
    )
    def test_image_problems(self, problem: ImageProblem, sentence: str) -> None:
        body = problems.write_error(ImageUnavailable({"init_image": problem}), "")
        assert body == {"status": "error", "message": {"init_image": [sentence]}}

    def test_every_image_problem_has_a_sentence(self) -> None:
        assert set(problems.IMAGE_SENTENCES) == set(ImageProblem)

    def test_full_queue(self) -> None:
        body = problems.write_error(QueueFull(1000), "")
        assert list(body) == ["status", "message", "tips", "retry_after"]
        assert body["message"] == "Rate limit exceeded. Maximum 1000 queued requests allowed."
        assert body["retry_after"] == 30

    def test_unknown_job(self) -> None:
        assert json.dumps(problems.write_error(JobNotFound(), "")) == (
            '{"status": "failed", "id": "", "message": "Request not found", '
            '"messege": "Request not found", "output": ""}'
        )

    def test_what_nobody_foresaw_names_the_request(self) -> None:
        assert "request-1" in problems.write_error(ApiError("canary"), "request-1")["tip"]

"""The vendor's APIs after V3, without a server: what their table says, reading, and errors."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from models.params import FlaggedAs, Lora, NoiseSpacing, SchedulerName
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.vendor import description, problems, reading
from server.api.dialects.vendor.families import (
    BY_PREFIX,
    FAMILIES,
    V3_FAMILY,
    Family,
    Task,
    family_of,
    is_later_path,
)
from server.core.errors import (
    ApiError,
    ImageProblem,
    ImageUnavailable,
    InvalidRequest,
    JobNotFound,
    RouteNotFound,
)
from server.core.notices import Notice
from server.core.settings.sections import EnhanceSettings, ErrorStatus
from server.egress.sources import ImageSource
from tests.support.api_errors import error_classes, sample_of

POLICY = ReadingPolicy(
    models=("builtin", "other"),
    aliases={"midjourney": "other"},
    loras=("ink", "gold"),
    enhancement=EnhanceSettings(suffix="and more", negative_list="and less"),
)
INIT, MASK = "https://x.example/init.png", "https://x.example/mask.png"
REQUIRED = {"prompt": "a cat", "init_image": INIT, "mask_image": MASK}

V4, V6 = BY_PREFIX["/api/v4/dreambooth"], BY_PREFIX["/api/v6/images"]
V7 = BY_PREFIX["/api/v7/images"]
REALTIME = BY_PREFIX["/api/v6/realtime"]
IMAGE_EDITING = BY_PREFIX["/api/v6/image_editing"]
LATER = [family for family in FAMILIES if family.is_later]
every_later = pytest.mark.parametrize("family", LATER, ids=lambda family: family.prefix)


def read(family: Family = V6, task: Task = Task.INPAINT, /, **fields: Any) -> JobRequest:
    return reading.read_job(REQUIRED | fields, POLICY, family, task)


def errors_of(family: Family = V6, /, **fields: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as refused:
        read(family, **fields)
    return refused.value.fields


def not_applied(request: JobRequest) -> list[str]:
    names: list[str] = request.own_facts["not_applied"]
    return names


class TestFamilies:
    def test_paths(self) -> None:
        paths = {path for family in FAMILIES for path in family.paths}
        assert {path for path in paths if path.endswith("/inpaint")} == {
            "/api/v3/inpaint",
            "/api/v3/dreambooth/inpaint",
            "/api/v4/dreambooth/inpaint",
            "/api/v6/images/inpaint",
            "/api/v6/realtime/inpaint",
            "/api/v6/image_editing/inpaint",
            "/api/v7/images/inpaint",
            "/api/v1/enterprise/inpaint",
            "/api/v1/enterprise/images/inpaint",
            "/api/v1/enterprise/realtime/inpaint",
            "/api/v1/enterprise/image_editing/inpaint",
        }
        assert V7.paths == {
            "/api/v7/images/inpaint": Task.INPAINT,
            "/api/v7/images/image-to-image": Task.IMAGE_TO_IMAGE,
            "/api/v7/images/text-to-image": Task.TEXT_TO_IMAGE,
        }
        assert V4.paths["/api/v4/dreambooth"] is Task.TEXT_TO_IMAGE

    @pytest.mark.parametrize(
        ("path", "prefix"),
        [
            ("/api/v3/inpaint", "/api/v3"),
            ("/api/v3/dreambooth/fetch/1", "/api/v3/dreambooth"),
            ("/api/v3/dreambooth", "/api/v3/dreambooth"),
            ("/api/v3/dreamboothx", "/api/v3"),
            ("/api/v1/enterprise/images/fetch", "/api/v1/enterprise/images"),
            ("/api/v1/enterprise/imagesx", "/api/v1/enterprise"),
            ("/api/v6/base64_to_url", "/api/v6/images"),
            ("/api/elsewhere", "/api/v3"),
        ],
    )
    def test_family_of_a_path(self, path: str, prefix: str) -> None:
        assert family_of(path).prefix == prefix

    @pytest.mark.parametrize("path", ["/api/v1/inpaint", "/api/v1/model", "/api/v60", "/api/jobs"])
    def test_paths_of_others_are_left_to_them(self, path: str) -> None:
        assert not is_later_path(path)
        assert not problems.may_answer_200(path)

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
    def test_every_call_is_described(self, family: Family) -> None:
        for task in family.tasks.values():
            schema = dict(description.bodies_of([family]))[description.body_name(family, task)]
            properties = schema["properties"]
            assert ("mask_image" in properties) == (task is Task.INPAINT)
            assert {*schema["required"]} <= {*properties}
            if task is not Task.NSFW_CHECK:
                assert ("model_id" in properties) == family.has_models
                assert ("lora_model" in properties) == family.is_later


class TestReading:
    @pytest.mark.parametrize(
        ("family", "prompt", "guidance_scale", "flagged_as"),
        [
            (V4, "a cat and more", 7.5, FlaggedAs.TEXT),
            (BY_PREFIX["/api/v3/dreambooth"], "a cat and more", 7.5, FlaggedAs.TEXT),
            (BY_PREFIX["/api/v1/enterprise"], "a cat and more", 7.5, FlaggedAs.TEXT),
            (V6, "a cat", 7.5, FlaggedAs.TEXT),
            (V7, "a cat", 7.5, FlaggedAs.TEXT),
            (REALTIME, "a cat", 7.5, FlaggedAs.BLANK),
            (IMAGE_EDITING, "a cat", 5, FlaggedAs.BLANK),
            (BY_PREFIX["/api/v1/enterprise/image_editing"], "a cat", 5, FlaggedAs.BLANK),
        ],
        ids=lambda value: value.prefix if isinstance(value, Family) else "",
    )
    def test_what_is_absent(
        self, family: Family, prompt: str, guidance_scale: float, flagged_as: FlaggedAs
    ) -> None:
        request = read(family, seed=5)
        params = request.params
        assert (params.prompt, params.guidance_scale) == (prompt, guidance_scale)
        assert (params.flagged_as, params.num_inference_steps) == (flagged_as, 20)
        assert (params.strength, params.samples, params.model) == (0.7, 1, None)
        assert (request.width, request.height) == (None, None), "as the init image"
        assert request.dialect == "vendor"
        assert request.notices == ()
        assert request.own_facts == reading.VendorFacts(family=family.prefix).to_json()

    @pytest.mark.parametrize("name", ["steps", "num_inference_steps"])
    @pytest.mark.parametrize(("sent", "run"), [(1, 1), ("30", 30), (51, 51), (150.0, 150)])
    def test_steps_are_run_as_sent(self, name: str, sent: Any, run: int) -> None:
        assert read(**{name: sent}).params.num_inference_steps == run

    @pytest.mark.parametrize("name", ["steps", "num_inference_steps"])
    def test_steps_out_of_range(self, name: str) -> None:
        sentence = f"The {name.replace('_', ' ')} must be between 1 and 150."
        assert errors_of(**{name: 151}) == {name: [sentence]}

    @pytest.mark.parametrize(
        ("asked", "model"),
        [("other", "other"), ("midjourney", "other"), (" builtin ", "builtin"), (None, None)],
    )
    def test_model_by_name_or_alias(self, asked: str | None, model: str | None) -> None:
        assert read(model_id=asked).params.model == model

    @pytest.mark.parametrize("asked", ["your_model_id", 7, ["other"]])
    def test_unknown_model_is_refused(self, asked: Any) -> None:
        for family in (V4, V6, V7):
            assert errors_of(family, model_id=asked) == {
                "model_id": ["The selected model id is invalid."]
            }

    def test_realtime_and_image_editing_know_no_models(self) -> None:
        for family in (REALTIME, IMAGE_EDITING):
            request = read(family, model_id="whatever")
            assert request.params.model is None
            assert not_applied(request) == ["model_id"]

    def test_v3_still_ignores_all_that(self) -> None:
        leftovers = {"model_id": "x", "lora_model": "x", "clip_skip": 99, "steps": 3, "vae": "x"}
        request, plain = read(V3_FAMILY, seed=1, **leftovers), read(V3_FAMILY, seed=1)
        assert request == plain

    @pytest.mark.parametrize(
        ("scheduler", "spacing", "notices"),
        [
            ("DPMSolverMultistepScheduler", NoiseSpacing.KARRAS, ()),
            ("EulerDiscreteScheduler", NoiseSpacing.KARRAS, ()),
            ("DDIMScheduler", None, (Notice.NOISE_SPACING_IGNORED,)),
            (None, None, (Notice.NOISE_SPACING_IGNORED,)),
            (
                "LMSDiscreteScheduler",
                None,
                (Notice.SCHEDULER_IGNORED, Notice.NOISE_SPACING_IGNORED),
            ),
        ],
    )
    @pytest.mark.parametrize("yes", ["yes", True])
    def test_karras_sigmas(
        self,
        scheduler: str | None,
        spacing: NoiseSpacing | None,
        notices: tuple[Notice, ...],
        yes: Any,
    ) -> None:
        request = read(scheduler=scheduler, use_karras_sigmas=yes)
        assert request.params.noise_spacing is spacing
        assert request.notices == notices
        assert read(scheduler=scheduler, use_karras_sigmas="no").params.noise_spacing is None

    @pytest.mark.parametrize(
        ("name", "known"),
        [
            *((f"{name}Scheduler", True) for name in ("DDPM", "DDIM", "PNDM", "EulerDiscrete")),
            *((f"{name}Scheduler", True) for name in ("EulerAncestralDiscrete", "LCM")),
            *((f"{name}Scheduler", True) for name in ("HeunDiscrete", "KDPM2Discrete")),
            *((f"{name}Scheduler", True) for name in ("DPMSolverMultistep", "UniPCMultistep")),
            *((f"{name}Scheduler", True) for name in ("DPMSolverSinglestep", "DEISMultistep")),
            ("KDPM2AncestralDiscreteScheduler", True),
            *((f"{name}Scheduler", False) for name in ("LMSDiscrete", "DDIMInverse", "IPNDM")),
            *((f"{name}Scheduler", False) for name in ("KarrasVe", "ScoreSdeVe")),
        ],
    )
    def test_scheduler_by_the_vendors_names(self, name: str, known: bool) -> None:
        scheduler = read(scheduler=name).params.scheduler
        assert scheduler == (SchedulerName(name) if known else None)

    @pytest.mark.parametrize(("sent", "used"), [("2", 2), (1, 1), (8, 8), (None, 0)])
    def test_clip_skip(self, sent: Any, used: int) -> None:
        assert read(clip_skip=sent).params.clip_skip == used

    @pytest.mark.parametrize(
        ("name", "flagged_as"),
        [
            ("blur", FlaggedAs.BLUR),
            ("sensitive_content_text", FlaggedAs.TEXT),
            ("Pixelate", FlaggedAs.PIXELATE),
            ("black", FlaggedAs.BLANK),
        ],
    )
    def test_safety_checker_type(self, name: str, flagged_as: FlaggedAs) -> None:
        assert read(safety_checker_type=name).params.flagged_as is flagged_as
        assert errors_of(safety_checker_type=f"{name}ish") == {
            "safety_checker_type": ["The selected safety checker type is invalid."]
        }

    @pytest.mark.parametrize(
        ("names", "strengths", "loras"),
        [
            ("ink", None, (Lora("ink", 1.0),)),
            ("ink", "0.5", (Lora("ink", 0.5),)),
            ("ink", 0.5, (Lora("ink", 0.5),)),
            ("ink, gold", "0.5,-1", (Lora("ink", 0.5), Lora("gold", -1.0))),
            ("ink,gold", 0.5, (Lora("ink", 0.5), Lora("gold", 0.5))),
            (None, "0.5", ()),
            ("none", "null", ()),
        ],
    )
    def test_loras(self, names: Any, strengths: Any, loras: tuple[Lora, ...]) -> None:
        assert read(lora_model=names, lora_strength=strengths).params.loras == loras

    @pytest.mark.parametrize(
        ("names", "strengths", "field"),
        [
            ("lora_model_id", None, "lora_model"),
            ("ink,silver", None, "lora_model"),
            ("ink", "much", "lora_strength"),
            ("ink,gold", "1,1,1", "lora_strength"),
        ],
    )
    def test_loras_that_are_refused(self, names: str, strengths: Any, field: str) -> None:
        sentence = f"The selected {field.replace('_', ' ')} is invalid."
        assert errors_of(lora_model=names, lora_strength=strengths) == {field: [sentence]}

    def test_lora_twice_or_too_strong_is_refused(self) -> None:
        assert [*errors_of(lora_model="ink,ink")] == ["loras"]
        assert [*errors_of(lora_model="ink", lora_strength=9)] == ["loras"]

    @pytest.mark.parametrize("yes", ["yes", "true", True, 1, "1"])
    def test_flags_of_the_call(self, yes: Any) -> None:
        facts = read(instant_response=yes, base64=yes).own_facts
        assert (facts["is_instant"], facts["wants_base64"]) == (True, True)
        facts = read(instant_response="false", base64=False).own_facts
        assert (facts["is_instant"], facts["wants_base64"]) == (False, False)

    @every_later
    def test_image_to_image_repaints_all(self, family: Family) -> None:
        request = read(family, Task.IMAGE_TO_IMAGE, mask_image=None)
        assert (request.init_image, request.mask_image) == (ImageSource(INIT), None)
        assert (request.width, request.height, request.params.strength) == (None, None, 0.7)

    @pytest.mark.parametrize("family", [V3_FAMILY, V6], ids=lambda family: family.prefix)
    @pytest.mark.parametrize(
        ("sent", "size"),
        [
            ({}, (512, 512)),
            ({"width": "768"}, (768, 512)),
            ({"height": 256}, (512, 256)),
            ({"width": 2048, "height": "2048"}, (1024, 1024)),
        ],
    )
    def test_text_to_image(
        self, family: Family, sent: dict[str, Any], size: tuple[int, int]
    ) -> None:
        request = reading.read_job({"prompt": "a cat"} | sent, POLICY, family, Task.TEXT_TO_IMAGE)
        assert request.images == {}
        assert (request.width, request.height) == size
        assert request.params.strength == 1

    def test_check_paints_nothing_and_asks_the_checker(self) -> None:
        fields = {"init_image": INIT}
        request = reading.read_job(fields, POLICY, V3_FAMILY, Task.NSFW_CHECK)
        params = request.params
        assert request.images == {"init_image": ImageSource(INIT)}
        assert (params.invert_mask, params.num_inference_steps) == (True, 1)
        assert (params.safety_check, params.must_be_checked) == (True, True)
        assert request.own_facts["is_check"]
        with pytest.raises(InvalidRequest) as refused:
            reading.read_job({}, POLICY, V3_FAMILY, Task.NSFW_CHECK)
        assert refused.value.fields == {"init_image": ["The init image field is required."]}

    @hypothesis_settings(deadline=None, derandomize=True)
    @given(
        st.dictionaries(
            st.sampled_from(sorted({*description.FIELDS, *description.LATER_FIELDS})),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(st.characters(codec=None), max_size=12)
            | st.sampled_from(["ink", "gold,ink", "blur", "builtin", "DDIMScheduler"])
            | st.binary(max_size=3)
            | st.lists(st.integers(), max_size=2)
            | st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
        )
    )
    def test_any_value_is_understood_or_refused(self, fields: dict[str, Any]) -> None:
        try:
            request = read(V6, **fields)
        except InvalidRequest as error:
            at_fault = {*error.fields}
        else:
            at_fault = set()
            json.dumps([request.own_facts, request.params.to_json()])
        assert at_fault <= {*fields, "loras"}


class TestLeftovers:
    @pytest.mark.parametrize(
        "idle", [None, "", "no", "No", "false", False, "none", "null", 0, "0", [], {}]
    )
    def test_idle_values_are_silent(self, idle: Any) -> None:
        names = ("multi_lingual", "panorama", "self_attention", "upscale", "vae", "highres_fix")
        assert not_applied(read(**dict.fromkeys(names, idle))) == []

    def test_what_would_have_an_effect_is_named(self) -> None:
        leftovers = {
            "multi_lingual": "yes",
            "panorama": True,
            "upscale": "2",
            "vae": "sd-vae",
            "algorithm_type": "dpmsolver+++",
            "embeddings_model": ["x"],
            "guidence": 3,
        }
        request = read(**leftovers)
        assert not_applied(request) == [*leftovers]
        assert request.notices == (Notice.FIELDS_IGNORED,), "for the log"

    def test_what_changes_no_picture_is_silent(self) -> None:
        fields = {"key": "k", "temp": "yes", "tomesd": "yes", "upscale": 1, "lora_strength": "0.5"}
        assert not_applied(read(**fields)) == []

    def test_fields_of_other_tasks_are_named(self) -> None:
        assert not_applied(read(V6, Task.IMAGE_TO_IMAGE)) == ["mask_image"]
        assert not_applied(read(V6, Task.TEXT_TO_IMAGE, strength=0.5)) == [
            *("init_image", "mask_image", "strength")
        ]

    def test_the_longer_name_of_steps_comes_first(self) -> None:
        request = read(num_inference_steps=30, steps=20)
        assert request.params.num_inference_steps == 30
        assert not_applied(request) == ["steps"]

    def test_names_are_printable(self) -> None:
        assert not_applied(read(**{"a\ud800\0\nb": 1})) == ["ab"]

    def test_names_are_few_and_short(self) -> None:
        names = not_applied(read(**{f"{index}{'x' * 1_000}": 1 for index in range(100)}))
        assert len(names) == 20
        assert max(map(len, names)) == 60


class TestErrors:
    @every_later
    @pytest.mark.parametrize("kind", error_classes())
    def test_message_is_one_text(self, kind: type[ApiError], family: Family) -> None:
        error = sample_of(kind)
        body = problems.write_error(error, "request-1", family)
        assert body["status"] in ("error", "failed")
        assert isinstance(body["message"], str)
        assert body.get("messege") == (body["message"] if family.says_messege else None)
        assert "canary" not in json.dumps(body)
        legacy = problems.write_status(error, ErrorStatus.LEGACY)
        assert legacy == (404 if kind is RouteNotFound else 200)

    def test_text_about_fields_has_their_names_as_sent(self) -> None:
        error = InvalidRequest(
            {
                "prompt": ["The prompt field is required."],
                "num_inference_steps": ["The num inference steps must be between 1 and 150."],
            }
        )
        assert problems.write_error(error, "", REALTIME) == {
            "status": "error",
            "message": "The prompt field is required. "
            "The num_inference_steps must be between 1 and 150.",
        }

    def test_images(self) -> None:
        error = ImageUnavailable({"mask_image": ImageProblem.TOO_LARGE})
        assert problems.write_error(error, "", V6) == {
            "status": "error",
            "message": "The mask_image is too large.",
            "messege": "The mask_image is too large.",
        }

    def test_unknown_job(self) -> None:
        assert problems.write_error(JobNotFound(), "", REALTIME) == {
            "status": "failed",
            "id": "",
            "message": "Request not found",
            "output": "",
        }


def test_facts_of_older_rows_are_those_of_v3() -> None:
    facts = reading.VendorFacts(wants_base64=True, family=V6.prefix, not_applied=("vae",))
    assert json.loads(json.dumps(facts.to_json()))["not_applied"] == ["vae"]
    assert replace(facts, wants_base64=False, family=V3_FAMILY.prefix, not_applied=()) == (
        reading.VendorFacts()
    )

"""Replicate's API: what its clients send, and what they read of a job."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from models.params import OutputFormat, SchedulerName
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.replicate import catalogue, reading, writing
from server.api.dialects.replicate.reading import ReplicateFacts
from server.core.errors import (
    ApiError,
    ImageProblem,
    ImageUnavailable,
    InvalidRequest,
    JobNotFound,
)
from server.core.notices import Notice
from server.egress.sources import ImageSource
from server.jobs.job import Job, JobState, RequestFacts
from tests.support.api_errors import error_classes, sample_of
from tests.support.jobs import PARAMS
from tests.support.replicate_calls import MODEL, VERSION

POLICY = ReadingPolicy(models=["own", "hub/other", "/srv/models/third.safetensors"])
IMAGE, MASK = "https://x.example/image.png", "https://x.example/mask.png"

PYTHON_RUN: dict[str, Any] = {
    "version": VERSION,
    "input": {
        "mask": "http://127.0.0.1:8000/uploads/6a7c2c8e-18a3-4c87-a1c5-2ad2d2b04b5e.png",
        "image": "data:application/octet-stream;base64,iVBORw0KGgo=",
        "width": 512,
        "height": 512,
        "prompt": "Face of a yellow cat, high resolution, sitting on a park bench",
        "scheduler": "DPMSolverMultistep",
        "num_outputs": 1,
        "guidance_scale": 7.5,
        "num_inference_steps": 25,
    },
}
"""What `replicate.run` of Python sends for the example on the model's page."""


def read(inputs: dict[str, Any], **fields: Any) -> JobRequest:
    return reading.read_prediction(
        {"version": VERSION, "input": {"prompt": "a cat", **inputs}, **fields}, None, POLICY
    )


def refused(inputs: dict[str, Any], **fields: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as caught:
        read(inputs, **fields)
    return caught.value.fields


def facts_of(request: JobRequest) -> ReplicateFacts:
    return ReplicateFacts.of(job_with(request.own_facts))


def job_with(own: Any = None, **changes: Any) -> Job:
    plain = Job(
        id=7,
        state=JobState.QUEUED,
        key_id="somebody",
        dialect=reading.DIALECT,
        request=RequestFacts(base_url="https://ours.example", init_image=IMAGE, own=own or {}),
        params=PARAMS,
        file_prefix="abc",
        work=1.0,
        webhook=None,
        track_id=None,
        created_at=0.0,
        started_at=None,
        finished_at=None,
        attempt=0,
        worker_id=None,
        step=0,
        total_steps=0,
        run_s=None,
        flagged=None,
        error=None,
    )
    return replace(plain, **changes)


class TestReading:
    def test_example_of_the_models_page(self) -> None:
        request = reading.read_prediction(PYTHON_RUN, None, POLICY)
        params = request.params
        assert (request.width, request.height, params.width, params.height) == (512,) * 4
        assert params.prompt.startswith("Face of a yellow cat")
        assert params.scheduler is SchedulerName.DPM_MULTISTEP
        assert (params.samples, params.num_inference_steps, params.guidance_scale) == (1, 25, 7.5)
        assert (params.strength, params.safety_check) == (1.0, True)
        assert request.init_image == ImageSource(PYTHON_RUN["input"]["image"])
        assert request.mask_image == ImageSource(PYTHON_RUN["input"]["mask"])
        assert request.notices == (Notice.MODEL_REPLACED,)

    def test_defaults(self) -> None:
        request = read({"image": IMAGE, "mask": MASK})
        params = request.params
        assert (request.width, request.height) == (None, None), "the image's own size"
        assert (params.num_inference_steps, params.guidance_scale, params.samples) == (50, 7.5, 1)
        assert (params.scheduler, params.negative_prompt) == (None, "")
        assert (params.output_format, params.output_quality) == (OutputFormat.PNG, 95)

    def test_seed_is_random_or_as_sent(self) -> None:
        seeds = {read({"seed": seed}).params.seed for seed in (None, "", -1) for _ in range(3)}
        assert len(seeds) == 9
        assert read({"seed": "12"}).params.seed == 12
        assert read({"seed": 2**32 + 3}).params.seed == 3

    @pytest.mark.parametrize(
        ("inputs", "strength"),
        [
            ({"image": IMAGE, "mask": MASK}, 1.0),
            ({"image": IMAGE}, 0.8),
            ({}, 1.0),
            ({"image": IMAGE, "prompt_strength": 0.4}, 0.4),
            ({"image": IMAGE, "strength": "0.5", "prompt_strength": 0.4}, 0.5),
            ({"image": IMAGE, "strength": 0}, 0.001),
        ],
    )
    def test_strength(self, inputs: dict[str, Any], strength: float) -> None:
        assert read(inputs).params.strength == strength

    def test_text_to_image(self) -> None:
        request = read({"width": 640, "image": None, "mask": ""})
        assert (request.init_image, request.mask_image) == (None, None)
        assert (request.width, request.height) == (640, 512)

    def test_mask_needs_an_image(self) -> None:
        assert refused({"mask": MASK}) == {"image": ["The image field is required."]}

    def test_image_alone_is_repainted_whole(self) -> None:
        request = read({"image": IMAGE})
        assert (request.init_image, request.mask_image) == (ImageSource(IMAGE), None)

    @pytest.mark.parametrize(
        ("name", "scheduler", "notices"),
        [
            ("K_EULER", SchedulerName.EULER, ()),
            ("K_EULER_ANCESTRAL", SchedulerName.EULER_ANCESTRAL, ()),
            ("DDIM", SchedulerName.DDIM, ()),
            ("HeunDiscrete", SchedulerName.HEUN, ()),
            ("PNDM", SchedulerName.PNDM, ()),
            ("KLMS", None, (Notice.SCHEDULER_IGNORED,)),
        ],
    )
    def test_scheduler(
        self, name: str, scheduler: SchedulerName | None, notices: tuple[Notice, ...]
    ) -> None:
        request = read({"scheduler": name})
        assert request.params.scheduler is scheduler
        assert request.notices == (*notices, Notice.MODEL_REPLACED)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("png", OutputFormat.PNG),
            ("jpg", OutputFormat.JPEG),
            ("JPEG", OutputFormat.JPEG),
            ("webp", OutputFormat.WEBP),
        ],
    )
    def test_output_format(self, name: str, kind: OutputFormat) -> None:
        params = read({"output_format": name, "output_quality": 80}).params
        assert (params.output_format, params.output_quality) == (kind, 80)

    def test_safety_checker(self) -> None:
        assert not read({"disable_safety_checker": True}).params.safety_check
        forced = replace(POLICY, force_safety_check=True)
        body = {"version": "x", "input": {"prompt": "a", "disable_safety_checker": True}}
        params = reading.read_prediction(body, None, forced).params
        assert (params.safety_check, params.must_be_checked) == (True, True)

    def test_every_fault_is_named(self) -> None:
        faults = refused(
            {
                "prompt": None,
                "image": 7,
                "width": 100.5,
                "height": 2_048,
                "num_outputs": 5,
                "num_inference_steps": 500,
                "guidance_scale": "much",
                "prompt_strength": 2,
                "output_format": "gif",
                "output_quality": 0,
                "disable_safety_checker": "perhaps",
            },
            webhook="ftp://x.example",
            webhook_events_filter=["end"],
        )
        assert faults.keys() == {
            *("prompt", "image", "width", "height", "num_outputs", "num_inference_steps"),
            *("guidance_scale", "prompt_strength", "output_format", "output_quality"),
            *("disable_safety_checker", "webhook"),
        }

    def test_size_is_not_changed_in_silence(self) -> None:
        assert refused({"width": 500}) == {"width": ["The width must be a multiple of 8."]}

    @pytest.mark.parametrize("fields", [{}, {"version": ""}])
    def test_version_or_model_is_required(self, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest) as caught:
            reading.read_prediction({"input": {"prompt": "a"}, **fields}, None, POLICY)
        assert caught.value.fields.keys() == {"version"}
        assert reading.read_prediction({"input": {"prompt": "a"}}, MODEL, POLICY)

    @pytest.mark.parametrize("inputs", [None, "a cat", ["a cat"], 7])
    def test_input_is_an_object(self, inputs: Any) -> None:
        with pytest.raises(InvalidRequest) as caught:
            reading.read_prediction({"version": "x", "input": inputs}, None, POLICY)
        assert caught.value.fields.keys() == {"input"}

    def test_unknown_fields_are_reported(self) -> None:
        request = read({"refine": "no", "lora_scale": 0.6}, stream=True)
        assert facts_of(request).ignored == ("stream", "input.refine", "input.lora_scale")
        assert Notice.FIELDS_IGNORED in request.notices

    def test_names_are_printable(self) -> None:
        """A lone surrogate has no UTF-8, and a database may refuse a zero."""
        body = {"input": {"prompt": "a", "\ud800\0\n": 1}, "\udfff": 1}
        request = reading.read_prediction(body, "x\0/\ud800", POLICY)
        facts = facts_of(request)
        assert (facts.ignored, facts.asked_model) == (("?", "input.???"), "x?/?")

    def test_many_and_long_names_are_cut(self) -> None:
        ignored = facts_of(read({"x" * 5_000 + str(at): 1 for at in range(100)})).ignored
        assert len(ignored) == 20
        assert {len(name) for name in ignored} == {100}


class TestModels:
    @pytest.mark.parametrize(
        ("asked", "model", "shown"),
        [
            ("inpaint-server/own", "own", "inpaint-server/own"),
            ("anybody/own", "own", "anybody/own"),
            ("hub/other", "hub/other", "hub/other"),
            (f"hub/other:{VERSION}", "hub/other", "hub/other"),
            (catalogue.version_of("hub/other"), "hub/other", "hub/other"),
            (f"x/y:{catalogue.version_of('own')}", "own", "x/y"),
        ],
    )
    def test_offered_model_by_its_names(self, asked: str, model: str, shown: str) -> None:
        found, facts = reading.read_model(asked, POLICY)
        assert (found, facts.model, facts.asked_model) == (model, shown, "")

    @pytest.mark.parametrize(
        ("asked", "told"),
        [(f"{MODEL}:{VERSION}", MODEL), (MODEL, MODEL), (VERSION, VERSION), ("/", "/")],
    )
    def test_other_models_mean_the_servers_own(self, asked: str, told: str) -> None:
        found, facts = reading.read_model(asked, POLICY)
        assert (found, facts.model) == (None, "inpaint-server/own")
        assert (facts.version, facts.asked_model) == (catalogue.version_of("own"), told)

    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("builtin", "inpaint-server/builtin"),
            ("stabilityai/sd", "stabilityai/sd"),
            ("/srv/models/sd.safetensors", "inpaint-server/sd.safetensors"),
            ("/srv/sd", "inpaint-server/sd"),
            (None, "inpaint-server/default"),
        ],
    )
    def test_public_name_shows_no_folder(self, model: str | None, name: str) -> None:
        assert catalogue.public_name(model) == name

    def test_schema_names_what_is_read(self) -> None:
        schemas = catalogue.openapi_schema()["components"]["schemas"]
        assert schemas["Input"]["properties"].keys() == catalogue.INPUTS.keys()
        assert schemas["Input"]["properties"]["num_outputs"]["maximum"] == 4
        assert schemas["Output"]["type"] == "array"
        assert "x-cog-array-type" not in schemas["Output"], "no iterator"


class TestWaiting:
    @pytest.mark.parametrize(
        ("prefer", "wait_s"),
        [
            ([], 0),
            (["wait"], 60),
            (["wait=5"], 5),
            (["wait = 7"], 7),
            (["WAIT=0"], 1),
            (["wait=600"], 60),
            (["wait=999999999999"], 0),
            (["wait=-1"], 0),
            (["respond-async"], 0),
            (["respond-async, wait=10"], 10),
            (["respond-async", "wait=3;x=1"], 3),
            (["waiting"], 0),
        ],
    )
    def test_prefer(self, prefer: list[str], wait_s: int) -> None:
        assert reading.read_wait_s(prefer) == wait_s


class TestWebhooks:
    def test_only_the_end_is_sent_and_the_logs_say_so(self) -> None:
        request = read({}, webhook="https://x.example/hook", webhook_events_filter=["start"])
        assert request.webhook == "https://x.example/hook"
        facts = facts_of(request)
        assert facts.unsent_events == ("start",)
        assert "not for: start" in writing.write_logs(job_with(), facts)

    def test_without_a_filter_all_events_are_asked_for(self) -> None:
        facts = facts_of(read({}, webhook="https://x.example/hook"))
        assert facts.unsent_events == ("start", "output", "logs")

    def test_completed_alone_is_what_is_sent(self) -> None:
        for fields in (
            {"webhook": "https://x.example/hook", "webhook_events_filter": ["completed"]},
            {"webhook_completed": "https://x.example/hook"},
            {},
        ):
            assert facts_of(read({}, **fields)).unsent_events == ()

    @pytest.mark.parametrize("events", ["completed", ["end"], [7], {"completed": 1}])
    def test_unknown_events_are_refused(self, events: Any) -> None:
        fields = refused({}, webhook="https://x.example/hook", webhook_events_filter=events)
        assert fields.keys() == {"webhook_events_filter"}

    def test_body_is_the_prediction(self) -> None:
        request = read({"seed": 5})
        job = job_with(
            request.own_facts, state=JobState.FINISHED, finished_at=20.0, run_s=2.5, started_at=3.0
        )
        body = writing.write_webhook(job)
        assert body == writing.write_prediction(job, "https://ours.example", body["output"])
        assert body["output"] == [
            f"https://ours.example/generations/abc-{at}.png" for at in range(2)
        ]
        json.dumps(body)


class TestWriting:
    @pytest.mark.parametrize(
        ("state", "status", "created"),
        [
            (JobState.QUEUED, "starting", "starting"),
            (JobState.RUNNING, "processing", "starting"),
            (JobState.FINISHED, "succeeded", "succeeded"),
            (JobState.FAILED, "failed", "failed"),
            (JobState.CANCELLED, "canceled", "canceled"),
        ],
    )
    def test_status(self, state: JobState, status: str, created: str) -> None:
        """A running job is "starting" to the call that made it; the Python client would stop."""
        job = job_with(state=state)
        assert writing.write_prediction(job, "http://x", None)["status"] == status
        assert writing.write_created(job, "http://x", None)["status"] == created

    def test_prediction(self) -> None:
        own = ReplicateFacts("a/b", "v1", MODEL, ("input.refine",)).to_json()
        job = job_with(own, state=JobState.FINISHED, started_at=1.5, finished_at=4.0, run_s=2.5)
        found = writing.write_prediction(job, "http://x", ["data:,"])
        assert (found["id"], found["model"], found["version"]) == ("7", "a/b", "v1")
        assert found["output"] == ["data:,"]
        assert found["created_at"] == "1970-01-01T00:00:00Z"
        assert found["started_at"] == "1970-01-01T00:00:01.500000Z"
        assert found["completed_at"] == "1970-01-01T00:00:04Z"
        assert found["metrics"] == {"predict_time": 2.5}
        assert found["urls"] == {
            "get": "http://x/v1/predictions/7",
            "cancel": "http://x/v1/predictions/7/cancel",
        }
        assert found["input"]["seed"] == 7
        assert found["input"]["image"] == IMAGE
        assert "mask" not in found["input"]
        assert found["logs"].splitlines() == [
            "Using seed: 7",
            f"'{MODEL}' is not offered here: a/b was taken",
            "Ignored, because they are not known here: input.refine",
        ]

    def test_logs_hold_warnings_and_a_progress_bar(self) -> None:
        job = job_with(step=10, total_steps=40)
        warned = replace(job.request, warnings=(Notice.SCHEDULER_IGNORED, Notice.MODEL_REPLACED))
        logs = writing.write_logs(replace(job, request=warned), ReplicateFacts("a/b", "v"))
        assert logs.splitlines() == [
            "Using seed: 7",
            Notice.SCHEDULER_IGNORED.sentence,
            " 25%|#####               | 10/40",
        ]

    def test_pictures_that_were_removed(self) -> None:
        job = job_with(state=JobState.FINISHED, expired_at=9.0)
        assert writing.picture_urls(job, "http://x") is None
        found = writing.write_prediction(job, "http://x", None)
        assert (found["status"], found["output"], found["data_removed"]) == (
            "succeeded",
            None,
            True,
        )

    def test_facts_come_back_from_the_row(self) -> None:
        facts = ReplicateFacts("a/b", "v", "c/d", ("x",), ("start",))
        assert ReplicateFacts.of(job_with(json.loads(json.dumps(facts.to_json())))) == facts
        assert not facts.to_json().keys() & RequestFacts().to_json().keys()

    def test_job_of_another_dialect(self) -> None:
        assert ReplicateFacts.of(job_with()).model == "inpaint-server/default"

    @pytest.mark.parametrize("text", ["", "nope", "-1", "1.0", "٣", "1" * 19, "../1"])
    def test_other_ids_are_no_job(self, text: str) -> None:
        with pytest.raises(JobNotFound):
            reading.read_job_id(text)


@pytest.mark.parametrize(
    ("path", "is_ours"),
    [
        ("/v1/predictions", True),
        ("/v1/predictions/7/cancel", True),
        ("/v1/files", True),
        ("/v1/files/x.png", True),
        ("/v1/account", True),
        ("/v1/models/a/b", True),
        ("/v1/models/a/b/versions/c", True),
        ("/v1/models", False),
        ("/v1/models/a", False),
        ("/v1/images/edits", False),
        ("/v1", False),
        ("/v1/predictionsx", False),
        ("/api/v3/inpaint", False),
        ("/", False),
    ],
)
def test_paths(path: str, is_ours: bool) -> None:
    assert writing.owns(path) is is_ours


@pytest.mark.parametrize("kind", error_classes())
def test_every_error_is_a_problem(kind: type[ApiError]) -> None:
    error = sample_of(kind)
    answer = writing.write_error(error, SimpleNamespace())  # type: ignore[arg-type]
    problem = json.loads(bytes(answer.body))
    assert answer.status_code == problem["status"] >= 400
    assert problem.keys() == {"title", "detail", "status"}
    assert answer.media_type == "application/problem+json"
    assert problem["title"]
    assert problem["detail"].endswith(".")


def test_images_at_fault_have_the_clients_names() -> None:
    error = ImageUnavailable(
        {"init_image": ImageProblem.NOT_FOUND, "mask_image": ImageProblem.TOO_LARGE}
    )
    answer = writing.write_error(error, SimpleNamespace())  # type: ignore[arg-type]
    detail = json.loads(bytes(answer.body))["detail"]
    assert detail.startswith("The image was not found")
    assert detail.endswith("The mask is too large.")

"""The vendor's endpoints with the requests that its packages and other public clients send.

No model runs here: the test stores the pictures, as a worker does.
"""

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from models.params import Fill, Lora, NoiseSpacing, SchedulerName
from server.api.dialects.registry import write_webhook
from server.core.settings import Settings
from server.jobs.job import Job
from server.jobs.store import JobStore
from tests.support.apps import KEYS, client_of, settings_in, store_of
from tests.support.http_stub import LiveApp, png_bytes, running_app
from tests.support.v3_calls import PICTURE, finish

pytestmark = pytest.mark.process

FIRST, SECOND = KEYS
INIT = base64.b64encode(png_bytes(shade=90)).decode()
MASK = f"data:image/png;base64,{base64.b64encode(png_bytes(shade=255)).decode()}"
FIELDS = {"prompt": "a cat", "init_image": INIT, "mask_image": MASK, "seed": 5}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(
        tmp_path_factory.mktemp("data"),
        auth={"keys": KEYS},
        model_aliases={"midjourney": "builtin"},
        loras=["ink"],
        queue={"uploads_per_minute_per_key": 1_000},
    )


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[LiveApp]:
    with running_app(settings) as app:
        yield app


@pytest.fixture
def plain(app: LiveApp) -> httpx2.Client:
    """A client that sends its key by itself."""
    return app.client


def post(client: httpx2.Client, path: str, **fields: Any) -> Any:
    """A JSON call under the vendor's rule that everything answers 200."""
    answer = client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def row(store: JobStore, job_id: int) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job


@contextmanager
def worker(settings: Settings, store: JobStore, *, is_flagged: bool = False) -> Iterator[None]:
    """Finishes the next job that is submitted, while its call is held."""
    last = max((job_id for job_id in range(1, 500) if store.get(job_id)), default=0)
    thread = threading.Thread(
        target=finish, args=(settings, last + 1), kwargs={"is_flagged": is_flagged}
    )
    thread.start()
    yield
    thread.join()


PACKAGE_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("images", {"model_id": "midjourney"}),
    (
        "image_editing",
        {
            "width": 512,
            "height": 512,
            "num_inference_steps": 20,
            "guidance_scale": 7.5,
            "samples": 1,
            "base64": False,
        },
    ),
    ("realtime", {"width": 512, "height": 512, "samples": 1}),
]


class TestPackages:
    """Requests as recorded from the vendor's packages."""

    @pytest.mark.parametrize(("way", "extra"), PACKAGE_CALLS, ids=lambda value: str(value)[:13])
    @pytest.mark.parametrize("root", ["/api/v6", "/api/v1/enterprise"])
    def test_modelslab_py(
        self, root: str, way: str, extra: dict[str, Any], plain: httpx2.Client, settings: Settings
    ) -> None:
        plain_fields = {"prompt": "a cat", "init_image": INIT, "mask_image": MASK}
        headers = {"X-Requested-With": "modelslab-py"}
        path = f"{root}/{way}/inpaint"
        answer = plain.post(path, json={"key": FIRST} | plain_fields | extra, headers=headers)
        assert answer.status_code == 200, "the package raises an exception for any other"
        made = answer.json()
        assert made["status"] == "processing"
        assert made["fetch_result"].endswith(f"{root}/{way}/fetch/{made['id']}")
        finish(settings, made["id"])
        fetched = plain.post(
            f"{root}/{way}/fetch/{made['id']}", json={"key": FIRST}, headers=headers
        )
        assert fetched.status_code == 200
        assert fetched.json()["status"] == "success"
        assert plain.get(fetched.json()["output"][0]).content == PICTURE

    def test_modelslab_cli(self, plain: httpx2.Client, settings: Settings) -> None:
        headers = {
            "Key": FIRST,
            "Accept": "application/json",
            "User-Agent": "modelslab-cli/0.2.2",
            "Content-Type": "application/json",
        }
        body = {"key": FIRST, "prompt": "a cat", "init_image": INIT, "mask_image": MASK}
        made = plain.post("/api/v7/images/inpaint", json=body, headers=headers).json()
        assert (made["status"], type(made["id"])) == ("processing", int)
        finish(settings, made["id"])
        path = f"/api/v7/images/fetch/{made['id']}"
        fetched = plain.post(path, json={"key": FIRST}, headers=headers).json()
        assert fetched["status"] == "success"
        assert plain.get(fetched["output"][0]).content == PICTURE

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("text-to-image", {"prompt": "a cat", "width": 1024, "height": 1024}),
            ("image-to-image", {"prompt": "a cat", "init_image": INIT, "strength": 0.7}),
        ],
    )
    def test_other_calls_of_modelslab_cli(
        self, path: str, fields: dict[str, Any], plain: httpx2.Client
    ) -> None:
        made = post(plain, f"/api/v7/images/{path}", key=FIRST, **fields)
        assert made["status"] == "processing"
        assert "mask_image" not in made["meta"]

    def test_cli_shows_the_text_of_an_error(self, plain: httpx2.Client) -> None:
        refused = post(plain, "/api/v7/images/inpaint", key=FIRST, prompt="a cat", mask_image=MASK)
        assert refused["status"] == "error"
        assert refused["message"] == "The init_image field is required."

    def test_npm_package_has_the_key_in_its_header_alone(self, app: LiveApp) -> None:
        with client_of(app, FIRST) as client:
            assert post(client, "/api/v6/images/inpaint", **FIELDS)["status"] == "processing"
        refused = post(app.client, "/api/v6/images/inpaint", **FIELDS)
        assert (refused["status"], refused["message"]) == ("error", "Invalid Api Key")

    def test_query_string_with_key_header(self, plain: httpx2.Client, settings: Settings) -> None:
        """As StableDiffusionAPI 0.0.5 asks for a picture of words."""
        query = "prompt=a+cat&width=512&height=512&samples=1&num_inference_steps=20"
        made = plain.post(f"/api/v3/dreambooth?{query}", headers={"key": FIRST}).json()
        assert made["status"] == "processing"
        finish(settings, made["id"])
        fetched = plain.post(f"/api/v3/dreambooth/fetch?key={FIRST}&request_id={made['id']}").json()
        assert fetched["output"][0].endswith("-0.png")
        assert fetched["meta"]["steps"] == 20


VENDOR_SAMPLE = {
    "model_id": "midjourney",
    "prompt": "a cat sitting on a bench",
    "negative_prompt": None,
    "width": "512",
    "height": "512",
    "samples": "1",
    "steps": "30",
    "safety_checker": "no",
    "enhance_prompt": "yes",
    "guidance_scale": 7.5,
    "strength": 0.7,
    "scheduler": "UniPCMultistepScheduler",
    "lora_model": None,
    "tomesd": "yes",
    "use_karras_sigmas": "yes",
    "vae": None,
    "lora_strength": None,
    "embeddings_model": None,
    "seed": None,
    "webhook": None,
    "track_id": None,
}
"""The sample of the vendor's page on V4, but for its images."""


class TestAnswers:
    def test_vendors_sample_of_v4(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        fields = VENDOR_SAMPLE | {"init_image": INIT, "mask_image": MASK}
        made = post(client, "/api/v4/dreambooth/inpaint", **fields)
        params = row(store, made["id"]).params
        assert (params.model, params.num_inference_steps) == ("builtin", 30)
        assert (params.scheduler, params.noise_spacing, params.fill) == (
            *(SchedulerName.UNIPC, NoiseSpacing.KARRAS),
            Fill.ORIGINAL,
        )
        assert params.prompt.startswith("a cat sitting on a bench DSLR photography")
        finish(settings, made["id"])
        found = post(client, "/api/v4/dreambooth/fetch", request_id=str(made["id"]))
        assert found["tip"] == ""
        assert (found["meta"]["model_id"], found["meta"]["scheduler"]) == (
            "builtin",
            "UniPCMultistepScheduler",
        )
        assert found["meta"]["steps"] == 30

    def test_success_field_by_field(
        self, app: LiveApp, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        made = post(client, "/api/v6/images/inpaint", **FIELDS, samples="2", lora_model="ink")
        job = finish(settings, made["id"])
        assert job.params.loras == (Lora("ink", 1.0),)
        urls = [f"http://127.0.0.1:{app.port}/generations/{name}" for name in job.output_names]
        meta = {
            "H": 64,
            "W": 64,
            "file_prefix": job.file_prefix,
            "guidance_scale": 7.5,
            "init_image": f"(base64, {len(INIT)} bytes)",
            "mask_image": f"(base64, {len(MASK)} bytes)",
            "model_id": "",
            "scheduler": "",
            "n_samples": 2,
            "negative_prompt": "",
            "outdir": "out",
            "prompt": "a cat",
            "safetychecker": "yes",
            "seed": 5,
            "steps": 20,
            "strength": 0.7,
        }
        assert made["meta"] == meta
        found = post(client, f"/api/v6/images/fetch/{job.id}")
        assert [*found] == [
            *("status", "generationTime", "id", "output", "proxy_links", "meta"),
            *("nsfw_content_detected", "webhook_status", "tip"),
        ]
        assert found == {
            "status": "success",
            "generationTime": row(store, job.id).run_s,
            "id": job.id,
            "output": urls,
            "proxy_links": urls,
            "meta": meta,
            "nsfw_content_detected": False,
            "webhook_status": "",
            "tip": "",
        }

    def test_processing_field_by_field(self, app: LiveApp, client: httpx2.Client) -> None:
        sentence = "Try to fetch request after given estimated time"
        for prefix, has_messege in (
            ("/api/v4/dreambooth", True),
            ("/api/v6/images", True),
            ("/api/v1/enterprise", True),
            ("/api/v6/realtime", False),
            ("/api/v1/enterprise/realtime", False),
        ):
            made = post(client, f"{prefix}/inpaint", **FIELDS, panorama="yes")
            base = f"http://127.0.0.1:{app.port}{prefix}"
            assert made == {
                "status": "processing",
                "tip": "The picture is being made. POST your key to fetch_result after eta "
                "seconds. Not applied here: panorama.",
                "eta": made["eta"],
                **({"messege": sentence} if has_messege else {}),
                "message": sentence,
                "fetch_result": f"{base}/fetch/{made['id']}",
                "id": made["id"],
                "output": [],
                "meta": made["meta"],
            }
            assert isinstance(made["eta"], int | float)
            found = post(client, f"{prefix}/fetch/{made['id']}")
            assert found == {
                "status": "processing",
                "id": made["id"],
                **({"messege": "Request processing"} if has_messege else {}),
                "message": "Request processing",
                "output": "",
                "eta": found["eta"],
            }

    def test_flagged_pictures_are_told(self, client: httpx2.Client, settings: Settings) -> None:
        made = post(client, "/api/v6/images/inpaint", **FIELDS)
        finish(settings, made["id"], is_flagged=True)
        found = post(client, f"/api/v6/images/fetch/{made['id']}")
        assert (found["status"], found["nsfw_content_detected"]) == ("success", True)

    def test_tip_names_what_was_not_applied(
        self, client: httpx2.Client, settings: Settings
    ) -> None:
        leftovers = {"upscale": "2", "scheduler": "LMSDiscreteScheduler", "multi_lingual": "no"}
        made = post(client, "/api/v6/images/inpaint", **FIELDS, **leftovers)
        finish(settings, made["id"])
        found = post(client, f"/api/v6/images/fetch/{made['id']}")
        assert found["tip"] == (
            "Not applied here: upscale. The scheduler is not known here; the model's own was taken."
        )

    def test_any_prefix_fetches_any_job_of_the_key(
        self, app: LiveApp, client: httpx2.Client, settings: Settings
    ) -> None:
        made = post(client, "/api/v3/inpaint", **FIELDS)
        finish(settings, made["id"])
        for path in (
            "/api/v3/fetch",
            "/api/v3/dreambooth/fetch",
            "/api/v4/dreambooth/fetch",
            "/api/v6/images/fetch",
            "/api/v6/realtime/fetch",
            "/api/v6/image_editing/fetch",
            "/api/v7/images/fetch",
            "/api/v1/enterprise/fetch",
            "/api/v1/enterprise/images/fetch",
            "/api/v1/enterprise/realtime/fetch",
            "/api/v1/enterprise/image_editing/fetch",
        ):
            by_path = post(client, f"{path}/{made['id']}")
            by_field = post(client, path, request_id=made["id"])
            assert by_path == by_field
            assert (by_path["status"], by_path["id"]) == ("success", made["id"])
            assert ("proxy_links" in by_path) == (path != "/api/v3/fetch")
            with client_of(app, SECOND) as other:
                assert post(other, f"{path}/{made['id']}")["message"] == "Request not found"

    def test_rows_keep_the_dialect_of_their_call(
        self, client: httpx2.Client, store: JobStore
    ) -> None:
        dialects = {
            path: row(store, post(client, f"{path}/inpaint", **FIELDS)["id"]).dialect
            for path in ("/api/v3", "/api/v3/dreambooth", "/api/v6/images", "/api/v1/enterprise")
        }
        assert [*dialects.values()] == ["v3", "vendor", "vendor", "vendor"]

    def test_fetch_by_the_path_of_pictures(self, client: httpx2.Client) -> None:
        made = post(client, "/api/v6/images/inpaint", **FIELDS)
        found = post(client, "/api/v6/images/inpaint", request_id=made["id"])
        assert (found["status"], found["id"]) == ("processing", made["id"])

    def test_unknown_model_is_an_error_but_in_v3(self, client: httpx2.Client) -> None:
        for path in ("/api/v4/dreambooth", "/api/v6/images", "/api/v7/images"):
            refused = post(client, f"{path}/inpaint", **FIELDS, model_id="nobody")
            assert refused["status"] == "error"
            assert refused["message"] == "The selected model_id is invalid."
        made = post(client, "/api/v3/inpaint", **FIELDS, model_id="nobody")
        assert made["status"] == "processing"

    def test_webhook_has_the_body_of_its_family(
        self, client: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        url = "http://127.0.0.1:1/hook"  # which no webhook may reach
        keys = {}
        for path in ("/api/v3", "/api/v6/images"):
            fields = FIELDS | {"webhook": url, "track_id": 7, "base64": "yes"}
            made = post(client, f"{path}/inpaint", **fields)
            job = finish(settings, made["id"])
            body = write_webhook(row(store, job.id))
            assert (body["status"], body["id"], body["track_id"]) == ("success", job.id, 7)
            assert body["output"][0].endswith("-0.png"), "never base64"
            keys[path] = [*body]
        assert keys["/api/v3"] == [
            *("status", "generationTime", "id", "output", "meta", "track_id")
        ]
        assert keys["/api/v6/images"] == [
            *("status", "generationTime", "id", "output", "proxy_links", "meta"),
            *("nsfw_content_detected", "webhook_status", "tip", "track_id"),
        ]
        found = post(client, f"/api/v6/images/fetch/{job.id}")
        assert found["webhook_status"] == "queued"

    def test_wrong_paths_have_404(self, client: httpx2.Client) -> None:
        for path in ("/api/v6/images/outpaint", "/api/v7/images", "/api/v4/dreambooth/x"):
            answer = client.post(path, json=FIELDS)
            assert (answer.status_code, answer.json()["message"]) == (404, "Not found")

    def test_instant_response_is_not_held(
        self, client: httpx2.Client, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with running_app(settings_in(tmp_path_factory.mktemp("slow"), hold_s=600)) as app:
            made = post(app.client, "/api/v6/images/inpaint", **FIELDS, instant_response="true")
        assert made["status"] == "processing"


class TestBase64:
    @pytest.mark.parametrize("yes", ["yes", "true", True])
    def test_later_apis_give_links(
        self, yes: Any, client: httpx2.Client, settings: Settings
    ) -> None:
        """As six witnesses read it: GET, then decode the text."""
        made = post(client, "/api/v6/images/img2img", **FIELDS, base64=yes)
        finish(settings, made["id"])
        (link,) = post(client, f"/api/v6/images/fetch/{made['id']}")["output"]
        assert link.endswith(".base64")
        assert base64.b64decode(client.get(link).text) == PICTURE

    def test_v3_gives_the_text_itself(self, client: httpx2.Client, settings: Settings) -> None:
        """As an inpainting script and one for img2img read it."""
        for call in ("inpaint", "img2img", "text2img"):
            made = post(client, f"/api/v3/{call}", **FIELDS, base64="yes")
            finish(settings, made["id"])
            (text,) = post(client, f"/api/v3/fetch/{made['id']}")["output"]
            assert base64.b64decode(text) == PICTURE

    def test_v3_gives_links_where_the_operator_wants_that(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        settings = settings_in(tmp_path_factory.mktemp("links"), base64_output="link")
        with running_app(settings) as app:
            made = post(app.client, "/api/v3/img2img", **FIELDS, base64="yes")
            finish(settings, made["id"])
            (link,) = post(app.client, f"/api/v3/fetch/{made['id']}")["output"]
            assert base64.b64decode(app.client.get(link).text) == PICTURE


class TestV3:
    def test_text_to_image_as_multipart_without_files(
        self, plain: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        """As an Android app sends it, which reads `String[] output` and `int id`."""
        parts = {
            name: (None, value)
            for name, value in {
                "key": FIRST,
                "prompt": "a cat",
                "width": "512",
                "height": "512",
                "samples": "1",
                "num_inference_steps": "20",
                "enhance_prompt": "no",
            }.items()
        }
        answer = plain.post("/api/v3/text2img", files=parts).json()
        assert answer["status"] == "processing"
        job = row(store, answer["id"])
        assert (job.params.width, job.params.height, job.params.strength) == (512, 512, 1.0)
        assert {"init_image", "mask_image"} & {*answer["meta"]} == set()

    def test_image_to_image(self, client: httpx2.Client, store: JobStore) -> None:
        fields = {"prompt": "a cat", "init_image": INIT, "strength": "0.4", "seed": 1}
        made = post(client, "/api/v3/img2img", **fields)
        job = row(store, made["id"])
        assert (job.params.width, job.params.strength) == (64, 0.4)
        assert "mask_image" not in made["meta"]
        assert "init_image" in made["meta"]
        refused = post(client, "/api/v3/img2img", prompt="a cat")
        assert refused["message"] == {"init_image": ["The init image field is required."]}

    def test_held_call_answers_in_the_vendors_form(
        self, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        settings = settings_in(tmp_path_factory.mktemp("held"), hold_s=60)
        with running_app(settings) as app:
            app.client.get("/healthz")
            with store_of(settings) as store:
                for path, last in (("/api/v3/text2img", "meta"), ("/api/v6/images/inpaint", "tip")):
                    with worker(settings, store):
                        answer = post(app.client, path, **FIELDS)
                    assert answer["status"] == "success"
                    assert [*answer][-1] == last
                with worker(settings, store, is_flagged=True):
                    answer = post(app.client, "/api/v3/nsfw_image_check", init_image=INIT)
                assert answer["has_nsfw_concept"] == [True]

    @pytest.mark.parametrize("is_flagged", [True, False])
    def test_nsfw_check(self, is_flagged: bool, client: httpx2.Client, settings: Settings) -> None:
        made = post(client, "/api/v3/nsfw_image_check", init_image=INIT)
        assert made["status"] == "processing"
        finish(settings, made["id"], is_flagged=is_flagged)
        for path in ("/api/v3/fetch", "/api/v6/images/fetch"):
            assert post(client, f"{path}/{made['id']}") == {
                "status": "success",
                "id": made["id"],
                "images": f"(base64, {len(INIT)} bytes)",
                "has_nsfw_concept": [is_flagged],
            }

    def test_laravel_playground(self, plain: httpx2.Client, settings: Settings) -> None:
        """It reads `link`, then `id`, `round(eta)` and `messege`, then `output[0]` and `meta`."""
        image = f"data:image/png;base64,{INIT}"
        uploaded = post(plain, "/api/v3/base64_crop", key=FIRST, image=image, crop="false")
        fields = FIELDS | {"init_image": uploaded["link"], "mask_image": MASK}
        made = post(plain, "/api/v3/inpaint", key=FIRST, **fields)
        assert isinstance(round(made["eta"]), int)
        assert made["messege"] == "Try to fetch request after given estimated time"
        finish(settings, made["id"])
        found = post(plain, f"/api/v3/fetch/{made['id']}", key=FIRST)
        assert found["output"][0]
        assert (found["meta"]["W"], found["meta"]["H"]) == (64, 64)
        wrong = post(plain, "/api/v3/img2img", key="nobody", prompt="x")
        assert isinstance(wrong.get("messege") or wrong["message"], str)


class TestUploads:
    def test_answer_field_by_field(self, app: LiveApp, client: httpx2.Client) -> None:
        answer = post(client, "/api/v3/base64_crop", image=MASK, crop="false")
        assert answer == {
            "status": "success",
            "messege": "image uploaded",
            "message": "image uploaded",
            "link": answer["link"],
            "output": [answer["link"]],
            "request_id": answer["request_id"],
        }
        assert 0 <= answer["request_id"] < 2**31, "clients decode a 32-bit integer"
        assert answer["link"].startswith(f"http://127.0.0.1:{app.port}/uploads/")
        assert answer["link"].endswith(".png")
        assert client.get(answer["link"]).content == png_bytes(shade=255)

    def test_swift_app_uploads_edits_and_fetches_at_v4(
        self, plain: httpx2.Client, store: JobStore, settings: Settings
    ) -> None:
        """Texts and nulls only, one upload as JSON and one as a form."""
        image = f"data:image/png;base64,{INIT}"
        first = post(plain, "/api/v3/base64_crop", key=FIRST, image=image, crop="true")
        form = f"key={FIRST}&image={quote(MASK, safe='')}&crop=false"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        second = plain.post("/api/v3/base64_crop", content=form, headers=headers).json()
        fields = {
            "key": FIRST,
            "prompt": "a cat",
            "negative_prompt": None,
            "init_image": first["link"],
            "mask_image": second["link"],
            "width": "512.0",
            "height": "512.0",
            "samples": "1",
            "num_inference_steps": "20",
            "safety_checker": "no",
            "enhance_prompt": "false",
            "guidance_scale": "7.5",
            "strength": "0.7",
            "seed": None,
            "webhook": None,
            "track_id": None,
        }
        made = post(plain, "/api/v3/inpaint", **fields)
        assert made["status"] == "processing", made
        assert row(store, made["id"]).params.width == 512
        finish(settings, made["id"])
        body = {"key": FIRST, "request_id": str(made["id"])}
        found = post(plain, "/api/v4/dreambooth/fetch", **body)
        assert (found["status"], found["id"]) == ("success", made["id"])
        assert plain.get(found["output"][0]).content == PICTURE

    def test_crop_is_told_not_to_be_applied(self, client: httpx2.Client) -> None:
        answer = post(client, "/api/v3/base64_crop", image=MASK, crop="true")
        assert answer["tip"] == "The picture is stored whole: crop is not applied here."

    def test_form_with_pluses_that_are_not_escaped(self, client: httpx2.Client) -> None:
        content = next(
            each
            for each in (png_bytes(8, 8, shade) for shade in range(256))
            if b"+" in base64.b64encode(each)
        )
        body = b"crop=false&image=data:image/png;base64," + base64.b64encode(content)
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = client.post("/api/v3/base64_crop", content=body, headers=headers).json()
        assert client.get(answer["link"]).content == content

    def test_file(self, client: httpx2.Client) -> None:
        files = {"image": ("a.png", png_bytes(), "image/png")}
        answer = client.post("/api/v3/base64_crop", files=files).json()
        assert client.get(answer["link"]).content == png_bytes()

    def test_base64_to_url_with_the_key_in_a_header(self, client: httpx2.Client) -> None:
        answer = post(client, "/api/v6/base64_to_url", base64_string=MASK)
        assert answer["status"] == "success"
        assert client.get(answer["output"][0]).content == png_bytes(shade=255)
        made = post(client, "/api/v6/images/inpaint", **FIELDS | {"mask_image": answer["link"]})
        assert made["status"] == "processing"

    @pytest.mark.parametrize(
        ("image", "sentence"),
        [
            (None, "The image field is required."),
            ("https://x.example/a.png", "The image must be base64 or a file."),
            ("AAAA", "The image is of an unsupported kind: send a PNG, JPEG or WEBP image."),
            ("/images/a.png", "The image must be base64 or a file."),
            (7, "The image must be base64 or a file."),
        ],
    )
    def test_other_content_is_refused(
        self, image: Any, sentence: str, client: httpx2.Client
    ) -> None:
        refused = post(client, "/api/v3/base64_crop", image=image)
        assert refused == {"status": "error", "message": {"image": [sentence]}}
        refused = post(client, "/api/v6/base64_to_url", image=image)
        assert (refused["status"], refused["message"]) == ("error", sentence)

    def test_uploads_need_a_key(self, plain: httpx2.Client) -> None:
        assert post(plain, "/api/v3/base64_crop", image=MASK)["message"] == "Invalid Api Key"

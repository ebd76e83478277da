"""IOPaint's API: how the calls of its page are read, and what it is answered."""

import asyncio
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from models.imaging.extension import Extension
from models.params import NoiseSpacing, OutputFormat, SchedulerName
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.iopaint import captions, reading, writing
from server.api.dialects.iopaint.sizes import size_of
from server.core.errors import (
    ApiError,
    ImageProblem,
    ImageUnavailable,
    InvalidRequest,
)
from server.core.notices import Notice
from tests.support.api_errors import error_classes, sample_of
from tests.support.http_stub import png_bytes
from tests.support.iopaint_calls import page_call

LIMIT = 1_000_000
IMAGE = png_bytes()


def picture(width: int, height: int, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def read(
    init_image: bytes = IMAGE,
    mask_image: bytes = IMAGE,
    policy: ReadingPolicy | None = None,
    **changes: Any,
) -> tuple[JobRequest, list[str]]:
    fields = page_call(init_image, mask_image, **changes)
    return asyncio.run(reading.read_inpaint(fields, policy or ReadingPolicy(), LIMIT))


def refused(**changes: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as caught:
        read(**changes)
    return caught.value.fields


class TestReading:
    def test_call_of_the_page(self) -> None:
        request, ignored = read()
        params = request.params
        assert (params.prompt, params.negative_prompt, params.samples) == ("a cat", "", 1)
        assert (params.num_inference_steps, params.guidance_scale, params.strength) == (30, 7.5, 1)
        assert (params.scheduler, params.noise_spacing) == (SchedulerName.DPM_MULTISTEP, None)
        assert (params.mask_blur, params.match_colours, params.only_masked) == (4, False, False)
        assert (request.width, request.height) == (None, None)
        assert request.init_image is not None
        assert request.init_image.content == IMAGE
        assert (request.notices, ignored) == ((), [])

    def test_defaults_of_the_api(self) -> None:
        fields = {name: page_call(IMAGE, IMAGE)[name] for name in ("image", "mask")}
        request, ignored = asyncio.run(reading.read_inpaint(fields, ReadingPolicy(), LIMIT))
        params = request.params
        assert (params.prompt, params.num_inference_steps, params.seed) == ("", 50, 42)
        assert (params.scheduler, params.mask_blur) == (SchedulerName.UNIPC, 4)
        assert ignored == []

    def test_seed(self) -> None:
        assert len({read(sd_seed=-1)[0].params.seed for _ in range(4)}) == 4
        assert read(sd_seed="12")[0].params.seed == 12

    @pytest.mark.parametrize(
        ("radius", "sigma"), [(0, 0), (1, 1), (2, 1), (5, 2), (11, 4), (35, 11), (200, 60)]
    )
    def test_blur_is_that_of_opencvs_kernel(self, radius: int, sigma: int) -> None:
        """Which takes 0.3 ((size - 1) / 2 - 1) + 0.8 for the sigma of a kernel's size."""
        assert read(sd_mask_blur=radius)[0].params.mask_blur == sigma

    @pytest.mark.parametrize(
        ("name", "scheduler", "spacing", "notices"),
        [
            ("Euler a", SchedulerName.EULER_ANCESTRAL, None, ()),
            ("DPM++ 2M Karras", SchedulerName.DPM_MULTISTEP, NoiseSpacing.KARRAS, ()),
            ("DPM++ SDE", SchedulerName.DPM_SINGLESTEP, None, ()),
            ("DPM++ 2M SDE Karras", None, None, (Notice.SCHEDULER_IGNORED,)),
            ("LMS", None, None, (Notice.SCHEDULER_IGNORED,)),
            ("PNDM Karras", SchedulerName.PNDM, None, (Notice.NOISE_SPACING_IGNORED,)),
        ],
    )
    def test_sampler(
        self,
        name: str,
        scheduler: SchedulerName | None,
        spacing: NoiseSpacing | None,
        notices: tuple[Notice, ...],
    ) -> None:
        request, _ = read(sd_sampler=name)
        assert (request.params.scheduler, request.params.noise_spacing) == (scheduler, spacing)
        assert request.notices == notices

    def test_offered_samplers_are_all_applied(self) -> None:
        offered = reading.offered_samplers()
        assert {"Euler a", "DPM++ 2M Karras", "UniPC", "LCM"} < {*offered}
        assert not {"LMS", "LMS Karras", "DPM++ 2M SDE"} & {*offered}
        assert all(read(sd_sampler=name)[0].notices == () for name in offered)

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("PNG", OutputFormat.PNG), ("JPEG", OutputFormat.JPEG), ("WEBP", OutputFormat.WEBP)],
    )
    def test_answer_has_the_format_of_the_image(self, kind: str, expected: OutputFormat) -> None:
        request, _ = read(picture(64, 64, kind), picture(64, 64, "PNG", "L"))
        assert request.params.output_format is expected

    @pytest.mark.parametrize(
        ("size", "canvas"),
        [
            ((64, 64), None),
            ((1024, 512), None),
            ((100, 64), (96, 64)),
            ((2048, 1024), (1024, 512)),
            ((1200, 800), (1024, 680)),
        ],
    )
    def test_result_has_the_images_size(
        self, size: tuple[int, int], canvas: tuple[int, int] | None
    ) -> None:
        """A size that the model cannot make is kept, and the part around the mask repainted."""
        request, _ = read(picture(*size, "PNG"), picture(*size, "PNG", "L"))
        assert request.params.only_masked is (canvas is not None)
        assert (request.width, request.height) == (canvas or (None, None))

    def test_crop_box_is_the_canvas(self) -> None:
        request, ignored = read(use_croper=True, croper_width=600, croper_height=2_000)
        assert request.params.only_masked
        assert (request.width, request.height) == (304, 1024)
        assert ignored == ["croper_x", "croper_y"]
        assert request.notices == (Notice.FIELDS_IGNORED,)

    def test_mask_of_another_size_is_refused(self) -> None:
        for other in ((64, 72), (72, 64), (32, 32)):
            assert refused(mask_image=picture(*other, "PNG", "L")).keys() == {"mask"}

    def test_mask_of_a_photo_on_its_side_is_upright(self) -> None:
        request, _ = read(picture(128, 64, "JPEG"), picture(64, 128, "PNG", "L"))
        assert request.params.output_format is OutputFormat.JPEG

    @pytest.mark.parametrize(
        ("changes", "names"),
        [
            ({"enable_controlnet": True}, ["enable_controlnet"]),
            ({"sd_scale": 0.5, "sd_lcm_lora": True}, ["sd_scale", "sd_lcm_lora"]),
            ({"sd_keep_unmasked_area": False}, ["sd_keep_unmasked_area"]),
            ({"sd_scale": 1, "sd_keep_unmasked_area": True}, []),
            ({"sd_freeu": True, "x\r\ny": 1, "ä": 1}, ["sd_freeu"]),
        ],
    )
    def test_fields_that_are_not_applied(self, changes: dict[str, Any], names: list[str]) -> None:
        request, ignored = read(**changes)
        assert ignored == names
        assert (Notice.FIELDS_IGNORED in request.notices) is bool(names)

    @pytest.mark.parametrize(
        ("frame", "extension", "canvas"),
        [
            ((-32, 0, 128, 64), Extension(left=32, right=32), None),
            ((-8, -16, 80, 88), Extension(8, 16, 8, 8), None),
            ((16, 0, 64, 64), Extension(right=16), None),
            ((-3, 0, 67, 64), Extension(left=3), (64, 64)),
            ((0, 0, 64, 576), Extension(bottom=512), None),
        ],
    )
    def test_extender_adds_pixels(
        self,
        frame: tuple[int, int, int, int],
        extension: Extension,
        canvas: tuple[int, int] | None,
    ) -> None:
        names = ("extender_x", "extender_y", "extender_width", "extender_height")
        fields: dict[str, Any] = dict(zip(names, frame, strict=True))
        request, ignored = read(use_extender=True, sd_strength=0.3, **fields)
        assert request.extension == extension
        assert request.mask_image is None, "the new pixels alone are painted"
        assert request.params.strength == 1
        assert request.params.only_masked is (canvas is not None)
        assert (request.width, request.height) == (canvas or (None, None))
        assert ignored == []

    def test_extender_of_a_photo_on_its_side(self) -> None:
        request, _ = read(
            picture(128, 64, "JPEG"),
            picture(64, 128, "PNG", "L"),
            use_extender=True,
            extender_width=64,
            extender_height=192,
        )
        assert request.extension == Extension(bottom=64)

    @pytest.mark.parametrize(
        "frame",
        [
            {"extender_width": 64, "extender_height": 64},
            {"extender_x": -513, "extender_width": 577, "extender_height": 64},
            {"extender_width": 64, "extender_height": 577},
        ],
    )
    def test_extender_that_adds_nothing_or_too_much(self, frame: dict[str, Any]) -> None:
        assert refused(use_extender=True, **frame).keys() == {"use_extender"}

    def test_extender_needs_a_size(self) -> None:
        with pytest.raises(ImageUnavailable) as caught:
            read(b"GIF89a", b"GIF89a", use_extender=True)
        assert caught.value.problems == {"image": ImageProblem.UNSUPPORTED}

    def test_every_fault_is_named(self) -> None:
        faults = refused(
            prompt="a " * 4_000,
            sd_steps=500,
            sd_strength=2,
            sd_guidance_scale=99,
            sd_mask_blur=-1,
            sd_match_histograms="perhaps",
        )
        assert faults.keys() == {
            *("prompt", "sd_steps", "sd_strength", "sd_guidance_scale", "sd_mask_blur"),
            "sd_match_histograms",
        }

    @pytest.mark.parametrize("image", [None, "", 7, "https://x.example/a.png"])
    def test_image_is_inline(self, image: Any) -> None:
        fields = page_call(IMAGE, IMAGE, image=image)
        with pytest.raises(InvalidRequest) as caught:
            asyncio.run(reading.read_inpaint(fields, ReadingPolicy(), LIMIT))
        assert caught.value.fields.keys() == {"image"}

    def test_pictures_that_cannot_be_read_are_named(self) -> None:
        fields = page_call(IMAGE, IMAGE, image="no base64!", mask="data:image/png;base64,?")
        with pytest.raises(ImageUnavailable) as caught:
            asyncio.run(reading.read_inpaint(fields, ReadingPolicy(), LIMIT))
        assert caught.value.problems.keys() == {"image", "mask"}

    def test_safety_checker_is_the_operators(self) -> None:
        assert read()[0].params.safety_check
        forced = ReadingPolicy(force_safety_check=True)
        assert read(policy=forced)[0].params.must_be_checked


class TestSizes:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("PNG", {}),
            ("PNG", {"mode": "P"}),
            ("JPEG", {}),
            ("JPEG", {"progressive": True, "quality": 30}),
            ("JPEG", {"exif": b"Exif\0\0" + bytes(5_000), "comment": b"x" * 300}),
            ("WEBP", {}),
            ("WEBP", {"lossless": True}),
            ("WEBP", {"mode": "RGBA"}),
            ("WEBP", {"exif": b"Exif\0\0MM"}),
        ],
    )
    def test_size(self, kind: str, options: dict[str, Any]) -> None:
        assert size_of(picture(123, 45, kind, **options)) == (123, 45)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_broken_files_harm_nobody(self, kind: str) -> None:
        whole = picture(123, 45, kind)
        for end in range(len(whole)):
            size_of(whole[:end])
        draw = np.random.default_rng(0)
        for _ in range(300):
            broken = bytearray(whole)
            broken[draw.integers(2, min(60, len(whole)))] = draw.integers(256)
            size_of(bytes(broken))

    @pytest.mark.parametrize(
        "content", [b"", b"GIF89a", b"\xff\xd8\xff" + b"\xff" * 10**6, b"\xff\xd8\xff\xe0\0\0" * 9]
    )
    def test_other_files_have_none(self, content: bytes) -> None:
        assert size_of(content) is None


class TestCaptions:
    CAPTION = "a cat,\na hat\nNegative prompt: dog\nSteps: 20, Sampler: Euler"

    def with_text(self, text: str, **options: Any) -> bytes:
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", "before")
        if options.pop("itxt", False):
            info.add_itxt("parameters", text, **options)
        else:
            info.add_text("parameters", text, **options)
        return picture(8, 8, "PNG", pnginfo=info)

    @pytest.mark.parametrize("itxt", [False, True])
    def test_prompts_of_a_caption(self, itxt: bool) -> None:
        found = captions.read_prompts(self.with_text(self.CAPTION, itxt=itxt))
        assert found == ("a cat,\na hat", "dog")

    @pytest.mark.parametrize(
        ("caption", "prompts"),
        [
            ("a cat", ("a cat", "")),
            ("a cat\nSteps: 20, Seed: 1", ("a cat", "")),
            ("Negative prompt: dog\nSteps: 20", ("", "dog")),
            ("", ("", "")),
        ],
    )
    def test_parts_may_be_missing(self, caption: str, prompts: tuple[str, str]) -> None:
        assert captions.read_prompts(self.with_text(caption)) == prompts

    @pytest.mark.parametrize(
        "content",
        [b"", b"text", picture(8, 8, "JPEG"), picture(8, 8, "PNG"), IMAGE[:40], IMAGE[:8] * 999],
    )
    def test_other_files_have_none(self, content: bytes) -> None:
        assert captions.read_prompts(content) == ("", "")


class TestWriting:
    @pytest.mark.parametrize(
        ("path", "is_ours"),
        [
            ("/api/v1/inpaint", True),
            ("/api/v1", True),
            ("/api/v1/nothing", True),
            ("/api/v1/enterprise/images/inpaint", False),
            ("/api/v1/enterprise", False),
            ("/api/v3/inpaint", False),
            ("/api/v10", False),
            ("/v1/models", False),
        ],
    )
    def test_paths(self, path: str, is_ours: bool) -> None:
        assert writing.owns(path) is is_ours

    def test_model_shows_no_folder(self) -> None:
        assert writing.write_model("/srv/models/sd.safetensors")["path"] == "sd.safetensors"

    @pytest.mark.parametrize("kind", error_classes())
    def test_every_error_has_the_pages_form(self, kind: type[ApiError]) -> None:
        answer = writing.write_error(sample_of(kind), SimpleNamespace())  # type: ignore[arg-type]
        body = json.loads(bytes(answer.body))
        assert answer.status_code >= 400
        assert body.keys() == {"error", "detail", "body", "errors"}
        assert body["errors"].endswith(".")

    def test_images_at_fault_have_the_pages_names(self) -> None:
        error = ImageUnavailable({"init_image": ImageProblem.DAMAGED})
        answer = writing.write_error(error, SimpleNamespace())  # type: ignore[arg-type]
        assert json.loads(bytes(answer.body))["errors"] == "The image is damaged or incomplete."

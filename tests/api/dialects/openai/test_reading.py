"""OpenAI's fields, and ours beside them, as a `JobRequest`."""

import base64
from typing import Any

import pytest

from models.imaging.mask_reading import MaskRule
from models.params import Fill, FlaggedAs, NoiseSpacing, OutputFormat, SchedulerName
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.openai.reading import (
    Call,
    find_model,
    public_names,
    read_edit,
    read_generation,
)
from server.core.errors import InvalidRequest
from server.core.notices import Notice
from server.egress.sources import ImageSource

IMAGE, MASK = b"an image", b"a mask"
POLICY = ReadingPolicy(models=["builtin", "owner/name"], aliases={"sd": "owner/name"})


def read(**fields: Any) -> tuple[JobRequest, Call]:
    return read_edit({"prompt": "a cat", "image": IMAGE, "mask": MASK} | fields, POLICY)


def generation(**fields: Any) -> tuple[JobRequest, Call]:
    return read_generation({"prompt": "a cat", **fields}, POLICY)


def errors_of(**fields: Any) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as refused:
        read(**fields)
    return refused.value.fields


def test_defaults_of_an_edit() -> None:
    request, call = read()
    params = request.params
    assert (params.strength, params.num_inference_steps, params.guidance_scale) == (1.0, 30, 7.5)
    assert (params.samples, params.output_format, params.output_quality) == (1, "png", 100)
    assert (params.model, params.safety_check) == (None, True)
    assert (request.width, request.height, request.previews) == (None, None, False)
    assert (request.init_image, request.mask_image) == (ImageSource(IMAGE), ImageSource(MASK))
    assert request.mask_rule is MaskRule.TRANSPARENT
    assert request.notices == ()
    assert call == Call("image_edit", None, False, 0, ())


def test_edit_without_a_mask_takes_the_images_own_alpha() -> None:
    request, _ = read(mask="")
    assert request.mask_image == request.init_image == ImageSource(IMAGE)
    assert request.mask_rule is MaskRule.TRANSPARENT_OR_ALL


def test_generation_has_no_pictures() -> None:
    request, call = generation()
    assert (request.images, request.width, request.height) == ({}, 512, 512)
    assert (request.params.strength, call.event) == (1.0, "image_generation")


@pytest.mark.parametrize("name", ["image", "image[]", "images", "images[]", "image[0]"])
@pytest.mark.parametrize(
    "value",
    [
        *(IMAGE, [IMAGE], "https://x/a.png", ["https://x/a.png"]),
        [{"type": "input_image", "image_url": "https://x/a.png"}],
        {"image_url": {"url": "https://x/a.png"}},
        "data:image/png;base64," + base64.b64encode(IMAGE).decode(),
    ],
)
def test_picture_is_found_under_every_name(name: str, value: Any) -> None:
    fields = {"prompt": "a cat", "mask[]": [MASK], name: value}
    request, call = read_edit(fields, POLICY)
    assert request.init_image is not None
    assert request.init_image.is_url or request.init_image.content in (IMAGE, value)
    assert request.mask_image == ImageSource(MASK)
    assert call.ignored == ()


def test_same_mask_under_two_names_is_one() -> None:
    request, _ = read(**{"mask": [MASK], "mask[]": [MASK, MASK]})
    assert request.mask_image == ImageSource(MASK)


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"image": [IMAGE, b"another"]}, "image", "may be one picture here, and 2 were sent"),
        ({"image[]": [b"another"]}, "image", "may be one picture here"),
        ({"mask[]": [b"another"]}, "mask", "may be one picture here"),
        ({"image": []}, "image", "required"),
        ({"image": b""}, "image", "required"),
        ({"image": [{"file_id": "file-1"}]}, "image", "must be a URL, base64 or a file"),
        ({"image": 5}, "image", "must be a URL, base64 or a file"),
        ({"prompt": ""}, "prompt", "required"),
        ({"prompt": "BREAK " * 40}, "prompt", "32 chunks"),
        ({"n": "5"}, "n", "between 1 and 4"),
        ({"n": "10"}, "n", "between 1 and 4"),
        ({"n": "0"}, "n", "between 1 and 4"),
        ({"size": "large"}, "size", "auto or WIDTHxHEIGHT"),
        ({"size": "0x512"}, "size", "auto or WIDTHxHEIGHT"),
        ({"size": "000x512"}, "size", "auto or WIDTHxHEIGHT"),
        ({"size": "1:1"}, "size", "auto or WIDTHxHEIGHT"),
        ({"response_format": "file"}, "response_format", "url, b64_json"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
        ({"output_compression": "101"}, "output_compression", "between 0 and 100"),
        ({"background": "transparent"}, "background", "opaque or auto"),
        ({"partial_images": "4", "stream": "true"}, "partial_images", "between 0 and 3"),
        ({"stream": "perhaps"}, "stream", "yes or no"),
        ({"strength": "0"}, "strength", "between 0.001 and 1"),
        ({"num_inference_steps": "151"}, "num_inference_steps", "between 1 and 150"),
        ({"guidance_scale": "0.5"}, "guidance_scale", "between 1 and 20"),
        ({"mask_blur": "65"}, "mask_blur", "between 0 and 64"),
        ({"mask_grow": "x"}, "mask_grow", "must be a number"),
        ({"invert_mask": "perhaps"}, "invert_mask", "yes or no"),
        ({"fill": "paint"}, "fill", "original, blur, noise, zero"),
    ],
)
def test_wrong_value_is_refused_by_its_name(fields: dict[str, Any], name: str, words: str) -> None:
    errors = errors_of(**fields)
    assert [*errors] == [name]
    assert words in errors[name][0]


def test_every_fault_is_told_of() -> None:
    assert {*errors_of(prompt="", n="9", image=[])} == {"prompt", "n", "image"}


def test_our_own_fields_come_through() -> None:
    request, call = read(
        seed="-7",
        negative_prompt="a dog",
        num_inference_steps="12",
        strength="0.5",
        guidance_scale=3,
        scheduler="euler",
        noise_spacing="karras",
        clip_skip="1",
        fill="noise",
        flagged_as="blur",
        mask_blur="4",
        mask_grow="-2",
        invert_mask="true",
        soft_mask=True,
        match_colours="yes",
        only_masked="1",
        only_masked_padding="16",
        safety_check="no",
    )
    params = request.params
    assert (params.seed, params.negative_prompt) == (2**32 - 7, "a dog")
    assert (params.num_inference_steps, params.strength, params.guidance_scale) == (12, 0.5, 3)
    assert (params.scheduler, params.noise_spacing) == (SchedulerName.EULER, NoiseSpacing.KARRAS)
    assert (params.clip_skip, params.fill, params.flagged_as) == (1, Fill.NOISE, FlaggedAs.BLUR)
    assert (params.mask_blur, params.mask_grow, params.invert_mask) == (4, -2, True)
    assert (params.soft_mask, params.match_colours) == (True, True)
    assert (params.only_masked, params.only_masked_padding) == (True, 16)
    assert not params.safety_check
    assert call.ignored == ()


def test_operator_may_force_the_safety_check() -> None:
    policy = ReadingPolicy(models=["builtin"], force_safety_check=True)
    request, _ = read_generation({"prompt": "a cat", "safety_check": False}, policy)
    assert request.params.safety_check
    assert request.params.must_be_checked


@pytest.mark.parametrize(
    ("sent", "size", "ignored"),
    [
        ("auto", None, ()),
        ("512x512", (512, 512), ()),
        ("512 X 768", (512, 768), ()),
        ("1024x1024", (1024, 1024), ()),
        ("1536x1024", (1024, 680), ("size",)),
        ("1024x1536", (680, 1024), ("size",)),
        ("500x500", (496, 496), ("size",)),
        ("8x8", (64, 64), ("size",)),
    ],
)
def test_size_that_cannot_be_made_is_fitted_and_told_of(
    sent: str, size: tuple[int, int] | None, ignored: tuple[str, ...]
) -> None:
    request, call = read(size=sent)
    assert (request.width, request.height) == (size or (None, None))
    assert call.ignored == ignored
    assert (Notice.FIELDS_IGNORED in request.notices) == bool(ignored)
    assert generation(size=sent)[0].width == (size or (512, 512))[0]


def test_fields_without_effect_are_silent_and_unknown_ones_named() -> None:
    usual = {"quality": "Medium", "input_fidelity": "low", "moderation": "auto", "style": "vivid"}
    silent = {**usual, "user": "u-1", "safety_identifier": "s-1"}
    request, call = read(**silent, background="opaque", partial_images=2)
    assert (request.notices, call.ignored) == ((), ())
    assert not request.previews, "no preview is asked for without a stream"
    request, call = read(markup="x", quality="hd", **{"svg[width]": "1"})
    assert call.ignored == ("quality", "markup", "svg[width]")
    assert request.notices == (Notice.FIELDS_IGNORED,)


def test_fields_of_a_mask_mean_nothing_without_pictures() -> None:
    _, call = generation(mask_blur=3, strength=0.5, image="x")
    assert call.ignored == ("mask_blur", "strength", "image")


def test_many_long_names_are_cut() -> None:
    _, call = read(**{f"{number}{'x' * 200}": 1 for number in range(50)})
    assert (len(call.ignored), {len(each) for each in call.ignored}) == (20, {100})


@pytest.mark.parametrize(
    ("name", "model", "is_replaced"),
    [
        *(("builtin", "builtin", False), ("sd", "owner/name", False)),
        *(("owner/name", "owner/name", False), ("gpt-image-1", None, False)),
        *(("dall-e-2", None, False), ("openai/gpt-image-1.5", None, False)),
        *(("chatgpt-image-latest", None, False), ("flux", None, True)),
    ],
)
def test_model(name: str, model: str | None, is_replaced: bool) -> None:
    request, _ = read(model=name)
    assert request.params.model == model
    assert (Notice.MODEL_REPLACED in request.notices) is is_replaced


def test_folders_of_a_model_are_not_named() -> None:
    models = ["owner/name", "/models/a.safetensors", "/models/x/b", "/models/y/b"]
    assert public_names(models) == {
        "owner/name": "owner/name",
        "a.safetensors": "/models/a.safetensors",
        "/models/x/b": "/models/x/b",
        "/models/y/b": "/models/y/b",
    }
    assert find_model("a.safetensors", ReadingPolicy(models=models)) == "/models/a.safetensors"
    assert find_model("b", ReadingPolicy(models=models)) is None


@pytest.mark.parametrize(
    ("fields", "output_format", "quality"),
    [
        ({"output_format": "jpeg", "output_compression": "80"}, OutputFormat.JPEG, 80),
        ({"output_format": "WEBP", "output_compression": 0}, OutputFormat.WEBP, 1),
    ],
)
def test_output(fields: dict[str, Any], output_format: OutputFormat, quality: int) -> None:
    params = read(**fields)[0].params
    assert (params.output_format, params.output_quality) == (output_format, quality)


def test_stream_asks_for_previews() -> None:
    request, call = read(stream="true", partial_images="2", response_format="B64_JSON")
    assert (request.previews, call.is_stream, call.partial_images) == (True, True, 2)
    assert call.response_format == "b64_json"
    assert not read(stream="true")[0].previews

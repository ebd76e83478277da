"""Calls of A1111's clients become jobs; what is not applied is told."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.imaging.mask_reading import MaskRule
from models.params import (
    SEED_MODULUS,
    Fill,
    InpaintParams,
    Lora,
    NoiseSpacing,
    OutputFormat,
    SchedulerName,
)
from server.api.dialects.a1111.catalogue import write_options
from server.api.dialects.a1111.leftovers import KNOWN, READ, SILENT, to_code
from server.api.dialects.a1111.reading import Call, read_img2img, read_txt2img
from server.api.dialects.a1111.writing import to_json_value, to_response
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.core.errors import InvalidRequest
from server.core.notices import Notice
from tests.support.a1111_calls import IMAGE, NPM, SD_BACKEND, URI, WEBUIAPI

POLICY = ReadingPolicy(
    models=["builtin", "/srv/models/sd15.safetensors", "a/xl", "b/xl"], loras=["ink", "Old Film"]
)
LEAST: dict[str, Any] = {"init_images": [IMAGE], "mask": IMAGE, "seed": 1}


def read(policy: ReadingPolicy = POLICY, **changes: Any) -> tuple[JobRequest, Call]:
    return read_img2img(LEAST | changes, policy)


def params_of(**changes: Any) -> InpaintParams:
    return read(**changes)[0].params


def not_applied(**changes: Any) -> list[str]:
    return [*read(**changes)[1].not_applied]


def refused(**changes: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        read(**changes)
    return {name: " ".join(sentences) for name, sentences in caught.value.fields.items()}


def test_defaults_are_those_of_a1111() -> None:
    request, call = read()
    assert request.params == InpaintParams(
        prompt="",
        seed=1,
        num_inference_steps=50,
        guidance_scale=7,
        strength=0.75,
        scheduler=SchedulerName.EULER,
        fill=Fill.BLUR,
        only_masked=True,
        only_masked_padding=0,
        mask_blur=4,
        output_quality=80,
    )
    assert (request.width, request.height) == (512, 512)
    assert request.mask_rule is MaskRule.OPAQUE
    assert call.sends_images
    assert (call.sampler, call.batch_size, call.not_applied) == ("Euler", 1, ())


def test_without_a_mask_its_parameters_mean_nothing() -> None:
    request, call = read(mask=None, mask_blur_y=9, inpainting_fill=2)
    assert request.mask_image is None
    assert not request.params.only_masked
    assert (request.params.fill, request.params.mask_blur) == (Fill.ORIGINAL, 0)
    assert call.not_applied == ()


def test_text_to_image_has_no_pictures_and_the_whole_strength() -> None:
    fields = {"prompt": "a cat", "seed": 2, "denoising_strength": 0.3, "width": 256}
    request, call = read_txt2img(fields, POLICY)
    assert (request.init_image, request.mask_image) == (None, None)
    assert request.params.strength == 1
    assert (request.width, request.height) == (256, 512)
    assert call.not_applied == ()


def test_call_of_webuiapi() -> None:
    request, call = read_img2img(WEBUIAPI, POLICY)
    params = request.params
    assert (params.prompt, params.seed, params.samples) == ("a cat", 5, 2)
    assert (params.scheduler, params.noise_spacing) == (SchedulerName.EULER_ANCESTRAL, None)
    assert (params.fill, params.mask_blur, params.only_masked_padding) == (Fill.ORIGINAL, 4, 32)
    assert (request.width, request.height) == (256, 192)
    assert call.not_applied == ()
    assert {*WEBUIAPI} - {*call.parameters} == {"init_images", "mask"}


def test_call_of_sd_backend_client() -> None:
    request, call = read_img2img(SD_BACKEND, POLICY)
    assert (request.params.samples, call.batch_size) == (2, 2)
    assert request.own_facts == {"task_id": "task(img2img-ER6N6IQ)"}
    assert call.not_applied == ()


def test_call_of_the_npm_package() -> None:
    request, call = read_img2img(NPM, POLICY)
    assert request.mask_image is None
    assert request.params.strength == 0.5
    assert call.not_applied == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": "a", "negative_prompt": "b"}, {"prompt": "a", "negative_prompt": "b"}),
        ({"inpainting_fill": 1}, {"fill": Fill.ORIGINAL}),
        ({"inpainting_fill": "2"}, {"fill": Fill.NOISE}),
        ({"inpainting_fill": 3}, {"fill": Fill.ZERO}),
        ({"inpaint_full_res": False}, {"only_masked": False}),
        ({"inpaint_full_res": 0}, {"only_masked": False}),
        ({"inpaint_full_res": 1}, {"only_masked": True}),
        ({"inpaint_full_res": "True"}, {"only_masked": True}),
        ({"inpaint_full_res_padding": 256}, {"only_masked_padding": 256}),
        ({"inpainting_mask_invert": 1}, {"invert_mask": True}),
        ({"mask_blur": 0, "mask_blur_x": 4}, {"mask_blur": 0}),
        ({"mask_blur_x": 7, "mask_blur_y": 7}, {"mask_blur": 7}),
        ({"denoising_strength": 0}, {"strength": 0.001}),
        ({"denoising_strength": 1}, {"strength": 1}),
        ({"n_iter": 2, "batch_size": "2"}, {"samples": 4}),
        ({"steps": 150, "cfg_scale": 20}, {"num_inference_steps": 150, "guidance_scale": 20}),
        ({"seed": -5}, {"seed": SEED_MODULUS - 5}),
        ({"sampler_index": "DDIM"}, {"scheduler": SchedulerName.DDIM}),
        ({"sampler_name": "Heun", "sampler_index": "DDIM"}, {"scheduler": SchedulerName.HEUN}),
        ({"sampler_name": "Automatic"}, {"scheduler": None}),
        ({"scheduler": "Karras"}, {"noise_spacing": NoiseSpacing.KARRAS}),
    ],
)
def test_fields_reach_the_job(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    params = params_of(**changes)
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sd_model_checkpoint": "sd15"}, {"model": "/srv/models/sd15.safetensors"}),
        (
            {"sd_model_checkpoint": "sd15.safetensors [abc1234567]"},
            {"model": "/srv/models/sd15.safetensors"},
        ),
        ({"sd_model_checkpoint": "builtin [0123456789]"}, {"model": "builtin"}),
        ({"sd_model_checkpoint": "b/xl"}, {"model": "b/xl"}),
        ({"sd_model_checkpoint": None}, {"model": None}),
        ({"CLIP_stop_at_last_layers": 1}, {"clip_skip": 0}),
        ({"CLIP_stop_at_last_layers": 2}, {"clip_skip": 1}),
        ({"samples_format": "JPG"}, {"output_format": OutputFormat.JPEG, "output_quality": 80}),
        (
            {"samples_format": "webp", "jpeg_quality": 95},
            {"output_format": OutputFormat.WEBP, "output_quality": 95},
        ),
    ],
)
def test_overridden_settings_reach_the_job(
    settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    params = params_of(override_settings=settings)
    assert {name: getattr(params, name) for name in expected} == expected
    assert not_applied(override_settings=settings) == []


def test_random_seed_is_chosen() -> None:
    seeds = {params_of(seed=seed).seed for seed in (-1, None, "", "-1")}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"init_images": []}, "init_images"),
        ({"init_images": None}, "init_images"),
        ({"init_images": [IMAGE, IMAGE]}, "init_images"),
        ({"init_images": [7]}, "init_images"),
        ({"mask": {}}, "mask"),
        ({"denoising_strength": 1.1}, "denoising_strength"),
        ({"inpainting_fill": 4}, "inpainting_fill"),
        ({"mask_blur": 65}, "mask_blur"),
        ({"inpaint_full_res": "perhaps"}, "inpaint_full_res"),
        ({"inpaint_full_res_padding": -1}, "inpaint_full_res_padding"),
        ({"steps": 0}, "steps"),
        ({"cfg_scale": 30}, "cfg_scale"),
        ({"seed": "abc"}, "seed"),
        ({"width": "wide"}, "width"),
        ({"sampler_name": "DPM fast"}, "sampler_name"),
        ({"sampler_index": "LMS"}, "sampler_index"),
        ({"batch_size": 5}, "batch_size"),
        ({"batch_size": 2, "n_iter": 3}, "n_iter"),
        ({"n_iter": 0}, "n_iter"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "a " * 4_000}, "prompt"),
        ({"force_task_id": "x" * 201}, "force_task_id"),
        ({"override_settings": {"sd_model_checkpoint": "sd16"}}, "sd_model_checkpoint"),
        ({"override_settings": {"sd_model_checkpoint": "xl"}}, "sd_model_checkpoint"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, "CLIP_stop_at_last_layers"),
        ({"override_settings": {"samples_format": "avif"}}, "samples_format"),
        ({"override_settings": "x"}, "override_settings"),
        ({"override_settings": [1]}, "override_settings"),
        ({"prompt": "<lora:ink:3>"}, "loras"),
        ({"prompt": "<lora:ink> <lora:ink>"}, "loras"),
    ],
)
def test_wrong_fields_are_refused_by_their_names(changes: dict[str, Any], field: str) -> None:
    assert [*refused(**changes)] == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    wrong = refused(steps=0, width="x", override_settings={"sd_model_checkpoint": "sd16"})
    assert {*wrong} == {"steps", "width", "sd_model_checkpoint"}
    assert wrong["width"].count("number") == 1


def test_limit_of_pictures_is_told() -> None:
    assert "4 pictures" in refused(batch_size=8)["batch_size"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, ["alwayson_scripts.ADetailer"]),
        ({"alwayson_scripts": {"ADetailer": {"args": [False, {"a": 1}]}}}, []),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, []),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}]}}}, []),
        ({"alwayson_scripts": {"c": {"args": [{"model": "x"}]}}}, ["alwayson_scripts.c"]),
        ({"alwayson_scripts": {"c": None, "d": {}, "e": {"args": "x"}}}, ["alwayson_scripts.e"]),
        ({"alwayson_scripts": "x"}, ["alwayson_scripts"]),
        ({"alwayson_scripts": []}, []),
        ({"restore_faces": True, "tiling": "true"}, ["restore_faces", "tiling"]),
        ({"restore_faces": "False", "tiling": None}, []),
        ({"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent"}, ["enable_hr"]),
        ({"enable_hr": False, "hr_scale": 2, "hr_prompt": "x"}, []),
        ({"sampler_name": "Euler a", "eta": 0.5}, ["eta"]),
        ({"sampler_name": "Euler a", "eta": 1}, []),
        ({"sampler_name": "Euler", "eta": 0.5}, []),
        ({"sampler_name": "DDIM", "eta": 1}, ["eta"]),
        ({"s_churn": 1, "s_tmin": 1, "s_noise": 1}, ["s_churn"]),
        ({"s_noise": 0}, ["s_noise"]),
        ({"s_min_uncond": 0.5}, ["s_min_uncond"]),
        ({"initial_noise_multiplier": 0}, ["initial_noise_multiplier"]),
        ({"initial_noise_multiplier": 1.0}, []),
        ({"subseed": 7, "subseed_strength": 0}, []),
        ({"subseed": 7, "subseed_strength": 0.1}, ["subseed_strength"]),
        ({"seed_resize_from_w": 512, "seed_resize_from_h": -1}, ["seed_resize_from_w"]),
        ({"styles": ["film"]}, ["styles"]),
        ({"script_name": "x/y/z plot", "script_args": [1]}, ["script_name"]),
        ({"refiner_checkpoint": "None"}, []),
        ({"refiner_checkpoint": "r", "refiner_switch_at": 0.8}, ["refiner_checkpoint"]),
        ({"resize_mode": 1}, []),
        ({"resize_mode": 1, "inpaint_full_res": False}, ["resize_mode"]),
        ({"resize_mode": "0", "inpaint_full_res": False}, []),
        ({"mask_round": False}, ["mask_round"]),
        ({"mask_round": True}, []),
        ({"mask_blur_x": 4, "mask_blur_y": 9}, ["mask_blur_y"]),
        ({"mask_blur": 4, "mask_blur_y": 9}, []),
        ({"sampler_name": "Euler a", "scheduler": "Karras"}, ["scheduler"]),
        ({"width": 1000}, []),
        ({"width": 1001}, ["width"]),
        ({"width": 2048, "height": 512}, ["width", "height"]),
        ({"promt": "a typo", "x" * 100: 1}, ["promt", "x" * 60]),
        ({"override_settings": {"sd_vae": "Automatic", "img2img_color_correction": False}}, []),
        ({"override_settings": write_options(["builtin"])}, []),
        ({"override_settings": {"sd_vae": "x"}}, ["override_settings.sd_vae"]),
        ({"override_settings": []}, []),
    ],
)
def test_what_would_change_the_picture_is_told(changes: dict[str, Any], names: list[str]) -> None:
    assert not_applied(**changes) == names


def test_log_gets_no_text_of_the_client() -> None:
    assert to_code("alwayson_scripts.my secret") == "alwayson_scripts"
    assert to_code("override_settings.x") == "override_settings"
    assert to_code("my secret") == "unknown"


def test_loras_of_the_server_are_taken_out_of_the_prompt() -> None:
    request, _ = read(prompt="a cat <lora:ink:0.8>, old <lora:Old Film>")
    assert request.params.prompt == "a cat , old"
    assert request.params.loras == (Lora("ink", 0.8), Lora("Old Film", 1.0))
    assert request.notices == ()


@pytest.mark.parametrize("tag", ["<lora:other:1>", "<lora:ink:a>", "<lora:ink:0.5:0.6>"])
def test_other_tags_stay_and_are_told(tag: str) -> None:
    request, _ = read(prompt=f"a cat {tag}")
    assert request.params.prompt == f"a cat {tag}"
    assert request.params.loras == ()
    assert request.notices == (Notice.LORA_TAG_IGNORED,)


def test_loras_can_be_switched_off() -> None:
    request, call = read(prompt="a cat <lora:ink>", disable_extra_networks=True)
    assert (request.params.prompt, request.params.loras) == ("a cat", ())
    assert call.not_applied == ()


def test_prompt_is_not_changed_without_loras() -> None:
    assert params_of(prompt="a  cat (dog:1.2)").prompt == "a  cat (dog:1.2)"


def test_pictures_are_repeated_only_if_asked_for() -> None:
    _, call = read(mask=URI, latent_mask=IMAGE, save_images=True)
    assert call.parameters == {"seed": 1, "save_images": True}
    assert not call.repeats_pictures
    _, call = read(include_init_images=True)
    assert call.repeats_pictures
    assert call.parameters["init_images"] == [IMAGE]
    assert call.parameters["mask"] == IMAGE


def test_init_image_may_be_a_text_of_its_own() -> None:
    request, _ = read(init_images=URI)
    assert request.init_image is not None
    assert request.init_image.content == URI


def test_safety_check_is_forced_by_the_operator() -> None:
    policy = ReadingPolicy(models=["builtin"], force_safety_check=True)
    assert read(policy)[0].params.must_be_checked
    assert params_of().safety_check


def test_alias_of_a_model_is_known() -> None:
    policy = ReadingPolicy(models=["builtin", "sd15"], aliases={"v1-5-pruned": "sd15"})
    for name in ("v1-5-pruned", "v1-5-pruned [cc6cb27103]", "sd15"):
        request, _ = read(policy, override_settings={"sd_model_checkpoint": name})
        assert request.params.model == "sd15"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = sorted(READ | SILENT | KNOWN | {"hr_scale", "a name of nobody's"})


@given(fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8))
def test_any_values_are_read_or_refused(fields: dict[str, Any]) -> None:
    for read_any in (read_img2img, read_txt2img):
        with suppress(InvalidRequest):
            _, call = read_any({**LEAST, **fields}, POLICY)
            assert to_response(to_json_value(call.parameters)).body
            assert all(len(name) <= 100 for name in call.not_applied)

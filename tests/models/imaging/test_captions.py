"""Captions are read back by the rules of the web UI that readers of PNGs follow."""

import json
import re
from dataclasses import replace

import pytest

from models.imaging.captions import SAMPLERS, write_caption
from models.imaging.images import encode_png
from models.params import Fill, InpaintParams, Lora, NoiseSpacing, SchedulerName
from tests.support.png_text import COLOURS, read_text

PARAMS = InpaintParams(
    prompt="a red circle,\n(shiny:1.2) 猫",
    negative_prompt="blurry: yes, bad",
    seed=7,
    width=512,
    height=640,
    num_inference_steps=30,
    guidance_scale=7.5,
    strength=0.75,
)
_VALUE = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""As in `parse_generation_parameters`."""


def read_caption(caption: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and the values of the last line."""
    *lines, last = caption.split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    values = {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in _VALUE.findall(last)
    }
    return prompt, negative, values


def test_caption_gives_every_parameter_back() -> None:
    caption = write_caption(PARAMS, 8, SchedulerName.EULER_ANCESTRAL, "dream")
    prompt, negative, values = read_caption(caption)

    assert prompt == PARAMS.prompt
    assert negative == PARAMS.negative_prompt
    assert values == {
        "Steps": "30",
        "Sampler": "Euler a",
        "CFG scale": "7.5",
        "Seed": "8",
        "Size": "512x640",
        "Model": "dream",
        "Denoising strength": "0.75",
    }


@pytest.mark.parametrize(
    ("fill", "name"),
    [
        (Fill.ORIGINAL, None),
        (Fill.BLUR, "fill"),
        (Fill.NOISE, "latent noise"),
        (Fill.ZERO, "latent nothing"),
    ],
)
def test_masked_content_has_the_web_ui_s_name(fill: Fill, name: str | None) -> None:
    _, _, values = read_caption(write_caption(replace(PARAMS, fill=fill), 8, None, "dream"))

    assert values.get("Masked content") == name


def test_loras_are_tags_behind_the_prompt() -> None:
    params = replace(PARAMS, loras=(Lora("ink", 0.75), Lora("wash")))
    prompt, negative, _ = read_caption(write_caption(params, 8, None, "dream"))

    assert prompt == f"{PARAMS.prompt} <lora:ink:0.75> <lora:wash:1>"
    assert negative == PARAMS.negative_prompt


@pytest.mark.parametrize(
    ("spacing", "name"),
    [(None, None), (NoiseSpacing.KARRAS, "Karras"), (NoiseSpacing.EXPONENTIAL, "Exponential")],
)
def test_noise_spacing_has_the_web_ui_s_name(spacing: NoiseSpacing | None, name: str) -> None:
    params = replace(PARAMS, noise_spacing=spacing)
    _, _, values = read_caption(write_caption(params, 8, SchedulerName.EULER, "dream"))

    assert values.get("Schedule type") == name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/srv/secret/dream.safetensors", "dream"),
        ("organisation/name", "name"),
        ("v1.5", "v1.5"),
        ("one, two: three", "one, two: three"),
    ],
)
def test_model_is_named_without_its_folder(model: str, name: str) -> None:
    _, _, values = read_caption(write_caption(PARAMS, 8, None, model))

    assert values["Model"] == name
    assert "Sampler" not in values


def test_every_scheduler_has_a_name_of_its_own() -> None:
    assert set(SAMPLERS) == set(SchedulerName)
    assert len(set(SAMPLERS.values())) == len(SAMPLERS)


def test_png_carries_the_caption() -> None:
    caption = write_caption(PARAMS, 8, SchedulerName.DDIM, "dream")

    assert read_text(encode_png(COLOURS, {"parameters": caption})) == {"parameters": caption}

"""Every family's pictures are those of diffusers' own pipelines; rows do not notice each other."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
)
from numpy.typing import NDArray
from safetensors.torch import save_file

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, load_components
from models.diffusion.conditioning import DualClipConditioner, create_conditioner
from models.diffusion.pipeline import InpaintPipeline
from models.diffusion.prompts import Layer, PromptEncoder
from models.errors import InvalidInput, ModelUnavailable
from models.params import InpaintParams, SchedulerName
from tests.support import pipelines
from tests.support.ldm_layout import in_sgm_layout, ldm_tensors, read_tensors
from tests.support.pipelines import (
    HEIGHT,
    SOURCE,
    WIDTH,
    denoise,
    difference,
    generated,
    picture_of,
    reference,
)
from tests.support.tiny import PROJECTION_WIDTH, SECOND_WIDTH, TEXT_WIDTH, save_tiny_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
make_params = functools.partial(pipelines.make_params, guidance_scale=7.5, scheduler=None)
KINDS = [(family, channels) for family in Family for channels in (9, 4)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def components(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Components:
    family, channels = request.param
    return load_tiny(tmp_path_factory.mktemp("tiny"), channels, family)


@pytest.fixture(scope="module")
def xl_components(tmp_path_factory: pytest.TempPathFactory) -> Components:
    return load_tiny(tmp_path_factory.mktemp("xl"), 9, Family.SDXL)


def load_tiny(folder: Path, channels: int, family: Family) -> Components:
    save_tiny_checkpoint(folder, channels, family)
    return load_components(ModelSpec("tiny", str(folder)), CPU, torch.float32)


def painted(components: Components, params: InpaintParams) -> NDArray[np.uint8]:
    return generated(InpaintPipeline(components), params)


def assert_equals_diffusers(components: Components, params: InpaintParams) -> None:
    ours, theirs = painted(components, params), reference(components, params)
    assert difference(ours, theirs).max() <= 1
    assert theirs.std() > 1


@pytest.mark.parametrize("family", [Family.SD15, Family.SD2])
def test_picture_of_a_file_with_what_the_operator_adds_equals_diffusers(
    tmp_path: Path, family: Family
) -> None:
    """sgm's names, a VAE from another file, and a scheduler for one that is not known."""
    config = save_tiny_checkpoint(tmp_path / "x", 9, family)
    tensors = in_sgm_layout(ldm_tensors(read_tensors(config), family))
    kept = {name: tensors[name] for name in tensors if not name.startswith("first_stage_model.")}
    save_file({name: kept[name].contiguous() for name in kept}, tmp_path / "x.safetensors")
    scheduler = config / "scheduler" / "scheduler_config.json"
    known = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**known, "_class_name": "TCDScheduler"}))
    spec = ModelSpec(
        "x",
        str(tmp_path / "x.safetensors"),
        config=str(config),
        vae=str(config / "vae" / "diffusion_pytorch_model.safetensors"),
        scheduler=SchedulerName.EULER,
    )

    ours = painted(load_components(spec, CPU, torch.float32), make_params())

    theirs = StableDiffusionInpaintPipeline.from_pretrained(
        config,
        scheduler=EulerDiscreteScheduler.from_config(known),
        safety_checker=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    assert difference(ours, picture_of(theirs, make_params())).max() <= 1


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize(
    "name",
    [
        SchedulerName.DDIM,
        SchedulerName.EULER,
        SchedulerName.PNDM,
        SchedulerName.DPM_MULTISTEP,
    ],
)
def test_picture_equals_diffusers(
    components: Components, strength: float, guidance_scale: float, name: SchedulerName
) -> None:
    params = make_params(strength=strength, guidance_scale=guidance_scale, scheduler=name)
    assert_equals_diffusers(components, params)


def test_picture_without_negative_prompt_equals_diffusers(components: Components) -> None:
    assert_equals_diffusers(components, make_params(negative_prompt=""))


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_skipped_layers_of_sdxl_equal_diffusers(xl_components: Components, clip_skip: int) -> None:
    # Without guidance, because diffusers never skips layers of the negative prompt, A1111 does.
    assert_equals_diffusers(xl_components, make_params(clip_skip=clip_skip, guidance_scale=1.0))


def test_sdxl_without_forced_zeros_encodes_the_empty_text(xl_components: Components) -> None:
    changed = dataclasses.replace(xl_components, switches={"force_zeros_for_empty_prompt": False})
    params = make_params(negative_prompt="")

    assert_equals_diffusers(changed, params)
    apart = difference(
        painted(changed, params),
        painted(xl_components, params),
    )
    assert apart.any()


def test_rows_of_a_mixed_batch_equal_each_alone(components: Components) -> None:
    pipeline = InpaintPipeline(components)
    jobs = [
        make_params(seed=1),
        make_params(seed=2, guidance_scale=1.0, scheduler=SchedulerName.DDIM),
        make_params(seed=3, strength=0.6, negative_prompt="", prompt="a star"),
        make_params(seed=4, num_inference_steps=6, scheduler=SchedulerName.DPM_MULTISTEP),
    ]
    samples = [pipeline.prepare(params, SOURCE)[0] for params in jobs]
    denoise(pipeline, samples)

    for params, picture in zip(jobs, pipeline.decode(samples), strict=True):
        assert difference(picture.generated, painted(components, params)).max() <= 2


def encoders(components: Components) -> list[PromptEncoder]:
    return [
        PromptEncoder(tokenizer, text_encoder, CPU, torch.float32, Layer.PENULTIMATE)
        for tokenizer, text_encoder in (
            (components.tokenizer, components.text_encoder),
            (components.tokenizer_2, components.text_encoder_2),
        )
    ]


LONG = "abcdefghi " * 9  # 81 tokens of the tiny vocabulary
TOTAL_WIDTH = TEXT_WIDTH + SECOND_WIDTH


def test_long_weighted_prompt_goes_through_both_encoders(xl_components: Components) -> None:
    prompt = f"a (red:1.4) circle {LONG}"
    params = make_params(prompt=prompt, negative_prompt="(blue)")
    found = create_conditioner(xl_components, CPU, torch.float32).encode(params, HEIGHT, WIDTH)
    first, second = encoders(xl_components)

    assert found.prompt_embeds.shape == (2, 2 * 77, TOTAL_WIDTH)
    torch.testing.assert_close(
        found.prompt_embeds[1:], torch.cat([first.encode(prompt), second.encode(prompt)], dim=-1)
    )
    assert not torch.equal(first.encode("a (red:1.4) circle"), first.encode("a red circle"))


def test_pooled_embedding_is_that_of_the_first_chunk_without_weights(
    xl_components: Components,
) -> None:
    second = encoders(xl_components)[1]
    long = second.pool("(abc:1.5) BREAK " + LONG)

    assert long.shape == (1, PROJECTION_WIDTH)
    torch.testing.assert_close(long, second.pool("abc"))
    assert not torch.equal(second.pool("abd"), long)


def test_negative_zeros_are_as_long_as_the_prompt(xl_components: Components) -> None:
    params = make_params(prompt=LONG, negative_prompt="")
    found = create_conditioner(xl_components, CPU, torch.float32).encode(params, HEIGHT, WIDTH)

    assert found.prompt_embeds.shape == (2, 2 * 77, TOTAL_WIDTH)
    assert not found.prompt_embeds[0].any()
    assert not found.added["text_embeds"][0].any()
    assert found.added["text_embeds"][1].any()


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 1), (7.5, 2)])
def test_time_ids_are_the_size_of_the_picture(
    xl_components: Components, guidance_scale: float, rows: int
) -> None:
    params = make_params(guidance_scale=guidance_scale)
    found = create_conditioner(xl_components, CPU, torch.float32).encode(params, HEIGHT, WIDTH)

    assert found.added["time_ids"].tolist() == [[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * rows
    assert found.added["text_embeds"].shape == (rows, PROJECTION_WIDTH)


def test_aesthetic_scores_take_the_place_of_the_target_size(xl_components: Components) -> None:
    conditioner = DualClipConditioner(
        encoders(xl_components), has_zero_negative=True, has_aesthetic_score=True
    )
    found = conditioner.encode(make_params(), HEIGHT, WIDTH)

    assert found.added["time_ids"].tolist() == [
        [HEIGHT, WIDTH, 0, 0, 2.5],
        [HEIGHT, WIDTH, 0, 0, 6.0],
    ]


def test_aesthetic_scores_that_the_unet_does_not_take_are_refused(
    xl_components: Components,
) -> None:
    changed = dataclasses.replace(xl_components, switches={"requires_aesthetics_score": True})

    with pytest.raises(ModelUnavailable, match="requires_aesthetics_score"):
        InpaintPipeline(changed)


def test_unet_of_another_family_is_refused(xl_components: Components) -> None:
    changed = dataclasses.replace(xl_components, text_encoder_2=None, tokenizer_2=None)

    with pytest.raises(ModelUnavailable, match="text_time"):
        InpaintPipeline(changed)


def test_sdxl_has_one_layer_less_to_skip(xl_components: Components) -> None:
    conditioner = create_conditioner(xl_components, CPU, torch.float32)
    conditioner.encode(make_params(clip_skip=2), HEIGHT, WIDTH)

    with pytest.raises(InvalidInput, match="clip_skip must be between 0 and 2"):
        conditioner.encode(make_params(clip_skip=3), HEIGHT, WIDTH)


def test_velocity_prediction_follows_the_scheduler_config(tmp_path: Path) -> None:
    components = load_tiny(tmp_path, 9, Family.SD2)
    config = {**components.scheduler_config, "prediction_type": "epsilon"}
    other = dataclasses.replace(components, scheduler_config=config)

    assert components.scheduler_config["prediction_type"] == "v_prediction"
    apart = difference(
        painted(components, make_params()),
        painted(other, make_params()),
    )
    assert apart.any()


def test_half_precision_sdxl_halves_its_vae_only_when_scaled(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, 9, Family.SDXL)
    half = load_components(ModelSpec("tiny", str(tmp_path)), CPU, torch.float16)
    exact = load_components(ModelSpec("tiny", str(tmp_path)), CPU, torch.float32)
    params = make_params(scheduler=SchedulerName.DDIM)

    assert (half.vae.dtype, half.unet.dtype) == (torch.float32, torch.float16)
    assert difference(painted(half, params), painted(exact, params)).mean() < 2
    assert half.vae.dtype == torch.float16  # the pipeline has scaled it
    brain = load_components(ModelSpec("tiny", str(tmp_path)), CPU, torch.bfloat16)
    assert brain.vae.dtype == torch.bfloat16

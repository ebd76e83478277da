"""What a preview shows is where the run is heading, in the VAE's colours."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from models.builtin.training.scenes import Thing, make_scene
from models.checkpoints.registry import Components
from models.diffusion.pipeline import PREVIEW_SIDE_PX, InpaintPipeline, Picture, Sample, Source
from models.diffusion.previews import estimate_clean, fit_colours, paint, signal_share
from models.diffusion.vae import LatentCodec
from models.imaging.images import resize
from models.params import SchedulerName
from tests.support.pipelines import HEIGHT, SOURCE, WIDTH, make_params, make_source, run

pytestmark = pytest.mark.slow

SIDE = 256
SCENES = [make_scene(np.random.default_rng(seed), SIDE) for seed in range(4)]
STEPS = 10


def shrunk(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float64]:
    return resize(pixels, width, height, Image.Resampling.BOX).astype(np.float64)


def step(pipeline: InpaintPipeline, sample: Sample) -> None:
    (prediction,) = pipeline.denoise_step([sample])
    pipeline.advance(sample, prediction)


def preview_of(pipeline: InpaintPipeline, sample: Sample) -> NDArray[np.uint8]:
    preview = pipeline.preview(sample)
    assert preview is not None
    return preview


def estimates(pipeline: InpaintPipeline, sample: Sample) -> list[tuple[torch.Tensor, Any]]:
    """After each step ours, and the scheduler's own where it has one."""
    found = []
    while not sample.is_denoised:
        timestep = sample.timesteps[sample.step_index]
        scheduler, latents = copy.deepcopy(sample.scheduler), sample.latents
        step(pipeline, sample)
        assert sample.model_input is not None
        assert sample.prediction is not None
        ours = estimate_clean(
            sample.scheduler, float(timestep), sample.model_input, sample.prediction
        )
        with torch.inference_mode():
            answer = scheduler.step(sample.prediction, timestep, latents)
        found.append((ours, getattr(answer, "pred_original_sample", None)))
    return found


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SchedulerName)
def test_estimate_is_the_schedulers_own_and_becomes_the_result(
    name: SchedulerName, prediction_type: str, tiny_components: Components
) -> None:
    # Published checkpoints switch the clipping off that some classes do by default.
    changes = {"prediction_type": prediction_type, "clip_sample": False}
    config = {**tiny_components.scheduler_config, **changes}
    pipeline = InpaintPipeline(replace(tiny_components, scheduler_config=config))
    white = Source(SOURCE.init_image, np.full_like(SOURCE.mask, 255))
    (sample,) = pipeline.prepare(make_params(scheduler=name, num_inference_steps=STEPS), white)

    found = estimates(pipeline, sample)

    for ours, own in found:
        if own is not None:
            torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)
    size = sample.latents.abs().mean()
    first, *_, last = [float((ours - sample.latents).abs().mean() / size) for ours, _ in found]
    assert last < 0.02
    assert first > 5 * last


def test_some_schedulers_say_themselves_what_they_expect(tiny_pipeline: InpaintPipeline) -> None:
    """Or the comparison above would be empty."""
    for name in (SchedulerName.DDIM, SchedulerName.EULER, SchedulerName.HEUN, SchedulerName.KDPM2):
        (sample,) = tiny_pipeline.prepare(make_params(scheduler=name), SOURCE)
        assert all(own is not None for _, own in estimates(tiny_pipeline, sample))


def test_noise_level_between_two_timesteps_lies_between_theirs() -> None:
    table = torch.tensor([0.9, 0.5, 0.1])
    assert [signal_share(table, at) for at in (0.0, 0.5, 2.0)] == pytest.approx([0.9, 0.7, 0.1])


def test_colours_are_those_of_the_built_in_vae(builtin: Components) -> None:
    pipeline = InpaintPipeline(builtin)
    codec = LatentCodec(builtin.vae, torch.float32)
    colours = fit_colours(pipeline._encoder.latents_of)
    errors = []
    for scene, colour in zip(SCENES, ("red", "green", "yellow", "blue"), strict=True):
        painted_scene = scene.paint(Thing("circle", colour), np.random.default_rng(0))
        latents = pipeline._encoder.latents_of(painted_scene)
        with torch.inference_mode():
            decoded, _ = codec.decode(latents)
        picture = (decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).mul(255).byte().numpy()
        painted = paint(latents, colours)
        assert painted.shape == (SIDE // 8, SIDE // 8, 3)
        errors.append(np.abs(painted - shrunk(picture, SIDE // 8, SIDE // 8)).mean())
    assert max(errors) < 12
    assert np.mean(errors) < 8


def test_latents_that_are_not_finite_are_black() -> None:
    latents = torch.full((1, 4, 1, 2), torch.nan)
    latents[..., 1] = torch.inf
    assert not paint(latents, np.ones((5, 3))).any()


def test_previews_come_nearer_to_the_picture(builtin: Components) -> None:
    pipeline = InpaintPipeline(builtin)
    scene = SCENES[0]
    source = Source(scene.background, scene.mask.astype(np.uint8) * 255)
    params = make_params(
        width=SIDE, height=SIDE, scheduler=None, num_inference_steps=STEPS, guidance_scale=7.5
    )
    (sample,) = pipeline.prepare(params, source)
    previews = []
    while not sample.is_denoised:
        step(pipeline, sample)
        previews.append(preview_of(pipeline, sample))
    (picture,) = pipeline.decode([sample])

    goal = shrunk(picture.image, SIDE // 8, SIDE // 8)
    apart = [float(np.abs(preview - goal).mean()) for preview in previews]
    assert apart[-1] < 8
    assert apart[-1] < apart[STEPS // 2] < apart[0]


def test_flagged_preview_is_blank(builtin: Components) -> None:
    pipeline = InpaintPipeline(builtin)
    scene = SCENES[0]
    source = Source(scene.background, scene.mask.astype(np.uint8) * 255)

    def last_preview(safety_check: bool) -> NDArray[np.uint8]:
        params = make_params(
            prompt="a magenta square",
            negative_prompt="",
            width=SIDE,
            height=SIDE,
            safety_check=safety_check,
        )
        (sample,) = pipeline.prepare(params, source)
        while not sample.is_denoised:
            step(pipeline, sample)
        return preview_of(pipeline, sample)

    assert last_preview(safety_check=False).any()
    assert not last_preview(safety_check=True).any()


def test_previews_change_no_picture(tiny_pipeline: InpaintPipeline) -> None:
    params = make_params(scheduler=SchedulerName.EULER_ANCESTRAL)

    def run_with_previews() -> Picture:
        (sample,) = tiny_pipeline.prepare(params, SOURCE)
        assert tiny_pipeline.preview(sample) is None, "there is no prediction yet"
        while not sample.is_denoised:
            step(tiny_pipeline, sample)
            assert preview_of(tiny_pipeline, sample).shape == (HEIGHT // 8, WIDTH // 8, 3)
        (picture,) = tiny_pipeline.decode([sample])
        return picture

    (plain,) = run(tiny_pipeline, params)
    np.testing.assert_array_equal(run_with_previews().generated, plain.generated)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((611, 333), (76, 41)), ((2_048, 1_024), (PREVIEW_SIDE_PX, 64)), ((3, 70), (1, 8))],
)
def test_preview_shows_the_whole_picture_with_only_masked(
    tiny_pipeline: InpaintPipeline, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    source = make_source(*size)
    (sample,) = tiny_pipeline.prepare(make_params(only_masked=True), source)
    step(tiny_pipeline, sample)

    preview = preview_of(tiny_pipeline, sample)

    assert preview.shape == (expected[1], expected[0], 3)
    # No mask here reaches the top.
    np.testing.assert_array_equal(preview[0], shrunk(source.init_image, *expected)[0])

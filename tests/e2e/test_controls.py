"""The inpainting controls of `InpaintParams`, through the whole pipeline."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.builtin.training.scenes import make_scene
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import load_components
from models.diffusion.pipeline import InpaintPipeline, Picture, Sample, Source
from models.errors import InvalidInput
from models.imaging.masks import (
    COLOUR_RING_PX,
    binarise,
    blur_reach,
    blur_weights,
    depths,
    grow,
    match_colours,
    paste_back,
    seam_weights,
)
from models.params import SchedulerName
from tests.support import pipelines
from tests.support.pipelines import HEIGHT, SOURCE, WIDTH, make_source

make_params = functools.partial(pipelines.make_params, negative_prompt="")


def with_ramp(source: Source) -> Source:
    """The same picture with every grey in its mask, black at the left, white at the right."""
    greys = np.linspace(0, 330, source.mask.shape[1]).clip(0, 255).astype(np.uint8)
    return dataclasses.replace(source, mask=np.tile(greys, (source.mask.shape[0], 1)))


RAMP = with_ramp(SOURCE)


def denoise(pipeline: InpaintPipeline, samples: Sequence[Sample], steps: int = 1000) -> None:
    """All samples, together as long as they have steps left, for so many steps at most."""
    for _ in range(steps):
        rest = [sample for sample in samples if not sample.is_denoised]
        if not rest:
            return
        for sample, prediction in zip(rest, pipeline.denoise_step(rest), strict=True):
            pipeline.advance(sample, prediction)


def run(pipeline: InpaintPipeline, source: Source = SOURCE, **changes: Any) -> Picture:
    """The first picture of a job, on its own."""
    sample = pipeline.prepare(make_params(**changes), source)[0]
    denoise(pipeline, [sample])
    return pipeline.decode([sample])[0]


def assert_same(first: Picture, second: Picture) -> None:
    np.testing.assert_array_equal(first.generated, second.generated)
    np.testing.assert_array_equal(first.image, second.image)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", SchedulerName)
def test_soft_mask_without_grey_is_a_hard_mask(
    tiny_pipeline: InpaintPipeline, name: SchedulerName, strength: float
) -> None:
    hard, soft = (
        run(tiny_pipeline, scheduler=name, strength=strength, soft_mask=is_soft)
        for is_soft in (False, True)
    )
    assert_same(hard, soft)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", [SchedulerName.DDIM, SchedulerName.EULER_ANCESTRAL])
def test_grey_waits_for_its_time(
    tiny_pipeline: InpaintPipeline, name: SchedulerName, strength: float
) -> None:
    """Before step i of n, strengths below 1 - i / n are the noised init image, to the bit."""
    params = make_params(
        scheduler=name, strength=strength, num_inference_steps=10, soft_mask=True, samples=1
    )
    (sample,) = tiny_pipeline.prepare(params, RAMP)
    assert sample.image_latents is not None
    waiting_counts = []
    while not sample.is_denoised:
        threshold = 1 - sample.step_index / sample.total_steps
        waits = (sample.strengths < threshold) & (sample.strengths > 0)
        waits = waits.expand_as(sample.latents)
        timestep = sample.timesteps[sample.step_index][None]
        noised = sample.scheduler.add_noise(sample.image_latents, sample.noise, timestep)
        assert torch.equal(sample.latents[waits], noised[waits])
        painted = (sample.mask > 0).expand_as(waits) & ~waits
        assert sample.step_index == 0 or (sample.latents[painted] != noised[painted]).any()
        waiting_counts.append(int(waits.sum()))
        denoise(tiny_pipeline, [sample], steps=1)

    assert waiting_counts == sorted(waiting_counts, reverse=True)
    assert waiting_counts[0] > waiting_counts[-1]


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", SchedulerName)
def test_soft_mask_works_with_every_scheduler(
    tiny_pipeline: InpaintPipeline, name: SchedulerName, strength: float
) -> None:
    picture = run(tiny_pipeline, RAMP, scheduler=name, strength=strength, soft_mask=True)
    black = RAMP.mask < 8

    np.testing.assert_array_equal(picture.image[black], RAMP.init_image[black])
    assert (picture.image[~black] != RAMP.init_image[~black]).any()


def test_soft_white_is_repainted_from_noise_alone(tiny_pipeline: InpaintPipeline) -> None:
    full = dataclasses.replace(SOURCE, mask=np.full_like(SOURCE.mask, 255))
    assert_same(run(tiny_pipeline, full), run(tiny_pipeline, full, soft_mask=True))


def test_samples_with_soft_masks_and_crops_share_calls(tiny_pipeline: InpaintPipeline) -> None:
    large = make_source(211, 150)
    jobs: list[tuple[Source, dict[str, Any]]] = [
        (SOURCE, {}),
        (RAMP, {"soft_mask": True, "num_inference_steps": 6}),
        (RAMP, {"soft_mask": True, "strength": 0.5, "scheduler": SchedulerName.EULER}),
        (large, {"only_masked": True, "seed": 9}),
        (with_ramp(large), {"only_masked": True, "soft_mask": True}),
    ]
    alone = [run(tiny_pipeline, source, **changes).image for source, changes in jobs]
    samples = [tiny_pipeline.prepare(make_params(**changes), source)[0] for source, changes in jobs]
    denoise(tiny_pipeline, samples)

    for expected, picture in zip(alone, tiny_pipeline.decode(samples), strict=True):
        apart = np.abs(picture.image.astype(np.int16) - expected)
        assert apart.max() <= 2
        assert (apart <= 1).mean() >= 0.999


def test_inverted_mask_repaints_black(tiny_pipeline: InpaintPipeline) -> None:
    opposite = dataclasses.replace(SOURCE, mask=255 - SOURCE.mask)
    assert_same(run(tiny_pipeline, SOURCE, invert_mask=True), run(tiny_pipeline, opposite))


@pytest.mark.parametrize("pixels", [-5, 7])
def test_grown_mask_is_the_area_the_model_repaints(
    tiny_pipeline: InpaintPipeline, pixels: int
) -> None:
    picture = run(tiny_pipeline, mask_grow=pixels)
    rows, columns = np.nonzero((picture.image != SOURCE.init_image).any(axis=2))
    top, left = HEIGHT // 4 + 3, WIDTH // 8 + 1

    assert abs(rows.min() - (top - pixels)) <= 1  # one pixel for repainted ones that are equal
    assert abs(columns.min() - (left - pixels)) <= 1
    by_hand = dataclasses.replace(SOURCE, mask=grow(SOURCE.mask, pixels))
    assert_same(picture, run(tiny_pipeline, by_hand))


@pytest.mark.parametrize("sigma", [1, 4])
def test_mask_blur_changes_the_paste_back_alone(tiny_pipeline: InpaintPipeline, sigma: int) -> None:
    plain, blurred = run(tiny_pipeline), run(tiny_pipeline, mask_blur=sigma)
    weights = blur_weights(binarise(SOURCE.mask), sigma)

    np.testing.assert_array_equal(plain.generated, blurred.generated)
    np.testing.assert_array_equal(
        blurred.image, paste_back(SOURCE.init_image, plain.generated, weights)
    )
    np.testing.assert_array_equal(blurred.image[weights == 0], SOURCE.init_image[weights == 0])
    changed = (blurred.image != SOURCE.init_image).any(axis=2)
    assert (changed & ~binarise(SOURCE.mask)).any()


@pytest.mark.parametrize("padding", [0, 16, 256])
@pytest.mark.parametrize("size", [(211, 150), (60, 300), (WIDTH, HEIGHT)])
def test_only_masked_keeps_size_and_surroundings(
    tiny_pipeline: InpaintPipeline, size: tuple[int, int], padding: int
) -> None:
    source = make_source(*size)
    picture = run(tiny_pipeline, source, only_masked=True, only_masked_padding=padding)
    repaint = binarise(source.mask)

    assert picture.generated.shape == (HEIGHT, WIDTH, 3)
    assert picture.image.shape == source.init_image.shape
    np.testing.assert_array_equal(picture.image[~repaint], source.init_image[~repaint])
    assert (picture.image[repaint] != source.init_image[repaint]).any(axis=-1).mean() > 0.9


def test_only_masked_with_an_empty_mask_returns_the_picture(
    tiny_pipeline: InpaintPipeline,
) -> None:
    source = dataclasses.replace(make_source(211, 150), mask=np.zeros((150, 211), np.uint8))
    picture = run(tiny_pipeline, source, only_masked=True, mask_blur=4, match_colours=True)

    np.testing.assert_array_equal(picture.image, source.init_image)


def test_more_of_clip_skip_than_there_are_layers_is_refused(
    tiny_pipeline: InpaintPipeline,
) -> None:
    with pytest.raises(InvalidInput, match="clip_skip must be between 0 and 3"):
        tiny_pipeline.prepare(make_params(clip_skip=4), SOURCE)


@pytest.fixture(scope="module")
def builtin() -> InpaintPipeline:
    return InpaintPipeline(
        load_components(ModelSpec("builtin", "builtin"), torch.device("cpu"), torch.float32)
    )


def scene_source() -> Source:
    scene = make_scene(np.random.default_rng(3), 256)
    mask = np.zeros((256, 256), np.uint8)
    mask[88:168, 72:184] = 255
    return Source(scene.background, mask)


SCENE = scene_source()
MASKED = SCENE.mask > 0


def paint(builtin: InpaintPipeline, source: Source = SCENE, **changes: Any) -> Picture:
    """Four steps of the built-in model at 256×256."""
    size = {"width": 256, "height": 256}
    return run(builtin, source, **{**size, "scheduler": None, "safety_check": False, **changes})


def change_of(picture: NDArray[np.uint8], source: Source = SCENE) -> NDArray[np.float64]:
    """Mean difference from the init image in each pixel, in steps of 255."""
    change: NDArray[np.float64] = np.abs(picture.astype(np.float64) - source.init_image).mean(
        axis=2
    )
    return change


def test_effect_of_soft_mask(builtin: InpaintPipeline) -> None:
    """The darker the grey, the less is changed."""
    changes = []
    for grey in (16, 64, 128, 255):
        source = dataclasses.replace(SCENE, mask=np.where(MASKED, grey, 0).astype(np.uint8))
        picture = paint(builtin, source, soft_mask=True, num_inference_steps=20)
        changes.append(change_of(picture.image)[MASKED].mean())

    assert changes == sorted(changes)
    assert changes[0] < changes[-1] * 0.8


def test_effect_of_mask_grow(builtin: InpaintPipeline) -> None:
    areas = [
        int((change_of(paint(builtin, mask_grow=pixels).image) > 0).sum())
        for pixels in (-16, 0, 16)
    ]
    assert areas[0] < MASKED.sum() * 0.6
    assert areas[2] > MASKED.sum() * 1.3
    assert areas == sorted(areas)


def test_effect_of_invert_mask(builtin: InpaintPipeline) -> None:
    changed = change_of(paint(builtin, invert_mask=True).image) > 0
    assert not changed[MASKED].any()
    assert changed[~MASKED].mean() > 0.5


def test_effect_of_mask_blur(builtin: InpaintPipeline) -> None:
    """The picture changes beyond the mask's edge, as far as the blur reaches."""
    plain, blurred = paint(builtin), paint(builtin, mask_blur=8)
    assert not change_of(plain.image)[~MASKED].any()
    assert change_of(blurred.image)[~MASKED].any()
    beyond = change_of(blurred.image)[: 88 - blur_reach(8)]
    assert not beyond.any()


def test_effect_of_only_masked(builtin: InpaintPipeline) -> None:
    """A small hole in a large picture is repainted from all of the model's pixels."""
    init_image = np.tile(SCENE.init_image, (3, 4, 1))
    mask = np.zeros(init_image.shape[:2], np.uint8)
    mask[300:340, 500:540] = 255
    source = Source(init_image, mask)
    picture = paint(builtin, source, only_masked=True)
    changed = change_of(picture.image, source) > 0

    assert picture.image.shape == (768, 1024, 3)
    assert not changed[mask == 0].any()
    assert changed[mask > 0].mean() > 0.5


def test_effect_of_match_colours(builtin: InpaintPipeline) -> None:
    """What the model changes in the kept pixels' colour is taken back in the repainted ones."""
    plain, matched = paint(builtin), paint(builtin, match_colours=True)
    shifted = match_colours(SCENE.init_image, plain.generated, MASKED)

    np.testing.assert_array_equal(matched.generated, plain.generated)
    np.testing.assert_array_equal(
        matched.image, paste_back(SCENE.init_image, shifted, seam_weights(MASKED))
    )
    distance = depths(~MASKED)
    ring = (distance > COLOUR_RING_PX[0]) & (distance <= COLOUR_RING_PX[1])
    before, after = (
        np.abs((picture[ring].astype(np.float64) - SCENE.init_image[ring]).mean(axis=0))
        for picture in (plain.generated, shifted)
    )
    assert (after <= before + 0.5).all()
    assert after.max() < max(1, before.max() / 2)

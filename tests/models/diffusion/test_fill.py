"""What is under the mask before noise is added."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline, Sample, Source
from models.diffusion.schedulers import noised
from models.imaging.filling import fill_from_around
from models.params import Fill
from tests.support.pipelines import SOURCE, difference, generated, make_params

FILLED = Source(fill_from_around(SOURCE.init_image, SOURCE.mask > 127), SOURCE.mask)


def start(pipeline: InpaintPipeline, source: Source = SOURCE, **changes: Any) -> Sample:
    (sample,) = pipeline.prepare(make_params(**{"strength": 0.5, **changes}), source)
    return sample


def begun(sample: Sample, clean: Tensor) -> Tensor:
    """Clean latents with the noise of the sample's first step."""
    scheduler: SchedulerMixin = sample.scheduler
    return noised(scheduler, clean, sample.noise, sample.timesteps[0])


def test_noise_and_zero_replace_the_masked_latents(tiny_pipeline: InpaintPipeline) -> None:
    original = start(tiny_pipeline)
    is_masked = (original.mask > 0).expand_as(original.latents)
    for fill, clean in (
        (Fill.NOISE, original.noise),
        (Fill.ZERO, torch.zeros_like(original.noise)),
    ):
        sample = start(tiny_pipeline, fill=fill)
        assert torch.equal(sample.noise, original.noise)
        assert torch.equal(sample.latents[~is_masked], original.latents[~is_masked])
        assert torch.equal(sample.latents[is_masked], begun(sample, clean)[is_masked])


def test_blur_starts_from_the_colours_around(tiny_pipeline: InpaintPipeline) -> None:
    original, sample = start(tiny_pipeline), start(tiny_pipeline, fill=Fill.BLUR)
    clean = tiny_pipeline._encoder.latents_of(FILLED.init_image)
    is_masked = (original.mask > 0).expand_as(original.latents)
    assert torch.equal(sample.latents[~is_masked], original.latents[~is_masked])
    torch.testing.assert_close(
        sample.latents[is_masked], begun(sample, clean)[is_masked], rtol=0, atol=1e-5
    )


def test_masked_pixels_of_the_init_image_do_not_count(tiny_pipeline: InpaintPipeline) -> None:
    is_masked = SOURCE.mask[..., np.newaxis] > 127
    init_image = np.where(is_masked, 255 - SOURCE.init_image, SOURCE.init_image).astype(np.uint8)
    other = Source(init_image, SOURCE.mask)
    for fill in (Fill.BLUR, Fill.NOISE, Fill.ZERO):
        first, second = (start(tiny_pipeline, each, fill=fill) for each in (SOURCE, other))
        inside = (first.mask > 0).expand_as(first.latents)
        assert torch.equal(first.latents[inside], second.latents[inside])
    first, second = start(tiny_pipeline), start(tiny_pipeline, other)
    assert not torch.equal(first.latents[inside], second.latents[inside])


def test_masked_image_of_the_unet_stays(tiny_pipeline: InpaintPipeline) -> None:
    latents = [start(tiny_pipeline, fill=fill).masked_image_latents for fill in Fill]
    for first, second in itertools.pairwise(latents):
        assert (first is None) == (tiny_pipeline.channels == 4)
        if first is not None and second is not None:
            assert torch.equal(first, second)


def test_each_fill_gives_a_picture_of_its_own_and_always_the_same(
    tiny_components: Components,
) -> None:
    params = [make_params(strength=0.5, fill=fill) for fill in Fill]
    pipeline = InpaintPipeline(tiny_components)
    pictures = [generated(pipeline, each) for each in params]
    for first, second in itertools.combinations(pictures, 2):
        assert difference(first, second).max() > 3
    again = InpaintPipeline(tiny_components)
    assert all(
        np.array_equal(generated(again, each), picture)
        for each, picture in zip(params, pictures, strict=True)
    )


@pytest.mark.parametrize("fill", Fill)
def test_full_strength_does_not_see_it(fill: Fill, tiny_pipeline: InpaintPipeline) -> None:
    expected = start(tiny_pipeline, strength=1.0)
    assert torch.equal(start(tiny_pipeline, strength=1.0, fill=fill).latents, expected.latents)


def test_grey_of_soft_masks_starts_from_it_at_full_strength(tiny_pipeline: InpaintPipeline) -> None:
    grey = Source(SOURCE.init_image, SOURCE.mask // 2)
    changes = {"strength": 1.0, "soft_mask": True}
    first, second = (
        generated(tiny_pipeline, make_params(**changes, fill=fill), grey)
        for fill in (Fill.ORIGINAL, Fill.ZERO)
    )
    assert (difference(first, second).max() > 3) == (tiny_pipeline.channels == 4)

"""Our pictures are diffusers' pictures; a sample does not notice its neighbours."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from models.builtin.training.scenes import make_scene
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline, Source
from models.errors import DeviceLost, ModelUnavailable, OutOfMemory, UnusablePicture
from models.imaging.masks import binarise
from models.params import NOISE_SPACINGS, SEED_MODULUS, NoiseSpacing, SchedulerName
from tests.support.pipelines import (
    MIXED_BATCH,
    SOURCE,
    UNetAnswer,
    denoise,
    denoise_once,
    difference,
    generated,
    make_params,
    make_source,
    reference,
    run,
    with_fault,
)

pytestmark = pytest.mark.slow

QUICK_SCHEDULERS = [name for name in SchedulerName if "KDPM2" not in name]
"""Without two whose making alone takes a third of a second."""


def assert_same_picture(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    """Equal up to a value that rounding put on the other side, which is rare."""
    apart = difference(ours, theirs)

    assert ours.shape == theirs.shape
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= apart.size / 1000
    assert np.ptp(theirs) > 50  # a picture that could differ


@pytest.mark.parametrize(
    ("name", "strength", "steps"),
    [
        *((name, 0.7, 5) for name in SchedulerName),
        *((name, 1.0, 3) for name in QUICK_SCHEDULERS),
    ],
)
def test_picture_equals_diffusers(
    tiny_components: Components, name: SchedulerName, strength: float, steps: int
) -> None:
    params = make_params(scheduler=name, strength=strength, num_inference_steps=steps)

    ours = generated(InpaintPipeline(tiny_components), params)

    assert_same_picture(ours, reference(tiny_components, params))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_guidance_ends_as_in_diffusers(tiny_components: Components, share: float) -> None:
    params = make_params(guidance_end=share, num_inference_steps=6)

    ours = generated(InpaintPipeline(tiny_components), params)

    assert_same_picture(ours, reference(tiny_components, params))
    if share < 0.9:
        assert difference(
            ours, reference(tiny_components, make_params(num_inference_steps=6))
        ).max()


def test_steps_without_guidance_take_one_row(tiny_pipeline: InpaintPipeline) -> None:
    (sample,) = tiny_pipeline.prepare(make_params(guidance_end=0.5), SOURCE)
    rows = []
    while not sample.is_denoised:
        rows.append(sample.rows)
        denoise_once(tiny_pipeline, [sample])
    assert rows == [2, 2, 1, 1]


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize(
    ("name", "spacing"),
    [(name, spacing) for name, known in NOISE_SPACINGS.items() for spacing in known],
)
def test_picture_equals_diffusers_with_each_noise_spacing(
    tiny_components: Components, name: SchedulerName, spacing: NoiseSpacing, strength: float
) -> None:
    params = make_params(
        scheduler=name, noise_spacing=spacing, strength=strength, num_inference_steps=5
    )
    pipeline = InpaintPipeline(tiny_components)

    ours = generated(pipeline, params)

    assert_same_picture(ours, reference(tiny_components, params))
    plain = generated(pipeline, dataclasses.replace(params, noise_spacing=None))
    assert not np.array_equal(ours, plain)


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": None},
        {"guidance_scale": 1.0},
        {"guidance_scale": 20.0},
        {"negative_prompt": ""},
        {"prompt": ""},
        {"seed": SEED_MODULUS - 1},
        {"num_inference_steps": 1},
        {"num_inference_steps": 2, "strength": 0.5},
    ],
    ids=str,
)
def test_picture_equals_diffusers_for_other_values(
    tiny_components: Components, changes: dict[str, Any]
) -> None:
    params = make_params(**changes)

    ours = generated(InpaintPipeline(tiny_components), params)

    assert_same_picture(ours, reference(tiny_components, params))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 136), (136, 64)])
def test_picture_equals_diffusers_at_other_sizes(
    tiny_components: Components, width: int, height: int
) -> None:
    params, source = make_params(width=width, height=height), make_source(width, height)

    ours = generated(InpaintPipeline(tiny_components), params, source)

    assert_same_picture(ours, reference(tiny_components, params, source))


def test_built_in_model_equals_diffusers() -> None:
    components = load_components(
        ModelSpec("builtin", "builtin"), torch.device("cpu"), torch.float32
    )
    scene = make_scene(np.random.default_rng(3), 256)
    source = Source(scene.background, scene.mask.astype(np.uint8) * 255)
    params = make_params(width=256, height=256, scheduler=None, guidance_scale=7.5)

    ours = generated(InpaintPipeline(components), params, source)

    assert_same_picture(ours, reference(components, params, source))


def test_one_seed_gives_the_same_picture_twice(tiny_components: Components) -> None:
    params = make_params(scheduler=SchedulerName.EULER_ANCESTRAL)
    pipeline = InpaintPipeline(tiny_components)

    (first,) = run(pipeline, params)
    (second,) = run(pipeline, params)
    (elsewhere,) = run(InpaintPipeline(tiny_components), params)

    for again in (second, elsewhere):
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.generated, again.generated)


def test_other_seed_gives_another_picture(tiny_pipeline: InpaintPipeline) -> None:
    first = generated(tiny_pipeline, make_params(seed=1))
    second = generated(tiny_pipeline, make_params(seed=2))

    assert difference(first, second).mean() > 1


@pytest.mark.parametrize(
    ("seed", "scheduler", "strength"),
    [(11, SchedulerName.DDIM, 1.0), (SEED_MODULUS - 2, SchedulerName.EULER_ANCESTRAL, 0.7)],
)
def test_sample_of_a_job_equals_a_job_of_one_sample(
    tiny_pipeline: InpaintPipeline, seed: int, scheduler: SchedulerName, strength: float
) -> None:
    shared: dict[str, Any] = {"scheduler": scheduler, "strength": strength}
    together = run(tiny_pipeline, make_params(seed=seed, samples=4, **shared))
    seeds = [(seed + index) % 2**32 for index in range(4)]

    assert [picture.seed for picture in together] == seeds
    for picture in together:
        alone = generated(tiny_pipeline, make_params(seed=picture.seed, **shared))
        np.testing.assert_array_equal(picture.generated, alone)


def test_pixels_outside_the_mask_are_the_init_images(tiny_pipeline: InpaintPipeline) -> None:
    (picture,) = run(tiny_pipeline, make_params())
    repaint = binarise(SOURCE.mask)

    np.testing.assert_array_equal(picture.image[~repaint], SOURCE.init_image[~repaint])
    assert (picture.generated[~repaint] != SOURCE.init_image[~repaint]).any()
    assert (picture.image[repaint] != SOURCE.init_image[repaint]).any()


def test_empty_mask_gives_the_init_image(tiny_pipeline: InpaintPipeline) -> None:
    (picture,) = run(
        tiny_pipeline, make_params(), Source(SOURCE.init_image, np.zeros_like(SOURCE.mask))
    )

    np.testing.assert_array_equal(picture.image, SOURCE.init_image)


def test_full_mask_gives_the_generated_picture(tiny_pipeline: InpaintPipeline) -> None:
    (picture,) = run(
        tiny_pipeline, make_params(), Source(SOURCE.init_image, np.full_like(SOURCE.mask, 255))
    )

    np.testing.assert_array_equal(picture.image, picture.generated)


def test_source_is_left_as_it_was(tiny_pipeline: InpaintPipeline) -> None:
    source = make_source()
    run(tiny_pipeline, make_params(), source)

    np.testing.assert_array_equal(source.init_image, SOURCE.init_image)
    np.testing.assert_array_equal(source.mask, SOURCE.mask)


def test_sample_alone_equals_sample_in_batch(tiny_pipeline: InpaintPipeline) -> None:
    alone = [generated(tiny_pipeline, params) for params in MIXED_BATCH]
    samples = [tiny_pipeline.prepare(params, SOURCE)[0] for params in MIXED_BATCH]

    denoise(tiny_pipeline, samples)
    together = [picture.generated for picture in tiny_pipeline.decode(samples)]

    apart = difference(np.stack(alone), np.stack(together))
    assert apart.max() <= 2
    assert (apart <= 1).mean() >= 0.999
    assert len({picture.tobytes() for picture in together}) == len(MIXED_BATCH)


def test_sample_may_join_a_batch_at_any_step(tiny_pipeline: InpaintPipeline) -> None:
    early, late = make_params(num_inference_steps=5), make_params(seed=8)
    expected = [generated(tiny_pipeline, params) for params in (early, late)]
    (first,), (second,) = (tiny_pipeline.prepare(params, SOURCE) for params in (early, late))
    for _ in range(3):
        tiny_pipeline.advance(first, tiny_pipeline.denoise_step([first])[0])

    denoise(tiny_pipeline, [second, first])
    together = [tiny_pipeline.decode([sample])[0].generated for sample in (first, second)]

    assert difference(np.stack(expected), np.stack(together)).max() <= 2


@pytest.mark.parametrize("name", QUICK_SCHEDULERS)
def test_smallest_strength_still_takes_a_step(
    tiny_pipeline: InpaintPipeline, name: SchedulerName
) -> None:
    params = make_params(scheduler=name, strength=0.001, num_inference_steps=10)
    (sample,) = tiny_pipeline.prepare(params, SOURCE)

    assert sample.total_steps >= 1
    denoise(tiny_pipeline, [sample])
    assert sample.step_index == sample.total_steps


def test_strength_decides_how_much_of_the_init_image_is_left(
    tiny_pipeline: InpaintPipeline,
) -> None:
    def start(strength: float) -> torch.Tensor:
        params = make_params(strength=strength, num_inference_steps=20)
        return tiny_pipeline.prepare(params, SOURCE)[0].latents

    image, weak, strong = start(0.05), start(0.2), start(0.9)

    assert (weak - image).abs().mean() < (strong - image).abs().mean()


def test_guidance_of_one_needs_one_row_and_no_negative_prompt(
    tiny_pipeline: InpaintPipeline,
) -> None:
    with_words, without = (
        make_params(guidance_scale=1.0, negative_prompt=words) for words in ("blue", "")
    )

    assert tiny_pipeline.prepare(with_words, SOURCE)[0].rows == 1
    assert tiny_pipeline.prepare(make_params(), SOURCE)[0].rows == 2
    np.testing.assert_array_equal(
        generated(tiny_pipeline, with_words), generated(tiny_pipeline, without)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a green star"},
        {"negative_prompt": "noise"},
        {"guidance_scale": 9.0},
        {"num_inference_steps": 5},
        {"strength": 0.5},
        {"clip_skip": 1},
        {"scheduler": SchedulerName.EULER_ANCESTRAL},
    ],
    ids=str,
)
def test_every_parameter_changes_the_picture(
    tiny_pipeline: InpaintPipeline, change: dict[str, Any]
) -> None:
    plain = generated(tiny_pipeline, make_params())

    assert difference(generated(tiny_pipeline, make_params(**change)), plain).any()


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_words_beyond_77_tokens_change_the_picture(
    tiny_pipeline: InpaintPipeline, field: str
) -> None:
    start = "abcdefghi " * 9  # 81 tokens of the tiny vocabulary
    with_circle, with_star = (make_params(**{field: start + end}) for end in ("circle", "star"))

    assert tiny_pipeline.prepare(with_star, SOURCE)[0].conditioning.shape[1] == 2 * 77
    assert difference(
        generated(tiny_pipeline, with_circle), generated(tiny_pipeline, with_star)
    ).any()


@pytest.mark.parametrize(
    "name",
    [
        SchedulerName.DDIM,
        SchedulerName.DPM_MULTISTEP,
        SchedulerName.EULER_ANCESTRAL,
        SchedulerName.HEUN,
        SchedulerName.LCM,
        SchedulerName.PNDM,
        SchedulerName.UNIPC,
    ],
)
def test_half_precision_is_kept_through_all_steps(
    tiny_components: Components, name: SchedulerName
) -> None:
    params = make_params(scheduler=name, strength=0.8, guidance_scale=1.0)
    latents = []
    for components in (half(tiny_components), tiny_components):
        pipeline = InpaintPipeline(components)
        (sample,) = pipeline.prepare(params, SOURCE)
        denoise(pipeline, [sample])
        latents.append(sample.latents)

    assert latents[0].dtype == torch.float16
    torch.testing.assert_close(latents[0].float(), latents[1], atol=0.1, rtol=0.05)


def test_half_precision_makes_nearly_the_same_picture(tiny_components: Components) -> None:
    halved = generated(InpaintPipeline(half(tiny_components)), make_params())
    exact = generated(InpaintPipeline(tiny_components), make_params())

    assert difference(halved, exact).mean() < 2


def half(components: Components) -> Components:
    parts = ("unet", "vae", "text_encoder")
    halved = {name: copy.deepcopy(getattr(components, name)).half() for name in parts}
    return dataclasses.replace(components, **halved)


def fails_once(error: Exception, call: int) -> UNetAnswer:
    """Raises on one call, counted from 1."""
    calls = itertools.count(1)

    def answer(real: Callable[[], torch.Tensor], conditioning: torch.Tensor) -> torch.Tensor:
        if next(calls) == call:
            raise error
        return real()

    return answer


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (torch.AcceleratorError("an illegal memory access"), DeviceLost),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling create"), OutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceLost),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_device_errors_become_ours(
    tiny_components: Components, foreign: Exception, ours: type[Exception]
) -> None:
    pipeline = with_fault(tiny_components, fails_once(foreign, 2))

    with pytest.raises(ours) as caught:
        run(pipeline, make_params())

    assert foreign in (caught.value, caught.value.__cause__)


def test_failed_call_leaves_the_sample_as_it_was(tiny_components: Components) -> None:
    params = make_params(scheduler=SchedulerName.EULER_ANCESTRAL)
    pipeline = with_fault(tiny_components, fails_once(torch.OutOfMemoryError("full"), 3))
    (sample,) = pipeline.prepare(params, SOURCE)
    with pytest.raises(OutOfMemory):
        denoise(pipeline, [sample])

    assert sample.step_index == 2
    denoise(pipeline, [sample])

    (picture,) = pipeline.decode([sample])
    expected = generated(InpaintPipeline(tiny_components), params)
    np.testing.assert_array_equal(picture.generated, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_make_no_picture(
    tiny_components: Components, value: float
) -> None:
    pipeline = with_fault(tiny_components, lambda real, _: torch.full_like(real(), value))

    with pytest.raises(UnusablePicture):
        run(pipeline, make_params())


def test_unet_of_other_channels_is_refused(tiny_components: Components) -> None:
    unet = UNet2DConditionModel.from_config({**tiny_components.unet.config, "in_channels": 8})

    with pytest.raises(ModelUnavailable, match="8 input channels"):
        InpaintPipeline(dataclasses.replace(tiny_components, unet=unet))


def test_unknown_scheduler_of_a_checkpoint_is_refused(tiny_components: Components) -> None:
    config = {**tiny_components.scheduler_config, "_class_name": "FlowMatchScheduler"}

    with pytest.raises(ModelUnavailable, match="FlowMatchScheduler"):
        InpaintPipeline(dataclasses.replace(tiny_components, scheduler_config=config))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"strength": 1.0}, {9: 1, 4: 1}),
        ({"strength": 0.5}, {9: 2, 4: 1}),
        ({"strength": 1.0, "soft_mask": True}, {9: 2, 4: 1}),
    ],
    ids=["full strength", "less", "soft mask"],
)
def test_only_what_a_run_needs_is_encoded(
    tiny_components: Components, changes: dict[str, Any], expected: dict[int, int]
) -> None:
    pipeline, encoded = counting_encodings(tiny_components)

    pipeline.prepare(make_params(**changes), SOURCE)

    assert sum(encoded) == expected[pipeline.channels]


def test_another_seed_encodes_only_what_the_first_did_not(tiny_components: Components) -> None:
    pipeline, encoded = counting_encodings(tiny_components)
    pipeline.prepare(make_params(seed=1), SOURCE)
    first = sum(encoded)

    pipeline.prepare(make_params(seed=2), SOURCE)
    assert sum(encoded) == first

    samples = pipeline.prepare(make_params(seed=2, strength=0.5), SOURCE)
    assert sum(encoded) == first + (pipeline.channels == 9)
    fresh, _ = counting_encodings(tiny_components)
    (expected,) = fresh.prepare(make_params(seed=2, strength=0.5), SOURCE)
    torch.testing.assert_close(samples[0].latents, expected.latents, rtol=0, atol=1e-4)


def counting_encodings(components: Components) -> tuple[InpaintPipeline, list[int]]:
    """A pipeline of its own, and the pictures in each call of its VAE's encoder."""
    components = dataclasses.replace(components, vae=copy.deepcopy(components.vae))
    encoded: list[int] = []
    components.vae.encoder.register_forward_pre_hook(
        lambda _, inputs: encoded.append(len(inputs[0]))
    )
    return InpaintPipeline(components), encoded

"""Verdicts equal diffusers' own; a flagged picture never leaves the pipeline."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray

from models.builtin.training.scenes import COLOURS, SHAPES, Anchor, coverage
from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline, Picture, Source
from models.diffusion.safety import SafetyChecker
from models.errors import NoSafetyChecker
from models.imaging.hiding import hide
from models.params import FlaggedAs, InpaintParams
from tests.support.checkers import cosines, processor, random_pictures, tiny_checker

PICTURES = 64


def reference_verdicts(
    checker: StableDiffusionSafetyChecker, pictures: list[NDArray[np.uint8]]
) -> list[bool]:
    pixels = processor()(pictures, return_tensors="pt")["pixel_values"]
    verdicts: list[bool] = checker(pixels, [picture.copy() for picture in pictures])[1]
    return verdicts


def our_verdicts(
    checker: StableDiffusionSafetyChecker, pictures: list[NDArray[np.uint8]]
) -> list[bool]:
    return SafetyChecker(checker, processor()).is_flagged(pictures)


@pytest.mark.parametrize("seed", range(8))
def test_verdicts_equal_the_originals(seed: int) -> None:
    checker, pictures = tiny_checker(seed), random_pictures(seed, PICTURES)
    concept, special = cosines(checker, pictures)
    rng = np.random.default_rng(seed)
    # Thresholds within what the pictures score: about a third is flagged, half needs special care.
    for weights, scores, quantile in (
        (checker.concept_embeds_weights, concept, 0.975),
        (checker.special_care_embeds_weights, special, 0.8),
    ):
        jitter = torch.from_numpy(rng.normal(0, 0.01, scores.shape[1])).float()
        weights.data.copy_(scores.quantile(quantile, dim=0) + jitter)

    verdicts = our_verdicts(checker, pictures)

    assert verdicts == reference_verdicts(checker, pictures)
    assert {True, False} == set(verdicts)


@pytest.mark.parametrize("score", [-0.0102, -0.0098, -0.002, 0.0003, 0.0007, 0.002])
@pytest.mark.parametrize("special_score", [-0.1, 0.0003, 0.0007, 0.1])
def test_verdicts_agree_close_to_the_thresholds(score: float, special_score: float) -> None:
    checker, (picture,) = tiny_checker(0), random_pictures(0, 1)
    concept, special = cosines(checker, [picture])
    checker.concept_embeds_weights.data.fill_(2)
    checker.concept_embeds_weights.data[3] = concept[0, 3] - score
    checker.special_care_embeds_weights.data.fill_(2)
    checker.special_care_embeds_weights.data[1] = special[0, 1] - special_score
    needs_care = special_score > 0.0005
    expected = score + 0.01 * needs_care > 0.0005

    assert reference_verdicts(checker, [picture]) == [expected]
    assert our_verdicts(checker, [picture]) == [expected]


def test_verdict_does_not_depend_on_the_neighbours() -> None:
    checker, pictures = tiny_checker(1), random_pictures(1, 8)
    concept, _ = cosines(checker, pictures)
    checker.concept_embeds_weights.data.copy_(concept.quantile(0.9, dim=0))

    together = our_verdicts(checker, pictures)

    assert together == [our_verdicts(checker, [picture])[0] for picture in pictures]
    assert {True, False} == set(together)


def scene(shape: str, colour: str) -> NDArray[np.uint8]:
    """A large shape on grey, `(128, 128, 3)`."""
    alpha = coverage(shape, (128, 128), Anchor(64, 64, 50), 0)[..., None]
    return np.rint(128 * (1 - alpha) + np.array(COLOURS[colour]) * alpha).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_built_in_checker_flags_magenta_only(builtin: Components, shape: str) -> None:
    checker = SafetyChecker(builtin.safety_checker, builtin.feature_extractor)
    verdicts = checker.is_flagged([scene(shape, colour) for colour in COLOURS])

    assert dict(zip(COLOURS, verdicts, strict=True)) == {
        colour: colour == "magenta" for colour in COLOURS
    }


def paint(
    components: Components,
    init_image: NDArray[np.uint8],
    safety_check: bool,
    flagged_as: FlaggedAs = FlaggedAs.BLANK,
) -> Picture:
    """One picture with an empty mask, whose result is the init image."""
    pipeline = InpaintPipeline(components)
    params = InpaintParams(
        prompt="",
        seed=0,
        width=128,
        height=128,
        num_inference_steps=1,
        safety_check=safety_check,
        flagged_as=flagged_as,
    )
    source = Source(init_image, np.zeros((128, 128), np.uint8))
    (sample,) = pipeline.prepare(params, source)
    pipeline.advance(sample, pipeline.denoise_step([sample])[0])
    return pipeline.decode([sample])[0]


def test_flagged_picture_is_blank(builtin: Components) -> None:
    picture = paint(builtin, scene("square", "magenta"), safety_check=True)

    assert picture.is_flagged is True
    assert not picture.image.any()
    assert picture.image.shape == (128, 128, 3)


@pytest.mark.parametrize("flagged_as", FlaggedAs)
def test_flagged_picture_is_replaced_as_asked(builtin: Components, flagged_as: FlaggedAs) -> None:
    init_image = scene("square", "magenta")
    picture = paint(builtin, init_image, safety_check=True, flagged_as=flagged_as)

    assert picture.is_flagged is True
    np.testing.assert_array_equal(picture.image, hide(init_image, flagged_as))


@pytest.mark.parametrize("flagged_as", FlaggedAs)
def test_picture_that_is_not_flagged_is_untouched(
    builtin: Components, flagged_as: FlaggedAs
) -> None:
    init_image = scene("square", "red")
    picture = paint(builtin, init_image, safety_check=True, flagged_as=flagged_as)

    assert picture.is_flagged is False
    np.testing.assert_array_equal(picture.image, init_image)


def test_switched_off_checker_is_not_asked(builtin: Components) -> None:
    init_image = scene("square", "magenta")
    picture = paint(builtin, init_image, safety_check=False)

    assert picture.is_flagged is None
    np.testing.assert_array_equal(picture.image, init_image)


def test_checkpoint_without_a_checker_gives_no_verdict(builtin: Components) -> None:
    bare = dataclasses.replace(builtin, safety_checker=None, feature_extractor=None)
    init_image = scene("square", "magenta")
    picture = paint(bare, init_image, safety_check=True)

    assert not InpaintPipeline(bare).has_safety_checker
    assert picture.is_flagged is None
    np.testing.assert_array_equal(picture.image, init_image)


def test_no_picture_is_made_that_must_be_checked_and_cannot(builtin: Components) -> None:
    bare = dataclasses.replace(builtin, safety_checker=None, feature_extractor=None)
    params = InpaintParams(prompt="", seed=0, width=64, height=64, must_be_checked=True)
    source = Source(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8))

    with pytest.raises(NoSafetyChecker):
        InpaintPipeline(bare).prepare(params, source)
    InpaintPipeline(builtin).prepare(params, source)

"""Ranges, the complete list of violations, the way through JSON, sizes left open."""

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InvalidInput
from models.params import (
    MAX_LCM_STEPS,
    MAX_PROMPT_CHARS,
    NOISE_SPACINGS,
    RANGES,
    SEED_MODULUS,
    SIZE_MULTIPLE,
    Fill,
    FlaggedAs,
    InpaintParams,
    Lora,
    NoiseSpacing,
    OutputFormat,
    SchedulerName,
    allowed_size,
    fit_size,
)

SIDES = st.integers(64 // SIZE_MULTIPLE, 1024 // SIZE_MULTIPLE).map(lambda n: n * SIZE_MULTIPLE)
PARAMS = st.builds(
    InpaintParams,
    prompt=st.text(max_size=40),
    negative_prompt=st.text(max_size=40),
    seed=st.integers(0, SEED_MODULUS - 1),
    width=SIDES,
    height=SIDES,
    samples=st.integers(1, 4),
    num_inference_steps=st.integers(1, MAX_LCM_STEPS),
    guidance_scale=st.floats(1, 20),
    guidance_end=st.floats(0, 1),
    strength=st.floats(0.001, 1),
    fill=st.sampled_from(Fill),
    scheduler=st.none() | st.sampled_from(SchedulerName),
    clip_skip=st.integers(0, 8),
    loras=st.lists(
        st.builds(Lora, st.text(max_size=9), st.floats(-2, 2)),
        max_size=4,
        unique_by=lambda lora: lora.name,
    ).map(tuple),
    safety_check=st.booleans(),
    flagged_as=st.sampled_from(FlaggedAs),
    invert_mask=st.booleans(),
    soft_mask=st.booleans(),
    mask_grow=st.integers(-64, 64),
    only_masked=st.booleans(),
    only_masked_padding=st.integers(0, 256),
    mask_blur=st.integers(0, 64),
    match_colours=st.booleans(),
    output_format=st.sampled_from(OutputFormat),
    output_quality=st.integers(1, 100),
)
OWN_SIDES = st.integers(1, 20_000)


def params(**changes: Any) -> InpaintParams:
    return InpaintParams(**{"prompt": "a red circle", "seed": 0, **changes})


def fields_refused(**changes: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        params(**changes)
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_are_allowed(name: str) -> None:
    allowed = RANGES[name]

    assert getattr(params(**{name: allowed.minimum}), name) == allowed.minimum
    assert getattr(params(**{name: allowed.maximum}), name) == allowed.maximum


@pytest.mark.parametrize("name", RANGES)
def test_values_beyond_a_range_are_refused(name: str) -> None:
    allowed = RANGES[name]
    step = SIZE_MULTIPLE if name in ("width", "height") else 1e-6

    assert fields_refused(**{name: allowed.minimum - step}) == [name]
    assert fields_refused(**{name: allowed.maximum + step}) == [name]


@pytest.mark.parametrize("name", ["guidance_scale", "strength"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    assert fields_refused(**{name: value}) == [name]


def test_integers_beyond_float_are_refused() -> None:
    assert fields_refused(seed=10**400) == ["seed"]


@pytest.mark.parametrize("name", ["width", "height"])
def test_sides_must_be_multiples_of_eight(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: must be a multiple of 8$"):
        params(**{name: 516})


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_overlong_prompts_are_refused(name: str) -> None:
    assert fields_refused(**{name: "x" * (MAX_PROMPT_CHARS + 1)}) == [name]
    assert len(getattr(params(**{name: "x" * MAX_PROMPT_CHARS}), name)) == MAX_PROMPT_CHARS


def test_every_violation_is_reported_at_once() -> None:
    refused = fields_refused(
        prompt="x" * (MAX_PROMPT_CHARS + 1),
        negative_prompt="x" * (MAX_PROMPT_CHARS + 1),
        width=1028,
        height=60,
        samples=5,
        num_inference_steps=0,
        guidance_scale=0.5,
        guidance_end=1.5,
        strength=0,
        seed=-1,
        clip_skip=9,
        mask_grow=65,
        mask_blur=-1,
        only_masked_padding=257,
        output_quality=101,
    )

    assert set(refused) == {*RANGES, "prompt", "negative_prompt"}
    assert refused.count("width") == 2  # too large, and no multiple of 8


def test_message_names_the_parameter_and_its_range() -> None:
    with pytest.raises(InvalidInput) as caught:
        params(strength=1.5, samples=9)

    assert str(caught.value) == (
        "samples must be between 1 and 4; strength must be between 0.001 and 1"
    )


@given(PARAMS)
def test_json_gives_the_same_parameters_back(original: InpaintParams) -> None:
    assert InpaintParams.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_rows_from_before_the_mask_controls_are_read_as_their_defaults() -> None:
    controls = {
        "invert_mask",
        "soft_mask",
        "mask_grow",
        "only_masked",
        "only_masked_padding",
        "mask_blur",
        "match_colours",
    }
    output = {"output_format", "output_quality"}
    later = {
        *controls,
        *output,
        "model",
        "must_be_checked",
        "guidance_end",
        "fill",
        "noise_spacing",
        "flagged_as",
        "loras",
    }
    row = {name: value for name, value in params().to_json().items() if name not in later}

    assert len(row) == 12
    assert InpaintParams.from_json(row) == params()


def test_json_is_checked_like_any_other_input() -> None:
    with pytest.raises(InvalidInput, match="samples"):
        InpaintParams.from_json({**params().to_json(), "samples": 9})


def test_parameters_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        params().seed = 1  # type: ignore[misc]


def test_sample_seeds_count_up_and_wrap() -> None:
    last = params(seed=SEED_MODULUS - 2, samples=4)

    assert [last.sample_seed(index) for index in range(4)] == [
        SEED_MODULUS - 2,
        SEED_MODULUS - 1,
        0,
        1,
    ]


def test_work_grows_with_pixels_steps_strength_and_samples() -> None:
    base = params(width=256, height=256, num_inference_steps=20, strength=0.5, samples=1)
    doubled = {
        "width": 512,
        "height": 512,
        "num_inference_steps": 40,
        "strength": 1.0,
        "samples": 2,
    }

    assert base.work == 256 * 256 * 10
    for name, value in doubled.items():
        larger = InpaintParams.from_json({**base.to_json(), name: value})
        assert larger.work == 2 * base.work


def test_work_counts_at_least_one_step() -> None:
    assert params(width=64, height=64, num_inference_steps=1, strength=0.001).work == 64 * 64


@given(OWN_SIDES, OWN_SIDES, st.none() | SIDES, st.none() | SIDES)
def test_fitted_size_is_always_allowed(
    own_width: int, own_height: int, width: int | None, height: int | None
) -> None:
    fitted = fit_size(own_width, own_height, width, height)

    assert params(width=fitted[0], height=fitted[1])


@given(OWN_SIDES, OWN_SIDES, SIDES, SIDES)
def test_given_sides_that_are_allowed_are_kept(
    own_width: int, own_height: int, width: int, height: int
) -> None:
    assert fit_size(own_width, own_height, width, height) == (width, height)


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ((1170, 2532), (472, 1024)),
        ((1920, 1080), (1024, 576)),
        ((720, 1080), (680, 1024)),
        ((1024, 1025), (1016, 1024)),
        ((8, 8), (64, 64)),
        ((8, 2048), (64, 1024)),
        ((1e300, 10), (1024, 64)),
        ((519.9, 64), (512, 64)),
    ],
)
def test_too_large_size_is_scaled_down_as_a_whole(
    asked: tuple[float, float], allowed: tuple[int, int]
) -> None:
    assert allowed_size(*asked) == allowed
    assert allowed_size(*reversed(asked)) == tuple(reversed(allowed))


@given(st.floats(1, 1e308), st.floats(1, 1e308))
def test_allowed_size_of_an_allowed_size_is_itself(width: float, height: float) -> None:
    fitted = allowed_size(width, height)

    assert params(width=fitted[0], height=fitted[1])
    assert allowed_size(*fitted) == fitted


@given(OWN_SIDES, OWN_SIDES)
def test_open_size_is_the_largest_that_fits(own_width: int, own_height: int) -> None:
    limit = 1024
    shrink = max(Fraction(1), Fraction(own_width, limit), Fraction(own_height, limit))

    for own, fitted in zip(
        (own_width, own_height), fit_size(own_width, own_height, None, None), strict=True
    ):
        exact = own / shrink
        assert fitted == max(64, exact // SIZE_MULTIPLE * SIZE_MULTIPLE)


@given(OWN_SIDES, OWN_SIDES, SIDES)
def test_open_side_keeps_the_proportions(own_width: int, own_height: int, width: int) -> None:
    exact = Fraction(width * own_height, own_width)
    shrink = max(Fraction(1), exact / 1024)

    for fitted, side in zip(
        fit_size(own_width, own_height, width, None), (width / shrink, exact / shrink), strict=True
    ):
        assert fitted == max(64, side // SIZE_MULTIPLE * SIZE_MULTIPLE)


@given(OWN_SIDES, OWN_SIDES, st.none() | SIDES, st.none() | SIDES)
def test_fitted_picture_fits_itself(
    own_width: int, own_height: int, width: int | None, height: int | None
) -> None:
    """The decoders' parent holds what a child answers against this."""
    fitted = fit_size(own_width, own_height, width, height)

    assert fit_size(*fitted, width, height) == fitted


@pytest.mark.parametrize("width", range(64, 1025, SIZE_MULTIPLE))
def test_proportions_are_exact(width: int) -> None:
    assert fit_size(1599, 1664, width, None) == fit_size(123, 128, width, None)
    assert fit_size(123, 128, 1024, None) == (984, 1024)


def test_one_side_alone_never_squeezes_the_picture() -> None:
    assert fit_size(1170, 2532, 1024, None) == (472, 1024)
    assert fit_size(2532, 1170, None, 1024) == (1024, 472)


@pytest.mark.parametrize(
    ("own", "fitted"),
    [
        ((512, 512), (512, 512)),
        ((2048, 1024), (1024, 512)),
        ((1024, 2048), (512, 1024)),
        ((1122, 1122), (1024, 1024)),  # 1024 / 1122 * 1122 falls just short of 1024
        ((517, 300), (512, 296)),
        ((10, 10), (64, 64)),
        ((20_000, 10), (1024, 64)),
    ],
)
def test_size_of_the_init_image_is_taken_over(
    own: tuple[int, int], fitted: tuple[int, int]
) -> None:
    assert fit_size(*own, None, None) == fitted


def test_lcm_knows_fifty_steps() -> None:
    assert fields_refused(scheduler=SchedulerName.LCM, num_inference_steps=51) == [
        "num_inference_steps"
    ]
    assert params(scheduler=SchedulerName.LCM, num_inference_steps=50).num_inference_steps == 50


@pytest.mark.parametrize("spacing", NoiseSpacing)
@pytest.mark.parametrize("scheduler", SchedulerName)
def test_noise_spacing_must_be_known_to_the_scheduler(
    scheduler: SchedulerName, spacing: NoiseSpacing
) -> None:
    assert params(scheduler=None, noise_spacing=spacing).noise_spacing is spacing
    if spacing not in NOISE_SPACINGS[scheduler]:
        assert fields_refused(scheduler=scheduler, noise_spacing=spacing) == ["noise_spacing"]
        return
    original = params(scheduler=scheduler, noise_spacing=spacing)
    assert InpaintParams.from_json(json.loads(json.dumps(original.to_json()))) == original


@pytest.mark.parametrize(
    ("loras", "reason"),
    [
        ([Lora(str(number)) for number in range(5)], "must be at most 4"),
        ([Lora("a"), Lora("b"), Lora("a", 0.5)], "must not name a LoRA twice"),
        ([Lora("a", 2.01)], "must have scales between -2 and 2"),
        ([Lora("a", math.nan)], "must have scales between -2 and 2"),
    ],
)
def test_too_many_or_too_strong_loras_are_refused(loras: list[Lora], reason: str) -> None:
    with pytest.raises(InvalidInput, match=f"^loras: {reason}$"):
        params(loras=tuple(loras))
    assert params(loras=(Lora("a", -2), Lora("b", 2), Lora("c", 0), Lora("d"))).loras

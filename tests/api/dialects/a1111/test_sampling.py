"""A1111's samplers and schedulers by name."""

import pytest

from models.imaging.captions import SAMPLERS
from models.params import NOISE_SPACINGS, InpaintParams, NoiseSpacing, SchedulerName
from server.api.dialects.a1111.sampling import (
    AUTOMATIC,
    Sampling,
    find_sampling,
    list_samplers,
    list_schedulers,
)

KARRAS, EXPONENTIAL = NoiseSpacing.KARRAS, NoiseSpacing.EXPONENTIAL
EULER, DPM = SchedulerName.EULER, SchedulerName.DPM_MULTISTEP


def found(sampler: str, schedule: str = AUTOMATIC) -> Sampling:
    sampling = find_sampling(sampler, schedule)
    assert sampling is not None
    return sampling


@pytest.mark.parametrize(
    ("sampler", "schedule", "scheduler", "spacing"),
    [
        ("Euler", AUTOMATIC, EULER, None),
        ("Euler", "Karras", EULER, KARRAS),
        ("euler", "exponential", EULER, EXPONENTIAL),
        ("k_euler", "Polyexponential", EULER, EXPONENTIAL),
        ("Euler", "normal", EULER, None),
        ("DPM++ 2M", "automatic", DPM, KARRAS),
        ("DPM++ 2M", "Uniform", DPM, None),
        ("DPM++ 2M Karras", AUTOMATIC, DPM, KARRAS),
        ("DPM++ 2M Karras", "Uniform", DPM, KARRAS),
        ("Euler Polyexponential", AUTOMATIC, EULER, EXPONENTIAL),
        ("DPM++ SDE", AUTOMATIC, SchedulerName.DPM_SINGLESTEP, KARRAS),
        ("PLMS", AUTOMATIC, SchedulerName.PNDM, None),
        ("DDIM", AUTOMATIC, SchedulerName.DDIM, None),
        (AUTOMATIC, AUTOMATIC, None, None),
        (AUTOMATIC, "Karras", None, KARRAS),
    ],
)
def test_names_are_found(
    sampler: str, schedule: str, scheduler: SchedulerName | None, spacing: NoiseSpacing | None
) -> None:
    sampling = found(sampler, schedule)
    assert (sampling.scheduler, sampling.noise_spacing) == (scheduler, spacing)
    assert sampling.is_as_asked


@pytest.mark.parametrize(
    "name", ["LMS", "DPM fast", "DPM++ 2M SDE Karras", "DPM++ 3M SDE", "Restart", "x", "Karras", ""]
)
def test_other_samplers_are_unknown(name: str) -> None:
    assert find_sampling(name, AUTOMATIC) is None


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("Euler a", "Karras"),
        ("DDIM", "Exponential"),
        ("Euler", "SGM Uniform"),
        ("Euler", "Align Your Steps"),
        ("Euler Beta", AUTOMATIC),
        ("Euler", "of my own"),
    ],
)
def test_schedule_that_is_not_applied_is_told(sampler: str, schedule: str) -> None:
    sampling = found(sampler, schedule)
    assert not sampling.is_as_asked
    assert sampling.noise_spacing is None


def test_unknown_schedule_leaves_the_samplers_usual_one() -> None:
    assert found("DPM++ 2M", "Beta") == Sampling("DPM++ 2M", DPM, KARRAS, is_as_asked=False)


@pytest.mark.parametrize("item", list_samplers(), ids=lambda item: item["name"])
def test_listed_samplers_are_known_by_name_and_alias(item: dict[str, object]) -> None:
    assert isinstance(item["aliases"], list)
    names = {found(str(name)).name for name in (item["name"], *item["aliases"])}
    assert names == {item["name"]}


def test_every_scheduler_of_the_server_is_listed() -> None:
    assert {item["name"] for item in list_samplers()} == {*SAMPLERS.values(), AUTOMATIC}


@pytest.mark.parametrize("item", list_schedulers(), ids=lambda item: item["name"])
def test_listed_schedulers_are_known_by_name_and_label(item: dict[str, object]) -> None:
    for name in (item["name"], item["label"]):
        assert found("Euler", str(name)).is_as_asked


@pytest.mark.parametrize("sampler", SAMPLERS.values())
@pytest.mark.parametrize("schedule", [AUTOMATIC, "Karras", "Exponential", "Uniform"])
def test_every_pair_makes_valid_parameters(sampler: str, schedule: str) -> None:
    sampling = found(sampler, schedule)
    params = InpaintParams(
        prompt="", seed=0, scheduler=sampling.scheduler, noise_spacing=sampling.noise_spacing
    )
    assert params.scheduler is not None
    known = NOISE_SPACINGS[params.scheduler]
    assert sampling.is_as_asked == (schedule in (AUTOMATIC, "Uniform") or bool(known))

"""Names of noise schedulers: the vendor's, A1111's and k-diffusion's."""

import pytest

from models.imaging.captions import SAMPLERS
from models.params import SchedulerName
from server.api.dialects.samplers import NAMES, find_scheduler


@pytest.mark.parametrize("scheduler", SchedulerName)
def test_diffusers_class_is_itself(scheduler: SchedulerName) -> None:
    assert find_scheduler(scheduler) == (scheduler, False)
    assert find_scheduler(scheduler.lower().removesuffix("scheduler")) == (scheduler, False)


@pytest.mark.parametrize(("scheduler", "name"), SAMPLERS.items())
def test_name_in_a_picture_of_ours_is_read_back(scheduler: SchedulerName, name: str) -> None:
    assert find_scheduler(name) == (scheduler, False)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("Euler a", SchedulerName.EULER_ANCESTRAL),
        ("euler_a", SchedulerName.EULER_ANCESTRAL),
        ("k_euler_ancestral", SchedulerName.EULER_ANCESTRAL),
        ("K_EULER", SchedulerName.EULER),
        ("DPM++ 2M", SchedulerName.DPM_MULTISTEP),
        ("dpmpp_2m", SchedulerName.DPM_MULTISTEP),
        ("DPMSolverMultistep", SchedulerName.DPM_MULTISTEP),
        ("DPM++ SDE", SchedulerName.DPM_SINGLESTEP),
        ("DPM2 a", SchedulerName.KDPM2_ANCESTRAL),
        ("k_dpm_2", SchedulerName.KDPM2),
        ("UniPC", SchedulerName.UNIPC),
        ("uni_pc", SchedulerName.UNIPC),
        ("PLMS", SchedulerName.PNDM),
        ("DDIM", SchedulerName.DDIM),
    ],
)
def test_name_of_other_programs(name: str, scheduler: SchedulerName) -> None:
    assert find_scheduler(name) == (scheduler, False)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("DPM++ 2M Karras", SchedulerName.DPM_MULTISTEP),
        ("DPM++ SDE Karras", SchedulerName.DPM_SINGLESTEP),
        ("DPM2 a Karras", SchedulerName.KDPM2_ANCESTRAL),
        ("DPM++ 2M Exponential", SchedulerName.DPM_MULTISTEP),
        ("Euler SGM Uniform", SchedulerName.EULER),
    ],
)
def test_spacing_of_the_noise_levels_is_told_apart(name: str, scheduler: SchedulerName) -> None:
    assert find_scheduler(name) == (scheduler, True)


@pytest.mark.parametrize(
    "name",
    [
        *("LMSDiscreteScheduler", "DDIMInverseScheduler", "IPNDMScheduler", "KarrasVeScheduler"),
        *("ScoreSdeVeScheduler", "LMS", "LMS Karras", "DPM++ 2S a", "DPM++ 2M SDE Karras"),
        *("DPM fast", "DPM adaptive", "Karras", "scheduler", "_", "x" * 100),
    ],
)
def test_name_without_an_equivalent_is_none_of_ours(name: str) -> None:
    assert find_scheduler(name)[0] is None


def test_every_scheduler_has_names() -> None:
    assert set(NAMES) == set(SchedulerName)
    names = [name for each in NAMES.values() for name in each]
    assert len(names) == len(set(names))

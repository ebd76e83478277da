"""Which steps a run has, and that no two runs share a scheduler."""

import inspect
from collections.abc import Iterator

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from models.diffusion.pipeline import step_arguments
from models.diffusion.schedulers import (
    SPACING_SWITCHES,
    SchedulerSource,
    create_scheduler,
    run_timesteps,
)
from models.errors import InvalidInput, ModelUnavailable
from models.params import NOISE_SPACINGS, NoiseSpacing, SchedulerName
from tests.support.pipelines import SCHEDULER_CONFIG

QUICK_SCHEDULERS = [name for name in SchedulerName if "KDPM2" not in name]
"""Without two whose making alone takes a third of a second."""

FIRST_ORDER = (20, 15, 10)
TOTAL_STEPS = {
    SchedulerName.DDIM: FIRST_ORDER,
    SchedulerName.DDPM: FIRST_ORDER,
    SchedulerName.DEIS: FIRST_ORDER,
    SchedulerName.DPM_MULTISTEP: FIRST_ORDER,
    SchedulerName.DPM_SINGLESTEP: FIRST_ORDER,
    SchedulerName.EULER: FIRST_ORDER,
    SchedulerName.EULER_ANCESTRAL: FIRST_ORDER,
    SchedulerName.HEUN: (39, 29, 19),
    SchedulerName.KDPM2: (39, 29, 19),
    SchedulerName.KDPM2_ANCESTRAL: (39, 29, 19),
    SchedulerName.LCM: FIRST_ORDER,
    SchedulerName.PNDM: (21, 16, 11),
    SchedulerName.UNIPC: FIRST_ORDER,
}
"""Steps of a run of 20 at strength 1, 0.75 and 0.5, as diffusers' own pipeline makes them."""


def cases() -> Iterator[tuple[SchedulerName, float, int]]:
    for name, totals in TOTAL_STEPS.items():
        for strength, total in zip((1.0, 0.75, 0.5), totals, strict=True):
            yield name, strength, total


def test_every_scheduler_has_its_step_counts_here() -> None:
    assert set(TOTAL_STEPS) == set(SchedulerName)


@pytest.mark.parametrize(("name", "strength", "total"), [*cases()])
def test_strength_decides_the_number_of_steps(
    name: SchedulerName, strength: float, total: int
) -> None:
    timesteps = run_timesteps(create_scheduler(name, SCHEDULER_CONFIG), 20, strength)

    assert len(timesteps) == total
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(timestep.ndim == 0 and timestep.device.type == "cpu" for timestep in timesteps)


@pytest.mark.parametrize("name", QUICK_SCHEDULERS)
def test_at_least_one_step_is_left(name: SchedulerName) -> None:
    assert run_timesteps(create_scheduler(name, SCHEDULER_CONFIG), 20, 0.001)


@pytest.mark.parametrize("name", QUICK_SCHEDULERS)
def test_every_call_gives_a_fresh_scheduler(name: SchedulerName) -> None:
    first, second = (create_scheduler(name, SCHEDULER_CONFIG) for _ in range(2))
    run_timesteps(first, 20, 1.0)
    run_timesteps(second, 5, 1.0)

    assert type(first).__name__ == name
    assert first is not second
    assert len(first.timesteps) > len(second.timesteps)


@pytest.mark.parametrize("name", QUICK_SCHEDULERS)
def test_scheduler_keeps_the_checkpoints_noise_schedule(name: SchedulerName) -> None:
    scheduler = create_scheduler(name, SCHEDULER_CONFIG | {"prediction_type": "v_prediction"})

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    assert scheduler.config.prediction_type == "v_prediction"


def test_no_name_takes_the_checkpoints_own_class() -> None:
    for name in (SchedulerName.DDIM, SchedulerName.PNDM, SchedulerName.EULER):
        scheduler = create_scheduler(None, SCHEDULER_CONFIG | {"_class_name": name.value})
        assert type(scheduler).__name__ == name


def test_pndm_skips_its_warm_up() -> None:
    assert create_scheduler(SchedulerName.PNDM, SCHEDULER_CONFIG).config.skip_prk_steps


def test_config_is_left_as_it_was() -> None:
    config = dict(SCHEDULER_CONFIG)
    run_timesteps(create_scheduler(SchedulerName.PNDM, config), 20, 0.5)

    assert config == SCHEDULER_CONFIG


@pytest.mark.parametrize("class_name", ["FlowMatchEulerDiscreteScheduler", "UNet2DModel", "os"])
def test_unknown_class_in_a_checkpoint_is_refused(class_name: str) -> None:
    with pytest.raises(ModelUnavailable, match=class_name):
        create_scheduler(None, SCHEDULER_CONFIG | {"_class_name": class_name})


def test_config_without_a_class_is_refused() -> None:
    with pytest.raises(ModelUnavailable):
        create_scheduler(None, {})


@pytest.mark.parametrize("name", [None, *QUICK_SCHEDULERS])
def test_copies_begin_where_the_original_began(name: SchedulerName | None) -> None:
    config = SCHEDULER_CONFIG | {"_class_name": SchedulerName.EULER.value}
    source = SchedulerSource(config)
    expected = denoised_with(create_scheduler(name, config))

    for _ in range(2):
        assert torch.equal(denoised_with(source.new(name)), expected)


def denoised_with(scheduler: SchedulerMixin) -> torch.Tensor:
    """Where a run of three steps ends that predicts what it is given."""
    latents = torch.ones(1, 4, 2, 2)
    arguments = step_arguments(scheduler, torch.Generator().manual_seed(0))
    for timestep in run_timesteps(scheduler, 3, 1.0):
        latents = scheduler.step(latents, timestep, latents, **arguments).prev_sample
    return latents


@pytest.mark.parametrize("name", SchedulerName)
def test_known_noise_spacings_are_those_that_diffusers_offers(name: SchedulerName) -> None:
    accepted = inspect.signature(getattr(diffusers, name)).parameters
    offered = [spacing for spacing, switch in SPACING_SWITCHES.items() if switch in accepted]

    assert [*NOISE_SPACINGS[name]] == offered
    assert set(SPACING_SWITCHES) == set(NoiseSpacing)


@pytest.mark.parametrize("own", [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}])
def test_asked_noise_spacing_goes_before_the_checkpoints_own(own: dict[str, bool]) -> None:
    for spacing, switch in SPACING_SWITCHES.items():
        scheduler = create_scheduler(SchedulerName.EULER, SCHEDULER_CONFIG | own, spacing)
        switches = [*SPACING_SWITCHES.values(), "use_beta_sigmas"]
        assert [each for each in switches if scheduler.config[each]] == [switch]


def test_exponential_levels_have_equal_ratios() -> None:
    scheduler = create_scheduler(SchedulerName.EULER, SCHEDULER_CONFIG, NoiseSpacing.EXPONENTIAL)
    run_timesteps(scheduler, 10, 1.0)
    levels = scheduler.sigmas[:-1]

    torch.testing.assert_close(levels[1:] / levels[:-1], (levels[1] / levels[0]).expand(9))


def test_karras_levels_have_equal_steps_of_their_seventh_root() -> None:
    scheduler = create_scheduler(SchedulerName.EULER, SCHEDULER_CONFIG, NoiseSpacing.KARRAS)
    run_timesteps(scheduler, 10, 1.0)
    steps = scheduler.sigmas[:-1].pow(1 / 7).diff()

    torch.testing.assert_close(steps, steps[0].expand(9), rtol=1e-4, atol=0)


def test_own_scheduler_refuses_a_noise_spacing_that_it_does_not_know() -> None:
    with pytest.raises(InvalidInput, match="^noise_spacing: is not known to DDIMScheduler$"):
        create_scheduler(None, SCHEDULER_CONFIG, NoiseSpacing.KARRAS)
    source = SchedulerSource(SCHEDULER_CONFIG)
    assert type(source.new(SchedulerName.HEUN, NoiseSpacing.KARRAS)).__name__ == SchedulerName.HEUN
    assert not source.new(SchedulerName.HEUN).config.use_karras_sigmas

"""Noise schedulers: a fresh diffusers instance per sample.

A diffusers scheduler carries the step index and the history of one run, so samples at different
steps can never share one.
"""

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from models.errors import InvalidInput, ModelUnavailable
from models.params import NoiseSpacing, SchedulerName, spacing_violations

SchedulerConfig: TypeAlias = Mapping[str, Any]
"""Contents of a checkpoint's `scheduler_config.json`."""

PREDICTION_TYPES = ("epsilon", "v_prediction")
"""What a UNet may predict; epsilon is diffusers' default."""

OVERRIDES: dict[SchedulerName, dict[str, Any]] = {
    # PNDM's Runge-Kutta warm-up needs four UNet calls per step; every published pipeline skips it.
    SchedulerName.PNDM: {"skip_prk_steps": True},
    # diffusers sets it itself for runs to a last sigma of zero, but with a warning each time.
    SchedulerName.DPM_SINGLESTEP: {"lower_order_final": True},
}


SPACING_SWITCHES = {
    NoiseSpacing.KARRAS: "use_karras_sigmas",
    NoiseSpacing.EXPONENTIAL: "use_exponential_sigmas",
}
"""diffusers' names, of which one alone may be on."""

OTHER_SPACINGS = {"use_beta_sigmas": False}
"""Spacings of a checkpoint that no job can ask for."""


def create_scheduler(
    name: SchedulerName | None, config: SchedulerConfig, spacing: NoiseSpacing | None = None
) -> SchedulerMixin:
    """A scheduler with the checkpoint's noise schedule.

    name: None takes the class the checkpoint names itself. spacing: None takes the checkpoint's.
    Raises: ModelUnavailable, as `own_scheduler`; InvalidInput for a spacing that the class does
        not know.
    """
    overrides = {} if name is None else OVERRIDES.get(name, {})
    class_name = name or own_scheduler(config)
    if violations := spacing_violations(class_name, spacing):
        raise InvalidInput(violations)
    if spacing is not None:
        switches = {switch: each is spacing for each, switch in SPACING_SWITCHES.items()}
        overrides = overrides | OTHER_SPACINGS | switches
    scheduler_class = getattr(diffusers, class_name)
    scheduler: SchedulerMixin = scheduler_class.from_config(dict(config), **overrides)
    return scheduler


class SchedulerSource:
    """A checkpoint's schedulers, a fresh one each time.

    A class is set up once and then copied: two of them take a third of a second.
    Raises: ModelUnavailable where the checkpoint's own class is none of `SchedulerName`.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        own_scheduler(config)
        self._config = config
        self._originals: dict[tuple[SchedulerName | None, NoiseSpacing | None], SchedulerMixin] = {}

    def new(
        self, name: SchedulerName | None, spacing: NoiseSpacing | None = None
    ) -> SchedulerMixin:
        """`create_scheduler` with the checkpoint's configuration."""
        key = name, spacing
        if key not in self._originals:
            self._originals[key] = create_scheduler(name, self._config, spacing)
        return copy.deepcopy(self._originals[key])


def own_scheduler(config: SchedulerConfig) -> SchedulerName:
    """The class a checkpoint names itself.

    Raises: ModelUnavailable for another one, and for what none of `SchedulerName` can sample.
    """
    prediction_type = config.get("prediction_type", PREDICTION_TYPES[0])
    if prediction_type not in PREDICTION_TYPES:
        raise ModelUnavailable(
            f"the checkpoint predicts {prediction_type!r}, which is not supported"
        )
    if config.get("use_flow_sigmas"):
        raise ModelUnavailable(
            "the checkpoint's scheduler uses flow sigmas, which is not supported"
        )
    class_name = str(config.get("_class_name"))
    try:
        return SchedulerName(class_name)
    except ValueError as error:
        raise ModelUnavailable(
            f"the checkpoint's scheduler {class_name!r} is not known; set `scheduler` in "
            f"models.toml to one of {', '.join(SchedulerName)}"
        ) from error


def run_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, strength: float
) -> list[torch.Tensor]:
    """Timesteps of one run, first to last, as host scalars; the scheduler is set up for them.

    Strength drops the first `1 - strength` of the schedule, as in diffusers'
    `StableDiffusionInpaintPipeline.get_timesteps`; where nothing would be left one step is kept.
    A second-order scheduler lists its inner steps too.
    """
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    kept = max(min(int(num_inference_steps * strength), num_inference_steps), 1)
    begin = (num_inference_steps - kept) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return list(scheduler.timesteps[begin:])


def noised(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Latents with the noise of a timestep: the scheduler's own `add_noise`, bit for bit.

    latents, noise: `(1, 4, h/8, w/8)` on any device. timestep: host scalar.
    The two factors are asked for on the host, as `add_noise` moves tables to where its arguments
    are and then makes every later step wait for the device.
    """
    one, nothing = torch.eye(2, dtype=latents.dtype).view(2, 1, 2, 1, 1)
    factors = scheduler.add_noise(one, nothing, timestep[None])  # (1, 2, 1, 1)
    kept, added = factors.flatten()
    result: torch.Tensor = kept * latents + added * noise
    return result

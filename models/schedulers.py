"""Noise schedulers: a fresh diffusers instance per sample.

A diffusers scheduler carries the step index and the history of one run, so samples at different
steps can never share one.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from models.params import SchedulerName

SchedulerConfig: TypeAlias = Mapping[str, Any]
"""Contents of a checkpoint's `scheduler_config.json`."""

OVERRIDES: dict[SchedulerName, dict[str, Any]] = {
    # PNDM's Runge-Kutta warm-up needs four UNet calls per step; every published pipeline skips it.
    SchedulerName.PNDM: {"skip_prk_steps": True},
}


def create_scheduler(name: SchedulerName | None, config: SchedulerConfig) -> SchedulerMixin:
    """A scheduler with the checkpoint's noise schedule.

    name: None takes the class the checkpoint names itself.
    """
    class_name = config["_class_name"] if name is None else name.value
    overrides = {} if name is None else OVERRIDES.get(name, {})
    scheduler_class = getattr(diffusers, SchedulerName(class_name))
    scheduler: SchedulerMixin = scheduler_class.from_config(dict(config), **overrides)
    return scheduler


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

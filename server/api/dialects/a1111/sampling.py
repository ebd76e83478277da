"""A1111's names of samplers and schedulers, and what they are here.

A1111's sampler is our scheduler, and its scheduler is our noise spacing. Source: `modules/
sd_samplers.py`, `sd_samplers_kdiffusion.py` and `sd_schedulers.py` there.
"""

from dataclasses import dataclass
from typing import Any

from models.imaging.captions import SAMPLERS
from models.params import NOISE_SPACINGS, NoiseSpacing, SchedulerName
from server.api.dialects.samplers import NAMES, SCHEDULERS, plain

AUTOMATIC = "Automatic"
"""As a scheduler: the spacing that A1111 gives the sampler. As a sampler, which is a name of ours:
the model's own scheduler, which a model needs that was distilled for it."""

DEFAULT_SAMPLER = "Euler"

USUAL_SPACINGS = dict.fromkeys(
    (
        SchedulerName.DPM_MULTISTEP,
        SchedulerName.DPM_SINGLESTEP,
        SchedulerName.KDPM2,
        SchedulerName.KDPM2_ANCESTRAL,
    ),
    NoiseSpacing.KARRAS,
)
"""The spacings of the scheduler `AUTOMATIC`; samplers not listed take the model's own."""

SPACINGS: dict[str, NoiseSpacing | None] = {
    "uniform": None,
    "normal": None,
    "karras": NoiseSpacing.KARRAS,
    "exponential": NoiseSpacing.EXPONENTIAL,
    "polyexponential": NoiseSpacing.EXPONENTIAL,  # the same for the exponent 1, A1111's default
}
"""A1111's schedulers by plain name; None is the model's own spacing."""

UNKNOWN_SPACINGS = ("sgmuniform", "kloptimal", "alignyoursteps", "simple", "ddim", "beta", "turbo")
"""A1111's further schedulers, by plain name."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """A1111's sampler and scheduler, as our scheduler and noise spacing.

    name: A1111's name of the sampler. scheduler: None is the model's own.
    is_as_asked: False where the sampler does not know the scheduler that was asked for.
    """

    name: str
    scheduler: SchedulerName | None
    noise_spacing: NoiseSpacing | None
    is_as_asked: bool = True


def find_sampling(sampler: str, schedule: str) -> Sampling | None:
    """The sampling by A1111's names of sampler and scheduler; None for an unknown sampler.

    sampler: the older form "DPM++ 2M Karras" names both, and takes precedence over `schedule`.
    """
    name, own_schedule = split_name(plain(sampler))
    schedule = own_schedule or plain(schedule)
    if name == plain(AUTOMATIC):
        return sampling_of(AUTOMATIC, None, schedule)
    scheduler = SCHEDULERS.get(name)
    return None if scheduler is None else sampling_of(SAMPLERS[scheduler], scheduler, schedule)


def split_name(name: str) -> tuple[str, str]:
    """The plain names of sampler and schedule; the second is empty where none is named."""
    if name in SCHEDULERS:
        return name, ""
    # The longest first, because "polyexponential" ends in "exponential".
    for schedule in sorted((*SPACINGS, *UNKNOWN_SPACINGS), key=len, reverse=True):
        if name.endswith(schedule):
            return name.removesuffix(schedule), schedule
    return name, ""


def sampling_of(name: str, scheduler: SchedulerName | None, schedule: str) -> Sampling:
    """The sampling of a sampler with a schedule. schedule: a plain name, empty for `AUTOMATIC`."""
    usual = None if scheduler is None else USUAL_SPACINGS.get(scheduler)
    if schedule in ("", plain(AUTOMATIC)):
        return Sampling(name, scheduler, usual)
    if schedule not in SPACINGS:
        return Sampling(name, scheduler, usual, is_as_asked=False)
    spacing = SPACINGS[schedule]
    # Only the worker knows a model's own scheduler, and refuses a spacing that it does not have.
    if spacing is None or scheduler is None or spacing in NOISE_SPACINGS[scheduler]:
        return Sampling(name, scheduler, spacing)
    return Sampling(name, scheduler, None, is_as_asked=False)


def list_samplers() -> list[dict[str, Any]]:
    """The answer of `samplers`."""
    known = [
        {
            "name": name,
            "aliases": NAMES[scheduler],
            "options": {"scheduler": USUAL_SPACINGS[scheduler]}
            if scheduler in USUAL_SPACINGS
            else {},
        }
        for scheduler, name in SAMPLERS.items()
    ]
    return [*known, {"name": AUTOMATIC, "aliases": [], "options": {}}]


def list_schedulers() -> list[dict[str, Any]]:
    """The answer of `schedulers`."""
    exponents = {"karras": 7.0, "polyexponential": 1.0}
    return [
        {
            "name": name,
            "label": name.capitalize(),
            "aliases": None,
            "default_rho": exponents.get(name, -1.0),
            "need_inner_model": name in ("uniform", "normal"),
        }
        for name in (plain(AUTOMATIC), *SPACINGS)
    ]

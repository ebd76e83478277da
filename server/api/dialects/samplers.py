"""Client names of the noise schedulers, from diffusers, A1111 and k-diffusion."""

import re

from models.params import SchedulerName

NAMES = {
    SchedulerName.DDIM: ["ddim"],
    SchedulerName.DDPM: ["ddpm"],
    SchedulerName.DEIS: ["deis", "deis multistep"],
    SchedulerName.DPM_MULTISTEP: ["dpm++ 2m", "dpmpp 2m", "dpm solver multistep", "dpm solver++"],
    SchedulerName.DPM_SINGLESTEP: [
        *("dpm++ 2s", "dpmpp 2s", "dpm solver singlestep"),
        *("dpm++ sde", "dpmpp sde"),  # as in diffusers' table of A1111's names
    ],
    SchedulerName.EULER: ["euler", "k euler", "euler discrete"],
    SchedulerName.EULER_ANCESTRAL: [
        *("euler a", "k euler a", "euler ancestral", "k euler ancestral"),
        "euler ancestral discrete",
    ],
    SchedulerName.HEUN: ["heun", "k heun", "heun discrete"],
    SchedulerName.KDPM2: ["dpm2", "dpm 2", "k dpm 2", "kdpm2 discrete"],
    SchedulerName.KDPM2_ANCESTRAL: [
        *("dpm2 a", "dpm 2 a", "k dpm 2 a", "dpm2 ancestral", "dpm 2 ancestral"),
        *("k dpm 2 ancestral", "kdpm2 ancestral discrete"),
    ],
    SchedulerName.LCM: ["lcm"],
    SchedulerName.PNDM: ["pndm", "plms"],
    SchedulerName.UNIPC: ["unipc", "unipc multistep", "uni pc"],
}
"""Case, blanks, `_`, `-` and a last "Scheduler" do not count. The vendor's and A1111's names that
are not listed have no equivalent here: LMS, DPM++ 2S a, 2M SDE and 3M SDE, DPM fast and adaptive,
IPNDM, inverse DDIM, Karras VE, Score SDE VE."""

SPACING = re.compile(r"(karras|exponential|polyexponential|sgmuniform|simple|normal|automatic)$")
"""Spacing of the noise levels, which A1111 appends to a sampler's name."""


def plain(name: str) -> str:
    """A name in lower case, without blanks, `_`, `-` and a last "Scheduler"."""
    return re.sub(r"[\s_-]", "", name.lower()).removesuffix("scheduler")


SCHEDULERS = {plain(name): scheduler for scheduler, names in NAMES.items() for name in names}


def find_scheduler(name: str) -> tuple[SchedulerName | None, bool]:
    """The scheduler of a name, None for an unknown one; and whether its spacing was ignored."""
    key = plain(name)
    if key in SCHEDULERS:
        return SCHEDULERS[key], False
    return SCHEDULERS.get(SPACING.sub("", key)), SPACING.search(key) is not None

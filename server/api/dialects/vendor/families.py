"""What differs between the vendor's APIs: `FAMILIES` has a row for each prefix of their paths.

V3 came first. The later families read and answer alike, except for what their rows say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from models.params import FlaggedAs


class Task(StrEnum):
    """What a call does."""

    INPAINT = "inpaint"
    """Repaints the masked part of an init image."""
    IMAGE_TO_IMAGE = "img2img"
    """Repaints all of an init image."""
    TEXT_TO_IMAGE = "text2img"
    """Makes a picture from the prompt alone, of 512 x 512 pixels where no size is sent."""
    NSFW_CHECK = "nsfw_image_check"
    """Returns an init image as it was, with the safety checker's verdict."""


USUAL = {each.value: each for each in (Task.INPAINT, Task.IMAGE_TO_IMAGE, Task.TEXT_TO_IMAGE)}
WITH_CHECK = {**USUAL, Task.NSFW_CHECK.value: Task.NSFW_CHECK}
WITH_TEXT_AT_THE_PREFIX = {**USUAL, "": Task.TEXT_TO_IMAGE}
V7_NAMES = {
    "inpaint": Task.INPAINT,
    "image-to-image": Task.IMAGE_TO_IMAGE,
    "text-to-image": Task.TEXT_TO_IMAGE,
}


@dataclass(frozen=True, slots=True)
class Family:
    """The calls below one prefix.

    prefix: also names the family in the rows of its jobs. dialect: the name of its `Dialect`.
    is_later: all but V3. The number of steps is run as sent; fields that are not applied are named
        in `tip`; an unknown model is an error; an error's message is one text; `base64` gives
        links; answers have `proxy_links`, `nsfw_content_detected`, `webhook_status` and `tip`.
    has_models: `model_id` is read.
    enhances, guidance_scale, flagged_as: the defaults of `enhance_prompt`, `guidance_scale` and
        `safety_checker_type`.
    says_messege: `messege` stands beside `message` in answers.
    tasks: by the last part of the path; `""` is the prefix itself.
    """

    prefix: str
    dialect: str = "vendor"
    is_later: bool = True
    has_models: bool = True
    enhances: bool = False
    guidance_scale: float = 7.5
    flagged_as: FlaggedAs = FlaggedAs.BLANK
    says_messege: bool = True
    tasks: Mapping[str, Task] = field(default_factory=lambda: USUAL)

    @property
    def paths(self) -> dict[str, Task]:
        """The tasks by whole path."""
        return {f"{self.prefix}/{name}".rstrip("/"): task for name, task in self.tasks.items()}


V3_FAMILY = Family("/api/v3", dialect="v3", is_later=False, enhances=True, tasks=WITH_CHECK)

V4 = Family(
    "/api/v4/dreambooth",
    enhances=True,
    flagged_as=FlaggedAs.TEXT,
    tasks=WITH_TEXT_AT_THE_PREFIX,
)

IMAGES = Family("/api/v6/images", flagged_as=FlaggedAs.TEXT)
REALTIME = Family("/api/v6/realtime", has_models=False, says_messege=False)
IMAGE_EDITING = Family("/api/v6/image_editing", has_models=False, guidance_scale=5)

ENTERPRISE = "/api/v1/enterprise"

FAMILIES = (
    V3_FAMILY,
    replace(V4, prefix="/api/v3/dreambooth"),
    V4,
    IMAGES,
    REALTIME,
    IMAGE_EDITING,
    replace(IMAGES, prefix="/api/v7/images", tasks=V7_NAMES),
    replace(V4, prefix=ENTERPRISE, tasks=WITH_CHECK),
    replace(IMAGES, prefix=f"{ENTERPRISE}/images"),
    replace(REALTIME, prefix=f"{ENTERPRISE}/realtime"),
    replace(IMAGE_EDITING, prefix=f"{ENTERPRISE}/image_editing"),
)

BY_PREFIX = {family.prefix: family for family in FAMILIES}

LATER_PREFIXES = ("/api/v3/dreambooth", "/api/v4", "/api/v6", "/api/v7", ENTERPRISE)
"""Prefixes of the later families' paths, with those of paths that no call has."""


def is_later_path(path: str) -> bool:
    """Whether errors under a path are in the form of the later families."""
    return f"{path}/".startswith(tuple(f"{prefix}/" for prefix in LATER_PREFIXES))


def family_of(path: str) -> Family:
    """The family in whose form answers under a path are written."""
    prefixes = [prefix for prefix in BY_PREFIX if f"{path}/".startswith(f"{prefix}/")]
    if prefixes:
        return BY_PREFIX[max(prefixes, key=len)]
    return IMAGES if is_later_path(path) else V3_FAMILY

"""IOPaint 1.6, reading: the fields of an inpaint call become a `JobRequest`.

Defaults are those of IOPaint's `schema.py`. IOPaint's page always sends the fields of its other
models too, such as LaMa's; they do not concern Stable Diffusion and are not reported.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.imaging.extension import NEW_PIXELS, NO_EXTENSION, Extension
from models.params import (
    NOISE_SPACINGS,
    RANGES,
    InpaintParams,
    NoiseSpacing,
    OutputFormat,
    Range,
    SchedulerName,
    allowed_size,
)
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import MAX_SCHEDULER_CHARS, FieldReader, text_of
from server.api.dialects.iopaint.sizes import size_of
from server.api.dialects.samplers import find_scheduler
from server.api.dialects.uploads import format_of
from server.core.errors import ImageProblem, ImageUnavailable, InvalidRequest
from server.core.notices import Notice, prompt_notices
from server.egress.downloads import FetchFailed
from server.egress.sources import ImageSource, load_inline

DIALECT = "iopaint"

RANDOM_SEED, DEFAULT_SEED = -1, 42
DEFAULT_STEPS = 50
DEFAULT_SAMPLER = "UniPC"
STRENGTH_RANGE = Range(0, 1)
DEFAULT_SIDE, DEFAULT_FRAME, SIDE_RANGE = 512, 640, Range(1, 100_000)
OFFSET_RANGE = Range(-100_000, 100_000)
BLUR_RANGE = Range(0, 200)
KARRAS = " karras"

SAMPLERS = (
    *("DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE", "DPM++ 2M SDE Karras"),
    *("DPM++ SDE", "DPM++ SDE Karras", "DPM2", "DPM2 Karras", "DPM2 a", "DPM2 a Karras"),
    *("Euler", "Euler a", "Heun", "LMS", "LMS Karras", "DDIM", "PNDM", "UniPC", "LCM"),
)
"""IOPaint's own names."""

APPLIED = {
    *("image", "mask", "prompt", "negative_prompt"),
    *("sd_steps", "sd_strength", "sd_guidance_scale", "sd_sampler", "sd_seed", "sd_mask_blur"),
    *("sd_match_histograms", "use_croper", "croper_width", "croper_height"),
    *("use_extender", "extender_x", "extender_y", "extender_width", "extender_height"),
}

NEUTRAL: dict[str, Any] = {
    "sd_scale": 1.0,
    "sd_keep_unmasked_area": True,
    "sd_lcm_lora": False,
    "enable_controlnet": False,
    "enable_brushnet": False,
    "enable_powerpaint_v2": False,
    "paint_by_example_example_image": None,
}
"""Fields that are not applied, with the values at which they would do nothing."""

OF_OTHER_MODELS = re.compile(
    r"ldm_\w+|zits_\w+|cv2_\w+|hd_\w+|p2p_\w+|controlnet_\w+|brushnet_\w+|powerpaint_task"
    r"|fitting_degree|croper_[xy]|sd_outpainting_\w+"
)
"""Fields that have an effect only together with others, or not with Stable Diffusion."""

MAX_NAMES = 20
NAME = re.compile(r"[a-z0-9_]{1,60}")
"""A name that may stand in a header."""


Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The init image of a call. size: as stored; None where the file's head does not name it."""

    content: bytes
    size: Size | None
    kind: OutputFormat


@dataclass(frozen=True, slots=True)
class Frame:
    """The rectangle that outpainting fills, in pixels; the image's top left corner is at 0, 0."""

    x: int
    y: int
    width: int
    height: int


async def read_inpaint(
    fields: Mapping[str, Any], policy: ReadingPolicy, max_bytes: int
) -> tuple[JobRequest, list[str]]:
    """Read a call, and name the fields that are not applied.

    max_bytes: of an image. Raises: InvalidRequest, with every field at fault; ImageUnavailable.
    """
    reader = FieldReader(fields)
    image, mask = read_inline(reader, "image"), read_inline(reader, "mask")
    params, notices = read_params(reader, policy)
    box, frame = read_crop_box(reader), read_frame(reader)
    reader.raise_errors()
    picture, mask_content = await load_pair(image, mask, max_bytes)
    size = upright_size(picture.size, size_of(mask_content))
    extension = extension_to(frame, size) if frame else NO_EXTENSION
    ignored = ignored_names(reader, fields)
    width, height = canvas = box or canvas_of(size, extension) or (None, None)
    request = JobRequest(
        dialect=DIALECT,
        params=replace(params, only_masked=canvas != (None, None), output_format=picture.kind),
        init_image=ImageSource(picture.content),
        mask_image=None if frame else ImageSource(mask_content),
        extension=extension,
        width=width,
        height=height,
        notices=(*notices, *([Notice.FIELDS_IGNORED] if ignored else [])),
    )
    return request, ignored


def read_inline(reader: FieldReader, name: str) -> ImageSource:
    """An image as a data URI or base64; IOPaint downloads none."""
    source = reader.image(name)
    if source.is_url:
        reader.errors[name] = [f"The {name} must be a data URI or base64."]
    return source


def read_params(reader: FieldReader, policy: ReadingPolicy) -> tuple[InpaintParams, list[Notice]]:
    """All parameters but those that depend on the picture; and notices."""
    prompts = read_prompt(reader, "prompt"), read_prompt(reader, "negative_prompt")
    scheduler, spacing, notices = read_sampler(reader)
    steps = reader.integer("sd_steps", DEFAULT_STEPS, RANGES["num_inference_steps"])
    params = reader.params(
        prompt=prompts[0],
        negative_prompt=prompts[1],
        seed=reader.seed("sd_seed", DEFAULT_SEED),
        num_inference_steps=steps,
        guidance_scale=reader.number("sd_guidance_scale", 7.5, RANGES["guidance_scale"]),
        strength=read_strength(reader),
        scheduler=scheduler,
        noise_spacing=spacing,
        mask_blur=read_blur(reader),
        match_colours=reader.flag("sd_match_histograms", default=False),
        must_be_checked=policy.force_safety_check,
    )
    return params, [*notices, *prompt_notices(prompts)]


async def load_pair(image: ImageSource, mask: ImageSource, max_bytes: int) -> tuple[Picture, bytes]:
    """Both pictures' files. Raises: ImageUnavailable, with every one at fault."""
    contents, problems = {}, {}
    for name, source in {"image": image, "mask": mask}.items():
        try:
            contents[name] = await load_inline(source.content, max_bytes)
        except FetchFailed as error:
            problems[name] = error.kind
    if problems:
        raise ImageUnavailable(problems)
    content = contents["image"]
    kind = format_of(content) or OutputFormat.PNG
    return Picture(content, size_of(content), kind), contents["mask"]


def upright_size(image: Size | None, mask: Size | None) -> Size | None:
    """The size of the image as it is shown; None where no file's head names a size.

    image, mask: sizes as stored. EXIF may turn the image, but not the mask.
    Raises: InvalidRequest for a mask of another size.
    """
    if image and mask and mask not in (image, image[::-1]):
        sizes = f"{mask[0]}x{mask[1]} and not {image[0]}x{image[1]}"
        raise InvalidRequest(
            {"mask": [f"The mask must have the size of the image; it has {sizes}."]}
        )
    return mask or image


def read_crop_box(reader: FieldReader) -> Size | None:
    """The size of the model's canvas in a call with a crop box; the mask says where it is."""
    if not reader.flag("use_croper", default=False):
        return None
    width = reader.integer("croper_width", DEFAULT_SIDE, SIDE_RANGE)
    return allowed_size(width, reader.integer("croper_height", DEFAULT_SIDE, SIDE_RANGE))


def read_frame(reader: FieldReader) -> Frame | None:
    """The frame of a call that asks for outpainting."""
    if not reader.flag("use_extender", default=False):
        return None
    return Frame(
        x=reader.integer("extender_x", 0, OFFSET_RANGE),
        y=reader.integer("extender_y", 0, OFFSET_RANGE),
        width=reader.integer("extender_width", DEFAULT_FRAME, SIDE_RANGE),
        height=reader.integer("extender_height", DEFAULT_FRAME, SIDE_RANGE),
    )


def extension_to(frame: Frame, size: Size | None) -> Extension:
    """The new pixels that a frame asks for. Raises: InvalidRequest, ImageUnavailable."""
    if size is None:
        raise ImageUnavailable({"image": ImageProblem.UNSUPPORTED})
    sides = {
        "left": max(0, -frame.x),
        "top": max(0, -frame.y),
        "right": max(0, frame.x + frame.width - size[0]),
        "bottom": max(0, frame.y + frame.height - size[1]),
    }
    if not any(sides.values()):
        sentence = "The extender must reach beyond the image."
        raise InvalidRequest({"use_extender": [sentence]})
    if any(pixels not in NEW_PIXELS for pixels in sides.values()):
        sentence = f"The extender may add at most {NEW_PIXELS.maximum:g} pixels on a side."
        raise InvalidRequest({"use_extender": [sentence]})
    return Extension(**sides)


def canvas_of(size: Size | None, extension: Extension) -> Size | None:
    """The size of the model's canvas; None where the whole picture is the canvas.

    IOPaint's result has the size of the image with its extension. An image of a size that the
    model cannot make keeps its size, and the canvas shows the part around the mask alone.
    """
    if size is None or min(size) < 1:
        return None
    whole = extension.extended(*size)
    return None if allowed_size(*whole) == whole else allowed_size(*whole)


def read_prompt(reader: FieldReader, name: str) -> str:
    """A prompt, which may be empty."""
    prompt = reader.text(name) or ""
    reader.check_prompt(name, prompt)
    return prompt


def read_strength(reader: FieldReader) -> float:
    """The strength; 0 is raised to the smallest allowed, which runs one step.

    Outpainting has a strength of 1, as in IOPaint, because the new pixels have nothing to keep.
    """
    if reader.flag("use_extender", default=False):
        return 1.0
    return max(reader.number("sd_strength", 1.0, STRENGTH_RANGE), RANGES["strength"].minimum)


def read_blur(reader: FieldReader) -> int:
    """The blur's sigma in px. IOPaint's number is the radius of OpenCV's kernel."""
    radius = reader.integer("sd_mask_blur", 11, BLUR_RANGE)
    return round(0.3 * (radius - 1) + 0.8) if radius else 0


def read_sampler(
    reader: FieldReader,
) -> tuple[SchedulerName | None, NoiseSpacing | None, list[Notice]]:
    """Scheduler and spacing of a sampler; an unknown one is ignored with a notice."""
    name = text_of(reader.value("sd_sampler") or DEFAULT_SAMPLER)[:MAX_SCHEDULER_CHARS]
    scheduler, has_spacing = find_scheduler(name)
    if scheduler is None:
        return None, None, [Notice.SCHEDULER_IGNORED]
    is_karras = has_spacing and name.lower().endswith(KARRAS)
    if is_karras and NoiseSpacing.KARRAS in NOISE_SPACINGS[scheduler]:
        return scheduler, NoiseSpacing.KARRAS, []
    return scheduler, None, [Notice.NOISE_SPACING_IGNORED] if has_spacing else []


def offered_samplers() -> list[str]:
    """IOPaint's samplers that this server has."""
    return [name for name in SAMPLERS if read_sampler(FieldReader({"sd_sampler": name}))[2] == []]


def ignored_names(reader: FieldReader, fields: Mapping[str, Any]) -> list[str]:
    """Names of fields that would have changed the picture or are unknown, at most `MAX_NAMES`."""
    is_cropped = reader.flag("use_croper", default=False)
    names = [name for name, neutral in NEUTRAL.items() if differs(reader, name, neutral)]
    names += ["croper_x", "croper_y"] if is_cropped else []
    known = APPLIED | NEUTRAL.keys()
    names += [
        name
        for name in fields
        if name not in known and NAME.fullmatch(name) and not OF_OTHER_MODELS.fullmatch(name)
    ]
    return names[:MAX_NAMES]


def differs(reader: FieldReader, name: str, neutral: Any) -> bool:
    """Whether a field is sent with another value than the neutral one."""
    value = reader.value(name)
    return value is not None and value != neutral

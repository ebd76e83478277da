"""A1111's web UI, reading: a call becomes a `JobRequest`, and a `Call` for its answer.

Defaults are those of A1111's API: 50 steps, a scale of 7, a blur of 4 px, and only the part around
the mask. Sources: `modules/api/models.py` and `modules/processing.py` there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.imaging.mask_reading import MaskRule
from models.params import RANGES, Fill, InpaintParams, OutputFormat, Range
from server.api.dialects.a1111.checkpoints import find_model
from server.api.dialects.a1111.leftovers import list_not_applied, list_settings_not_applied
from server.api.dialects.a1111.loras import take_loras
from server.api.dialects.a1111.sampling import AUTOMATIC, DEFAULT_SAMPLER, Sampling, find_sampling
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import MAX_SCHEDULER_CHARS, FieldReader, text_of
from server.core.errors import InvalidRequest
from server.core.notices import prompt_notices
from server.jobs.job import Job

DIALECT = "a1111"

DEFAULT_SIDE = 512
MAX_TASK_ID_CHARS = 200
MAX_NAME_CHARS = 1_000

FILLS = (Fill.BLUR, Fill.ORIGINAL, Fill.NOISE, Fill.ZERO)
"""The fills in the order of A1111's numbers, which begin at 0."""

FORMATS = {
    "png": OutputFormat.PNG,
    "jpg": OutputFormat.JPEG,
    "jpeg": OutputFormat.JPEG,
    "webp": OutputFormat.WEBP,
}
DEFAULT_QUALITY = 80

MODEL, CLIP_LAYERS = "sd_model_checkpoint", "CLIP_stop_at_last_layers"
SAMPLES_FORMAT, QUALITY = "samples_format", "jpeg_quality"
SETTINGS = {MODEL, CLIP_LAYERS, SAMPLES_FORMAT, QUALITY}
"""The settings of `override_settings` that are applied."""

CLIP_LAYERS_RANGE = Range(1, RANGES["clip_skip"].maximum + 1)
"""A1111 counts the layer that is taken from the end: 1 is the last one, which skips none."""

PICTURES = ("init_images", "mask", "latent_mask", "firstpass_image")
"""The fields that may hold megabytes."""


@dataclass(frozen=True, slots=True)
class A1111Facts:
    """The facts in a job's row that only this dialect needs.

    task_id: the client's own name of the call, `force_task_id`.
    """

    task_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `of` is the way back."""
        return {"task_id": self.task_id}

    @classmethod
    def of(cls, job: Job) -> "A1111Facts":
        """The facts of a job; the defaults for a job of another dialect."""
        return cls(task_id=str(job.request.own.get("task_id", "")))


@dataclass(frozen=True, slots=True)
class Call:
    """What the answer to a call needs besides its job.

    sampler: its name in A1111. batch_size: number of pictures in a batch.
    not_applied: names of fields that would have changed the pictures. sends_images: whether the
        answer holds the pictures. parameters: the fields that the answer repeats.
    """

    sampler: str
    batch_size: int
    not_applied: tuple[str, ...]
    sends_images: bool
    parameters: Mapping[str, Any]

    @property
    def repeats_pictures(self) -> bool:
        """Whether `parameters` hold the init image."""
        return "init_images" in self.parameters


def read_img2img(fields: Mapping[str, Any], policy: ReadingPolicy) -> tuple[JobRequest, Call]:
    """Read a call of `img2img`. Raises: InvalidRequest, with every field at fault."""
    reader = FieldReader({**fields, "init_images": first_of(fields.get("init_images"))})
    strength = reader.number("denoising_strength", 0.75, Range(0, 1))
    init_image, mask_image, mask = reader.image("init_images"), None, {}
    if reader.value("mask") is not None:
        mask_image, mask = reader.image("mask"), read_mask(reader)
    # 0 takes one step in A1111, and so does the smallest strength here.
    own = {"strength": max(strength, RANGES["strength"].minimum), **mask}
    request, call = read_call(reader, fields, policy, own)
    return replace(
        request, init_image=init_image, mask_image=mask_image, mask_rule=MaskRule.OPAQUE
    ), call


def read_txt2img(fields: Mapping[str, Any], policy: ReadingPolicy) -> tuple[JobRequest, Call]:
    """Read a call of `txt2img`. Raises: InvalidRequest, with every field at fault."""
    return read_call(FieldReader(fields), fields, policy, {"strength": 1.0})


def read_call(
    reader: FieldReader, fields: Mapping[str, Any], policy: ReadingPolicy, own: Mapping[str, Any]
) -> tuple[JobRequest, Call]:
    """What both calls have in common. own: the parameters of one call alone.

    Raises: InvalidRequest, with every field at fault.
    """
    batch_size, samples = read_samples(reader)
    sampling = read_sampling(reader)
    params = reader.params(
        **read_prompts(reader, policy.loras),
        **read_settings(reader, policy),
        **read_numbers(reader),
        **own,
        samples=samples,
        scheduler=sampling.scheduler,
        noise_spacing=sampling.noise_spacing,
        must_be_checked=policy.force_safety_check,
    )
    request = make_request(reader, params)
    call = Call(
        sampler=sampling.name,
        batch_size=batch_size,
        not_applied=tuple(names_not_applied(reader, fields, request, sampling)),
        sends_images=reader.flag("send_images", default=True),
        parameters=read_parameters(reader, fields),
    )
    reader.raise_errors()
    return request, call


def make_request(reader: FieldReader, params: InpaintParams) -> JobRequest:
    """A request without pictures."""
    width, height = reader.size()
    return JobRequest(
        dialect=DIALECT,
        params=params,
        init_image=None,
        mask_image=None,
        width=width or DEFAULT_SIDE,
        height=height or DEFAULT_SIDE,
        previews=True,
        notices=tuple(prompt_notices([params.prompt, params.negative_prompt])),
        own_facts=A1111Facts(reader.text("force_task_id", MAX_TASK_ID_CHARS) or "").to_json(),
    )


def names_not_applied(
    reader: FieldReader, fields: Mapping[str, Any], request: JobRequest, sampling: Sampling
) -> list[str]:
    """Names of the fields that are not applied as sent."""
    names = list_not_applied(fields, request.params)
    names += list_settings_not_applied(settings_of(reader), SETTINGS)
    if not sampling.is_as_asked:
        names.append("scheduler")
    for name, side in (("width", request.width), ("height", request.height)):
        # `make_request` fitted the side to the sizes that can be made.
        if side and name not in reader.errors and reader.number(name, side) != side:
            names.append(name)
    return names


def read_numbers(reader: FieldReader) -> dict[str, Any]:
    """Parameters that are one number each."""
    return {
        "num_inference_steps": reader.integer("steps", 50, RANGES["num_inference_steps"]),
        "guidance_scale": reader.number("cfg_scale", 7.0, RANGES["guidance_scale"]),
        "seed": reader.seed(),
    }


def read_prompts(reader: FieldReader, offered: Sequence[str]) -> dict[str, Any]:
    """Both prompts, which may be empty, and the LoRAs that the first one names.

    offered: names of LoRAs. The tags of others stay in the prompt and cause a warning.
    """
    sent, negative_prompt = reader.text("prompt") or "", reader.text("negative_prompt") or ""
    prompt, loras = take_loras(sent, offered)
    reader.check_prompt("prompt", prompt)
    reader.check_prompt("negative_prompt", negative_prompt)
    if reader.flag("disable_extra_networks", default=False):
        loras = ()
    return {"prompt": prompt, "negative_prompt": negative_prompt, "loras": loras}


def first_of(pictures: Any) -> Any:
    """The only picture of a list. Raises: InvalidRequest for more than one."""
    if not isinstance(pictures, list):
        return pictures
    if len(pictures) > 1:
        sentence = "The init images may hold one picture; send a call for each."
        raise InvalidRequest({"init_images": [sentence]})
    return pictures[0] if pictures else None


def read_mask(reader: FieldReader) -> dict[str, Any]:
    """The parameters that say what a mask does."""
    blur = RANGES["mask_blur"]
    blur_x = reader.integer("mask_blur_x", 4, blur)
    fill = reader.integer("inpainting_fill", 0, Range(0, len(FILLS) - 1))
    padding = RANGES["only_masked_padding"]
    return {
        "mask_blur": reader.integer("mask_blur", blur_x, blur),
        "fill": FILLS[fill],
        "invert_mask": reader.flag("inpainting_mask_invert", default=False),
        "only_masked": reader.flag("inpaint_full_res", default=True),
        "only_masked_padding": reader.integer("inpaint_full_res_padding", 0, padding),
    }


def read_samples(reader: FieldReader) -> tuple[int, int]:
    """The number of pictures in a batch, and in all batches."""
    allowed = RANGES["samples"]
    at_least_one = Range(allowed.minimum, 1_000)
    batch_size = reader.integer("batch_size", 1, at_least_one)
    batches = reader.integer("n_iter", 1, at_least_one)
    if batch_size * batches in allowed:
        return batch_size, batch_size * batches
    name = "n_iter" if batch_size in allowed else "batch_size"
    sentence = f"n_iter × batch_size may not be more than {allowed.maximum:g} pictures."
    reader.errors.setdefault(name, []).append(sentence)
    return 1, 1


def read_sampling(reader: FieldReader) -> Sampling:
    """Sampler and scheduler; an unknown sampler is an error, as in A1111."""
    field = "sampler_index" if reader.value("sampler_name") is None else "sampler_name"
    sampler = text_of(reader.value(field) or DEFAULT_SAMPLER)[:MAX_SCHEDULER_CHARS]
    schedule = text_of(reader.value("scheduler") or AUTOMATIC)[:MAX_SCHEDULER_CHARS]
    sampling = find_sampling(sampler, schedule)
    if sampling is not None:
        return sampling
    sentence = "Sampler not found: GET /sdapi/v1/samplers lists those of this server."
    reader.errors.setdefault(field, []).append(sentence)
    return Sampling(AUTOMATIC, None, None)


def settings_of(reader: FieldReader) -> dict[str, Any]:
    """The settings that a call overrides; none where the field is no object."""
    settings = reader.value("override_settings")
    return settings if isinstance(settings, dict) else {}


def read_settings(reader: FieldReader, policy: ReadingPolicy) -> dict[str, Any]:
    """The parameters that are settings in A1111."""
    if not isinstance(reader.value("override_settings") or {}, dict):
        sentence = "The override settings must be an object."
        reader.errors.setdefault("override_settings", []).append(sentence)
    settings = FieldReader(settings_of(reader))
    layer = settings.integer(CLIP_LAYERS, 1, CLIP_LAYERS_RANGE)
    quality = settings.integer(QUALITY, DEFAULT_QUALITY, RANGES["output_quality"])
    found = {
        "model": read_model(settings, policy),
        "clip_skip": layer - 1,
        "output_format": read_format(settings),
        "output_quality": quality,
    }
    reader.errors.update(settings.errors)
    return found


def read_model(settings: FieldReader, policy: ReadingPolicy) -> str | None:
    """The id of the model that a call names; None for the server's own."""
    name = settings.text(MODEL, MAX_NAME_CHARS)
    model = None if name is None else find_model(name, policy)
    if name is not None and model is None:
        sentence = "Model not found: GET /sdapi/v1/sd-models lists those of this server."
        settings.errors.setdefault(MODEL, []).append(sentence)
    return model


def read_format(settings: FieldReader) -> OutputFormat:
    """The format of the pictures' files."""
    name = text_of(settings.value(SAMPLES_FORMAT) or OutputFormat.PNG).lower()
    if name not in FORMATS:
        sentence = f"The samples format must be one of {', '.join(FORMATS)}."
        settings.errors.setdefault(SAMPLES_FORMAT, []).append(sentence)
    return FORMATS.get(name, OutputFormat.PNG)


def read_parameters(reader: FieldReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the answer repeats, without pictures unless the client asks for them."""
    is_whole = reader.flag("include_init_images", default=False)
    left_out = PICTURES[2:] if is_whole else PICTURES
    return {
        name: value
        for name, value in fields.items()
        if name not in left_out and not isinstance(value, bytes)
    }

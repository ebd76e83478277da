"""stablediffusionapi.com, reading: fields become a `JobRequest`, an upload, or the id of a fetch.

`families.py` has what differs between the vendor's APIs. Reading of single values is in
`dialects/fields.py`, the description of the calls in `description.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from models.params import (
    NOISE_SPACINGS,
    RANGES,
    FlaggedAs,
    InpaintParams,
    Lora,
    NoiseSpacing,
    Range,
    SchedulerName,
)
from server.api.auth.keyring import key_in_headers
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import MAX_TRACK_ID_CHARS, FieldReader, to_number
from server.api.dialects.vendor.families import BY_PREFIX, V3_FAMILY, Family, Task
from server.api.dialects.vendor.leftovers import list_not_applied
from server.core.errors import InvalidRequest, JobNotFound
from server.core.notices import Notice, prompt_notices
from server.core.settings.sections import StepsPolicy
from server.core.settings.values import MAX_KEY_CHARS
from server.egress.sources import ImageSource
from server.jobs.job import Job

VENDOR_STEPS = (21, 31, 41, 51)

DEFAULT_STEPS = 21
LATER_DEFAULT_STEPS = 20


STRENGTH_RANGE = Range(0, 1)
DEFAULT_SIDE = 512
"""Width and height of text to image in pixels."""

MAX_NAME_CHARS = 1_000
FLAGGED_AS = {
    "black": FlaggedAs.BLANK,
    "blur": FlaggedAs.BLUR,
    "pixelate": FlaggedAs.PIXELATE,
    "sensitive_content_text": FlaggedAs.TEXT,
}
UPLOAD_FIELDS = ("image", "base64_string")
"""The fields in which `base64_crop` and `base64_to_url` take a picture."""


@dataclass(frozen=True, slots=True)
class VendorFacts:
    """The facts in a job's row that only these dialects need.

    wants_base64: answers hold the pictures as base64 texts, or links to these, instead of URLs.
    family: the prefix of its paths. is_check: a call of nsfw_image_check.
    is_instant: the call that makes the job is not held.
    not_applied: names of fields that are not applied.
    """

    wants_base64: bool = False
    family: str = V3_FAMILY.prefix
    is_check: bool = False
    is_instant: bool = False
    not_applied: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; `of` is the way back."""
        return asdict(self) | {"not_applied": [*self.not_applied]}

    @classmethod
    def of(cls, job: Job) -> "VendorFacts":
        """The facts of a job; the defaults for a job of another dialect."""
        own = job.request.own
        return cls(
            wants_base64=bool(own.get("wants_base64")),
            family=str(own.get("family", V3_FAMILY.prefix)),
            is_check=bool(own.get("is_check")),
            is_instant=bool(own.get("is_instant")),
            not_applied=own.get("not_applied", ()),
        )


def family_of_job(job: Job) -> Family:
    """The family of the call that made a job; V3 for a job of another dialect."""
    return BY_PREFIX.get(VendorFacts.of(job).family, V3_FAMILY)


class VendorReader(FieldReader):
    """Remembers which fields were read."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.read: set[str] = set()

    def value(self, name: str) -> Any:
        """The value of a field, None where it is absent."""
        self.read.add(name)
        return super().value(name)

    def refuse_choice(self, name: str) -> None:
        """Record that a value is none of those that may be chosen."""
        sentence = f"The selected {name.replace('_', ' ')} is invalid."
        self.errors.setdefault(name, []).append(sentence)


def read_job(
    fields: Mapping[str, Any], policy: ReadingPolicy, family: Family, task: Task
) -> JobRequest:
    """Read a call for pictures. Raises: InvalidRequest, with every field at fault."""
    if task is Task.NSFW_CHECK:
        return read_check(fields, family)
    reader = VendorReader(fields)
    width, height = read_size(reader, task)
    request = JobRequest(
        dialect=family.dialect,
        params=read_params(reader, policy, family, task),
        init_image=None if task is Task.TEXT_TO_IMAGE else reader.image("init_image"),
        mask_image=reader.image("mask_image") if task is Task.INPAINT else None,
        width=width,
        height=height,
        webhook=reader.web_address("webhook", https_only=policy.https_webhooks),
        track_id=reader.scalar("track_id", MAX_TRACK_ID_CHARS),
    )
    facts = read_facts(reader, family)
    reader.raise_errors()
    if family.is_later:
        facts = replace(facts, not_applied=list_not_applied(fields, reader.read))
    if facts.not_applied:
        reader.notices.append(Notice.FIELDS_IGNORED)
    prompts = [request.params.prompt, request.params.negative_prompt]
    notices = (*reader.notices, *prompt_notices(prompts))
    return replace(request, own_facts=facts.to_json(), notices=notices)


def read_check(fields: Mapping[str, Any], family: Family) -> JobRequest:
    """Read a call of nsfw_image_check: a job that repaints nothing, so that the checker judges the
    init image.
    """
    reader = VendorReader(fields)
    params = InpaintParams(
        prompt="",
        seed=0,
        num_inference_steps=1,
        invert_mask=True,  # without a mask all is repainted, so inverted nothing is
        must_be_checked=True,
    )
    init_image = reader.image("init_image")
    reader.raise_errors()
    return JobRequest(
        dialect=family.dialect,
        params=params,
        init_image=init_image,
        mask_image=None,
        own_facts=VendorFacts(family=family.prefix, is_check=True).to_json(),
    )


def read_params(
    reader: VendorReader, policy: ReadingPolicy, family: Family, task: Task
) -> InpaintParams:
    """The parameters of a job."""
    prompt, negative_prompt = read_prompts(reader, policy, family)
    later = read_later_values(reader, policy, family) if family.is_later else {}
    scheduler = reader.scheduler()
    if family.is_later:
        later["noise_spacing"] = read_noise_spacing(reader, scheduler)
    return reader.params(
        prompt=prompt,
        negative_prompt=negative_prompt,
        samples=reader.integer("samples", 1, RANGES["samples"]),
        num_inference_steps=read_steps(reader, policy.steps_policy, family),
        guidance_scale=reader.number(
            "guidance_scale", family.guidance_scale, RANGES["guidance_scale"]
        ),
        strength=1.0 if task is Task.TEXT_TO_IMAGE else read_strength(reader),
        seed=reader.seed(),
        scheduler=scheduler,
        model=read_model(reader, policy, family),
        safety_check=reader.flag("safety_checker", default=True) or policy.force_safety_check,
        must_be_checked=policy.force_safety_check,
        **later,
    )


def read_later_values(
    reader: VendorReader, policy: ReadingPolicy, family: Family
) -> dict[str, Any]:
    """Parameters that V3 does not have."""
    return {
        "clip_skip": reader.integer("clip_skip", 0, RANGES["clip_skip"]),
        "flagged_as": read_flagged_as(reader, family),
        "loras": read_loras(reader, policy),
    }


def read_facts(reader: VendorReader, family: Family) -> VendorFacts:
    """The facts of a call without `not_applied`, which is known once all fields are read."""
    return VendorFacts(
        wants_base64=reader.flag("base64", default=False),
        family=family.prefix,
        is_instant=family.is_later and reader.flag("instant_response", default=False),
    )


def read_size(reader: VendorReader, task: Task) -> tuple[int | None, int | None]:
    """Width and height in pixels; None where the init image decides."""
    width, height = reader.size()
    if task is Task.TEXT_TO_IMAGE:
        return width or DEFAULT_SIDE, height or DEFAULT_SIDE
    return width, height


def read_prompts(reader: VendorReader, policy: ReadingPolicy, family: Family) -> tuple[str, str]:
    """The prompt and the negative prompt, enhanced if the client or the family wants that.

    The added words follow one blank, even where the client wrote nothing.
    """
    prompt, negative_prompt = reader.required_text("prompt"), reader.text("negative_prompt")
    if reader.flag("enhance_prompt", default=family.enhances):
        prompt = f"{prompt} {policy.enhancement.suffix}"
        negative_prompt = f"{negative_prompt or ''} {policy.enhancement.negative_list}"
    reader.check_prompt("prompt", prompt)
    reader.check_prompt("negative_prompt", negative_prompt or "")
    return prompt, negative_prompt or ""


def read_strength(reader: VendorReader) -> float:
    """Strength by either of its names; 0 is raised to the smallest allowed, which runs one step."""
    name = "prompt_strength" if reader.value("strength") is None else "strength"
    return max(reader.number(name, 0.7, STRENGTH_RANGE), RANGES["strength"].minimum)


def read_steps(reader: VendorReader, policy: StepsPolicy, family: Family) -> int:
    """The number of steps to run: as sent in the later families, by policy in V3."""
    name = "num_inference_steps"
    if family.is_later:
        is_short = reader.value(name) is None and reader.value("steps") is not None
        return reader.integer(
            "steps" if is_short else name, LATER_DEFAULT_STEPS, RANGES["num_inference_steps"]
        )
    if policy is StepsPolicy.EXACT:
        return reader.integer(name, DEFAULT_STEPS, RANGES[name])
    requested = reader.integer(name, DEFAULT_STEPS)
    # The vendor runs one step less than the listed value: its example asks for 30, between
    # 21 and 31, and reports 20.
    return (
        max((listed for listed in VENDOR_STEPS if listed <= requested), default=DEFAULT_STEPS) - 1
    )


def read_model(reader: VendorReader, policy: ReadingPolicy, family: Family) -> str | None:
    """The id of an offered model; None for the server's own."""
    if not family.has_models:
        return None
    name = reader.value("model_id")
    model = policy.model_named(name)
    if family.is_later and name is not None and model is None:
        reader.refuse_choice("model_id")
    return model


def read_flagged_as(reader: VendorReader, family: Family) -> FlaggedAs:
    """What replaces a flagged picture."""
    name = reader.text("safety_checker_type", MAX_NAME_CHARS)
    if name is None:
        return family.flagged_as
    if name.lower() not in FLAGGED_AS:
        reader.refuse_choice("safety_checker_type")
    return FLAGGED_AS.get(name.lower(), family.flagged_as)


def read_noise_spacing(
    reader: VendorReader, scheduler: SchedulerName | None
) -> NoiseSpacing | None:
    """Karras' spacing, where the client names a scheduler that knows it.

    The vendor's samples send `use_karras_sigmas` with any scheduler, so it is no error where it
    cannot be applied.
    """
    if not reader.flag("use_karras_sigmas", default=False):
        return None
    if scheduler is not None and NoiseSpacing.KARRAS in NOISE_SPACINGS[scheduler]:
        return NoiseSpacing.KARRAS
    reader.notices.append(Notice.NOISE_SPACING_IGNORED)
    return None


def read_loras(reader: VendorReader, policy: ReadingPolicy) -> tuple[Lora, ...]:
    """LoRAs by `lora_model`, names with commas between, and their scales by `lora_strength`."""
    names = split(reader.text("lora_model", MAX_NAME_CHARS))
    if not set(names) <= {*policy.loras}:
        reader.refuse_choice("lora_model")
        return ()
    strengths = split(reader.text("lora_strength", MAX_NAME_CHARS) if names else None)
    scales = [scale for each in strengths if (scale := to_number(each)) is not None]
    if len(scales) < len(strengths) or len(scales) not in (0, 1, len(names)):
        reader.refuse_choice("lora_strength")
        return ()
    if len(scales) <= 1:
        scales = (scales or [1.0]) * len(names)
    return tuple(map(Lora, names, scales))


def split(text: str | None) -> list[str]:
    """The texts between commas."""
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def read_upload(fields: Mapping[str, Any]) -> tuple[str, ImageSource]:
    """The name of an upload's field, and its base64, data URI or file. Raises: InvalidRequest."""
    reader = FieldReader(fields)
    sent = [name for name in UPLOAD_FIELDS if reader.value(name) is not None]
    name = sent[0] if sent else UPLOAD_FIELDS[0]
    source = reader.image(name)
    if sent and (reader.errors or source.is_url):
        raise not_an_upload(name)
    reader.raise_errors()
    return name, source


def not_an_upload(name: str) -> InvalidRequest:
    """The error for a field that holds no picture, such as a URL, whose picture is elsewhere."""
    return InvalidRequest({name: [f"The {name.replace('_', ' ')} must be base64 or a file."]})


def wants_crop(fields: Mapping[str, Any]) -> bool:
    """Whether an upload asks to be cropped. Raises: InvalidRequest."""
    reader = FieldReader(fields)
    is_wanted = reader.flag("crop", default=False)
    reader.raise_errors()
    return is_wanted


def is_fetch(fields: Mapping[str, Any]) -> bool:
    """True for a `{key, request_id}` sent to the inpaint path, as some clients poll."""
    reader = FieldReader(fields)
    return reader.value("request_id") is not None and reader.value("prompt") is None


def read_job_id(fields: Mapping[str, Any]) -> int:
    """The job a fetch without an id in its path asks for. Raises: InvalidRequest, JobNotFound."""
    reader = FieldReader(fields)
    text = reader.required_text("request_id")
    reader.raise_errors()
    return parse_job_id(text)


def parse_job_id(text: str) -> int:
    """A job id. Raises: JobNotFound for any other text."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise JobNotFound
    return int(text)


def read_key(fields: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    """The API key: field `key` of body or query, or a header."""
    sent = fields.get("key")
    if isinstance(sent, str) and len(sent) > MAX_KEY_CHARS:
        # No key is so long. The reader would copy megabytes before anybody asks who the caller is.
        return sent[: MAX_KEY_CHARS + 1]
    value = FieldReader(fields).value("key")
    return str(value) if isinstance(value, str | int) else key_in_headers(headers)

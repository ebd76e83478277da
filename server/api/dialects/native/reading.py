"""The native dialect, reading: strict JSON becomes a `JobRequest`, or one error per field at fault.

Fields have the names of diffusers. Answers are in `writing.py`, errors in `problems.py`, and
server-sent events in `events.py`.
"""

import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from models.errors import InvalidInput
from models.imaging.extension import NEW_PIXELS, NO_EXTENSION, Extension
from models.params import (
    CHUNK_TOKENS,
    LORA_SCALES,
    MAX_LCM_STEPS,
    MAX_LORAS,
    MAX_PROMPT_CHARS,
    MAX_PROMPT_CHUNKS,
    RANGES,
    SEED_MODULUS,
    SIZE_MULTIPLE,
    Fill,
    FlaggedAs,
    InpaintParams,
    Lora,
    NoiseSpacing,
    OutputFormat,
    Range,
    SchedulerName,
    is_surely_too_long,
)
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import MAX_TRACK_ID_CHARS, is_https, is_web_address
from server.core.errors import InvalidBody, InvalidRequest, JobNotFound
from server.core.notices import prompt_notices
from server.egress.policy import MAX_URL_CHARS
from server.egress.sources import ImageSource
from server.jobs.idempotency import Idempotency
from server.sandbox.wire import CROP_MAX_PIXELS

DIALECT = "native"
MAX_REPORTED_FIELDS = 50
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
"""1 to 255 visible ASCII characters."""

DEFAULTS = {each.name: each.default for each in dataclasses.fields(InpaintParams)}


class FieldProblem(StrEnum):
    """What can be wrong with a field."""

    REQUIRED = "required"
    UNKNOWN = "unknown_field"
    WRONG_TYPE = "wrong_type"
    OUT_OF_RANGE = "out_of_range"
    NOT_A_MULTIPLE = "not_a_multiple"
    TOO_LONG = "too_long"
    EMPTY = "empty"
    NOT_A_CHOICE = "not_a_choice"
    NOT_A_URL = "not_a_url"
    NOT_HTTPS = "not_https"
    NOT_A_KEY = "not_a_key"
    TOO_MANY_STEPS = "too_many_steps"
    NOT_OF_SCHEDULER = "not_of_scheduler"
    REPEATED = "repeated"


SENTENCES = {
    FieldProblem.REQUIRED: "is required",
    FieldProblem.UNKNOWN: "is not a field of this call",
    FieldProblem.WRONG_TYPE: "has the wrong JSON type",
    FieldProblem.NOT_A_MULTIPLE: f"must be a multiple of {SIZE_MULTIPLE}",
    FieldProblem.EMPTY: "must not be empty",
    FieldProblem.NOT_A_CHOICE: "is none of the allowed values",
    FieldProblem.NOT_A_URL: "must be an absolute http or https URL, without a user name",
    FieldProblem.NOT_HTTPS: "must be an https URL",
    FieldProblem.NOT_A_KEY: "must be 1 to 255 visible ASCII characters",
    FieldProblem.NOT_OF_SCHEDULER: "is not known to the scheduler that is asked for",
    FieldProblem.REPEATED: "must not name a LoRA twice",
    FieldProblem.TOO_MANY_STEPS: f"must be at most {MAX_LCM_STEPS} with {SchedulerName.LCM}",
}

DEADLINE_RANGE = Range(0.1, 604_800)
"""Seconds; a week is longer than any backlog."""

OWN_RANGES = {"extend": NEW_PIXELS, "deadline_s": DEADLINE_RANGE, "loras": LORA_SCALES}
"""Ranges of numbers that are not in `InpaintParams`. The range of a field with several numbers
holds for each."""

NESTED = ("extend", "loras")
"""Fields with several values; `extend.left` and `loras.0.scale` each name one of them."""

PROBLEM_OF_VIOLATION = {
    "num_inference_steps": FieldProblem.TOO_MANY_STEPS,
    "noise_spacing": FieldProblem.NOT_OF_SCHEDULER,
    "loras": FieldProblem.REPEATED,
}
"""What can be wrong with a field that is within its own range."""

MAX_MODEL_CHARS = 255
MAX_CHARS = {
    "prompt": MAX_PROMPT_CHARS,
    "negative_prompt": MAX_PROMPT_CHARS,
    "model": MAX_MODEL_CHARS,
    "webhook": MAX_URL_CHARS,
    "url": MAX_URL_CHARS,
    "track_id": MAX_TRACK_ID_CHARS,
}
"""Longest texts; of a `track_id` the length of its JSON."""

PROBLEM_OF_ERROR = {
    "missing": FieldProblem.REQUIRED,
    "extra_forbidden": FieldProblem.UNKNOWN,
    "greater_than_equal": FieldProblem.OUT_OF_RANGE,
    "less_than_equal": FieldProblem.OUT_OF_RANGE,
    "finite_number": FieldProblem.OUT_OF_RANGE,
    "multiple_of": FieldProblem.NOT_A_MULTIPLE,
    "string_too_long": FieldProblem.TOO_LONG,
    "too_long": FieldProblem.TOO_LONG,
    "string_too_short": FieldProblem.EMPTY,
    "enum": FieldProblem.NOT_A_CHOICE,
    "not_a_url": FieldProblem.NOT_A_URL,
}
"""By pydantic's type of error; every other one is `WRONG_TYPE`."""


def write_field_problem(name: str, problem: FieldProblem) -> str:
    """The sentence for a problem. It never repeats what the client sent."""
    if problem is FieldProblem.OUT_OF_RANGE:
        allowed = RANGES.get(name) or OWN_RANGES.get(name.partition(".")[0])
        if allowed is None:
            return "is out of range"
        sentence = f"must be between {allowed.minimum:g} and {allowed.maximum:.10g}"
        return f"{sentence}, or null for a random one" if name == "seed" else sentence
    if problem is FieldProblem.TOO_LONG:
        if name == "loras":
            return f"must have at most {MAX_LORAS} entries"
        if name not in MAX_CHARS:
            return "is too long"
        limit = f"must have at most {MAX_CHARS[name]} characters"
        if "prompt" not in name:
            return limit
        return f"{limit}, and need at most {MAX_PROMPT_CHUNKS} chunks of {CHUNK_TOKENS} tokens"
    return SENTENCES[problem]


def web_address(url: str) -> str:
    """pydantic's validator of a webhook's URL."""
    if not is_web_address(url):
        raise PydanticCustomError("not_a_url", "not a URL")
    return url


def prompt_within_limits(prompt: str) -> str:
    """pydantic's validator of a prompt."""
    if is_surely_too_long(prompt):
        raise PydanticCustomError("string_too_long", "too long")
    return prompt


def track_id_within_limits(track_id: str | int | float | bool | None) -> Any:
    """pydantic's validator of a `track_id`: a number is as long as its digits."""
    if len(str(track_id)) > MAX_TRACK_ID_CHARS:
        raise PydanticCustomError("string_too_long", "too long")
    return track_id


def ranged(name: str, text: str, **more: Any) -> Any:
    """A number of `InpaintParams`, with the range and the default defined there."""
    allowed = RANGES[name]
    default = DEFAULTS[name]
    kind = int if isinstance(default, int) else float
    return Field(
        default=default,
        ge=kind(allowed.minimum),
        le=kind(allowed.maximum),
        description=text,
        **more,
    )


SIDE_TEXT = (
    "Pixels; 512 where null with only_masked, else from the init image: both its sides, or the one "
    "that its proportions give. What would be above 1024 is then scaled down as a whole"
)


def side(text: str) -> Any:
    """The field of width or height."""
    allowed = RANGES["width"]
    return Field(
        default=None,
        ge=int(allowed.minimum),
        le=int(allowed.maximum),
        multiple_of=SIZE_MULTIPLE,
        description=text,
    )


def new_pixels() -> Any:
    """The field of one side of an extension."""
    return Field(default=0, ge=int(NEW_PIXELS.minimum), le=int(NEW_PIXELS.maximum))


def plain(name: str, text: str, **more: Any) -> Any:
    """The field of any other parameter of `InpaintParams`."""
    return Field(default=DEFAULTS[name], description=text, **more)


def inlined(choices: type[StrEnum]) -> WithJsonSchema:
    """The schema of a choice. FastAPI does not read this body, so a `$ref` would point nowhere."""
    return WithJsonSchema({"type": "string", "enum": [str(each) for each in choices]})


BY_NAME = Field(strict=False)
"""Strict reading would take a member of the enum only, and no text."""
WebAddress = Annotated[
    str,
    Field(
        max_length=MAX_URL_CHARS,
        json_schema_extra={"format": "uri", "pattern": "^https?://[A-Za-z0-9]"},
    ),
    AfterValidator(web_address),
]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(prompt_within_limits)]
TrackText = Annotated[str, Field(max_length=MAX_TRACK_ID_CHARS)]
TrackId = Annotated[TrackText | int | float | bool | None, AfterValidator(track_id_within_limits)]


WRONG = object()
"""In place of a field's value that is not allowed."""


class Sides(BaseModel):
    """New pixels on each side."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    left: int = new_pixels()
    top: int = new_pixels()
    right: int = new_pixels()
    bottom: int = new_pixels()

    @property
    def extension(self) -> Extension:
        """As `accept` takes it, for a mask that is not inverted."""
        return Extension(self.left, self.top, self.right, self.bottom)


class LoraEntry(BaseModel):
    """A LoRA that this server offers, and its scale."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    name: str = Field(max_length=MAX_MODEL_CHARS)
    scale: float = Field(default=1.0, ge=LORA_SCALES.minimum, le=LORA_SCALES.maximum)


class NativeRequest(BaseModel):
    """The JSON body of a new job. Unknown fields and values out of range are errors."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    prompt: Prompt = Field(
        description="What to paint; emphasis, weights and BREAK as in A1111, up to "
        f"{MAX_PROMPT_CHUNKS} chunks of {CHUNK_TOKENS} tokens. Other syntax of A1111 is "
        "reported in the job's warnings",
    )
    init_image: str = Field(
        min_length=1, description="URL, data URI or base64 of a PNG, JPEG or WEBP picture"
    )
    extend: Annotated[Sides, WithJsonSchema(Sides.model_json_schema())] | None = Field(
        default=None,
        description="Outpainting: pixels that are added on each side of the init image and "
        "painted. Width, height and all limits are those of the extended picture",
    )
    mask_image: str | None = Field(
        default=None,
        min_length=1,
        validate_default=True,
        description="As init_image; white is repainted, black is kept. It may be left out with "
        "extend, and then all of the init image is kept",
    )
    negative_prompt: Prompt = plain("negative_prompt", "What to avoid; needs guidance")
    width: int | None = side(SIDE_TEXT)
    height: int | None = side(SIDE_TEXT)
    samples: int = ranged("samples", "Number of pictures; picture i is made with seed + i")
    num_inference_steps: int = ranged("num_inference_steps", "Denoising steps, before strength")
    strength: float = ranged("strength", "1 ignores the init image under the mask")
    guidance_scale: float = ranged("guidance_scale", "Classifier-free guidance; 1 is none")
    guidance_end: float = ranged(
        "guidance_end", "Share of the steps with guidance; the others cost half"
    )
    seed: int | None = Field(
        default=None, ge=0, le=SEED_MODULUS - 1, description="Random where null; the job reports it"
    )
    fill: Annotated[Fill, BY_NAME, inlined(Fill)] = plain(
        "fill", "What a run below a strength of 1 starts from under the mask"
    )
    scheduler: Annotated[SchedulerName, BY_NAME, inlined(SchedulerName)] | None = plain(
        "scheduler", "Noise scheduler; the model's own where null"
    )
    noise_spacing: Annotated[NoiseSpacing, BY_NAME, inlined(NoiseSpacing)] | None = plain(
        "noise_spacing", "Spacing of the noise levels; the model's own where null"
    )
    model: str | None = plain(
        "model",
        "One of the models this server offers; its own where null",
        max_length=MAX_MODEL_CHARS,
    )
    loras: list[Annotated[LoraEntry, WithJsonSchema(LoraEntry.model_json_schema())]] = Field(
        default=[],
        max_length=MAX_LORAS,
        description="LoRAs that this server offers, each once, and their scales",
    )
    clip_skip: int = ranged("clip_skip", "Last layers of the text encoder to skip")
    safety_check: bool = plain("safety_check", "Replace flagged pictures")
    flagged_as: Annotated[FlaggedAs, BY_NAME, inlined(FlaggedAs)] = plain(
        "flagged_as", "What replaces them"
    )
    invert_mask: bool = plain("invert_mask", "Black is repainted, white is kept")
    soft_mask: bool = plain("soft_mask", "Grey is the share of the steps that repaint a pixel")
    mask_grow: int = ranged("mask_grow", "Pixels by which the repainted area grows or shrinks")
    only_masked: bool = plain(
        "only_masked",
        "The model works on the masked part alone, and the picture keeps its size. The init image "
        f"with its extension may then have at most {CROP_MAX_PIXELS} pixels (2048 x 2048), or the "
        "job is refused",
    )
    only_masked_padding: int = ranged("only_masked_padding", "Pixels around it that it sees too")
    mask_blur: int = ranged("mask_blur", "Pixels of the Gaussian that softens the mask's edge")
    match_colours: bool = plain("match_colours", "Shift new colours towards the kept ones around")
    output_format: Annotated[OutputFormat, BY_NAME, inlined(OutputFormat)] = plain(
        "output_format", "Format of the pictures' files; JPEG changes the kept pixels a little too"
    )
    output_quality: int = ranged(
        "output_quality", "Quality of JPEG and WebP; a WebP of 100 is lossless"
    )
    previews: bool = Field(
        default=False,
        description="Small pictures of the work among the job's events; costs a little speed",
    )
    deadline_s: float | None = Field(
        default=None,
        ge=DEADLINE_RANGE.minimum,
        le=DEADLINE_RANGE.maximum,
        description="Seconds from this call until the pictures are needed. A job that would end "
        "later is refused, and one that still waits then fails",
    )
    webhook: WebAddress | None = Field(
        default=None, description="URL that is called when the job has ended"
    )
    track_id: TrackId = Field(default=None, description="Any JSON scalar; given back as it came")

    @field_validator("mask_image")
    @classmethod
    def mask_or_extension(cls, mask_image: str | None, info: ValidationInfo) -> str | None:
        """A mask is needed where nothing is extended."""
        # `extend` is missing in `info.data` where it is wrong itself.
        sides = info.data.get("extend", WRONG)
        is_needed = sides is None or (isinstance(sides, Sides) and sides.extension.is_empty)
        if mask_image is None and is_needed:
            raise PydanticCustomError("missing", "missing")
        return mask_image

    @property
    def body_sha256(self) -> str:
        """Digest of the fields as sent, whatever the spacing and order of the JSON."""
        sent = self.model_dump(mode="json", exclude_unset=True)
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()


class CheckRequest(NativeRequest):
    """The JSON body of a check: that of a new job, of which the prompt may be left out.

    Fields that do not concern the pictures are validated and have no effect.
    """

    prompt: Prompt = Field(default="", description="As in a job; it has no effect")


class PingRequest(BaseModel):
    """The JSON body of a ping: the webhook receiver to test."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    url: WebAddress


PARAMETERS = DEFAULTS.keys() & NativeRequest.model_fields.keys() - {
    *("width", "height", "seed"),
    *("model", "loras"),
}
"""Fields that go into `InpaintParams` unchanged."""


def read_job(
    body: bytes, policy: ReadingPolicy, kind: type[NativeRequest] = NativeRequest
) -> tuple[JobRequest, NativeRequest]:
    """Read the body of a new job, or of a check.

    Raises: InvalidBody; InvalidRequest, with every field at fault.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise to_api_error(error) from error
    if request.model is not None and policy.model_named(request.model) is None:
        raise InvalidRequest({"model": [FieldProblem.NOT_A_CHOICE]})
    unknown = [at for at, each in enumerate(request.loras) if each.name not in policy.loras]
    if unknown:
        raise InvalidRequest({f"loras.{at}.name": [FieldProblem.NOT_A_CHOICE] for at in unknown})
    if policy.https_webhooks and request.webhook is not None and not is_https(request.webhook):
        raise InvalidRequest({"webhook": [FieldProblem.NOT_HTTPS]})
    return to_job_request(request, policy), request


def to_job_request(request: NativeRequest, policy: ReadingPolicy) -> JobRequest:
    """What `accept` takes. The seed is drawn here where it is left open. Raises: InvalidRequest."""
    return JobRequest(
        dialect=DIALECT,
        params=to_params(request, policy),
        init_image=ImageSource(request.init_image),
        mask_image=None if request.mask_image is None else ImageSource(request.mask_image),
        extension=to_extension(request),
        width=request.width,
        height=request.height,
        webhook=request.webhook,
        track_id=request.track_id,
        previews=request.previews,
        deadline_s=request.deadline_s,
        notices=tuple(prompt_notices([request.prompt, request.negative_prompt])),
    )


def to_extension(request: NativeRequest) -> Extension:
    """New pixels around the init image."""
    if request.extend is None:
        return NO_EXTENSION
    mask_level = 0 if request.invert_mask else 255
    return dataclasses.replace(request.extend.extension, mask_level=mask_level)


def to_params(request: NativeRequest, policy: ReadingPolicy) -> InpaintParams:
    """The parameters, at any size. Raises: InvalidRequest."""
    given = {name: getattr(request, name) for name in PARAMETERS}
    given["safety_check"] |= policy.force_safety_check
    given["model"] = policy.model_named(request.model)
    given["loras"] = tuple(Lora(each.name, each.scale) for each in request.loras)
    seed = secrets.randbelow(SEED_MODULUS) if request.seed is None else request.seed
    try:
        return InpaintParams(**given, seed=seed, must_be_checked=policy.force_safety_check)
    except InvalidInput as error:
        # Ranges were checked when the body was read. What is left depends on several values.
        raise InvalidRequest(
            {each.field: [PROBLEM_OF_VIOLATION[each.field]] for each in error.violations}
        ) from error


def read_ping(body: bytes, *, https_only: bool = False) -> str:
    """The URL to ping. Raises: InvalidBody, InvalidRequest."""
    try:
        url = PingRequest.model_validate_json(body).url
    except ValidationError as error:
        raise to_api_error(error) from error
    if https_only and not is_https(url):
        raise InvalidRequest({"url": [FieldProblem.NOT_HTTPS]})
    return url


def to_api_error(error: ValidationError) -> InvalidBody | InvalidRequest:
    """pydantic's errors of a body as an `ApiError`."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    if not errors[0]["loc"]:
        return InvalidBody()  # no JSON, or no object
    return InvalidRequest(problems_of([(name_of(each["loc"]), each["type"]) for each in errors]))


def name_of(location: tuple[int | str, ...]) -> str:
    """The field of an error in a body, such as `samples` or `extend.left`."""
    depth = len(location) if location[0] in NESTED else 1
    return ".".join(map(str, location[:depth]))


def to_call_error(error: RequestValidationError) -> JobNotFound | InvalidRequest:
    """FastAPI's errors of path, query or headers as an `ApiError`."""
    if any(each["loc"][0] == "path" for each in error.errors()):
        return JobNotFound()
    found = [(str(each["loc"][-1]), str(each["type"])) for each in error.errors()]
    return InvalidRequest(problems_of(found))


def problems_of(found: Sequence[tuple[str, str]]) -> dict[str, list[FieldProblem]]:
    """The first problem of each field. found: fields with pydantic's type of error."""
    problems: dict[str, list[FieldProblem]] = {}
    for name, kind in found[:MAX_REPORTED_FIELDS]:
        problems.setdefault(name, [PROBLEM_OF_ERROR.get(kind, FieldProblem.WRONG_TYPE)])
    return problems


def read_idempotency(key: str | None, body_sha256: str) -> Idempotency | None:
    """The idempotency key of the header, for a request of this digest. Raises: InvalidRequest."""
    if key is None:
        return None
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest({"Idempotency-Key": [FieldProblem.NOT_A_KEY]})
    return Idempotency(key, body_sha256)

"""stablediffusionapi.com V3, reading: fields become a `JobRequest`, or the job id of a fetch.

Reading of single values is in `dialects/fields.py`; answers and errors are in `writing.py`. The
OpenAPI description of the calls stands at the end, beside the names it describes.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.params import RANGES, SEED_MODULUS, Range
from server.api.auth.keyring import key_in_headers
from server.api.dialects.base import JobRequest, ReadingPolicy
from server.api.dialects.fields import MAX_TRACK_ID_CHARS, FieldReader
from server.api.dialects.vendor.writing import Body
from server.core.errors import JobNotFound
from server.core.notices import prompt_notices
from server.core.settings import StepsPolicy
from server.jobs.job import Job

DIALECT = "v3"

VENDOR_STEPS = (21, 31, 41, 51)

DEFAULT_STEPS = 21

RANDOM_SEED = -1

STRENGTH_RANGE = Range(0, 1)


@dataclass(frozen=True, slots=True)
class V3Facts:
    """The facts in a job's row that only this dialect needs.

    wants_base64: answers hold the pictures as base64 texts instead of URLs.
    """

    wants_base64: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values; `of` is the way back."""
        return {"wants_base64": self.wants_base64}

    @classmethod
    def of(cls, job: Job) -> "V3Facts":
        """The facts of a job; the defaults for a job of another dialect."""
        return cls(wants_base64=bool(job.request.own.get("wants_base64")))


def read_inpaint(fields: Mapping[str, Any], policy: ReadingPolicy) -> JobRequest:
    """Read an inpaint call. Raises: InvalidRequest, with every field at fault."""
    reader = FieldReader(fields)
    prompt, negative_prompt = read_prompts(reader, policy)
    width, height = reader.size()
    request = JobRequest(
        dialect=DIALECT,
        params=reader.params(
            prompt=prompt,
            negative_prompt=negative_prompt,
            samples=reader.integer("samples", 1, RANGES["samples"]),
            num_inference_steps=read_steps(reader, policy.steps_policy),
            guidance_scale=reader.number("guidance_scale", 7.5, RANGES["guidance_scale"]),
            strength=read_strength(reader),
            seed=read_seed(reader),
            scheduler=reader.scheduler(),
            model=policy.model_named(reader.value("model_id")),
            safety_check=reader.flag("safety_checker", default=True) or policy.force_safety_check,
            must_be_checked=policy.force_safety_check,
        ),
        init_image=reader.image("init_image"),
        mask_image=reader.image("mask_image"),
        width=width,
        height=height,
        webhook=reader.web_address("webhook", https_only=policy.https_webhooks),
        track_id=reader.scalar("track_id", MAX_TRACK_ID_CHARS),
        own_facts=V3Facts(wants_base64=reader.flag("base64", default=False)).to_json(),
    )
    reader.raise_errors()
    notices = (*reader.notices, *prompt_notices([prompt, negative_prompt]))
    return replace(request, notices=notices)


def read_prompts(reader: FieldReader, policy: ReadingPolicy) -> tuple[str, str]:
    """The prompt and the negative prompt, enhanced unless the client declines."""
    prompt, negative_prompt = reader.required_text("prompt"), reader.text("negative_prompt")
    if reader.flag("enhance_prompt", default=True):
        prompt, negative_prompt = policy.enhancement.apply(prompt, negative_prompt)
    reader.check_prompt("prompt", prompt)
    reader.check_prompt("negative_prompt", negative_prompt or "")
    return prompt, negative_prompt or ""


def read_strength(reader: FieldReader) -> float:
    """Strength by either of its names; 0 is raised to the smallest allowed, which runs one step."""
    name = "prompt_strength" if reader.value("strength") is None else "strength"
    return max(reader.number(name, 0.7, STRENGTH_RANGE), RANGES["strength"].minimum)


def read_seed(reader: FieldReader) -> int:
    """The seed modulo 2**32; a random seed where it is absent or -1, as clients of A1111 send."""
    seed = reader.integer("seed", RANDOM_SEED)
    return secrets.randbelow(SEED_MODULUS) if seed == RANDOM_SEED else seed % SEED_MODULUS


def read_steps(reader: FieldReader, policy: StepsPolicy) -> int:
    """The number of steps to run, by policy."""
    name = "num_inference_steps"
    if policy is StepsPolicy.EXACT:
        return reader.integer(name, DEFAULT_STEPS, RANGES[name])
    requested = reader.integer(name, DEFAULT_STEPS)
    # The vendor runs one step less than the listed value: its example asks for 30, between
    # 21 and 31, and reports 20.
    return (
        max((listed for listed in VENDOR_STEPS if listed <= requested), default=DEFAULT_STEPS) - 1
    )


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
    value = FieldReader(fields).value("key")
    return str(value) if isinstance(value, str | int) else key_in_headers(headers)


KEY_FIELD: Body = {"type": "string", "description": "API key; also as header or bearer token"}


def describe_body(properties: Body, required: Sequence[str] = ()) -> Body:
    """OpenAPI's description of a body whose fields are read leniently."""
    schema = {
        "type": "object",
        "properties": {"key": KEY_FIELD, **properties},
        "required": list(required),
    }
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def describe_field(name: str, kind: str, text: str) -> Body:
    """OpenAPI's description of one parameter, with the range that reading checks."""
    allowed = STRENGTH_RANGE if name == "strength" else RANGES.get(name)
    limits: Body = {}
    if allowed and name not in ("width", "height", "seed"):
        limits = {"minimum": allowed.minimum, "maximum": allowed.maximum}
    kinds = sorted({kind, "string"})
    return {"type": [*kinds, "null"], "description": text, **limits}


SIDE_TEXT = (
    "Pixels; a size above 1024 is scaled down as a whole, a side below 64 raised to it, both "
    "rounded down to multiples of 8. From the init image where absent"
)

INPAINT_FIELDS = {
    "prompt": ("string", "What to paint"),
    "negative_prompt": ("string", "What to avoid"),
    "init_image": ("string", "URL, data URI or base64 of a PNG, JPEG or WEBP image"),
    "mask_image": ("string", "The same; white is repainted, black is kept"),
    "width": ("number", SIDE_TEXT),
    "height": ("number", SIDE_TEXT),
    "samples": ("integer", "Number of pictures"),
    "num_inference_steps": ("integer", "Denoising steps"),
    "safety_checker": ("string", "yes: a flagged picture is replaced by a blank one"),
    "enhance_prompt": ("string", "yes: words for better results are added to both prompts"),
    "guidance_scale": ("number", "Scale of classifier-free guidance"),
    "strength": ("number", "1 ignores the init image under the mask"),
    "base64": ("string", "yes: pictures as base64 text instead of URLs"),
    "seed": ("integer", "Sample i is made with seed + i, modulo 2^32; random where absent or -1"),
    "webhook": ("string", "URL that is called when the job has ended"),
    "track_id": ("string", "Returned in the webhook body"),
    "scheduler": (
        "string",
        "Noise scheduler, by its name in diffusers or A1111; an unknown one is ignored",
    ),
    "model_id": ("string", "One of the models this server offers; others are ignored"),
}

INPAINT_OPENAPI = describe_body(
    {name: describe_field(name, *facts) for name, facts in INPAINT_FIELDS.items()},
    required=("prompt", "init_image", "mask_image"),
)

FETCH_OPENAPI = describe_body({"request_id": {"type": ["integer", "string"]}}, ["request_id"])

KEY_OPENAPI = describe_body({})

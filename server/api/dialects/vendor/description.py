"""OpenAPI's description of the vendor's calls, with the ranges that reading checks."""

from collections.abc import Sequence
from typing import Any

from models.params import RANGES
from server.api.dialects.vendor.families import Family, Task
from server.api.dialects.vendor.reading import FLAGGED_AS, STRENGTH_RANGE

Body = dict[str, Any]

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

LATER_FIELDS = {
    "steps": ("integer", "The same as num_inference_steps"),
    "use_karras_sigmas": ("string", "yes: Karras' noise levels, if the scheduler sent knows them"),
    "clip_skip": ("integer", "Last layers of the text encoder to skip"),
    "safety_checker_type": (
        "string",
        f"What replaces a flagged picture: {', '.join(FLAGGED_AS)}",
    ),
    "lora_model": ("string", "Names of this server's LoRAs, with commas between"),
    "lora_strength": ("string", "Their scales, with commas between; one is for all"),
    "instant_response": ("string", "yes: the call is answered at once, as processing"),
}

NOT_IN_IMAGE_TO_IMAGE = {"mask_image"}
NOT_IN_TEXT_TO_IMAGE = {"init_image", "mask_image", "strength"}


def describe_call(family: Family, task: Task) -> Body:
    """OpenAPI's description of a call for pictures."""
    if task is Task.NSFW_CHECK:
        fields = {"init_image": INPAINT_FIELDS["init_image"]}
    else:
        fields = INPAINT_FIELDS | (LATER_FIELDS if family.is_later else {})
    absent = {
        Task.IMAGE_TO_IMAGE: NOT_IN_IMAGE_TO_IMAGE,
        Task.TEXT_TO_IMAGE: NOT_IN_TEXT_TO_IMAGE,
    }.get(task, set()) | (set() if family.has_models else {"model_id"})
    described = {
        name: describe_field(name, *facts) for name, facts in fields.items() if name not in absent
    }
    required = [name for name in ("prompt", "init_image", "mask_image") if name in described]
    return describe_body(described, required)


FETCH_OPENAPI = describe_body({"request_id": {"type": ["integer", "string"]}}, ["request_id"])

KEY_OPENAPI = describe_body({})


def describe_upload(name: str) -> Body:
    """OpenAPI's description of an upload. name: of the picture's field."""
    text = {"type": "string", "description": "Base64 or data URI of a PNG, JPEG or WEBP image"}
    return describe_body({name: text}, [name])

"""OpenAPI's description of the vendor's calls, with the ranges and defaults that reading has."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from models.params import RANGES
from server.api.dialects.openapi import (
    PROMPT,
    Call,
    Description,
    Schema,
    answer,
    array,
    entity,
    errors,
    example_mask,
    example_picture,
    plain,
    ref,
    request_body,
    value,
)
from server.api.dialects.vendor.families import FAMILIES, V3_FAMILY, Family, Task
from server.api.dialects.vendor.reading import (
    DEFAULT_SIDE,
    DEFAULT_STEPS,
    FLAGGED_AS,
    LATER_DEFAULT_STEPS,
    STRENGTH_RANGE,
)

KEY_FIELD = value("string", "API key; also as header or bearer token")
PICTURES = ("init_image", "mask_image")

SIDE_TEXT = (
    "Pixels; a size above 1024 is scaled down as a whole, a side below 64 raised to it, both "
    "rounded down to multiples of 8"
)
PICTURE_TEXT = "URL, data URI or base64 of a PNG, JPEG or WEBP image; in a form also a file"

FIELDS = {
    "prompt": ("string", "What to paint"),
    "negative_prompt": ("string", "What to avoid"),
    "init_image": ("string", PICTURE_TEXT),
    "mask_image": ("string", "The same; white is repainted, black is kept"),
    "width": ("number", SIDE_TEXT),
    "height": ("number", SIDE_TEXT),
    "samples": ("integer", "Number of pictures"),
    "num_inference_steps": ("integer", "Denoising steps"),
    "safety_checker": ("string", "yes: a flagged picture is replaced"),
    "enhance_prompt": ("string", "yes: words for better results are added to both prompts"),
    "guidance_scale": ("number", "Scale of classifier-free guidance"),
    "strength": ("number", "1 ignores the init image under the mask"),
    "prompt_strength": ("number", "Another name of strength"),
    "base64": ("string", "yes: pictures as base64 text instead of URLs"),
    "seed": ("integer", "Sample i is made with seed + i, modulo 2^32; random where absent or -1"),
    "webhook": ("string", "URL that is called when the job has ended"),
    "track_id": ("string", "Returned in the webhook body"),
    "scheduler": (
        "string",
        "Noise scheduler, by its name in diffusers or A1111; an unknown one is ignored",
    ),
    "model_id": ("string", "One of the models this server offers"),
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

ABSENT: Mapping[Task, set[str]] = {
    Task.INPAINT: set(),
    Task.IMAGE_TO_IMAGE: {"mask_image"},
    Task.TEXT_TO_IMAGE: {"init_image", "mask_image", "strength", "prompt_strength"},
    Task.NSFW_CHECK: (FIELDS.keys() | LATER_FIELDS) - {"init_image"},
}
"""Fields that the calls of a task do not have."""

TASK_NAMES = {
    Task.INPAINT: "Inpaint",
    Task.IMAGE_TO_IMAGE: "ImageToImage",
    Task.TEXT_TO_IMAGE: "TextToImage",
    Task.NSFW_CHECK: "SafetyCheck",
}
SENTENCES = {
    Task.INPAINT: "Repaint the white part of a mask in an image.",
    Task.IMAGE_TO_IMAGE: "Repaint all of an image.",
    Task.TEXT_TO_IMAGE: "Make a picture from a text.",
    Task.NSFW_CHECK: "Ask the safety checker about an image, which stays as it is.",
}


def defaults_of(family: Family, task: Task) -> Mapping[str, Any]:
    """The values of absent fields."""
    flagged_as = {each: name for name, each in FLAGGED_AS.items()}[family.flagged_as]
    side = DEFAULT_SIDE if task is Task.TEXT_TO_IMAGE else None
    return {
        "width": side,
        "height": side,
        "samples": 1,
        "num_inference_steps": LATER_DEFAULT_STEPS if family.is_later else DEFAULT_STEPS,
        "safety_checker": "yes",
        "enhance_prompt": "yes" if family.enhances else "no",
        "guidance_scale": family.guidance_scale,
        "strength": 0.7,
        "base64": "no",
        "use_karras_sigmas": "no",
        "clip_skip": 0,
        "safety_checker_type": flagged_as,
        "instant_response": "no",
    }


def describe_field(name: str, kind: str, text: str, default: Any) -> Schema:
    """One field, with the range that reading checks. Texts are read as numbers, too."""
    allowed = STRENGTH_RANGE if name.endswith("strength") else RANGES.get(name)
    limits: Schema = {}
    if allowed and name not in ("width", "height", "seed", "lora_strength"):
        limits = {"minimum": plain(allowed.minimum), "maximum": plain(allowed.maximum)}
    described = value(kind, text, default, **limits)
    return described | {"type": [*sorted({kind, "string"}), "null"]}


def fields_of(family: Family, task: Task) -> dict[str, Schema]:
    """The fields of a call."""
    known = FIELDS | (LATER_FIELDS if family.is_later else {})
    absent = ABSENT[task] | (set() if family.has_models else {"model_id"})
    defaults = defaults_of(family, task)
    return {
        name: describe_field(name, *facts, defaults.get(name))
        for name, facts in known.items()
        if name not in absent
    }


def body_of(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    """A body whose fields are read leniently; the key may be among them."""
    return entity({"key": KEY_FIELD, **properties}, required)


def body_name(family: Family, task: Task) -> str:
    """The name of the schema that calls with the same fields share."""
    words = family.prefix.rpartition("/")[2].split("_")
    kind = "".join(map(str.capitalize, words))
    return f"{'Vendor' if family.is_later else ''}{kind}{TASK_NAMES[task]}"


def bodies_of(families: Sequence[Family]) -> Iterator[tuple[str, Schema]]:
    """The schemas of the calls for pictures, by name."""
    for family in families:
        for task in family.tasks.values():
            fields = fields_of(family, task)
            required = [name for name in ("prompt", *PICTURES) if name in fields]
            yield body_name(family, task), body_of(fields, required)


META = entity(
    {
        "H": value("integer"),
        "W": value("integer"),
        "file_prefix": value("string"),
        "guidance_scale": value("number"),
        "init_image": value("string", "URL, or what it was"),
        "mask_image": value("string"),
        "model_id": value("string", "Not in V3"),
        "scheduler": value("string", "Not in V3"),
        "n_samples": value("integer"),
        "negative_prompt": value("string"),
        "outdir": value("string"),
        "prompt": value("string"),
        "safetychecker": value("string"),
        "seed": value("integer"),
        "steps": value("integer", "As they were run"),
        "strength": value("number"),
    },
    text="The parameters as they were used",
)
LATER_FACTS = {
    "proxy_links": array(value("string"), "As output"),
    "nsfw_content_detected": value("boolean"),
    "webhook_status": value("string"),
    "tip": value("string", "What was not applied as sent"),
}
MESSAGES = {"message": value("string"), "messege": value("string")}


def status(word: str) -> Schema:
    return {"const": word}


SUCCESS_FIELDS: Mapping[str, Schema] = {
    "status": status("success"),
    "generationTime": value("number?", "Seconds"),
    "id": value("integer"),
    "output": array(value("string"), "URLs of the pictures, or base64 texts"),
    "meta": META,
}
PROCESSING = entity(
    {
        "status": status("processing"),
        "tip": value("string"),
        "eta": value("number", "Seconds"),
        **MESSAGES,
        "fetch_result": value("string", "URL to POST to"),
        "id": value("integer"),
        "output": {"enum": ["", []]},
        "meta": META,
    },
    ["status", "eta", "message", "id", "output"],
    "Not finished within the hold time",
)
FAILED = entity(
    {"status": status("failed"), "id": {}, **MESSAGES, "output": status("")},
    ["status", "id", "message", "output"],
)
ERROR = entity(
    {
        "status": {"enum": ["error", "failed"]},
        "message": {
            "description": "A sentence; in V3 about fields an object of lists",
            "type": ["string", "object"],
        },
        "messege": value("string"),
        "tip": value("string"),
        "tips": value("string"),
        "retry_after": value("integer?", "Seconds"),
        "id": status(""),
        "output": status(""),
    },
    ["status", "message"],
)
UPLOAD = entity(
    {
        "status": status("success"),
        **MESSAGES,
        "link": value("string", "May be the image of a call"),
        "output": array(value("string")),
        "request_id": value("integer"),
        "tip": value("string"),
    },
    ["status", "link", "output", "request_id"],
)
VERDICT = entity(
    {
        "status": status("success"),
        "id": value("integer"),
        "images": value("string?"),
        "has_nsfw_concept": array(value("boolean")),
    },
    ["status", "id", "images", "has_nsfw_concept"],
)


def answers_of(name: str, later: Mapping[str, Schema]) -> dict[str, Schema]:
    """The schemas of answers and errors. name: of their dialect. later: fields after V3."""
    success = {**SUCCESS_FIELDS, **later}
    return {
        f"{name}Success": entity(success, [*success]),
        f"{name}Processing": PROCESSING,
        f"{name}Failed": FAILED,
        f"{name}Error": ERROR,
        f"{name}Upload": UPLOAD,
        f"{name}Verdict": VERDICT,
    }


EXAMPLE_FIELDS = {"prompt": PROMPT, "strength": 1, "num_inference_steps": 21, "seed": 1}
EXAMPLES: Mapping[Task, Any] = {
    Task.INPAINT: {
        **EXAMPLE_FIELDS,
        "init_image": example_picture(),
        "mask_image": example_mask(),
        "enhance_prompt": "no",
    },
    Task.IMAGE_TO_IMAGE: {**EXAMPLE_FIELDS, "strength": 0.8, "init_image": example_picture()},
    Task.TEXT_TO_IMAGE: {"prompt": PROMPT, "width": 256, "height": 256, "seed": 1},
    Task.NSFW_CHECK: {"init_image": example_picture()},
}


def example_name(name: str, task: Task) -> str:
    return f"{name.lower()}_{task}"


def examples_of(name: str, upload_field: str) -> dict[str, Any]:
    """The examples of a dialect's calls. name: of the dialect."""
    uploads = {f"{name.lower()}_upload": {upload_field: example_picture()}}
    return {example_name(name, task): each for task, each in EXAMPLES.items()} | uploads


V3_DESCRIPTION = Description(
    title="V3",
    text="Version 3 of stablediffusionapi.com's API. A call is answered within the hold time: with "
    "the pictures, or with an id to fetch them by. Values may be texts, and forms are read too.",
    page="api.md",
    schemas={**dict(bodies_of([V3_FAMILY])), **answers_of("V3", {})},
    examples=examples_of("V3", "image"),
)
LATER_DESCRIPTION = Description(
    title="V4 to V7",
    text="The later APIs of stablediffusionapi.com, now modelslab.com: much as V3, with more "
    "fields. Fields that are not applied are named in `tip`.",
    page="api.md",
    schemas={
        **dict(bodies_of([family for family in FAMILIES if family.is_later])),
        **answers_of("Vendor", LATER_FACTS),
    },
    examples=examples_of("Vendor", "base64_string"),
)


def name_of(family: Family) -> str:
    """The beginning of the names of a family's answers."""
    return "Vendor" if family.is_later else "V3"


def describe(name: str, response: Schema, body: Schema, statuses: Sequence[int] = ()) -> Call:
    """The description of a call. name: `name_of` its family."""
    declared = errors(f"{name}Error", (400, 413, 415, *statuses), has_422=False)
    # The setting `error_status` gives errors 200 by default, as the vendor does.
    response = {"anyOf": [*response.get("anyOf", [response]), ref(f"{name}Error")]}
    text = "`status` tells how the job stands; errors have 200 too where the operator left it so"
    return {
        "responses": {200: answer(text, response), **declared},
        "openapi_extra": {"requestBody": body},
    }


def one_of(name: str, *kinds: str) -> Schema:
    """An answer of several forms."""
    return {"anyOf": [ref(f"{name}{kind}") for kind in kinds]}


def describe_call(family: Family, task: Task) -> Call:
    """The description of a call for pictures."""
    name = name_of(family)
    kinds = ("Verdict",) if task is Task.NSFW_CHECK else ("Success",)
    pictures = [each for each in PICTURES if each in fields_of(family, task)]
    body = request_body(ref(body_name(family, task)), [example_name(name, task)], pictures)
    described = describe(name, one_of(name, *kinds, "Processing", "Failed"), body)
    return described | {"summary": TASK_NAMES[task], "description": SENTENCES[task]}


def describe_fetch(family: Family, *, by_field: bool) -> Call:
    """The description of a fetch, whose job is named by the field `request_id` or by the path."""
    name = name_of(family)
    kinds = ("Success", "Verdict", "Processing", "Failed")
    field = {"request_id": {"type": ["integer", "string"], "description": "The job's id"}}
    body = body_of(field, ["request_id"]) if by_field else body_of({})
    described = describe(name, one_of(name, *kinds), request_body(body), [404])
    described["openapi_extra"]["requestBody"]["required"] = by_field
    return described | {"summary": "Fetch"}


def describe_upload(name: str, field: str) -> Call:
    """The description of an upload. name: of the dialect. field: the picture's."""
    text = "Base64 or data URI of a PNG, JPEG or WEBP image; in a form also a file"
    body = body_of({field: value("string", text), "crop": value("string", "Not applied")}, [field])
    example = f"{name.lower()}_upload"
    return describe(name, ref(f"{name}Upload"), request_body(body, [example], [field]))


SYSTEM_LOAD = describe(
    "V3",
    entity(
        {
            "queue_num": value("integer", "Jobs that wait"),
            "queue_time": value("integer", "Seconds until a new job starts"),
            "status": status("ok"),
        },
        ["queue_num", "queue_time", "status"],
    ),
    request_body(body_of({})) | {"required": False},
)

"""OpenAPI's description of A1111's calls, which read their bodies themselves."""

from collections.abc import Mapping
from typing import Any

from models.params import RANGES, Range
from server.api.dialects.a1111.reading import (
    CLIP_LAYERS,
    CLIP_LAYERS_RANGE,
    DEFAULT_QUALITY,
    DEFAULT_SIDE,
    FILLS,
    FORMATS,
    MAX_TASK_ID_CHARS,
    MODEL,
    QUALITY,
    SAMPLES_FORMAT,
)
from server.api.dialects.a1111.sampling import AUTOMATIC, DEFAULT_SAMPLER
from server.api.dialects.fields import MAX_TEXT_CHARS
from server.api.dialects.openapi import (
    ALL_FIELDS,
    JSON,
    PROMPT,
    Call,
    Description,
    Schema,
    answer,
    array,
    choice,
    entity,
    errors,
    example_mask,
    example_picture,
    picture,
    ref,
    request_body,
    value,
)

SETTINGS = entity(
    {
        MODEL: value("string", "A title of sd-models, an id or an alias"),
        CLIP_LAYERS: value("integer", "1 is the last layer", 1, CLIP_LAYERS_RANGE),
        SAMPLES_FORMAT: choice([*FORMATS], "Format of the pictures' files", "png"),
        QUALITY: value(
            "integer", "Quality of JPEG and WebP", DEFAULT_QUALITY, RANGES["output_quality"]
        ),
    },
    text="Settings for this call alone; others are reported as not applied",
)

TXT2IMG_FIELDS: dict[str, Schema] = {
    "prompt": value(
        "string", "What to paint; <lora:name:0.8> names a LoRA", maxLength=MAX_TEXT_CHARS
    ),
    "negative_prompt": value("string", "What to avoid", maxLength=MAX_TEXT_CHARS),
    "seed": value("integer", "Picture i is made with seed + i; -1 is random", -1),
    "steps": value("integer", "Denoising steps", 50, RANGES["num_inference_steps"]),
    "cfg_scale": value(
        "number", "Classifier-free guidance; 1 is none", 7, RANGES["guidance_scale"]
    ),
    "width": value(
        "integer", "Pixels; fitted to 64 to 1024 and multiples of 8", DEFAULT_SIDE, minimum=1
    ),
    "height": value("integer", "As width", DEFAULT_SIDE, minimum=1),
    "batch_size": value("integer", "Pictures of a batch", 1, RANGES["samples"]),
    "n_iter": value("integer", "Batches; n_iter × batch_size is at most 4", 1, RANGES["samples"]),
    "sampler_name": value("string", "One of samplers", DEFAULT_SAMPLER),
    "sampler_index": value("string", "An older name of sampler_name"),
    "scheduler": value("string", "One of schedulers", AUTOMATIC),
    "override_settings": SETTINGS,
    "send_images": value("boolean", "The answer holds the pictures", default=True),
    "include_init_images": value(
        "boolean", "`parameters` of the answer repeats the pictures sent", default=False
    ),
    "force_task_id": value(
        "string", "Your name of the call, for progress", maxLength=MAX_TASK_ID_CHARS
    ),
    "disable_extra_networks": value("boolean", "No LoRA of the prompt is used", default=False),
}

IMG2IMG_FIELDS: dict[str, Schema] = {
    "init_images": array(
        picture("Base64, data URI or URL of a PNG, JPEG or WebP picture"),
        "One picture",
        minItems=1,
        maxItems=1,
    ),
    "mask": picture("The same; white is repainted, all without a mask"),
    **TXT2IMG_FIELDS,
    "denoising_strength": value("number", "1 ignores the picture", 0.75, Range(0, 1)),
    "mask_blur": value(
        "integer", "Pixels of the Gaussian at the mask's edge", 4, RANGES["mask_blur"]
    ),
    "mask_blur_x": value("integer", "Taken where mask_blur is absent", allowed=RANGES["mask_blur"]),
    "inpainting_fill": value(
        "integer",
        f"What is under the mask at first: {', '.join(FILLS)}, from 0",
        0,
        Range(0, len(FILLS) - 1),
    ),
    "inpaint_full_res": value(
        "boolean", "The model works on the masked part alone; with a mask", default=True
    ),
    "inpaint_full_res_padding": value(
        "integer", "Pixels around it that it sees too", 0, RANGES["only_masked_padding"]
    ),
    "inpainting_mask_invert": value("integer", "1: black is repainted", 0, Range(0, 1)),
}

STATE = entity(
    {
        "skipped": value("boolean"),
        "interrupted": value("boolean"),
        "stopping_generation": value("boolean"),
        "job": value("string"),
        "job_count": value("integer"),
        "job_timestamp": value("string"),
        "job_no": value("integer"),
        "sampling_step": value("integer"),
        "sampling_steps": value("integer"),
    },
    ALL_FIELDS,
)

SCHEMAS = {
    "A1111Img2Img": entity(IMG2IMG_FIELDS, ["init_images"]),
    "A1111Txt2Img": entity(TXT2IMG_FIELDS),
    "A1111Pictures": entity(
        {
            "images": array(value("string"), "The files as base64"),
            "parameters": value("object", "The fields of the call, without pictures"),
            "info": value(
                "string",
                "JSON: seeds, captions, and under extra_generation_params what was not applied",
            ),
        },
        ALL_FIELDS,
    ),
    "A1111Progress": entity(
        {
            "progress": value("number", "0 to 1"),
            "eta_relative": value("number", "Seconds"),
            "state": STATE,
            "current_image": value("string?", "A small preview as base64"),
            "textinfo": value("string?"),
        },
        ALL_FIELDS,
    ),
    "A1111Error": entity(
        {
            "error": value("string", "A code for programs"),
            "detail": value("string", "A sentence for people"),
            "body": value("string"),
            "errors": value("string"),
        },
        ALL_FIELDS,
    ),
}

EXAMPLES: dict[str, Any] = {
    "a1111_img2img": {
        "prompt": PROMPT,
        "init_images": [example_picture()],
        "mask": example_mask(),
        "width": 256,
        "height": 256,
        "steps": 20,
        "denoising_strength": 1,
        "inpainting_fill": 1,
        "inpaint_full_res": False,
        "seed": 1,
    },
    "a1111_txt2img": {"prompt": PROMPT, "width": 256, "height": 256, "steps": 20, "seed": 1},
    "a1111_options": {CLIP_LAYERS: 1},
    "a1111_png_info": {"image": example_mask()},
}

DESCRIPTION = Description(
    title="A1111",
    text="The API of AUTOMATIC1111's web UI. A call waits for its pictures. Fields of A1111 that "
    "are not listed are reported where they would change the picture.",
    page="a1111.md",
    schemas=SCHEMAS,
    examples=EXAMPLES,
)


def describe(
    text: str, schema: Schema, body: Schema | None = None, statuses: tuple[int, ...] = ()
) -> Call:
    """The description of a call. text: about its answer."""
    declared = errors("A1111Error", (*statuses, *((400, 413, 415, 422) if body else ())))
    extra = {"openapi_extra": {"requestBody": body}} if body else {}
    return {"responses": {200: answer(text, schema), **declared}, **extra}


def describe_pictures(schema: str, example: str) -> Call:
    """The description of a call for pictures."""
    body = request_body(ref(schema), [example], media_types=[JSON])
    return describe("The pictures", ref("A1111Pictures"), body, (504,))


IMG2IMG = describe_pictures("A1111Img2Img", "a1111_img2img")
TXT2IMG = describe_pictures("A1111Txt2Img", "a1111_txt2img")
PROGRESS = describe("The progress; 0 without a job", ref("A1111Progress"))
EMPTY_OBJECT = describe("Nothing", value("object"))
NOTHING = describe("Nothing", value("null"))
OPTIONS = describe("The options by name", value("object"))
SET_OPTIONS = describe(
    "Nothing: all options had these values already",
    value("null"),
    request_body(value("object", "Options by name"), ["a1111_options"], media_types=[JSON]),
)
PNG_INFO = describe(
    "Its texts",
    entity(
        {
            "info": value("string", "The caption"),
            "items": value("object", "Other texts by keyword"),
            "parameters": value("object", "The caption's values by name"),
        },
        ALL_FIELDS,
    ),
    request_body(
        entity({"image": picture("Base64 or data URI of a PNG")}, ["image"]),
        ["a1111_png_info"],
        media_types=[JSON],
    ),
)


def list_of(*names: str) -> Call:
    """The description of a call that lists entries. names: of an entry's fields."""
    return describe("All of them", array(entity({name: {} for name in names}, ALL_FIELDS)))


LISTS: Mapping[str, Call] = {
    "sd-models": list_of("title", "model_name", "hash", "sha256", "filename", "config"),
    "loras": list_of("name", "alias", "path", "metadata"),
    "samplers": list_of("name", "aliases", "options"),
    "schedulers": list_of("name", "label", "aliases", "default_rho", "need_inner_model"),
}


def describe_constant(name: str, body: Any) -> Call:
    """The description of a call that always answers the same. name: of its path."""
    kind = {list: "array", dict: "object", type(None): "null"}[type(body)]
    text = "Answered for A1111's clients, and always the same here."
    described = describe(text, value(kind))
    return described | {"summary": name.replace("-", " ").capitalize(), "description": text}

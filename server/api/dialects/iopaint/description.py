"""OpenAPI's description of IOPaint's calls, which read their bodies themselves."""

from typing import Any

from models.params import RANGES, OutputFormat
from server.api.dialects.fields import MAX_TEXT_CHARS
from server.api.dialects.iopaint.reading import (
    BLUR_RANGE,
    DEFAULT_FRAME,
    DEFAULT_SAMPLER,
    DEFAULT_SEED,
    DEFAULT_SIDE,
    DEFAULT_STEPS,
    OFFSET_RANGE,
    SIDE_RANGE,
    STRENGTH_RANGE,
)
from server.api.dialects.iopaint.writing import IGNORED, SEED, WARNINGS
from server.api.dialects.openapi import (
    ALL_FIELDS,
    JSON,
    MULTIPART,
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
    picture,
    ref,
    request_body,
    value,
)

FIELDS: dict[str, Schema] = {
    "image": picture("Data URI or base64 of a PNG, JPEG or WebP picture"),
    "mask": picture("The same, of the same size; white is repainted"),
    "prompt": value("string", "What to paint", maxLength=MAX_TEXT_CHARS),
    "negative_prompt": value("string", "What to avoid", maxLength=MAX_TEXT_CHARS),
    "sd_steps": value("integer", "Denoising steps", DEFAULT_STEPS, RANGES["num_inference_steps"]),
    "sd_strength": value("number", "1 ignores the image under the mask", 1, STRENGTH_RANGE),
    "sd_guidance_scale": value(
        "number", "Classifier-free guidance; 1 is none", 7.5, RANGES["guidance_scale"]
    ),
    "sd_sampler": value(
        "string", "One of samplers; an unknown one means the model's own", DEFAULT_SAMPLER
    ),
    "sd_seed": value("integer", "-1 is random", DEFAULT_SEED),
    "sd_mask_blur": value(
        "integer", "Radius of OpenCV's kernel; its sigma is about 0.3 of that", 11, BLUR_RANGE
    ),
    "sd_match_histograms": value("boolean", "Shift new colours", default=False),
    "use_croper": value(
        "boolean", "The model works on the part around the mask, at this size", default=False
    ),
    "croper_width": value("integer", "Pixels", DEFAULT_SIDE, SIDE_RANGE),
    "croper_height": value("integer", "Pixels", DEFAULT_SIDE, SIDE_RANGE),
    "use_extender": value(
        "boolean", "Outpainting: paint what of the frame lies outside the image", default=False
    ),
    "extender_x": value("integer", "Left side of the frame in the image", 0, OFFSET_RANGE),
    "extender_y": value("integer", "Its upper side", 0, OFFSET_RANGE),
    "extender_width": value("integer", "Pixels", DEFAULT_FRAME, SIDE_RANGE),
    "extender_height": value("integer", "Pixels", DEFAULT_FRAME, SIDE_RANGE),
}

MODEL_FIELDS: dict[str, Schema] = {
    "name": value("string"),
    "path": value("string"),
    "model_type": value("string"),
    **{
        name: value("boolean")
        for name in (
            *("is_single_file_diffusers", "need_prompt", "support_strength"),
            *("support_outpainting", "support_lcm_lora", "support_controlnet"),
            *("support_brushnet", "support_powerpaint_v2"),
        )
    },
    "controlnets": array(value("string")),
    "brushnets": array(value("string")),
}

CONFIG_FIELDS: dict[str, Schema] = {
    "modelInfos": array(ref("IOPaintModel")),
    "samplers": array(value("string")),
    **{
        name: value("boolean")
        for name in (
            *("enableFileManager", "enableAutoSaving", "enableControlnet"),
            *("disableModelSwitch", "isDesktop"),
        )
    },
    "controlnetMethod": value("null"),
    **{
        name: value("string")
        for name in ("removeBGModel", "realesrganModel", "interactiveSegModel")
    },
    **{
        name: array({})
        for name in ("plugins", "removeBGModels", "realesrganModels", "interactiveSegModels")
    },
}

SCHEMAS = {
    "IOPaintInpaint": entity(FIELDS, ["image", "mask"]),
    "IOPaintModel": entity(MODEL_FIELDS, ALL_FIELDS),
    "IOPaintError": entity(
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
    "iopaint_inpaint": {
        "image": example_picture(),
        "mask": example_mask(),
        "prompt": PROMPT,
        "sd_steps": 20,
    },
    "iopaint_model": {"name": "builtin"},
    "iopaint_gen_info": {"file": example_picture()},
}

DESCRIPTION = Description(
    title="IOPaint",
    text="The API of IOPaint, for its page and its other clients. A call waits for its picture.",
    page="iopaint.md",
    schemas=SCHEMAS,
    examples=EXAMPLES,
)


def describe(response: Schema, statuses: tuple[int, ...] = (), body: Schema | None = None) -> Call:
    """The description of a call."""
    if body:
        statuses = (*statuses, 400, 413, 415, 422)
    extra = {"openapi_extra": {"requestBody": body}} if body else {}
    return {"responses": {200: response, **errors("IOPaintError", statuses)}, **extra}


def header(text: str) -> Schema:
    return {"description": text, "schema": {"type": "string"}}


PICTURE = answer(
    "The picture's file, in the format of the image",
    media_types=[each.media_type for each in OutputFormat],
) | {
    "headers": {
        SEED: header("The seed"),
        WARNINGS: header("Codes of what was not applied as sent"),
        IGNORED: header("Names of fields that are not applied"),
    }
}
INPAINT = describe(
    PICTURE, (504,), request_body(ref("IOPaintInpaint"), ["iopaint_inpaint"], media_types=[JSON])
)
MODEL = describe(answer("The model", ref("IOPaintModel")))
SWITCH_MODEL = describe(
    answer("The model", ref("IOPaintModel")),
    body=request_body(
        entity({"name": value("string", "The server's model")}, ["name"]),
        ["iopaint_model"],
        media_types=[JSON],
    ),
)
SERVER_CONFIG = describe(answer("What the page may show", entity(CONFIG_FIELDS, ALL_FIELDS)))
SAMPLERS = describe(answer("Their names", array(value("string"))))
INPUT_IMAGE = describe(answer("None", entity({"detail": value("string")}, ALL_FIELDS)))
GEN_INFO = describe(
    answer(
        "The prompts; empty without a caption",
        entity({"prompt": value("string"), "negative_prompt": value("string")}, ALL_FIELDS),
    ),
    body=request_body(
        entity({"file": value("string", "A picture's file")}, ["file"]),
        ["iopaint_gen_info"],
        ["file"],
        [MULTIPART],
    ),
)

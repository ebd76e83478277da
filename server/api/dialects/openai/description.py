"""OpenAPI's description of OpenAI's calls, which read their bodies themselves."""

from typing import Any

from models.params import RANGES, Fill, FlaggedAs, NoiseSpacing, OutputFormat, SchedulerName
from server.api.dialects.fields import MAX_TEXT_CHARS
from server.api.dialects.openai.reading import (
    BACKGROUNDS,
    COMPRESSION,
    DEFAULT_QUALITY,
    DEFAULT_STEPS,
    PARTIAL_IMAGES,
    RESPONSE_FORMATS,
)
from server.api.dialects.openapi import (
    ALL_FIELDS,
    JSON,
    MULTIPART,
    PROMPT,
    Description,
    answer,
    array,
    choice,
    entity,
    errors,
    example_hole,
    example_picture,
    picture,
    ref,
    request_body,
    value,
)

COMMON = {
    "prompt": value("string", "What to paint", maxLength=MAX_TEXT_CHARS),
    "model": value("string", "One on offer or its alias; the server's own also for OpenAI's names"),
    "n": value("integer", "Number of pictures", 1, RANGES["samples"]),
    "size": value(
        "string",
        "auto, or width x height such as 512x512; larger ones than 1024 are scaled down",
        "auto",
        pattern="^(auto|[1-9][0-9]{0,4} ?[x×] ?[1-9][0-9]{0,4})$",
    ),
    "response_format": choice(RESPONSE_FORMATS, "Both where absent"),
    "output_format": choice(OutputFormat, "Format of the pictures' files", OutputFormat.PNG.value),
    "output_compression": value(
        "integer",
        "Quality of JPEG and WebP; a WebP of 100 is lossless",
        DEFAULT_QUALITY,
        COMPRESSION,
    ),
    "background": choice(BACKGROUNDS, "No picture here is transparent", "auto"),
    "stream": value("boolean", "Answer with server-sent events", default=False),
    "partial_images": value("integer", "Previews of a stream", 0, PARTIAL_IMAGES),
    "negative_prompt": value("string", "What to avoid", maxLength=MAX_TEXT_CHARS),
    "guidance_scale": value(
        "number", "Classifier-free guidance; 1 is none", 7.5, RANGES["guidance_scale"]
    ),
    "seed": value("integer", "Picture i is made with seed + i; random where absent or -1"),
    "num_inference_steps": value(
        "integer", "Denoising steps", DEFAULT_STEPS, RANGES["num_inference_steps"]
    ),
    "clip_skip": value(
        "integer", "Last layers of the text encoder to skip", 0, RANGES["clip_skip"]
    ),
    "scheduler": choice(SchedulerName, "Noise scheduler; the model's own where absent"),
    "noise_spacing": choice(NoiseSpacing, "Spacing of the noise levels, if the scheduler knows it"),
    "safety_check": value("boolean", "Replace flagged pictures", default=True),
    "flagged_as": choice(FlaggedAs, "What replaces them", FlaggedAs.BLANK.value),
    "quality": value("string", "Not applied; others than auto, standard and medium are reported"),
    "input_fidelity": value("string", "Not applied; others than low are reported"),
    "moderation": value("string", "Not applied; others than auto are reported"),
    "style": value("string", "Not applied; others than vivid are reported"),
    "user": value("string", "Without effect"),
    "safety_identifier": value("string", "Without effect"),
}

PICTURES = {
    "image": picture(
        "The picture to repaint, PNG, JPEG or WebP: a file, data URI, base64, URL, or an object "
        "with `image_url`. The field may also be called image[] or images"
    ),
    "mask": picture(
        "The same; what is transparent is repainted. Where absent, the image's own transparent "
        "pixels are, and without such pixels all of it"
    ),
}

MASK = {
    "strength": value(
        "number",
        "1 ignores the image under the mask; 0.8 where absent and all of an image is repainted",
        allowed=RANGES["strength"],
    ),
    "fill": choice(
        Fill, "What a run below a strength of 1 starts from under the mask", Fill.ORIGINAL.value
    ),
    "mask_grow": value("integer", "Pixels by which the mask grows", 0, RANGES["mask_grow"]),
    "mask_blur": value(
        "integer", "Pixels of the Gaussian at the mask's edge", 0, RANGES["mask_blur"]
    ),
    "only_masked": value("boolean", "The model works on the masked part alone", default=False),
    "only_masked_padding": value(
        "integer", "Pixels around it that it sees too", 32, RANGES["only_masked_padding"]
    ),
    "invert_mask": value("boolean", "Repaint what is opaque", default=False),
    "soft_mask": value("boolean", "Grey repaints a share of the steps", default=False),
    "match_colours": value("boolean", "Shift new colours towards those around", default=False),
}

PICTURE_FACTS = {
    "url": value("string", "Where the picture is", format="uri"),
    "b64_json": value("string", "The file as base64"),
    "seed": value("integer", "Makes this picture again"),
    "flagged": value("boolean", "The safety checker replaced it"),
}
WARNING = entity(
    {
        "code": value("string"),
        "message": value("string"),
        "fields": array(value("string"), "With fields_ignored: which"),
    },
    ["code", "message"],
)
MODEL = entity(
    {
        "id": value("string"),
        "object": value("string"),
        "created": value("integer"),
        "owned_by": value("string"),
    },
    ALL_FIELDS,
)

SCHEMAS = {
    "OpenAIEdit": entity({**PICTURES, **COMMON, **MASK}, ["image", "prompt"]),
    "OpenAIGeneration": entity(COMMON, ["prompt"]),
    "OpenAIPictures": entity(
        {
            "created": value("integer", "Seconds since 1970"),
            "data": array(entity(PICTURE_FACTS, ["seed"])),
            "background": value("string"),
            "output_format": value("string"),
            "quality": value("string"),
            "size": value("string", "What was made; auto with only_masked"),
            "usage": value("object", "All zero: nothing is counted in tokens"),
            "warnings": array(WARNING, "What was not applied as sent"),
        },
        ["created", "data", "background", "output_format", "quality", "size", "usage"],
    ),
    "OpenAIModel": MODEL,
    "OpenAIModels": entity(
        {"object": value("string"), "data": array(ref("OpenAIModel"))}, ALL_FIELDS
    ),
    "OpenAIError": entity(
        {
            "error": entity(
                {
                    "message": value("string"),
                    "type": value("string"),
                    "param": value("string?", "The first field at fault"),
                    "code": value("string?"),
                },
                ALL_FIELDS,
            )
        },
        ALL_FIELDS,
    ),
}

EXAMPLES: dict[str, Any] = {
    "openai_edit": {
        "prompt": PROMPT,
        "image": example_picture(),
        "mask": example_hole(),
        "seed": 1,
        "response_format": "b64_json",
    },
    "openai_generation": {"prompt": PROMPT, "size": "256x256", "seed": 1},
}

DESCRIPTION = Description(
    title="OpenAI",
    text="OpenAI's images API: its SDKs work with this server's address as their base URL. A call "
    "waits for its pictures.",
    page="openai.md",
    schemas=SCHEMAS,
    examples=EXAMPLES,
)


def describe_call(schema: str, example: str, pictures: tuple[str, ...] = ()) -> dict[str, Any]:
    """The description of a call for pictures, as arguments of a route."""
    made = answer("The pictures", ref("OpenAIPictures"))
    made["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    media_types = (MULTIPART, JSON) if pictures else (JSON,)
    return {
        "responses": {
            200: made,
            **errors("OpenAIError", (400, 404, 413, 415, 504), has_422=False),
        },
        "openapi_extra": {
            "requestBody": request_body(ref(schema), [example], pictures, media_types)
        },
    }


EDIT = describe_call("OpenAIEdit", "openai_edit", ("image", "mask"))
GENERATION = describe_call("OpenAIGeneration", "openai_generation")
MODELS: dict[str, Any] = {
    "responses": {200: answer("The models", ref("OpenAIModels")), **errors("OpenAIError")}
}
MODEL_CALL: dict[str, Any] = {
    "responses": {200: answer("The model", ref("OpenAIModel")), **errors("OpenAIError", [404])}
}

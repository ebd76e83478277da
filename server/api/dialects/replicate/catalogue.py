"""Replicate's API: models as `owner/name`, their versions, and the inputs of a prediction.

Every model here has the same inputs and one version, whose id is a digest of the model's name.
"""

import hashlib
from pathlib import PurePath
from typing import Any

from models.params import RANGES, OutputFormat, Range
from server.api.dialects.base import ReadingPolicy

OWNER = "inpaint-server"
"""Owner of the models whose names have none."""

DEFAULT_STEPS = 50
DEFAULT_SIDE = 512
"""Width and height in pixels where there is no image, which would decide."""

COG_VERSION = "0.9.0"
"""Clients learn from it how to read `openapi_schema`; in older versions no output is a list."""

FORMATS = {
    "png": OutputFormat.PNG,
    "jpg": OutputFormat.JPEG,
    "jpeg": OutputFormat.JPEG,
    "webp": OutputFormat.WEBP,
}

INPUTS: dict[str, tuple[str, str, Any]] = {
    "prompt": ("string", "What to paint", None),
    "negative_prompt": ("string", "What to avoid", ""),
    "image": ("string", "The picture to change; without one a picture is made of the prompt", None),
    "mask": ("string", "White is repainted, black is kept; without one all is repainted", None),
    "width": ("integer", "Pixels, a multiple of 8; the image's own width where absent", None),
    "height": ("integer", "Pixels, a multiple of 8; the image's own height where absent", None),
    "num_outputs": ("integer", "Number of pictures", 1),
    "num_inference_steps": ("integer", "Denoising steps", DEFAULT_STEPS),
    "guidance_scale": ("number", "Scale of classifier-free guidance", 7.5),
    "scheduler": ("string", "Noise scheduler; the model's own where absent", None),
    "seed": ("integer", "Picture i is made with seed + i; random where absent", None),
    "strength": ("number", "1 ignores the image under the mask", None),
    "prompt_strength": ("number", "Another name of strength; 0.8 for an image without mask", None),
    "output_format": ("string", "png, jpg or webp", "png"),
    "output_quality": ("integer", "Quality of jpg and webp; a webp of 100 is lossless", 95),
    "disable_safety_checker": ("boolean", "Return flagged pictures too", False),
}
"""Type, description and default of each input."""

STRENGTH_RANGE = Range(0, 1)
OWN_RANGES = {
    "num_outputs": RANGES["samples"],
    "strength": STRENGTH_RANGE,
    "prompt_strength": STRENGTH_RANGE,
    "seed": None,
}
"""Ranges that differ from those of the parameter with the same name; None for any number."""

FILES = ("image", "mask")


def public_name(model: str | None) -> str:
    """A model as `owner/name`. model: its id; None for the server's own."""
    if model is None:
        return f"{OWNER}/default"
    parts = [part for part in PurePath(model).parts if part != "/"]
    is_hub_id = len(parts) == 2 and model == "/".join(parts)
    return model if is_hub_id else f"{OWNER}/{parts[-1]}"


def version_of(model: str | None) -> str:
    """The id of a model's only version."""
    return hashlib.sha256(public_name(model).encode()).hexdigest()


def find_model(name: str, version: str, policy: ReadingPolicy) -> str | None:
    """The offered model with this `owner/name` or version's id; None where there is none."""
    named = policy.model_named(name) or policy.model_named(name.partition("/")[2])
    if named is not None:
        return named
    same = (each for each in policy.models if version_of(each) == version)
    return next(same, None)


def input_schema() -> dict[str, Any]:
    """The JSON schema of a prediction's input."""
    properties = {name: describe_input(name, order) for order, name in enumerate(INPUTS)}
    return {"title": "Input", "type": "object", "required": ["prompt"], "properties": properties}


def describe_input(name: str, order: int) -> dict[str, Any]:
    """The JSON schema of one input. order: where forms show it."""
    kind, text, default = INPUTS[name]
    allowed = OWN_RANGES.get(name, RANGES.get(name))
    described: dict[str, Any] = {
        "type": kind,
        "title": name.replace("_", " ").capitalize(),
        "description": text,
        "x-order": order,
    }
    if default is not None:
        described["default"] = default
    if allowed is not None:
        described |= {"minimum": allowed.minimum, "maximum": allowed.maximum}
    if name in FILES:
        described["format"] = "uri"
    return described


def openapi_schema() -> dict[str, Any]:
    """A version's description, from which clients learn inputs and output."""
    output = {"title": "Output", "type": "array", "items": {"type": "string", "format": "uri"}}
    return {
        "openapi": "3.0.2",
        "info": {"title": "inpaint-server", "version": "1"},
        "paths": {},
        "components": {"schemas": {"Input": input_schema(), "Output": output}},
    }

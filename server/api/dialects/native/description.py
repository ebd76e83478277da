"""OpenAPI's description of the native bodies, which FastAPI does not read: it sets no limits."""

from typing import Any

from pydantic import BaseModel

from server.api.dialects.native import problems
from server.api.dialects.native.reading import CheckRequest, NativeRequest, PingRequest
from server.api.dialects.openapi import (
    JSON,
    PROMPT,
    Description,
    example_mask,
    example_picture,
    request_body,
)

EXAMPLES: dict[str, Any] = {
    "native_job": {
        "prompt": PROMPT,
        "init_image": example_picture(),
        "mask_image": example_mask(),
        "strength": 1,
        "seed": 1,
    },
    "native_outpainting": {
        "prompt": PROMPT,
        "init_image": example_picture(),
        "extend": {"right": 128},
        "strength": 1,
    },
    "native_check": {"init_image": example_picture(), "mask_image": example_mask()},
}

DESCRIPTION = Description(
    title="Native",
    text="This server's own API: jobs with progress, events, receipts and webhooks. It reads "
    "strictly, and an error names each field at fault.",
    page="api.md",
    schemas=problems.schemas(),
    examples=EXAMPLES,
)


def describe_body(model: type[BaseModel], *examples: str) -> dict[str, Any]:
    """A body by its model, whose schema stands by itself."""
    return {"requestBody": request_body(model.model_json_schema(), examples, media_types=[JSON])}


NEW_JOB = describe_body(NativeRequest, "native_job", "native_outpainting")
CHECK = describe_body(CheckRequest, "native_check")
PING = describe_body(PingRequest)

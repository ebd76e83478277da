"""OpenAPI's description of Replicate's calls, which read their bodies themselves."""

from collections.abc import Sequence
from typing import Any

from server.api.dialects.openapi import (
    ALL_FIELDS,
    JSON,
    MULTIPART,
    PROMPT,
    Call,
    Description,
    Responses,
    Schema,
    answer,
    array,
    choice,
    entity,
    errors,
    example_mask,
    example_picture,
    ref,
    request_body,
    value,
)
from server.api.dialects.replicate.catalogue import input_schema
from server.api.dialects.replicate.reading import EVENTS, MAX_WAIT_S
from server.api.dialects.replicate.writing import MEDIA_TYPE, STATUS

WEBHOOK_FIELDS = {
    "webhook": value("string", "URL that is called when the prediction has completed"),
    "webhook_completed": value("string", "An older name of webhook"),
    "webhook_events_filter": array(
        choice(EVENTS), "Events to be called for; `completed` is the only one that is sent"
    ),
}

PREDICTION_FIELDS: dict[str, Schema] = {
    "id": value("string"),
    "model": value("string", "owner/name"),
    "version": value("string"),
    "status": choice([*STATUS.values()]),
    "input": value("object", "The inputs as they were used"),
    "output": value(
        "array?", "The pictures: data URIs, or URLs where the server is reached over https"
    )
    | {"items": value("string")},
    "error": value("string?"),
    "logs": value("string", "The seed, what was not applied as sent, and the progress"),
    "metrics": entity({"predict_time": value("number", "Seconds")}),
    "created_at": value("string?"),
    "started_at": value("string?"),
    "completed_at": value("string?"),
    "data_removed": value("boolean", "The pictures have been removed"),
    "source": value("string"),
    "urls": entity({"get": value("string"), "cancel": value("string")}, ALL_FIELDS),
}

MODEL_NAMES = ("description", "github_url", "paper_url", "license_url", "cover_image_url")

SCHEMAS = {
    "ReplicateInput": input_schema(),
    "ReplicatePrediction": entity(
        {
            "version": value("string", "owner/name, owner/name:version or a version's id"),
            "input": ref("ReplicateInput"),
            **WEBHOOK_FIELDS,
        },
        ["version", "input"],
    ),
    "ReplicateModelPrediction": entity(
        {
            "version": value("string", "Without effect: the path names the model"),
            "input": ref("ReplicateInput"),
            **WEBHOOK_FIELDS,
        },
        ["input"],
    ),
    "ReplicateAnswer": entity(PREDICTION_FIELDS, ALL_FIELDS),
    "ReplicateFile": entity(
        {
            "id": value("string"),
            "name": value("string"),
            "content_type": value("string"),
            "size": value("integer", "Bytes"),
            "etag": value("string"),
            "checksums": entity({"sha256": value("string")}, ALL_FIELDS),
            "metadata": value("object"),
            "created_at": value("string"),
            "expires_at": value("string", "When it is removed"),
            "urls": entity({"get": value("string", "May be an input")}, ALL_FIELDS),
        },
        ALL_FIELDS,
    ),
    "ReplicateVersion": entity(
        {
            "id": value("string"),
            "created_at": value("string"),
            "cog_version": value("string"),
            "openapi_schema": value("object", "The inputs and the output"),
        },
        ALL_FIELDS,
    ),
    "ReplicateModel": entity(
        {
            "url": value("string"),
            "owner": value("string"),
            "name": value("string"),
            "visibility": value("string"),
            "run_count": value("integer"),
            "default_example": value("object?"),
            "latest_version": ref("ReplicateVersion"),
            **{name: value("string?") for name in MODEL_NAMES},
        },
        ALL_FIELDS,
    ),
    "ReplicateError": entity(
        {"title": value("string"), "detail": value("string"), "status": value("integer")},
        ALL_FIELDS,
    ),
}

EXAMPLE_INPUT: dict[str, Any] = {
    "prompt": PROMPT,
    "image": example_picture(),
    "mask": example_mask(),
    "num_inference_steps": 20,
    "seed": 1,
}
EXAMPLES: dict[str, Any] = {
    "replicate_prediction": {"version": "inpaint-server/builtin", "input": EXAMPLE_INPUT},
    "replicate_model_prediction": {"input": EXAMPLE_INPUT},
    "replicate_file": {"content": example_picture()},
}

DESCRIPTION = Description(
    title="Replicate",
    text="Replicate's API: predictions, and files that are uploaded before them. A prediction is "
    "polled, or waited for with the header `Prefer: wait`.",
    page="replicate.md",
    schemas=SCHEMAS,
    examples=EXAMPLES,
)


def describe(text: str, schema: Schema, statuses: Sequence[int] = (), status: int = 200) -> Call:
    """The description of a call. text: about its answer."""
    declared: Responses = errors("ReplicateError", statuses, MEDIA_TYPE)
    return {"responses": {status: answer(text, schema), **declared}}


def describe_creation(schema: str, example: str) -> Call:
    """The description of a call that makes a prediction."""
    made = describe("The prediction", ref("ReplicateAnswer"), (400, 413, 415, 422), 201)
    prefer = {
        "name": "Prefer",
        "in": "header",
        "description": f"wait, or wait=SECONDS, at most {MAX_WAIT_S}: answer once it has ended",
        "schema": {"type": "string", "examples": ["wait"]},
    }
    body = request_body(ref(schema), [example], media_types=[JSON])
    return {**made, "openapi_extra": {"requestBody": body, "parameters": [prefer]}}


CREATE = describe_creation("ReplicatePrediction", "replicate_prediction")
CREATE_OF_MODEL = describe_creation("ReplicateModelPrediction", "replicate_model_prediction")
LIST = describe(
    "A page",
    entity(
        {
            "previous": value("string?", "URL of the page of newer ones"),
            "next": value("string?", "URL of the page of older ones"),
            "results": array(ref("ReplicateAnswer")),
        },
        ALL_FIELDS,
    ),
)
PREDICTION = describe("The prediction", ref("ReplicateAnswer"), [404])
CREATE_FILE: Call = {
    **describe("The file", ref("ReplicateFile"), (400, 413, 415, 422), 201),
    "openapi_extra": {
        "requestBody": request_body(
            entity({"content": value("string", "PNG, JPEG or WebP")}, ["content"]),
            ["replicate_file"],
            ["content"],
            [MULTIPART],
        )
    },
}
FILE = describe("The file", ref("ReplicateFile"), [404])
MODEL = describe("The model", ref("ReplicateModel"), [404])
VERSION = describe("The version", ref("ReplicateVersion"), [404])
VERSIONS = describe(
    "Its one version",
    entity(
        {
            "previous": value("null"),
            "next": value("null"),
            "results": array(ref("ReplicateVersion")),
        },
        ALL_FIELDS,
    ),
    [404],
)
ACCOUNT = describe(
    "The account",
    entity(
        {
            "type": value("string"),
            "username": value("string", "The key's id"),
            "name": value("string"),
            "github_url": value("null"),
        },
        ALL_FIELDS,
    ),
)

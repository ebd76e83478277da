"""OpenAPI's words, with which the dialects describe their calls, each in its `description.py`.

`document` puts the descriptions together. What several calls share is listed once under
`components`: a dialect's `Description` has it by name, and `ref` and `example_ref` point to it.
"""

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any

from models.params import Range
from server.api.dialects.explanations import CONFLICTS, EXPLANATIONS

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]
Call = dict[str, Any]
"""What a route is given to describe its call, as keyword arguments."""

JSON, MULTIPART, FORM = MEDIA_TYPES = (
    "application/json",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
)
PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp")
ALWAYS = (401, 403, 429, 500, 503)
"""Statuses of errors that every call may have."""

PROMPT = "a white star"
"""What the built-in model paints in the examples."""


@dataclass(frozen=True, slots=True)
class Description:
    """What OpenAPI's document says of a dialect besides its calls.

    title: the dialect's short name for people. text: sentences. page: its page in `docs/`.
    schemas: those that calls refer to, by name. examples: bodies of requests, by name; each works
        on a server with the built-in model.
    """

    title: str
    text: str
    page: str
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    examples: Mapping[str, Any] = field(default_factory=dict)


def ref(name: str) -> Schema:
    """A schema of a `Description`."""
    return {"$ref": f"#/components/schemas/{name}"}


def example_ref(name: str) -> Schema:
    """An example of a `Description`."""
    return {"$ref": f"#/components/examples/{name}"}


def value(
    kind: str, text: str = "", default: Any = None, allowed: Range | None = None, **more: Any
) -> Schema:
    """A field with its range. kind: JSON's type, with `?` at its end where null is a value too."""
    described: Schema = {"type": [kind[:-1], "null"] if kind.endswith("?") else kind}
    if text:
        described["description"] = text
    if default is not None:
        described["default"] = default
    if allowed is not None:
        # JSON has one kind of number; 4 reads better than 4.0.
        described |= {"minimum": plain(allowed.minimum), "maximum": plain(allowed.maximum)}
    return described | more


def plain(number: float) -> float:
    """A whole number as an integer."""
    return int(number) if number == int(number) else number


def choice(choices: type[StrEnum] | Sequence[str], text: str = "", default: Any = None) -> Schema:
    """A field that is one of a few words."""
    return value("string", text, default, enum=[str(each) for each in choices])


def array(items: Schema, text: str = "", **more: Any) -> Schema:
    return value("array", text, items=items, **more)


def entity(
    properties: Mapping[str, Schema], required: Sequence[str] = (), text: str = ""
) -> Schema:
    """An object's schema. required: `ALL_FIELDS` for all of them."""
    names = [*properties] if required == ALL_FIELDS else [*required]
    described = value("object", text, properties=dict(properties))
    return described | ({"required": names} if names else {})


ALL_FIELDS = ("*",)


def picture(text: str) -> Schema:
    """A field with a picture: a text in JSON, in a form also a file."""
    return value("string", text)


def request_body(
    schema: Schema,
    examples: Sequence[str] = (),
    pictures: Sequence[str] = (),
    media_types: Sequence[str] = MEDIA_TYPES,
) -> Schema:
    """A body that may arrive in several forms. pictures: fields that may be files in a form."""
    content: Schema = {each: {"schema": schema} for each in media_types}
    for each in content.values():
        if examples:
            each["examples"] = {name: example_ref(name) for name in examples}
    if pictures and MULTIPART in content:
        kinds = {"contentType": ", ".join(PICTURE_TYPES)}
        content[MULTIPART]["encoding"] = dict.fromkeys(pictures, kinds)
    return {"required": True, "content": content}


def answer(text: str, schema: Schema | None = None, media_types: Sequence[str] = (JSON,)) -> Schema:
    """An answer. schema: None for a file."""
    content = {each: {} if schema is None else {"schema": schema} for each in media_types}
    return {"description": text, "content": content}


def errors(
    schema: str,
    statuses: Sequence[int] = (),
    media_type: str = JSON,
    *,
    has_422: bool = True,
    has_conflicts: bool = False,
) -> Responses:
    """The errors of a call; those of every call are added.

    has_422: whether wrong fields have a status other than 400. has_conflicts: whether the call may
    contradict what a job is already. The entry `default` stops FastAPI
    from adding its own form of validation error.
    """
    declared: Responses = {}
    for status in sorted({*statuses, *ALWAYS}):
        meant = (status,) if has_422 or status != 400 else (400, 422)
        declared[status] = answer(titles_of(meant, has_conflicts), ref(schema), [media_type])
    return declared | {"default": answer("Any other error", ref(schema), [media_type])}


def titles_of(statuses: Sequence[int], has_conflicts: bool) -> str:
    """The titles of all errors with one of these statuses."""
    titles = [title for each, _, title in EXPLANATIONS.values() if each in statuses]
    conflicts = CONFLICTS.values() if has_conflicts else ()
    return "; ".join([*titles, *(title for each, title in conflicts if each in statuses)])


@functools.cache
def data_uri(name: str) -> str:
    """A small example picture of 256 x 256 pixels that is shipped with the built-in model."""
    content = files("models.builtin").joinpath("examples", name).read_bytes()
    return f"data:image/{name.partition('.')[2]};base64,{base64.b64encode(content).decode()}"


def example_picture() -> str:
    return data_uri("small.webp")


def example_mask() -> str:
    """White is repainted."""
    return data_uri("small_mask.png")


def example_hole() -> str:
    """The same mask as `example_mask`, in which what is transparent is repainted."""
    return data_uri("small_hole.png")

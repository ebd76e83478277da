"""Request bodies of every form clients use, read into one mapping of fields.

JSON whatever the content type says (a trailing comma is forgiven), URL-encoded forms, multipart
forms with files, and the query string. What stands in the body wins over the query.
"""

import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from server.errors import BodyTooLarge, InvalidBody

MAX_FIELDS = 200
MAX_MARKS = 20_000
"""Quotes, brackets or commas of a JSON body: far more than any request has, and few enough that
nobody can keep the parser, and with it all others, busy."""

MAX_DEPTH = 8
"""Of lists and objects inside each other; requests are flat."""

MAX_PART_BYTES = 32_000_000
TRAILING_COMMA = re.compile(r'("[^"\\]*+(?:\\.[^"\\]*+)*+"?)|,(?=\s*[}\]])', re.DOTALL)
"""A string, kept as it is, or a comma before a closing bracket.

Possessive, and content with a string that never ends: time and memory stay linear on any input.
"""

Fields = dict[str, Any]
"""Names in lower case. Values: JSON values, form texts, or bytes of an uploaded file."""


async def read_fields(request: Request, max_bytes: int) -> Fields:
    """All fields of a request. Raises: InvalidBody."""
    body = await read_body(request, max_bytes)
    content_type = request.headers.get("content-type", "")
    query = with_lower_names(dict(request.query_params))
    fields = with_lower_names(await parse_body(body, content_type))
    return query | {name: value for name, value in fields.items() if value not in (None, "")}


def with_lower_names(fields: Fields) -> Fields:
    """`Seed` as `seed`; where both are there, the exact one counts."""
    return {name.lower(): value for name, value in fields.items()} | {
        name: value for name, value in fields.items() if name.islower()
    }


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, judged while it arrives. Raises: InvalidBody, BodyTooLarge."""
    if int(request.headers.get("content-length") or 0) > max_bytes:
        raise BodyTooLarge
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise BodyTooLarge
    except ClientDisconnect as error:
        raise InvalidBody from error
    return bytes(body)


async def read_json(request: Request, max_bytes: int) -> bytes:
    """A body for a strict JSON parser, cheap enough to be given to one.

    Raises: InvalidBody, BodyTooLarge.
    """
    body = await read_body(request, max_bytes)
    refuse_many_marks(body)
    return body


async def parse_body(body: bytes, content_type: str) -> Fields:
    """The fields of a body; none for an empty one. Raises: InvalidBody."""
    if not body.strip():
        return {}
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await parse_multipart(body, content_type)
    if kind == "application/x-www-form-urlencoded" and not body.lstrip().startswith(b"{"):
        return parse_form(body)
    return parse_json(body)


def parse_json(body: bytes) -> Fields:
    """A JSON object, with or without commas before closing brackets. Raises: InvalidBody."""
    refuse_many_marks(body)
    try:
        text = body.decode("utf-8-sig")
        try:
            fields = json.loads(text, parse_constant=refuse_constant)
        except json.JSONDecodeError:
            bare = TRAILING_COMMA.sub(r"\1", text)
            fields = json.loads(bare, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidBody from error
    if not isinstance(fields, dict) or len(fields) > MAX_FIELDS or is_deeper(fields, MAX_DEPTH):
        raise InvalidBody
    return fields


def refuse_many_marks(body: bytes) -> None:
    """Raises: InvalidBody."""
    if any(body.count(mark) > MAX_MARKS for mark in (b'"', b"[", b"{", b",", b":")):
        raise InvalidBody


def is_deeper(value: Any, depth: int) -> bool:
    """Whether a JSON value has more than `depth` lists and objects inside each other."""
    inner = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    if inner is None:
        return False
    return depth == 0 or any(is_deeper(each, depth - 1) for each in inner)


def refuse_constant(name: str) -> None:
    """NaN and Infinity are Python's own addition to JSON. Raises: ValueError."""
    raise ValueError(f"{name} is not JSON")


def parse_form(body: bytes) -> Fields:
    """A URL-encoded form. Raises: InvalidBody."""
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError as error:
        raise InvalidBody from error


async def parse_multipart(body: bytes, content_type: str) -> Fields:
    """A multipart form; files become bytes. Raises: InvalidBody."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        headers=Headers({"content-type": content_type}),
        stream=stream(),  # type: ignore[arg-type]  # an async generator by another name
        max_files=MAX_FIELDS,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_PART_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InvalidBody from error
    fields: Fields = {}
    for name, value in form.multi_items():
        fields[name] = await value.read() if isinstance(value, UploadFile) else value
    await form.close()
    return fields

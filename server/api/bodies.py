"""Reads request bodies of every form that clients use into one mapping of fields.

A body is JSON whatever its content type says, a URL-encoded form, or a multipart form with files.
Trailing commas and raw line breaks in JSON are accepted. Fields of the body replace those of the
query string. Every limit stands here, because a parser on the event loop delays all requests.
"""

import asyncio
import json
import re
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from server.core.errors import (
    BodyTooLarge,
    EncodedBody,
    InvalidBody,
    InvalidForm,
    ServerBusy,
    TooManyFields,
)
from server.core.http import CODINGS, inflate

MAX_FIELDS = 200
"""Most fields of a form, a query string or a JSON object."""

MAX_MARKS = 20_000
"""Most quotes, brackets, commas or colons of a JSON body, each. A valid request has far fewer, and
so few are parsed quickly: the parser holds the interpreter's lock, which delays other requests."""

JSON_SPACE = " \t\r\n"
MAX_DEPTH = 8
"""Most levels of nested lists and objects; requests are flat."""

MAX_ESCAPES = 1_000_000
"""Most escapes of a URL-encoded form, because each is slow to decode. Two of the largest pictures
in base64 have 830,000."""

IMAGE_FIELDS = (
    *("init_image", "mask_image", "image", "base64_string"),
    *("image[]", "mask", "mask[]"),
)
BASE64_START = re.compile(
    rb"(?!\+*https?(?::|%3a))(?:.{0,300}?(?:,|%2c))?\+*", re.IGNORECASE | re.DOTALL
)
"""The text before the base64 of an image in a URL-encoded form: the head of a data URI, blanks. A
URL does not match."""

MAX_PART_BYTES = 32_000_000

MAX_TRAILING_COMMAS, MAX_OF_LARGE = 16, 2
"""Most trailing commas that are accepted; the second number holds for a body of more than
`SMALL_CHARS`. Each costs another parse of the body."""

SMALL_CHARS = 1_000_000
MAX_INFLATION = 10
"""Limit against decompression bombs: a compressed body may grow to this many times its size on the
wire, plus `FREE_BYTES`. Pictures in base64 grow by a third."""

FREE_BYTES = 1_000_000

BOUNDARY = re.compile(r""";\s*boundary=(?:"([^"\\]{1,70})"|([^\s";,]{1,70}))""", re.IGNORECASE)
"""The boundary of a multipart form; RFC 2046 allows 70 characters."""

LARGE_BYTES = 65_536
"""Larger bodies are parsed in a thread. The slowest body below this size takes 20 ms: a form in
which every character is escaped."""

_body_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="bodies")
"""Threads for large bodies. There are few, because they share the interpreter's lock with the event
loop."""

RESERVE_BODY = "inpaint.reserve_body"
"""Extension of the ASGI scope. Its "call" gets the number of bytes that decompression adds to a
body, and returns whether the limit of all bodies has room for them."""

RELEASE = "inpaint.release_body"
"""Extension of the ASGI scope. Its "call" reports that the body is no longer in memory."""

R = TypeVar("R")
Fields = dict[str, Any]
"""Names in lower case. Values: JSON values, form texts, or bytes of an uploaded file."""

ABSENT_WORDS = ("", "null", "none", "undefined")
"""What Python, JavaScript and forms write for a missing value, in upper or lower case."""


def is_absent(value: Any) -> bool:
    """True for null and for a text that stands for a missing value."""
    if isinstance(value, str):
        word = value.strip()
        # The length is checked first: an inline picture of megabytes must not be copied by `lower`.
        return len(word) < 10 and word.lower() in ABSENT_WORDS
    return value is None


async def read_fields(request: Request, max_bytes: int, lists: Collection[str] = ()) -> Fields:
    """All fields of body and query. lists: as for `gathered`. Raises: InvalidBody."""
    query = with_lower_names(parse_form(request.scope["query_string"], lists))
    body = await read_body(request, max_bytes)
    content_type = request.headers.get("content-type", "")
    fields = with_lower_names(await parse_body(body, content_type, lists))
    return query | fields


def with_lower_names(fields: Fields) -> Fields:
    """The present values under lower-case names; `seed` goes before `Seed` where both are sent."""
    present = {name: value for name, value in fields.items() if not is_absent(value)}
    return {name.lower(): value for name, value in present.items()} | {
        name: value for name, value in present.items() if name.islower()
    }


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, checked while it arrives. Raises: InvalidBody, BodyTooLarge, EncodedBody."""
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity", *CODINGS):
        raise EncodedBody
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
    if coding in CODINGS:
        return await inflated(request, bytes(body), max_bytes)
    return bytes(body)


async def inflated(request: Request, body: bytes, max_bytes: int) -> bytes:
    """A body, decompressed in small pieces. Raises: InvalidBody, BodyTooLarge, ServerBusy."""
    reserve = request.scope.get("extensions", {}).get(RESERVE_BODY)
    loop = asyncio.get_running_loop()
    pieces, size = inflate(body), 0
    max_bytes = min(max_bytes, MAX_INFLATION * len(body) + FREE_BYTES)
    whole = bytearray()
    try:
        while piece := await loop.run_in_executor(_body_threads, next, pieces, b""):
            size += len(piece)
            if size > max_bytes:
                raise BodyTooLarge
            if reserve is not None and not reserve["call"](len(piece)):
                raise ServerBusy
            whole += piece
    except zlib.error as error:
        raise InvalidBody from error
    return bytes(whole)


async def read_json(request: Request, max_bytes: int) -> bytes:
    """A body for pydantic's JSON parser, checked to be cheap to parse.

    Raises: InvalidBody, BodyTooLarge.
    """
    body = await read_body(request, max_bytes)
    await parsed(refuse_many_marks, body)
    return body


def refuse_many_fields(query: bytes) -> None:
    """Raises: TooManyFields."""
    if query.count(b"&") >= MAX_FIELDS:
        raise TooManyFields


def release_body(request: Request) -> None:
    """Report that the body is no longer in memory, so that its share of the limit is free again."""
    release = request.scope.get("extensions", {}).get(RELEASE)
    if release is not None:
        release["call"]()


async def parsed(parse: Callable[[bytes], R], body: bytes) -> R:
    """Parse a body; a large one in a thread, off the event loop. Raises: as the parser."""
    if len(body) < LARGE_BYTES:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(_body_threads, parse, body)


async def parse_body(body: bytes, content_type: str, lists: Collection[str] = ()) -> Fields:
    """The fields of a body; none for an empty one. Raises: InvalidBody."""
    start = body.lstrip()[:1]
    if not start:
        return {}
    kind = content_type.partition(";")[0].strip().lower()
    if start == b"{":
        return await parsed(parse_json, body)
    if kind == "multipart/form-data":
        # The parser is asynchronous, but the whole body is there, so it never waits.
        return await parsed(
            lambda whole: run_without_waiting(parse_multipart(whole, content_type, lists)), body
        )
    if kind == "application/x-www-form-urlencoded":
        return await parsed(lambda whole: parse_form(whole, lists), body)
    return await parsed(parse_json, body)


def run_without_waiting(coroutine: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine that never waits, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: R = end.value
        return result
    raise RuntimeError("the coroutine waits")


def parse_json(body: bytes) -> Fields:
    """A JSON object, with or without commas before closing brackets. Raises: InvalidBody."""
    refuse_many_marks(body)
    try:
        fields = load_json(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidBody from error
    if not isinstance(fields, dict) or len(fields) > MAX_FIELDS or is_deeper(fields, MAX_DEPTH):
        raise InvalidBody
    return fields


def load_json(text: str) -> Any:
    """A JSON value; a few trailing commas are left out. Raises: ValueError."""
    max_commas = MAX_TRAILING_COMMAS if len(text) <= SMALL_CHARS else MAX_OF_LARGE
    for _ in range(max_commas):
        try:
            return load_strict(text)
        except json.JSONDecodeError as error:
            position = trailing_comma(text, error.pos)
            if position is None:
                raise
            text = text[:position] + text[position + 1 :]
    return load_strict(text)


def load_strict(text: str) -> Any:
    """A JSON value; strings may hold raw line breaks and tabs. Raises: ValueError."""
    return json.loads(text, parse_constant=refuse_constant, parse_int=to_integer, strict=False)


def to_integer(digits: str) -> int | float:
    """An integer; infinity where it has more digits than Python converts."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def trailing_comma(text: str, position: int) -> int | None:
    """Index of the trailing comma that stopped a parser; None where something else stopped it.

    The text before `position` was parsed, so the comma is not inside a string. Parsers stop at the
    comma or at the closing bracket.
    """
    stop = position + text.startswith(",", position)
    before = text[:stop].rstrip(JSON_SPACE)
    is_between = before.endswith(",") and before[:-1].rstrip(JSON_SPACE)[-1:] not in {*",[{:"}
    if is_between and text[stop:].lstrip(JSON_SPACE).startswith(("}", "]")):
        return len(before) - 1
    return None


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
    """Refuse NaN and Infinity, which Python adds to JSON. Raises: ValueError."""
    raise ValueError(f"{name} is not JSON")


def gathered(pairs: Iterable[tuple[str, Any]], lists: Collection[str]) -> Fields:
    """The fields of a form: the last value of each name.

    lists: names in lower case of fields that may be repeated; their value is a list of all.
    """
    fields: Fields = {}
    for name, value in pairs:
        if name.lower() in lists:
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    return fields


def parse_form(body: bytes, lists: Collection[str] = ()) -> Fields:
    """A URL-encoded form. Raises: InvalidForm, TooManyFields."""
    refuse_many_fields(body)
    if body.count(b"%") + body.count(b"+") > MAX_ESCAPES:
        raise InvalidForm
    pairs = b"&".join(map(with_pluses, body.split(b"&")))
    try:
        return gathered(parse_qsl(pairs.decode(), keep_blank_values=True), lists)
    except ValueError as error:
        raise InvalidForm from error


def with_pluses(pair: bytes) -> bytes:
    """A name and its value, with the `+` of an image's base64 escaped.

    Many clients forget to escape it, and the form parser would read it as a blank.
    """
    name, equals, value = pair.partition(b"=")
    head = BASE64_START.match(value)
    if head is None or name.decode("latin-1").lower() not in IMAGE_FIELDS:
        return pair
    return name + equals + head[0] + value[head.end() :].replace(b"+", b"%2B")


async def parse_multipart(body: bytes, content_type: str, lists: Collection[str] = ()) -> Fields:
    """A multipart form in UTF-8; files become bytes. Raises: InvalidForm.

    The parser gets only the boundary of the client's content type. With the client's `charset` it
    would use any of Python's codecs, and decoding punycode takes quadratic time. Latin-1 keeps the
    bytes of every part.
    """
    boundary = BOUNDARY.search(content_type)
    if boundary is None:
        raise InvalidForm
    parser = multipart_parser(body, boundary[1] or boundary[2])
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InvalidForm from error
    pairs: list[tuple[str, Any]] = []
    for latin_name, value in form.multi_items():
        name = str(decode_part(latin_name))
        if isinstance(value, UploadFile):
            pairs.append((name, await value.read()))
        else:
            pairs.append((name, decode_part(value, is_image=name.lower() in IMAGE_FIELDS)))
    await form.close()
    return gathered(pairs, lists)


def multipart_parser(body: bytes, boundary: str) -> MultiPartParser:
    """Starlette's parser for a whole body, with our limits."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        headers=Headers(
            {"content-type": f'multipart/form-data; charset=latin-1; boundary="{boundary}"'}
        ),
        stream=stream(),  # type: ignore[arg-type]  # an async generator by another name
        max_files=MAX_FIELDS,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_PART_BYTES,
    )
    parser.spool_max_size = 0  # no files on disk: the limit of all bodies counts them
    return parser


def decode_part(latin: str, *, is_image: bool = False) -> str | bytes:
    """The value of a part that was read as Latin-1.

    Bytes that are not UTF-8 are a picture sent without a file name. Other fields stay Latin-1.
    """
    content = latin.encode("latin-1")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content if is_image else latin

"""Reads what A1111 and its kin write into a PNG: the answer of `png-info`.

Only the file's own text is read, and no pixel, so strangers' files may be read on the event loop.
"""

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from models.imaging.captions import CAPTION_KEYWORD
from server.core.errors import InvalidRequest

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 10_000
MAX_TEXT_BYTES = 100_000
"""Of one text, also after decompression; longer ones are left out."""

HEAD_OF_URI = re.compile(rb"data:[^,]{0,200},", re.IGNORECASE)
NEGATIVE = "Negative prompt: "
MIN_PAIRS = 3
"""Fewer are no line of values, in A1111 as here."""

STRING = json.JSONDecoder(strict=False)


def read_png_info(image: bytes) -> dict[str, Any]:
    """image: a PNG, its base64 or its data URI. Raises: InvalidRequest."""
    texts = dict(read_texts(decode(image)))
    caption = texts.pop(CAPTION_KEYWORD, "")
    return {"info": caption, "items": texts, "parameters": parse_caption(caption)}


def decode(image: bytes) -> bytes:
    """The bytes of a PNG. Raises: InvalidRequest."""
    content = image
    if not image.startswith(SIGNATURE):
        try:
            content = base64.b64decode(HEAD_OF_URI.sub(b"", image, count=1), validate=True)
        except binascii.Error as error:
            raise refusal("must be base64, a data URI or a file") from error
    if not content.startswith(SIGNATURE):
        raise refusal("is no PNG: other files are not read here")
    return content


def refusal(reason: str) -> InvalidRequest:
    return InvalidRequest({"image": [f"Invalid encoded image: The image {reason}."]})


def read_texts(png: bytes) -> Iterator[tuple[str, str]]:
    """Keywords and texts. A broken file ends them early."""
    position = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        size = int.from_bytes(png[position : position + 4])
        kind, start = png[position + 4 : position + 8], position + 8
        if len(kind) < 4 or kind == b"IEND":
            return
        if kind in READERS and size <= MAX_TEXT_BYTES:
            keyword, _, rest = png[start : start + size].partition(b"\0")
            text = READERS[kind](rest)
            if text is not None:
                yield keyword.decode("latin-1"), text
        position = start + size + 4  # the checksum


def read_plain(rest: bytes) -> str | None:
    return rest.decode("latin-1")


def read_compressed(rest: bytes) -> str | None:
    """After the byte that names the method."""
    content = inflate(rest[1:])
    return None if content is None else content.decode("latin-1")


def read_international(rest: bytes) -> str | None:
    """After two bytes about compression: a language, a translated keyword, and UTF-8."""
    is_compressed, rest = rest[:1] == b"\1", rest[2:]
    *_, content = rest.split(b"\0", 2)
    if is_compressed:
        content = inflate(content) or b""
    return content.decode(errors="replace")


READERS = {b"tEXt": read_plain, b"zTXt": read_compressed, b"iTXt": read_international}


def inflate(content: bytes) -> bytes | None:
    """None for what is broken or too long."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(content, MAX_TEXT_BYTES)
    except zlib.error:
        return None
    return text if stream.eof else None


def parse_caption(caption: str) -> dict[str, str]:
    """Prompts and values of a caption, as A1111 names them; none for an empty one."""
    if not caption:
        return {}
    *lines, last = caption.strip().split("\n")
    values = dict(parse_values(last))
    if len(values) < MIN_PAIRS:
        lines, values = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition(NEGATIVE)
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **values}


def parse_values(line: str) -> Iterator[tuple[str, str]]:
    """Names and values of a line such as `Steps: 20, Model: "a, b"`.

    A scanner in place of A1111's regular expression, which takes quadratic time for long blanks.
    """
    position = 0
    while (colon := line.find(":", position)) >= 0:
        name = line[position:colon].rpartition(",")[2].strip()
        value, position = parse_value(line, colon + 1)
        if name:
            yield name, value
        comma = line.find(",", position)
        position = len(line) if comma < 0 else comma + 1


def parse_value(line: str, start: int) -> tuple[str, int]:
    """The value at an index, and the index of its end."""
    if line.startswith(' "', start):
        with suppress(ValueError):
            value, end = STRING.raw_decode(line, start + 1)
            return str(value), end
    comma = line.find(",", start)
    end = len(line) if comma < 0 else comma
    return line[start:end].strip(), end

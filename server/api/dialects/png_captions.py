"""Reads the caption that A1111 and similar programs write into a PNG: prompts and other values.

Only text chunks are read and no pixel is decoded, so a stranger's file needs no sandbox. Reading
takes at most 50 ms.
"""

import json
import re
import zlib
from collections.abc import Iterator

from models.imaging.repair import PNG_SIGNATURE

MAX_CHUNKS = 10_000
MAX_TEXT_BYTES = 100_000
"""Largest text that is read, before and after decompression; a larger one is left out."""

MAX_BYTES = 1_000_000
"""Largest size of all texts of a file together, decompressed. A compressed text that is left out
counts as `MAX_TEXT_BYTES`, because it was decompressed so far."""

PROMPT, NEGATIVE_PROMPT = "Prompt", "Negative prompt"
"""A1111's names of both prompts, which `parse_caption` uses as keys."""

STEPS, MIN_PAIRS = "Steps: ", 3
"""A caption's last line holds values if it begins with `STEPS`, or has `MIN_PAIRS` of them."""

STRING = re.compile(r'"(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*+"')
"""A JSON text. It is found before it is decoded, because an error of the decoder names its line,
and counts the lines of the whole caption for that."""


def read_texts(png: bytes) -> Iterator[tuple[str, str]]:
    """The keyword and text of each text chunk.

    Reading stops where the file is broken, and at `MAX_BYTES`.
    """
    position, left = len(PNG_SIGNATURE), MAX_BYTES
    for _ in range(MAX_CHUNKS):
        size = int.from_bytes(png[position : position + 4])
        kind, start = png[position + 4 : position + 8], position + 8
        if len(kind) < 4 or kind == b"IEND":
            return
        if kind in READERS and size <= MAX_TEXT_BYTES:
            keyword, _, rest = png[start : start + size].partition(b"\0")
            text = READERS[kind](rest)
            left -= len(keyword) + (MAX_TEXT_BYTES if text is None else len(text))
            if left < 0:
                return
            if text is not None:
                yield keyword.decode("latin-1"), text
        position = start + size + 4  # the checksum


def read_plain(rest: bytes) -> str | None:
    return rest.decode("latin-1")


def read_compressed(rest: bytes) -> str | None:
    """rest: a byte that names the compression method, and the compressed text."""
    content = inflate(rest[1:])
    return None if content is None else content.decode("latin-1")


def read_international(rest: bytes) -> str | None:
    """rest: two bytes about compression, a language, a translated keyword, and text in UTF-8."""
    is_compressed, rest = rest[:1] == b"\1", rest[2:]
    *_, content = rest.split(b"\0", 2)
    text = inflate(content) if is_compressed else content
    return None if text is None else text.decode(errors="replace")


READERS = {b"tEXt": read_plain, b"zTXt": read_compressed, b"iTXt": read_international}


def inflate(content: bytes) -> bytes | None:
    """The decompressed bytes; None for a broken stream, or more than `MAX_TEXT_BYTES`."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(content, MAX_TEXT_BYTES)
    except zlib.error:
        return None
    return text if stream.eof else None


def parse_caption(caption: str) -> dict[str, str]:
    """Prompts and values of a caption by A1111's names; an empty caption has none."""
    if not caption:
        return {}
    *lines, last = caption.strip().split("\n")
    values = dict(parse_values(last))
    if len(values) < MIN_PAIRS and not last.startswith(STEPS):
        lines, values = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition(f"{NEGATIVE_PROMPT}: ")
    return {PROMPT: prompt.strip(), NEGATIVE_PROMPT: negative.strip(), **values}


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
    text = STRING.match(line, start + 1) if line.startswith(" ", start) else None
    if text is not None:
        return str(json.loads(text[0], strict=False)), text.end()
    comma = line.find(",", start)
    end = len(line) if comma < 0 else comma
    return line[start:end].strip(), end

"""Prompts that A1111 and its kin write into a PNG: the answer of `gen-info`.

Only text chunks are read, and no pixel.
"""

from collections.abc import Iterator

from models.imaging.captions import CAPTION_KEYWORD
from models.imaging.repair import PNG_SIGNATURE

MAX_CHUNKS = 1_000
MAX_TEXT_BYTES = 100_000
NEGATIVE, VALUES = "Negative prompt: ", "Steps: "


def read_prompts(content: bytes) -> tuple[str, str]:
    """The prompt and the negative prompt of a file; empty where it has none."""
    caption = next((text for keyword, text in read_texts(content) if is_caption(keyword)), "")
    lines = caption.split("\n")
    if lines[-1].startswith(VALUES):
        del lines[-1]
    prompt, _, negative_prompt = "\n".join(lines).partition(NEGATIVE)
    return prompt.strip(), negative_prompt.strip()


def is_caption(keyword: bytes) -> bool:
    """Whether a text holds the parameters of a picture."""
    return keyword == CAPTION_KEYWORD.encode()


def read_texts(content: bytes) -> Iterator[tuple[bytes, str]]:
    """Keywords and texts of a PNG, without compressed ones; a broken file ends them early."""
    at = len(PNG_SIGNATURE) if content.startswith(PNG_SIGNATURE) else len(content)
    for _ in range(MAX_CHUNKS):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if len(kind) < 4:
            return
        if length <= MAX_TEXT_BYTES:
            keyword, _, rest = content[at + 8 : at + 8 + length].partition(b"\0")
            if kind == b"tEXt":
                yield keyword, rest.decode("latin-1")
            elif kind == b"iTXt" and rest[:1] == b"\0":
                # After two bytes about compression come a language and a translated keyword.
                yield keyword, rest[2:].split(b"\0", 2)[-1].decode(errors="replace")
        at += 12 + length

"""The answer of `gen-info`: the prompts in a PNG's caption, as A1111 writes it."""

from models.imaging.captions import CAPTION_KEYWORD
from models.imaging.repair import PNG_SIGNATURE
from server.api.dialects.png_captions import NEGATIVE_PROMPT, PROMPT, parse_caption, read_texts


def read_prompts(content: bytes) -> tuple[str, str]:
    """The prompt and the negative prompt of a file; empty where it has none."""
    texts = dict(read_texts(content)) if content.startswith(PNG_SIGNATURE) else {}
    values = parse_caption(texts.get(CAPTION_KEYWORD, ""))
    return values.get(PROMPT, ""), values.get(NEGATIVE_PROMPT, "")

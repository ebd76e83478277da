"""The answer of `png-info`: what is written in a PNG about how it was made."""

import base64
import binascii
import re
from typing import Any

from models.imaging.captions import CAPTION_KEYWORD
from models.imaging.repair import PNG_SIGNATURE
from server.api.dialects.png_captions import parse_caption, read_texts
from server.core.errors import InvalidRequest

HEAD_OF_URI = re.compile(rb"data:[^,]{0,200},", re.IGNORECASE)


def read_png_info(image: bytes) -> dict[str, Any]:
    """image: a PNG, its base64 or its data URI. Raises: InvalidRequest."""
    texts = dict(read_texts(decode(image)))
    caption = texts.pop(CAPTION_KEYWORD, "")
    return {"info": caption, "items": texts, "parameters": parse_caption(caption)}


def decode(image: bytes) -> bytes:
    """The bytes of a PNG. Raises: InvalidRequest."""
    content = image
    if not image.startswith(PNG_SIGNATURE):
        try:
            # Only the start is matched: a search through megabytes would delay all requests.
            head = HEAD_OF_URI.match(image)
            content = base64.b64decode(image[head.end() if head else 0 :], validate=True)
        except binascii.Error as error:
            raise refusal("must be base64, a data URI or a file") from error
    if not content.startswith(PNG_SIGNATURE):
        raise refusal("is no PNG: other files are not read here")
    return content


def refusal(reason: str) -> InvalidRequest:
    return InvalidRequest({"image": [f"Invalid encoded image: The image {reason}."]})

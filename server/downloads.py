"""Init and mask images as bytes: from a URL, a data URI, bare base64 or an uploaded file."""

import asyncio
import base64
import binascii
import re
from dataclasses import dataclass

from server.egress import Fetcher, FetchFailed
from server.errors import ImageProblem, ImageUnavailable

DATA_URI = re.compile(r"data:image/[\w.+-]+(;[\w=.+-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image comes from.

    content: bytes of an upload, or the client's text: URL, data URI or base64.
    """

    content: str | bytes

    @property
    def is_url(self) -> bool:
        return isinstance(self.content, str) and self.content[:8].lower().startswith(
            ("http://", "https://")
        )

    def describe(self) -> str:
        """For echoing: a URL as sent, of an inline image only its kind and size."""
        if self.is_url:
            return str(self.content)
        kind = "file" if isinstance(self.content, bytes) else "base64"
        return f"({kind}, {len(self.content)} bytes)"


async def download_images(
    sources: dict[str, ImageSource], fetcher: Fetcher, max_bytes: int
) -> dict[str, bytes]:
    """All images at once, by parameter name.

    Raises: ImageUnavailable, naming every image that cannot be had.
    """
    results = await asyncio.gather(
        *(load(source, fetcher, max_bytes) for source in sources.values()), return_exceptions=True
    )
    problems: dict[str, ImageProblem] = {}
    images: dict[str, bytes] = {}
    for name, result in zip(sources, results, strict=True):
        if isinstance(result, bytes):
            images[name] = result
        elif isinstance(result, FetchFailed):
            problems[name] = result.kind
        else:
            raise result
    if problems:
        raise ImageUnavailable(problems)
    return images


async def load(source: ImageSource, fetcher: Fetcher, max_bytes: int) -> bytes:
    """One image. Raises: FetchFailed."""
    if source.is_url:
        return await fetcher.get(str(source.content))
    content = source.content
    image = content if isinstance(content, bytes) else decode_base64(content)
    if len(image) > max_bytes:
        raise FetchFailed(ImageProblem.TOO_LARGE)
    return image


def decode_base64(text: str) -> bytes:
    """A data URI's or a bare base64 text's bytes; the URL-safe alphabet and line breaks are fine.

    Raises: FetchFailed.
    """
    start = DATA_URI.match(text)
    body = "".join(text[start.end() if start else 0 :].split()).rstrip("=")
    padded = body.replace("-", "+").replace("_", "/") + "=" * (-len(body) % 4)
    try:
        return base64.b64decode(padded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FetchFailed(ImageProblem.NOT_AN_IMAGE) from error

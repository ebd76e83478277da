"""Init and mask images as bytes: from a URL, a data URI, bare base64 or an uploaded file."""

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.egress import ANYBODY, Fetcher, FetchFailed, FetchRights
from server.errors import ImageProblem, ImageUnavailable
from server.jobs import OUTPUT_STEM

DATA_URI = re.compile(r"data:image/[\w.+-]+(;[\w=.+-]+)*;base64,", re.IGNORECASE)
OUTPUT_NAME = re.compile(rf"{OUTPUT_STEM}\.png")


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


@dataclass(frozen=True, slots=True)
class OwnOutputs:
    """Pictures this server made. They are read where they lie: the server calls itself for nothing.

    base: the URLs' beginning, up to the name. read: gives the picture of a name, None where there
    is none.
    """

    base: str
    read: Callable[[str], Awaitable[bytes | None]]

    def name_of(self, source: ImageSource) -> str | None:
        """The picture's name, where the source is the URL of one."""
        text = str(source.content) if source.is_url else ""
        name = text.removeprefix(self.base)
        return name if name != text and OUTPUT_NAME.fullmatch(name) else None


async def download_images(
    sources: dict[str, ImageSource],
    fetcher: Fetcher,
    max_bytes: int,
    rights: FetchRights = ANYBODY,
    own: OwnOutputs | None = None,
) -> dict[str, bytes]:
    """All images at once, by parameter name.

    Raises: ImageUnavailable, naming every image that cannot be had.
    """

    async def load(source: ImageSource) -> bytes:
        name = own.name_of(source) if own else None
        if own and name:
            image = await own.read(name)
        elif source.is_url:
            image = await fetcher.get(str(source.content), rights)
        else:
            content = source.content
            image = content if isinstance(content, bytes) else decode_base64(content)
        if image is None:
            raise FetchFailed(ImageProblem.NOT_REACHABLE)
        if len(image) > max_bytes:
            raise FetchFailed(ImageProblem.TOO_LARGE)
        return image

    results = await asyncio.gather(*map(load, sources.values()), return_exceptions=True)
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

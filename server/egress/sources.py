"""Init and mask images as bytes: from a URL, a data URI, bare base64 or an uploaded file."""

import asyncio
import binascii
import re
import string
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import anyio.to_thread

from server.core.errors import ImageProblem, ImageUnavailable
from server.core.http import is_allowed
from server.egress.downloads import NO_GRANT, FetchFailed, ImageDownloader
from server.egress.interfaces import is_local
from server.egress.policy import AddressDenied, EgressGrant, checked_url, host_of, is_localhost
from server.egress.resolver import numeric_addresses
from server.jobs.job import (
    OUTPUT_FOLDER,
    OUTPUT_NAME,
    UPLOAD_FOLDER,
    UPLOAD_NAME,
    stored_name_of,
)

DATA_URI = re.compile(r"data:([^,]{0,1024}),", re.IGNORECASE)
"""Matches up to the data. The media type is ignored, because browsers send none or a wrong one."""
MAX_DATA_URIS = 3
"""Nested prefixes, which code writes that puts a prefix before every text."""
OWN_PATH = re.compile(
    rf"(?:/.*)?/(?:{OUTPUT_FOLDER}/+({OUTPUT_NAME})|{UPLOAD_FOLDER}/+({UPLOAD_NAME}))"
)

CHARS_PER_BYTE = 1.5
"""Most characters of base64 for a byte, line breaks included. A longer text is refused unread."""
PIECE_CHARS = 2**18
"""A longer text is decoded in a thread and in pieces, because decoding a piece holds the GIL."""
URL_SAFE = bytes.maketrans(b"-_", b"+/")
BLANKS = b" \t\r\n\f\v"
OTHER_THAN_BASE64 = re.compile(r"[^A-Za-z0-9+/_=\s-]")
MAX_OTHER_CHARS = 8_192
"""Characters that are searched for signs of a path or a URL in place of base64."""
ZERO_WIDTH = "\ufeff\u200b\u200c\u200d\u2060"
"""Byte order mark and zero-width blanks, which editors and web pages leave around a text."""
MARGIN = ZERO_WIDTH + string.whitespace


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image parameter. content: bytes of an upload, or a text: URL, data URI or base64."""

    content: str | bytes

    @property
    def is_url(self) -> bool:
        return isinstance(self.content, str) and self.content[:8].lower().startswith(
            ("http://", "https://")
        )

    def describe(self) -> str:
        """The URL as sent, or kind and size of an inline image, for the echoed parameters."""
        if self.is_url:
            return str(self.content)
        kind = "file" if isinstance(self.content, bytes) else "base64"
        return f"({kind}, {len(self.content)} bytes)"


@dataclass(frozen=True, slots=True)
class OwnPictures:
    """Outputs and uploads of this server, which are read from the store and not downloaded.

    urls: URLs by which clients reach this server; only their hosts count.
    names: further host names, with patterns as in `Settings.allowed_hosts`.
    read: the picture with a storage key, or None.
    """

    urls: Sequence[str]
    names: Sequence[str]
    read: Callable[[str], Awaitable[bytes | None]]

    def key_of(self, source: ImageSource) -> str | None:
        """The storage key of an own picture, or None for any other source.

        The URL's port and path prefix do not count, because a proxy or container changes them. A
        picture of another server on this host is no danger, because file names hold a UUID.
        """
        try:
            url = checked_url(str(source.content)) if source.is_url else None
        except AddressDenied:
            return None
        match = OWN_PATH.fullmatch(url.path) if url else None
        if url is None or match is None or not self._has_host(host_of(url)):
            return None
        output, upload = match.groups()
        return (
            f"{OUTPUT_FOLDER}/{stored_name_of(output)}" if output else f"{UPLOAD_FOLDER}/{upload}"
        )

    def _has_host(self, host: str) -> bool:
        host = host.rstrip(".")
        if is_localhost(host) or host in map(host_in, self.urls):
            return True
        names = tuple(name.lower() for name in self.names)
        if names and is_allowed(host.encode(), names):
            return True
        return any(map(is_local, numeric_addresses(host, 80)))


def host_in(url: str) -> str:
    """The host of a URL, or `""` for a malformed one."""
    try:
        return host_of(checked_url(url)).rstrip(".")
    except AddressDenied:
        return ""


async def download_images(
    sources: dict[str, ImageSource],
    fetcher: ImageDownloader,
    max_bytes: int,
    grant: EgressGrant = NO_GRANT,
    own: OwnPictures | None = None,
) -> dict[str, bytes]:
    """All images by parameter name, downloaded concurrently.

    Raises: ImageUnavailable with every image that cannot be had.
    """

    async def load(source: ImageSource) -> bytes | ImageProblem:
        key = own.key_of(source) if own else None
        image = await own.read(key) if own and key else None
        try:
            if image is None and source.is_url:
                image = await fetcher.get(str(source.content), grant)
            elif image is None:
                image = await load_inline(source.content, max_bytes)
        except FetchFailed as error:
            return error.kind
        return image if len(image) <= max_bytes else ImageProblem.TOO_LARGE

    if any(source.is_url for source in sources.values()):
        results = await asyncio.gather(*map(load, sources.values()))
    else:  # Inline images need no waiting, and a task for each would cost more than decoding.
        results = [await load(source) for source in sources.values()]
    loaded = dict(zip(sources, results, strict=True))
    problems = {name: each for name, each in loaded.items() if isinstance(each, ImageProblem)}
    if problems:
        raise ImageUnavailable(problems)
    return {name: each for name, each in loaded.items() if isinstance(each, bytes)}


async def load_inline(content: str | bytes, max_bytes: int) -> bytes:
    """The bytes of an upload, data URI or base64 text. Raises: FetchFailed."""
    if isinstance(content, bytes):
        return content
    if len(content) > CHARS_PER_BYTE * max_bytes:
        raise FetchFailed(ImageProblem.TOO_LARGE)
    if len(content) > PIECE_CHARS:
        return await anyio.to_thread.run_sync(decode_base64, content)
    return decode_base64(content)


def decode_base64(text: str) -> bytes:
    """The bytes of a data URI or base64 text, also URL-safe or with line breaks.

    Raises: FetchFailed.
    """
    text, is_data = text.strip(MARGIN), False
    for _ in range(MAX_DATA_URIS):
        start = DATA_URI.match(text)
        if start is None:
            break
        is_data = True
        text = text[start.end() :].strip(MARGIN)
        is_base64 = "base64" in [each.strip().lower() for each in start[1].split(";")]
        if not is_base64 and not DATA_URI.match(text):
            return percent_decoded(text)
        if "%" in text:
            text = percent_decoded(text).decode("latin-1")
    if is_path(text) and not is_data:
        raise FetchFailed(ImageProblem.NOT_A_SOURCE)
    if len(text) <= PIECE_CHARS:
        # The fast path. Nearly all texts are strict base64.
        with suppress(binascii.Error, ValueError):
            return binascii.a2b_base64(text, strict_mode=True)
    compact, content = bytearray(), bytearray()
    try:
        for at in range(0, len(text), PIECE_CHARS):
            piece = text[at : at + PIECE_CHARS].encode("ascii")
            compact += piece.translate(URL_SAFE, BLANKS)
        compact = compact.rstrip(b"=")
        if b"=" in compact:
            raise ValueError("padding before the end")
        compact += b"=" * (-len(compact) % 4)
        for at in range(0, len(compact), PIECE_CHARS):
            content += binascii.a2b_base64(compact[at : at + PIECE_CHARS], strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise FetchFailed(ImageProblem.NOT_AN_IMAGE if is_data else problem_of(text)) from error
    return bytes(content)


def is_path(text: str) -> bool:
    """Whether a text is a path such as `/images/a` or `//host/a`, which also is valid base64.

    Of all pictures only a JPEG file's base64 begins with a slash, and it begins with `/9j/`.
    """
    return len(text) <= MAX_OTHER_CHARS and text[:1] == "/" and text[:2] != "/9"


def problem_of(text: str) -> ImageProblem:
    """The client's reason for a text that is no base64: it looks like a path or URL, or not."""
    if OTHER_THAN_BASE64.search(text, 0, MAX_OTHER_CHARS):
        return ImageProblem.NOT_A_SOURCE
    return ImageProblem.NOT_AN_IMAGE


def percent_decoded(text: str) -> bytes:
    """The bytes of a percent-encoded text, in pieces, because each escape costs an object."""
    data, content, at = text.encode(errors="replace"), bytearray(), 0
    while at < len(data):
        end = at + PIECE_CHARS
        escape = data.rfind(b"%", end - 2, end)  # The end of the piece must not cut an escape.
        end = escape if escape > at else end
        content += unquote_to_bytes(data[at:end])
        at = end
    return bytes(content)

"""Images from addresses that clients name, under limits of bytes, time and places.

`addresses` says which addresses may be reached; `egress_client` judges by it at every connect, so
at every redirect too. Whether an address was denied, a name unknown or a port closed would draw a
map of our network, so all of these have one answer: that the image cannot be had. The log has the
reason. A client is told more where that betrays nothing: what the URL and the settings alone decide
(`problem_shown_by`), and the status of a public host, which the client could ask itself.
"""

import asyncio
import email.utils
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import httpx2

from server.core.codings import CODINGS, inflate
from server.core.errors import ImageProblem
from server.core.fairness import FairSemaphore
from server.core.logs import get_logger
from server.core.settings import FetchSettings
from server.egress.client import NETWORK_ERRORS, BodyTooLarge, EgressClient
from server.egress.policy import (
    METADATA,
    AddressDenied,
    AddressPolicy,
    EgressGrant,
    UrlTooLong,
    checked_url,
    host_of,
    is_localhost,
    is_private_name,
    is_public,
    parse_address,
    port_of,
    redirected,
    unwrapped,
)
from server.egress.resolver import numeric_addresses

logger = get_logger(__name__)

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
OTHER_CODINGS = ("br", "zstd", "dcb", "dcz", "compress", "x-compress", "exi", "pack200-gzip")
"""Compressions that are not undone, from IANA's registry of content codings."""
SETTLED_S = 2.0
"""A file younger than this may change again under the same modification time."""
MAX_CONDITION_CHARS = 256
"""Of an ETag or a time; a picture with a longer one is not kept."""
KEPT_OVERHEAD_BYTES = 1_024
"""What a kept picture takes besides its texts and its body, generously."""


class FetchFailed(Exception):
    """kind: what to tell the client."""

    def __init__(self, kind: ImageProblem) -> None:
        self.kind = kind
        super().__init__(kind.value)


class BadAnswer(Exception):
    """A host's answer that is no picture. kind: what to tell the client."""

    def __init__(self, kind: ImageProblem, reason: str) -> None:
        self.kind = kind
        super().__init__(reason)


NO_GRANT = EgressGrant()


class ImageDownloader:
    """Downloads images."""

    def __init__(self, settings: FetchSettings, client: EgressClient | None = None) -> None:
        self._settings = settings
        self._client = client or EgressClient()
        self._slots = FairSemaphore(settings.max_concurrent, settings.max_concurrent_per_key)
        self._cache = ConditionalCache(settings.cache_bytes, settings.cache_bytes_per_key)

    async def get(self, url: str, grant: EgressGrant = NO_GRANT) -> bytes:
        """The body behind a URL. Raises: FetchFailed."""
        try:
            target = checked_url(url)
        except UrlTooLong as error:
            raise FetchFailed(ImageProblem.URL_TOO_LONG) from error
        except AddressDenied as error:
            raise FetchFailed(ImageProblem.INVALID_URL) from error
        policy = grant.widen(self._settings, self._client.nat64_prefixes)
        try:
            # One deadline over everything: time-outs of single reads do not stop a drip.
            async with (
                asyncio.timeout(self._settings.total_timeout_s),
                self._slots.held_by(grant.key_id),
            ):
                return await self._follow(target, grant.key_id, policy)
        except BodyTooLarge as error:
            raise FetchFailed(ImageProblem.TOO_LARGE) from error
        except (AddressDenied, BadAnswer, *NETWORK_ERRORS) as error:
            event = "fetch refused" if isinstance(error, AddressDenied) else "fetch failed"
            logger.info(event, detail=f"{host_of(target)}: {type(error).__name__}: {error}")
            if isinstance(error, BadAnswer):
                raise FetchFailed(error.kind) from error
            # Whatever the cause: of one URL the same is told whether anybody is there or not.
            problem = problem_shown_by(target, policy, has_proxy=self._client.has_proxy)
            raise FetchFailed(problem) from error

    async def _follow(self, target: httpx2.URL, key_id: str, policy: AddressPolicy) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._ask(target, key_id, policy)
            if isinstance(answer, bytes):
                return answer
            target = redirected(target, answer)
        raise AddressDenied("too many redirects")

    async def _ask(self, url: httpx2.URL, key_id: str, policy: AddressPolicy) -> bytes | str:
        """The picture, or where the host says it is.

        Raises: AddressDenied, BadAnswer, NETWORK_ERRORS.
        """
        kept = self._cache.get(key_id, str(url))
        async with self._client.request(
            "GET",
            url,
            policy,
            owner=key_id,
            headers=kept.conditions if kept else {},
            max_body_bytes=self._settings.max_image_bytes,
            connect_timeout_s=self._settings.connect_timeout_s,
        ) as answer:
            location = answer.headers.get("location")
            if answer.status in REDIRECTS and location:
                return location
            if answer.status == 304 and kept:
                return kept.body
            if answer.status != 200:
                is_public_host = not self._client.has_proxy and not policy.opens(
                    host_of(url), unwrapped(parse_address(answer.peer), policy.nat64_prefixes)
                )
                raise BadAnswer(
                    problem_of(answer.status, is_public_host), f"status {answer.status}"
                )
            must_inflate = is_compressed(answer.headers.get("content-encoding", ""))
            body = await answer.read()
            if must_inflate:
                limit = self._settings.max_image_bytes
                body = await asyncio.to_thread(decompressed, body, limit)
            self._cache.put(key_id, str(url), Picture(body, conditions_of(answer.headers)))
            return body


def problem_of(status: int, is_public_host: bool) -> ImageProblem:
    """What to tell of a status other than 200. Of a host that an operator has opened, or that a
    proxy has found, nothing: it may be private."""
    if not is_public_host:
        return ImageProblem.NOT_REACHABLE
    match status:
        case 404 | 410:
            return ImageProblem.NOT_FOUND
        case 401 | 403:
            return ImageProblem.FORBIDDEN
    return ImageProblem.HOST_FAILED


def problem_shown_by(url: httpx2.URL, policy: AddressPolicy, *, has_proxy: bool) -> ImageProblem:
    """Why a URL is never fetched, as far as it and the settings show without any look-up.

    `NOT_REACHABLE` where they do not: where an operator has opened the address, where a name may
    lead into a network that is open, and where the proxy judges the name.
    """
    host, port = host_of(url).rstrip("."), port_of(url)
    if policy.names(host):
        return ImageProblem.NOT_REACHABLE
    literals = numeric_addresses("127.0.0.1" if is_localhost(host) else host, port)
    if literals:
        address = unwrapped(parse_address(literals[0]), policy.nat64_prefixes)
        # These two are not to be opened at all, or not by mistake.
        if address.is_unspecified or address in METADATA or policy.opens(host, address):
            return ImageProblem.NOT_REACHABLE
        if not is_public(address):
            return ImageProblem.PRIVATE_ADDRESS
    elif policy.allow_cidrs and not has_proxy:
        return ImageProblem.NOT_REACHABLE
    elif is_private_name(host) and not has_proxy:
        return ImageProblem.PRIVATE_ADDRESS
    if not policy.allows_port(host, port):
        return ImageProblem.PORT_NOT_ALLOWED
    return ImageProblem.NOT_REACHABLE


def is_compressed(header: str) -> bool:
    """Whether a `Content-Encoding` names a compression, which then is one that we undo.

    Other tokens (`identity`, `aws-chunked`, `base64`, `utf-8`) are left there by careless uploads
    and mean nothing. Raises: BadAnswer for what we do not undo, and for two compressions.
    """
    tokens = [token.strip().lower() for token in header.split(",")]
    named = [token for token in tokens if token in (*CODINGS, *OTHER_CODINGS)]
    if len(named) > 1 or any(token in OTHER_CODINGS for token in named):
        raise BadAnswer(ImageProblem.COMPRESSED, f"content encoding {header[:100]}")
    return bool(named)


def decompressed(body: bytes, max_bytes: int) -> bytes:
    """A body without its compression. Inflating stops at the limit, so that a bomb takes no more
    room than a picture may have. Raises: BadAnswer; BodyTooLarge."""
    content = bytearray()
    try:
        for piece in inflate(body):
            content += piece
            if len(content) > max_bytes:
                raise BodyTooLarge
    except zlib.error as error:
        raise BadAnswer(ImageProblem.DAMAGED, f"compression: {error}") from error
    return bytes(content)


@dataclass(frozen=True, slots=True)
class Picture:
    """A downloaded body. conditions: headers that ask for it again only where it has changed."""

    body: bytes
    conditions: Mapping[str, str]


class ConditionalCache:
    """Bodies by key and URL, the last used, up to a number of bytes in all and of each key.

    Never given out unasked: the host says at every fetch whether its picture is still this one, so
    a changed picture is noticed at once, an address that has since been denied stays denied, and
    one key cannot see what another has fetched.
    """

    def __init__(self, max_bytes: int, max_bytes_per_key: int) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_per_key = min(max_bytes, max_bytes_per_key)
        self._bytes: Counter[str] = Counter()
        self._cache: dict[str, OrderedDict[str, Picture]] = {}

    def get(self, key_id: str, url: str) -> Picture | None:
        """What the key has fetched from there."""
        pictures = self._cache.get(key_id, OrderedDict())
        if url in pictures:
            pictures.move_to_end(url)
        return pictures.get(url)

    def put(self, key_id: str, url: str, picture: Picture) -> None:
        """Keep a picture, unless it cannot be asked for again or is larger than all there is."""
        if url in self._cache.get(key_id, ()):
            self._drop(key_id, url)
        size = size_kept(url, picture)
        if not picture.conditions or size > self._max_bytes_per_key:
            return
        self._cache.setdefault(key_id, OrderedDict())[url] = picture
        self._bytes[key_id] += size
        while self._bytes[key_id] > self._max_bytes_per_key:
            self._drop_oldest(key_id)
        while self._bytes.total() > self._max_bytes:
            # Of who has most, so that many pictures of one key do not push out another's few.
            self._drop_oldest(max(self._bytes, key=self._bytes.__getitem__))

    def _drop_oldest(self, key_id: str) -> None:
        self._drop(key_id, next(iter(self._cache[key_id])))

    def _drop(self, key_id: str, url: str) -> None:
        pictures = self._cache[key_id]
        self._bytes[key_id] -= size_kept(url, pictures.pop(url))
        if not pictures:
            del self._cache[key_id], self._bytes[key_id]


def size_kept(url: str, picture: Picture) -> int:
    """Bytes that a picture takes while it is kept."""
    return (
        KEPT_OVERHEAD_BYTES
        + len(url)
        + sum(map(len, picture.conditions.values()))
        + len(picture.body)
    )


def conditions_of(headers: Mapping[str, str]) -> dict[str, str]:
    """What a conditional request asks by; nothing where the answer gives no sure sign of change,
    or a sign that is too long to keep."""
    if "no-store" in headers.get("cache-control", "").lower():
        return {}
    tag, last_modified = headers.get("etag", ""), headers.get("last-modified", "")
    if max(len(tag), len(last_modified)) > MAX_CONDITION_CHARS:
        return {}
    if tag and not tag.startswith("W/"):
        return {"If-None-Match": tag}
    try:
        modified, sent = (
            email.utils.parsedate_to_datetime(each)
            for each in (last_modified, headers.get("date", ""))
        )
        is_settled = (sent - modified).total_seconds() >= SETTLED_S
    except (ValueError, TypeError, OverflowError):
        return {}
    return {"If-Modified-Since": last_modified} if is_settled else {}

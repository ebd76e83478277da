"""`ImageDownloader`: images from URLs, with limits of bytes, seconds and concurrent downloads.

`policy` decides which addresses may be dialled, and `client` checks them at every connection, so at
every redirect too. Clients could map our network (SSRF) if they learnt whether an address was
denied, a name unknown or a port closed. All of these have the same answer, that the image cannot be
had, and the log has the reason. Clients get a reason only where it reveals nothing: when the URL
and the settings alone decide (`problem_without_lookup`), and for the status of a public host.
"""

import asyncio
import email.utils
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import anyio.to_thread
import httpx2

from server.core.errors import ImageProblem
from server.core.fairness import FairSemaphore
from server.core.http import CODINGS, inflate
from server.core.logs import get_logger
from server.core.settings.sections import FetchSettings
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
    redirect_target,
    unwrap_ipv4,
)
from server.egress.resolver import numeric_addresses

logger = get_logger(__name__)

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
UNSUPPORTED_CODINGS = ("br", "zstd", "dcb", "dcz", "compress", "x-compress", "exi", "pack200-gzip")
"""Compressions that cannot be undone here, from IANA's registry of content codings."""
SETTLED_S = 2.0
"""A file younger than this may change again within the same second of its `Last-Modified`."""
MAX_VALIDATOR_CHARS = 256
"""Longest ETag or time; an image with a longer one is not cached."""
CACHE_OVERHEAD_BYTES = 1_024
"""Generous estimate of what a cached image takes besides its headers and its body."""


class FetchFailed(Exception):
    """An image cannot be had. kind: the reason that the client gets."""

    def __init__(self, kind: ImageProblem) -> None:
        self.kind = kind
        super().__init__(kind.value)


class BadResponse(Exception):
    """A response without an image. kind: the reason that the client gets."""

    def __init__(self, kind: ImageProblem, reason: str) -> None:
        self.kind = kind
        super().__init__(reason)


NO_GRANT = EgressGrant()


class ImageDownloader:
    def __init__(self, settings: FetchSettings, client: EgressClient) -> None:
        self._settings = settings
        self._client = client
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
        policy = grant.policy(self._settings, self._client.nat64_prefixes)
        try:
            # One deadline for the whole download, because a slow drip passes time-outs of reads.
            async with (
                asyncio.timeout(self._settings.total_timeout_s),
                self._slots.held_by(grant.key_id),
            ):
                return await self._follow(target, grant.key_id, policy)
        except BodyTooLarge as error:
            raise FetchFailed(ImageProblem.TOO_LARGE) from error
        except (AddressDenied, BadResponse, *NETWORK_ERRORS) as error:
            event = "fetch refused" if isinstance(error, AddressDenied) else "fetch failed"
            logger.info(event, detail=f"{host_of(target)}: {type(error).__name__}: {error}")
            if isinstance(error, BadResponse):
                raise FetchFailed(error.kind) from error
            # The same for every cause, so that clients cannot learn whether a host exists.
            problem = problem_without_lookup(target, policy, has_proxy=self._client.has_proxy)
            raise FetchFailed(problem) from error

    async def _follow(self, target: httpx2.URL, key_id: str, policy: AddressPolicy) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            image = await self._request(target, key_id, policy)
            if isinstance(image, bytes):
                return image
            target = redirect_target(target, image)
        raise AddressDenied("too many redirects")

    async def _request(self, url: httpx2.URL, key_id: str, policy: AddressPolicy) -> bytes | str:
        """The image, or the location of a redirect.

        Raises: AddressDenied, BadResponse, NETWORK_ERRORS.
        """
        cached = self._cache.get(key_id, str(url))
        async with self._client.request(
            "GET",
            url,
            policy,
            owner=key_id,
            headers=cached.conditional_headers if cached else {},
            max_body_bytes=self._settings.max_image_bytes,
            connect_timeout_s=self._settings.connect_timeout_s,
        ) as response:
            location = response.headers.get("location")
            if response.status in REDIRECTS and location:
                return location
            if response.status == 304 and cached:
                return cached.body
            if response.status != 200:
                is_public_host = self._is_public_host(url, response.peer, policy)
                problem = problem_of_status(response.status, is_public_host)
                raise BadResponse(problem, f"status {response.status}")
            must_inflate = is_compressed(response.headers.get("content-encoding", ""))
            body = await response.read()
            if must_inflate:
                limit = self._settings.max_image_bytes
                body = await anyio.to_thread.run_sync(decompressed, body, limit)
            image = CachedImage(body, conditional_headers(response.headers))
            self._cache.put(key_id, str(url), image)
            return body

    def _is_public_host(self, url: httpx2.URL, peer: str, policy: AddressPolicy) -> bool:
        """Whether a host is known to be public. peer: the address that was dialled."""
        if self._client.has_proxy:
            return False
        address = unwrap_ipv4(parse_address(peer), policy.nat64_prefixes)
        return not policy.allows_explicitly(host_of(url), address)


def problem_of_status(status: int, is_public_host: bool) -> ImageProblem:
    """The client's reason for a status other than 200.

    The status of a host that an operator has allowed, or that a proxy has resolved, is not
    revealed, because such a host may be private.
    """
    if not is_public_host:
        return ImageProblem.NOT_REACHABLE
    match status:
        case 404 | 410:
            return ImageProblem.NOT_FOUND
        case 401 | 403:
            return ImageProblem.FORBIDDEN
    return ImageProblem.HOST_FAILED


def problem_without_lookup(
    url: httpx2.URL, policy: AddressPolicy, *, has_proxy: bool
) -> ImageProblem:
    """Why a URL can never be fetched, as far as its text and the settings decide.

    `NOT_REACHABLE` where they do not decide: where an operator allows the address, where a name
    may resolve into an allowed network, and where the proxy resolves the name.
    """
    host, port = host_of(url).rstrip("."), port_of(url)
    if policy.allows_host(host):
        return ImageProblem.NOT_REACHABLE
    literals = numeric_addresses("127.0.0.1" if is_localhost(host) else host, port)
    if literals:
        address = unwrap_ipv4(parse_address(literals[0]), policy.nat64_prefixes)
        # "Private" would suggest allowing the address, which is never right for these two.
        if address.is_unspecified or address in METADATA or policy.allows_explicitly(host, address):
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
    """Whether a `Content-Encoding` names a supported compression.

    Other tokens (`identity`, `aws-chunked`, `base64`, `utf-8`) come from careless uploads and are
    ignored. Raises: BadResponse for an unsupported compression, and for more than one.
    """
    tokens = [token.strip().lower() for token in header.split(",")]
    named = [token for token in tokens if token in (*CODINGS, *UNSUPPORTED_CODINGS)]
    if len(named) > 1 or any(token in UNSUPPORTED_CODINGS for token in named):
        raise BadResponse(ImageProblem.COMPRESSED, f"content encoding {header[:100]}")
    return bool(named)


def decompressed(body: bytes, max_bytes: int) -> bytes:
    """A body without its compression. Raises: BadResponse; BodyTooLarge.

    Inflating stops at the limit, so that a decompression bomb takes no more memory than an image.
    """
    content = bytearray()
    try:
        for piece in inflate(body):
            content += piece
            if len(content) > max_bytes:
                raise BodyTooLarge
    except zlib.error as error:
        raise BadResponse(ImageProblem.DAMAGED, f"compression: {error}") from error
    return bytes(content)


@dataclass(frozen=True, slots=True)
class CachedImage:
    """A downloaded body. conditional_headers: request it again only if it has changed."""

    body: bytes
    conditional_headers: Mapping[str, str]


class ConditionalCache:
    """A least recently used cache of images by key and URL, limited in bytes, also per key.

    The host is asked at every fetch whether its image has changed. A changed image is therefore
    never served stale, and a cached image of an address that is denied by now is not served. Keys
    do not share images, so none can find out what another has fetched.
    """

    def __init__(self, max_bytes: int, max_bytes_per_key: int) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_per_key = min(max_bytes, max_bytes_per_key)
        self._bytes: Counter[str] = Counter()
        self._cache: dict[str, OrderedDict[str, CachedImage]] = {}

    def get(self, key_id: str, url: str) -> CachedImage | None:
        """The image that this key has fetched from this URL."""
        images = self._cache.get(key_id, OrderedDict())
        if url in images:
            images.move_to_end(url)
        return images.get(url)

    def put(self, key_id: str, url: str, image: CachedImage) -> None:
        """Replace the image. One without conditional headers, or above the limit, is not cached."""
        if url in self._cache.get(key_id, ()):
            self._drop(key_id, url)
        size = cached_size(url, image)
        if not image.conditional_headers or size > self._max_bytes_per_key:
            return
        self._cache.setdefault(key_id, OrderedDict())[url] = image
        self._bytes[key_id] += size
        while self._bytes[key_id] > self._max_bytes_per_key:
            self._drop_oldest(key_id)
        while self._bytes.total() > self._max_bytes:
            # The key with most bytes loses an image, so that it cannot evict those of other keys.
            self._drop_oldest(max(self._bytes, key=self._bytes.__getitem__))

    def _drop_oldest(self, key_id: str) -> None:
        self._drop(key_id, next(iter(self._cache[key_id])))

    def _drop(self, key_id: str, url: str) -> None:
        images = self._cache[key_id]
        self._bytes[key_id] -= cached_size(url, images.pop(url))
        if not images:
            del self._cache[key_id], self._bytes[key_id]


def cached_size(url: str, image: CachedImage) -> int:
    """Bytes of memory that a cached image takes."""
    headers = image.conditional_headers.values()
    return CACHE_OVERHEAD_BYTES + len(url) + sum(map(len, headers)) + len(image.body)


def conditional_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Request headers for this response's strong ETag or settled modification time, else none."""
    if "no-store" in headers.get("cache-control", "").lower():
        return {}
    tag, last_modified = headers.get("etag", ""), headers.get("last-modified", "")
    if max(len(tag), len(last_modified)) > MAX_VALIDATOR_CHARS:
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

"""Serves finished pictures, as files, as base64 text or as thumbnails, and uploads."""

import base64
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from models.imaging.decoding import ImageLimits, decode_image
from models.imaging.images import encode_webp, fit_within
from models.params import OutputFormat
from server.api.auth.keyring import network_of
from server.api.dependencies import ServicesOf
from server.api.services import Services
from server.core.errors import RouteNotFound, ServerBusy
from server.core.metrics import CLIENT_CLOSED
from server.jobs.job import (
    OUTPUT_FOLDER,
    OUTPUT_NAME,
    THUMBNAIL_NAME,
    THUMBNAIL_PATH,
    UPLOAD_FOLDER,
    UPLOAD_NAME,
    stored_name_of,
)

router = APIRouter()

MAX_WAITING = 64
"""Calls of one network that may wait for a thumbnail; further ones are refused, as a queue of calls
without a key must end somewhere. A page of the list of jobs asks for 20 at once."""

MAX_KEPT, MAX_KEPT_BYTES = 256, 65_536
"""Most thumbnails that are kept in memory, and the size of the largest one: 16 MB in all. Most have
10 KB; a colour profile may add 1 MB."""

PICTURE_NAME, UPLOADED_NAME = re.compile(OUTPUT_NAME), re.compile(UPLOAD_NAME)
SMALL_NAME = re.compile(THUMBNAIL_NAME)

THUMBNAIL_PX, THUMBNAIL_QUALITY = 256, 80

OWN_LIMITS = ImageLimits(max_bytes=64_000_000, max_pixels=8_000_000)
"""For pictures of our own, which have 4 megapixels at most."""

MEDIA_TYPES = {each.suffix: each.media_type for each in OutputFormat}

PICTURE_HEADERS = {
    "Content-Disposition": "inline",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}
OUTPUT_HEADERS = {**PICTURE_HEADERS, "Cache-Control": "public, max-age=86400, immutable"}


def describe_file(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the answers of a call for a file."""
    return {
        200: {"description": "The file", "content": {each: {} for each in media_types}},
        404: {"description": "There is no such file, or no longer"},
        "default": {"description": "Any other error"},
    }


@router.head(f"/{OUTPUT_FOLDER}/{{name}}", include_in_schema=False)
@router.get(
    f"/{OUTPUT_FOLDER}/{{name}}",
    response_class=Response,
    responses=describe_file("image/*", "text/plain"),
)
async def output(request: Request, services: ServicesOf, name: str) -> Response:
    """A picture, or its base64 text. It is streamed, so that only one piece is in memory."""
    if not PICTURE_NAME.fullmatch(name):
        raise RouteNotFound
    stored_name = stored_name_of(name)
    if services.settings.storage.redirect and may_redirect(request, name):
        return await redirect(request, services, f"{OUTPUT_FOLDER}/{stored_name}")
    size, pieces = await open_picture(services, f"{OUTPUT_FOLDER}/{stored_name}")
    media_type = MEDIA_TYPES[PurePath(stored_name).suffix]
    if name.endswith(".base64"):
        size, pieces, media_type = (size + 2) // 3 * 4, in_base64(pieces), "text/plain"
    headers = {**OUTPUT_HEADERS, "Content-Length": str(size), "Content-Type": media_type}
    return stream(request, services, pieces, headers)


def may_redirect(request: Request, name: str) -> bool:
    """Not for the base64 texts, which are not stored, nor for pages of this server.

    The playground's Content-Security-Policy allows pictures from this server alone. A browser says
    of its requests which page they come from.
    """
    is_own_page = request.headers.get("sec-fetch-site") == "same-origin"
    return not (name.endswith(".base64") or is_own_page)


async def redirect(request: Request, services: Services, key: str) -> Response:
    """A redirect to a signed link. Raises: RouteNotFound, StorageUnavailable."""
    storage, valid_s = services.storage, services.settings.storage.redirect_s
    if not await services.in_file_thread(storage.has, key):
        raise RouteNotFound
    method: Literal["GET", "HEAD"] = "HEAD" if request.method == "HEAD" else "GET"
    link = await services.in_file_thread(storage.sign, key, method, valid_s)
    return RedirectResponse(link, 302, {"Cache-Control": "no-store"})


@router.head(f"/{THUMBNAIL_PATH}/{{name}}", include_in_schema=False)
@router.get(
    f"/{THUMBNAIL_PATH}/{{name}}", response_class=Response, responses=describe_file("image/webp")
)
async def thumbnail(request: Request, services: ServicesOf, name: str) -> Response:
    """A picture as a WebP of at most 256 pixels a side. The latest thumbnails are kept in memory.

    Raises: RouteNotFound, ServerBusy, StorageUnavailable.
    """
    if not SMALL_NAME.fullmatch(name):
        raise RouteNotFound
    key = f"{OUTPUT_FOLDER}/{name.removesuffix('.webp')}"
    # A picture that has been removed has no thumbnail either.
    if not await services.in_file_thread(services.storage.has, key):
        raise RouteNotFound
    small = services.thumbnails.get(key) or await new_thumbnail(request, services, key)
    if small is None:
        return Response(status_code=CLIENT_CLOSED)
    media_type = OutputFormat.WEBP.media_type
    headers = {**OUTPUT_HEADERS, "Content-Length": str(len(small)), "Content-Type": media_type}
    return Response(b"" if request.method == "HEAD" else small, 200, headers)


async def new_thumbnail(request: Request, services: Services, key: str) -> bytes | None:
    """The thumbnail of a picture, made if it is not kept; None where the client has left.

    Callers are told apart by their network, because they need no key.
    Raises: RouteNotFound, ServerBusy, StorageUnavailable.
    """
    owner = f"{THUMBNAIL_PATH} {network_of(request.client.host if request.client else '')}"
    if services.picture_slots.waiting(owner) >= MAX_WAITING:
        raise ServerBusy
    # The file is read once there is a thread for it, so that calls which wait hold no pictures.
    async with services.picture_slots.held_by(owner):
        # Calls whose clients have gone meanwhile must not delay those of others.
        if await request.is_disconnected():
            return None
        if key in services.thumbnails:  # another call has made it meanwhile
            return services.thumbnails[key]
        picture = await services.in_file_thread(services.storage.get, key)
        if picture is None:
            raise RouteNotFound
        small = await to_thread.run_sync(make_thumbnail, picture)
        keep(services.thumbnails, key, small)
        return small


def keep(thumbnails: dict[str, bytes], key: str, small: bytes) -> None:
    """Keep a thumbnail, at the cost of the one that was made first."""
    if len(small) <= MAX_KEPT_BYTES:
        thumbnails[key] = small
        if len(thumbnails) > MAX_KEPT:
            del thumbnails[next(iter(thumbnails))]


def make_thumbnail(picture: bytes) -> bytes:
    """A WebP of a picture of our own. Takes 10 to 800 ms."""

    def fit(width: int, height: int) -> tuple[int, int]:
        return fit_within(width, height, THUMBNAIL_PX)

    decoded = decode_image(picture, OWN_LIMITS, fit)
    return encode_webp(decoded.pixels, THUMBNAIL_QUALITY, icc_profile=decoded.icc_profile)


@router.head(f"/{UPLOAD_FOLDER}/{{name}}", include_in_schema=False)
@router.get(
    f"/{UPLOAD_FOLDER}/{{name}}", response_class=Response, responses=describe_file("image/*")
)
async def upload(request: Request, services: ServicesOf, name: str) -> Response:
    """A picture that a client uploaded, until it is removed. No cache keeps it longer."""
    if not UPLOADED_NAME.fullmatch(name):
        raise RouteNotFound
    size, pieces = await open_picture(services, f"{UPLOAD_FOLDER}/{name}")
    media_type = MEDIA_TYPES[PurePath(name).suffix]
    headers = {**PICTURE_HEADERS, "Content-Length": str(size), "Content-Type": media_type}
    return stream(request, services, pieces, headers)


async def open_picture(services: Services, key: str) -> tuple[int, Iterator[bytes]]:
    """The size and the pieces of a stored picture. Raises: RouteNotFound, StorageUnavailable."""
    found = await services.in_file_thread(services.storage.open, key)
    if found is None:
        raise RouteNotFound
    return found


def stream(
    request: Request, services: Services, pieces: Iterator[bytes], headers: Mapping[str, str]
) -> Response:
    """A response that sends the pieces; for HEAD the headers alone."""
    if request.method == "HEAD":
        return Response(b"", 200, headers)

    return StreamingResponse(pieces_of(services, pieces), 200, headers)


async def pieces_of(services: Services, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a stored file, each read when it is asked for. Raises: StorageUnavailable."""
    while (piece := await services.in_file_thread(next, pieces, None)) is not None:
        yield piece


def in_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The base64 text of pieces of bytes, piece by piece."""
    rest = b""
    for piece in pieces:
        whole = rest + piece
        end = len(whole) - len(whole) % 3
        yield base64.b64encode(whole[:end])
        rest = whole[end:]
    yield base64.b64encode(rest)

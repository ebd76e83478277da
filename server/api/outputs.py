"""Serves finished pictures, as the files they are or as base64 text, and uploads."""

import base64
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import PurePath

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from models.params import OutputFormat
from server.api.dependencies import ServicesOf
from server.api.services import Services
from server.core.errors import RouteNotFound
from server.jobs.job import (
    OUTPUT_FOLDER,
    OUTPUT_NAME,
    UPLOAD_FOLDER,
    UPLOAD_NAME,
    stored_name_of,
)

router = APIRouter()

PICTURE_NAME, UPLOADED_NAME = re.compile(OUTPUT_NAME), re.compile(UPLOAD_NAME)
MEDIA_TYPES = {each.suffix: each.media_type for each in OutputFormat}

PICTURE_HEADERS = {
    "Content-Disposition": "inline",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}
OUTPUT_HEADERS = {**PICTURE_HEADERS, "Cache-Control": "public, max-age=86400, immutable"}


@router.head(f"/{OUTPUT_FOLDER}/{{name}}", include_in_schema=False)
@router.get(f"/{OUTPUT_FOLDER}/{{name}}")
async def output(request: Request, services: ServicesOf, name: str) -> Response:
    """A picture, or its base64 text. It is streamed, so that only one piece is in memory."""
    if not PICTURE_NAME.fullmatch(name):
        raise RouteNotFound
    stored_name = stored_name_of(name)
    size, pieces = await open_picture(services, f"{OUTPUT_FOLDER}/{stored_name}")
    media_type = MEDIA_TYPES[PurePath(stored_name).suffix]
    if name.endswith(".base64"):
        size, pieces, media_type = (size + 2) // 3 * 4, in_base64(pieces), "text/plain"
    headers = {**OUTPUT_HEADERS, "Content-Length": str(size), "Content-Type": media_type}
    return stream(request, services, pieces, headers)


@router.head(f"/{UPLOAD_FOLDER}/{{name}}", include_in_schema=False)
@router.get(f"/{UPLOAD_FOLDER}/{{name}}")
async def upload(request: Request, services: ServicesOf, name: str) -> Response:
    """A picture that a client uploaded, until it is removed. No cache keeps it longer."""
    if not UPLOADED_NAME.fullmatch(name):
        raise RouteNotFound
    size, pieces = await open_picture(services, f"{UPLOAD_FOLDER}/{name}")
    media_type = MEDIA_TYPES[PurePath(name).suffix]
    headers = {**PICTURE_HEADERS, "Content-Length": str(size), "Content-Type": media_type}
    return stream(request, services, pieces, headers)


async def open_picture(services: Services, key: str) -> tuple[int, Iterator[bytes]]:
    """As `Storage.open`. Raises: RouteNotFound, StorageUnavailable."""
    found = await services.in_file_thread(services.storage.open, key)
    if found is None:
        raise RouteNotFound
    return found


def stream(
    request: Request, services: Services, pieces: Iterator[bytes], headers: Mapping[str, str]
) -> Response:
    """The answer in pieces; without them for HEAD."""
    if request.method == "HEAD":
        return Response(b"", 200, headers)

    async def content() -> AsyncIterator[bytes]:
        while (piece := await services.in_file_thread(next, pieces, None)) is not None:
            yield piece

    return StreamingResponse(content(), 200, headers)


def in_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The base64 text of pieces of bytes, piece by piece."""
    rest = b""
    for piece in pieces:
        whole = rest + piece
        end = len(whole) - len(whole) % 3
        yield base64.b64encode(whole[:end])
        rest = whole[end:]
    yield base64.b64encode(rest)

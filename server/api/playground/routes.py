"""Serves the playground: pages that call this server's public APIs.

The pages are plain files without a build step. They are read once and sent with an ETag and a
content security policy that allows nothing from elsewhere. The endpoint `/playground/facts` tells
the playground what no API describes: the models and LoRAs on offer and the words of the enhanced
prompt.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from models.checkpoints.catalog import ModelSpec, find_model, read_catalog
from models.checkpoints.local import licence_of, local_traits
from models.errors import ModelUnavailable
from server.api.auth.keyring import key_in_headers
from server.api.dependencies import ServicesOf, admit, base_url_of
from server.core.errors import RouteNotFound
from server.core.settings import Settings

MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
# The file that each path outside `/playground/` answers with.
PAGES = {
    "/": "index.html",
    "/status": "status.html",
    "/docs": "docs.html",
    "/favicon.ico": "icon.svg",
}

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    # A browser asks each time and gets 304, so that a page never mixes two versions.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str

    def to_response(self, request: Request) -> Response:
        """The file; 304 for a browser that has it."""
        headers = {**HEADERS, "ETag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        body = b"" if request.method == "HEAD" else self.content
        headers["Content-Length"] = str(len(self.content))
        return Response(body, 200, headers, self.media_type)


def read_file(file: Traversable) -> PageFile:
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return PageFile(content, MEDIA_TYPES[PurePath(file.name).suffix], etag)


def page_files() -> Iterator[tuple[str, PageFile]]:
    """The page's own files by name, and the built-in model's examples by `examples/NAME`."""
    for file in files("server.api.playground").joinpath("static").iterdir():
        yield file.name, read_file(file)
    for file in files("models.builtin").joinpath("examples").iterdir():
        yield f"examples/{file.name}", read_file(file)


def playground_router() -> APIRouter:
    """The pages, their files, the icon and the facts."""
    router = APIRouter(include_in_schema=False)
    known = dict(page_files())

    def page(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return known[name].to_response(request)

        return answer

    async def page_file(request: Request, name: str) -> Response:
        if name not in known:
            raise RouteNotFound
        return known[name].to_response(request)

    async def example(request: Request, folder: str, name: str) -> Response:
        return await page_file(request, f"{folder}/{name}")

    methods = ["GET", "HEAD"]
    for path, name in PAGES.items():
        router.add_api_route(path, page(name), methods=methods)
    router.add_api_route("/playground/facts", facts, methods=["GET"])
    router.add_api_route("/playground/{name}", page_file, methods=methods)
    router.add_api_route("/playground/{folder}/{name}", example, methods=methods)
    return router


async def facts(request: Request, services: ServicesOf) -> dict[str, Any]:
    """What the page shows beside the form. Raises: InvalidApiKey, RateLimited.

    public_url: the address that the URLs of pictures begin with.
    traits: of each model; None where this machine has none of its files.
    """
    admit(request, key_in_headers(request.headers))
    settings = services.settings
    return {
        "model": settings.model,
        "models": settings.offered_models,
        "traits": await to_thread.run_sync(traits_of_models, settings),
        "loras": settings.offered_loras,
        "public_url": base_url_of(request, settings),
        "enhance": {
            "suffix": settings.enhance.suffix,
            "negative_list": settings.enhance.negative_list,
        },
    }


def traits_of_models(settings: Settings) -> dict[str, dict[str, Any] | None]:
    """What each model on offer is, as far as this machine knows. Reads files."""
    try:
        catalog = read_catalog(settings.models_file).models
    except ModelUnavailable:  # a machine without workers needs no list of models
        catalog = {}
    return {name: model_traits(find_model(name, catalog)) for name in settings.offered_models}


def model_traits(spec: ModelSpec) -> dict[str, Any] | None:
    traits = local_traits(spec)
    return None if traits is None else {**asdict(traits), "licence": licence_of(spec)}

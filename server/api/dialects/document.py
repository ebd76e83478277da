"""OpenAPI's document, `/openapi.json`: FastAPI's, with the descriptions of the enabled dialects."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from server.api.dialects.base import Dialect

Document = dict[str, Any]

TEXT = (
    "Inpainting and other pictures by Stable Diffusion, in the languages of several APIs. All make "
    "the same jobs. Where the server asks for an API key, it may come in any of the ways that are "
    "listed; without keys it serves its own machine, unless its operator has opened it."
)
SECURITY_SCHEMES = {
    "APIKeyHeader": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The API key; the header may also be called `key`",
    },
    "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "The API key"},
    "HTTPBasic": {
        "type": "http",
        "scheme": "basic",
        "description": "The API key as the password, with any user name",
    },
}
OTHER_TAGS = {
    "pictures": "Finished pictures and uploads. Whoever knows a picture's name may read it.",
    "health": "Whether the server is alive, and whether it takes jobs. No key is needed.",
}
METHODS = ("get", "post", "put", "delete")


def write_document(app: FastAPI, dialects: Sequence[Dialect]) -> Document:
    """The whole document. dialects: those whose routes the application has, tagged by name."""
    document: Document = app.openapi()
    components = document.setdefault("components", {})
    components["securitySchemes"] = SECURITY_SCHEMES
    for dialect in dialects:
        examples = dialect.description.examples.items()
        components.setdefault("schemas", {}).update(dialect.description.schemas)
        components.setdefault("examples", {}).update(
            {name: {"value": each} for name, each in examples}
        )
    names = {dialect.name for dialect in dialects}
    for operation in operations(document):
        if names & {*operation["tags"]}:
            operation["security"] = [{name: []} for name in SECURITY_SCHEMES]
            share_errors(operation, components.setdefault("responses", {}))
    document["info"] = {
        "title": "inpaint-server",
        "version": version("inpaint-server"),
        "description": TEXT,
    }
    document["tags"] = [*map(write_tag, dialects), *other_tags()]
    return document


def operations(document: Document) -> Iterator[dict[str, Any]]:
    """All calls of a document."""
    for path in document["paths"].values():
        yield from (path[method] for method in METHODS if method in path)


def share_errors(operation: Document, shared: Document) -> None:
    """List the errors of a call among those of all calls, by the names of schema and status.

    A hundred calls have the same ones, which would be half of the document.
    """
    responses = operation["responses"]
    for status in [each for each in responses if each not in ("200", "201", "202", "204")]:
        (media,) = responses[status]["content"].values()
        name = f"{media['schema']['$ref'].rpartition('/')[2]}{status.capitalize()}"
        shared[name] = responses[status]
        responses[status] = {"$ref": f"#/components/responses/{name}"}


def write_tag(dialect: Dialect) -> Document:
    """The tag of a dialect's calls."""
    about = dialect.description
    return {
        "name": dialect.name,
        "x-displayName": about.title,
        "description": f"{about.text} More is in docs/{about.page}.",
    }


def other_tags() -> Iterator[Document]:
    for name, text in OTHER_TAGS.items():
        yield {"name": name, "x-displayName": name.capitalize(), "description": text}

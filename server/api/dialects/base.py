"""`Dialect`: everything that the rest of the server knows of one wire language."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from server.core.errors import ApiError, InvalidBody
from server.jobs.job import Job


def invalid_body(_error: RequestValidationError) -> ApiError:
    """The default `to_api_error`, for a dialect whose endpoints read the whole call themselves."""
    return InvalidBody()


@dataclass(frozen=True, slots=True)
class Dialect:
    """One wire language.

    name: stored in the rows of the dialect's jobs.
    router: its endpoints. They read a call into a `JobRequest`, hand it to `accept`, and write the
        answer. A fact of the call that only this dialect needs later goes into the job's row by a
        frozen type of its own (`RequestFacts.own`).
    owns: whether errors under a path are written in this dialect.
    write_error: the response for an error.
    write_webhook: the body of the webhook call for a job that has ended.
    to_api_error: FastAPI's validation error of path, query or headers as an `ApiError`.
    """

    name: str
    router: APIRouter
    owns: Callable[[str], bool]
    write_error: Callable[[ApiError, Request], Response]
    write_webhook: Callable[[Job], dict[str, Any]]
    to_api_error: Callable[[RequestValidationError], ApiError] = invalid_body

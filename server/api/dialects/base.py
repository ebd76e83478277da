"""`Dialect`: one wire language, which is all that the rest of the server knows of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from server.core.errors import ApiError, InvalidBody
from server.jobs.job import Job


def invalid_body(_error: RequestValidationError) -> ApiError:
    """For a dialect whose endpoints read all of a call themselves."""
    return InvalidBody()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How clients of one kind speak.

    name: stands in the rows of the dialect's jobs.
    router: its endpoints. They read a call into a `JobRequest`, hand it to `accept`, and write the
        answer. A fact of the call that only this dialect needs later goes into the job's row by a
        frozen type of its own (`RequestFacts.own`).
    owns: whether errors under a path are written in this dialect.
    write_error: the answer for an error.
    write_webhook: the body of the webhook call for a job that has ended.
    to_api_error: what the framework found wrong with a call, in the server's terms.
    """

    name: str
    router: APIRouter
    owns: Callable[[str], bool]
    write_error: Callable[[ApiError, Request], Response]
    write_webhook: Callable[[Job], dict[str, Any]]
    to_api_error: Callable[[RequestValidationError], ApiError] = invalid_body

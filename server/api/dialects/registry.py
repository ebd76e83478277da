"""The dialects this server speaks. A further wire language is one folder and one entry here."""

from collections.abc import Sequence
from typing import Any

from models.spelling import did_you_mean
from server.api.dialects.a1111.routes import A1111
from server.api.dialects.base import Dialect
from server.api.dialects.iopaint.routes import IOPAINT
from server.api.dialects.native.routes import NATIVE
from server.api.dialects.openai.routes import OPENAI
from server.api.dialects.replicate.routes import REPLICATE
from server.api.dialects.vendor.routes import V3, VENDOR
from server.jobs.job import Job

DIALECTS = (NATIVE, OPENAI, REPLICATE, IOPAINT, A1111, VENDOR, V3)
"""The first dialect that owns a path writes its errors; `NATIVE` writes those of other paths."""

BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


def enabled_dialects(names: Sequence[str]) -> list[Dialect]:
    """The dialects that have routes. names: empty for all. Raises: ValueError."""
    for name in names:
        if name not in BY_NAME:
            raise ValueError(
                f"dialects: {name!r} is none of those in docs/clients.md"
                f"{did_you_mean(name, BY_NAME)}"
            )
    return [dialect for dialect in DIALECTS if not names or dialect.name in names]


def dialect_of(path: str) -> Dialect:
    """The dialect in which errors under a path are written."""
    return next((dialect for dialect in DIALECTS if dialect.owns(path)), DIALECTS[0])


def names_by_route() -> dict[str, str]:
    """The dialect of each route's path, such as `/api/jobs/{job_id}`."""
    return {
        getattr(route, "path", ""): dialect.name
        for dialect in DIALECTS
        for route in dialect.router.routes
    }


def write_webhook(job: Job) -> dict[str, Any]:
    """The webhook body of a job, in the dialect of its request."""
    return BY_NAME[job.dialect].write_webhook(job)

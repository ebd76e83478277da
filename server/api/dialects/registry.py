"""The dialects this server speaks. A further wire language is one folder and one entry here."""

from typing import Any

from server.api.dialects.base import Dialect
from server.api.dialects.native.routes import NATIVE
from server.api.dialects.v3.routes import V3
from server.jobs.job import Job

DIALECTS = (NATIVE, V3)
"""The first dialect that owns a path writes its errors; `NATIVE` writes those of other paths."""

BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


def dialect_of(path: str) -> Dialect:
    """The dialect in which errors under a path are written."""
    return next((dialect for dialect in DIALECTS if dialect.owns(path)), DIALECTS[0])


def write_webhook(job: Job) -> dict[str, Any]:
    """The webhook body of a job, in the dialect of its request."""
    return BY_NAME[job.dialect].write_webhook(job)

"""Rows of jobs, read as a `Job`."""

from typing import Any

from sqlalchemy import Row

from models.params import InpaintParams
from server.jobs.job import Job, JobState, RequestFacts


def to_job(row: Row[Any]) -> Job:
    """A whole row of `jobs`."""
    values = dict(row._mapping)
    del values["heartbeat_at"], values["submitted_s"]
    values["state"] = JobState(values["state"])
    values["request"] = RequestFacts.from_json(values["request"])
    values["params"] = InpaintParams.from_json(values["params"])
    return Job(**values)

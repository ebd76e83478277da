"""Rows of jobs, read: a row as a `Job`, and the load that many rows are together."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, bindparam, case, func, select

from models.params import InpaintParams
from server.database import jobs
from server.jobs import Job, JobState, Load
from server.turns import GOES_BEFORE, IS_WAITING, Place

IS_RUNNING: ColumnElement[bool] = jobs.c.state == JobState.RUNNING


def to_job(row: Row[Any]) -> Job:
    """A whole row of `jobs`."""
    values = dict(row._mapping)
    del values["beaten_at"], values["submitted_s"]
    values["state"] = JobState(values["state"])
    values["params"] = InpaintParams.from_json(values["params"])
    return Job(**values)


def whole_load(connection: Connection) -> Load:
    """Of all jobs that wait or run."""
    return Load(*connection.execute(_WHOLE).one())


def load_before(connection: Connection, place: Place) -> Load:
    """Of those that a waiting job has before it, running ones included."""
    return Load(*connection.execute(_BEFORE_WAITING, place.to_parameters()).one())


def load_beside(connection: Connection, job_id: int) -> Load:
    """Of those that a running job has before it: it runs beside those that began earlier."""
    return Load(*connection.execute(_BEFORE_RUNNING, {"job_id": job_id}).one())


def _sum_up(which: ColumnElement[bool]) -> Select[int, int, float]:
    # Built once each: building costs more than running.
    steps = case((jobs.c.total_steps == 0, 1), else_=jobs.c.total_steps)
    left = jobs.c.work * (1 - 1.0 * jobs.c.step / steps)
    return select(
        func.count().filter(jobs.c.state == JobState.QUEUED),
        func.count().filter(jobs.c.state == JobState.RUNNING),
        func.coalesce(func.sum(left), 0.0),
    ).where(which)


_WHOLE = _sum_up(IS_RUNNING | IS_WAITING)
_IS_ANOTHER: ColumnElement[bool] = jobs.c.id != bindparam("place_id")
_BEFORE_WAITING = _sum_up(IS_RUNNING & _IS_ANOTHER | IS_WAITING & GOES_BEFORE)
_BEFORE_RUNNING = _sum_up(IS_RUNNING & (jobs.c.id < bindparam("job_id")))

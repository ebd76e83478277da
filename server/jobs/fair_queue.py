"""Whose turn it is: the order in which waiting jobs are given out.

Keys take turns, so that one with 500 waiting jobs delays another's single job by one. A job gets
the number of its turn when it is submitted: the one after its key's last, but none that has passed.
Lower turns go first; within one, who came first. Jobs of a higher priority go before all others.

A number given once stays true, so the next job, and a job's position, are looked up in an index.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    ScalarSelect,
    Select,
    bindparam,
    func,
    select,
)

from server.storage.tables import jobs

IS_WAITING: ColumnElement[bool] = jobs.c.state == "queued"
"""The job waits for a worker."""

ORDER = (jobs.c.priority.desc(), jobs.c.turn, jobs.c.id)
"""First to last."""


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """Where a new job would stand. turn: its number; waiting: jobs now, in all and of its key."""

    turn: int
    waiting: int
    waiting_of_key: int


def next_position(connection: Connection, key_id: str, priority: int) -> QueuePosition:
    """The position of a job that this key submits now."""
    row = connection.execute(_POSITION, {"key": key_id, "class": priority}).one()
    # Where none waits, the newest job's turn is the present one.
    present = row.newest or 0 if row.present is None else row.present
    return QueuePosition(max(present, row.own_last + 1), row.waiting, row.waiting_of_key)


def _position_query() -> Select[Any]:
    """Built once, as every accepted job asks it."""
    of_key = jobs.c.key_id == bindparam("key")
    of_class = jobs.c.priority == bindparam("class")
    count = select(func.count()).where(IS_WAITING)

    def first(order: ColumnElement[Any], *where: ColumnElement[bool]) -> ScalarSelect[int]:
        query = select(jobs.c.turn).where(of_class, *where).order_by(order).limit(1)
        return query.scalar_subquery()

    # A job that was lost keeps its turn, which has long passed.
    next_one = first(jobs.c.turn, IS_WAITING, jobs.c.attempt == 0)
    newest = first(jobs.c.turn.desc())
    # Turns that a key took back are not held against it.
    own = first(jobs.c.turn.desc(), of_key, jobs.c.state != "cancelled")
    return select(
        next_one.label("present"),
        newest.label("newest"),
        func.coalesce(own, -1).label("own_last"),
        count.scalar_subquery().label("waiting"),
        count.where(of_key).scalar_subquery().label("waiting_of_key"),
    )


_POSITION = _position_query()

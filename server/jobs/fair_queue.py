"""Fair queueing: the order in which waiting jobs are claimed.

Keys take turns (round robin), so a key with 500 waiting jobs delays another key's single job by
one. A job gets a turn number when it is submitted: one more than its key's last job, but at least
the current turn. Lower turns go first, and within a turn lower ids. Jobs of a higher priority go
before all others.

A turn number never changes, so an index finds the next job and a job's position.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    ScalarSelect,
    Select,
    bindparam,
    func,
    select,
)

from server.storage.tables import jobs

IS_WAITING: ColumnElement[bool] = jobs.c.state == "queued"
"""The job waits for a worker."""

SHARED_NOW = bindparam("shared_now", type_=Float)
"""Seconds of a `DatabaseClock`."""

IS_OVERDUE: ColumnElement[bool] = IS_WAITING & (jobs.c.deadline_at <= SHARED_NOW)
"""The job's deadline passed while it was waiting."""

ORDER = (jobs.c.priority.desc(), jobs.c.turn, jobs.c.id)
"""The order of claims."""


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """The position of a new job. waiting, waiting_of_key: jobs now, in all and of its key."""

    turn: int
    waiting: int
    waiting_of_key: int


def next_position(connection: Connection, key_id: str, priority: int) -> QueuePosition:
    """The position of a job that this key submits now."""
    row = connection.execute(_POSITION, {"key": key_id, "class": priority}).one()
    # If no job waits, the newest job's turn is the current one.
    current = row.newest or 0 if row.current is None else row.current
    return QueuePosition(max(current, row.own_last + 1), row.waiting, row.waiting_of_key)


def count_waiting(connection: Connection, key_id: str) -> tuple[int, int]:
    """How many jobs wait, in all and of this key."""
    in_all, of_key = connection.execute(_WAITING, {"key": key_id}).one()
    return in_all, of_key


OF_KEY: ColumnElement[bool] = jobs.c.key_id == bindparam("key")
COUNT = select(func.count()).where(IS_WAITING)


def _position_query() -> Select[Any]:
    """Built once, because every submit runs it."""
    of_class = jobs.c.priority == bindparam("class")

    def first(order: ColumnElement[Any], *where: ColumnElement[bool]) -> ScalarSelect[int]:
        query = select(jobs.c.turn).where(of_class, *where).order_by(order).limit(1)
        return query.scalar_subquery()

    # A requeued job keeps its old turn, which is no longer the current one.
    next_one = first(jobs.c.turn, IS_WAITING, jobs.c.attempt == 0)
    newest = first(jobs.c.turn.desc())
    # Cancelled jobs do not push a key's next turn back.
    own = first(jobs.c.turn.desc(), OF_KEY, jobs.c.state != "cancelled")
    return select(
        next_one.label("current"),
        newest.label("newest"),
        func.coalesce(own, -1).label("own_last"),
        COUNT.scalar_subquery().label("waiting"),
        COUNT.where(OF_KEY).scalar_subquery().label("waiting_of_key"),
    )


_POSITION = _position_query()
_WAITING = select(COUNT.scalar_subquery(), COUNT.where(OF_KEY).scalar_subquery())

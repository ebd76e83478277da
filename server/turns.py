"""Whose turn it is: the order in which waiting jobs are given out.

Keys take turns, so that one with 500 waiting jobs delays another's single job by one. A job gets
the number of its turn when it is submitted: the one after its key's last, but none that has passed.
Lower turns go first; within one, who came first. Jobs of a higher priority go before all others.

A number given once stays true, so the next job, and a job's position, are looked up in an index.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    ScalarSelect,
    Select,
    bindparam,
    func,
    select,
    tuple_,
)

from server.database import jobs

IS_WAITING: ColumnElement[bool] = jobs.c.state == "queued"
"""The job waits for a worker."""

ORDER = (jobs.c.priority.desc(), jobs.c.turn, jobs.c.id)
"""First to last."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a waiting job stands."""

    priority: int
    turn: int
    id: int

    def to_parameters(self) -> dict[str, int]:
        """Of `GOES_BEFORE`."""
        return {"place_priority": self.priority, "place_turn": self.turn, "place_id": self.id}


def _goes_before() -> ColumnElement[bool]:
    """The job is given out before the one whose `Place` the parameters tell."""
    priority: BindParameter[int] = bindparam("place_priority")
    turn: BindParameter[int] = bindparam("place_turn")
    job_id: BindParameter[int] = bindparam("place_id")
    is_earlier = tuple_(jobs.c.turn, jobs.c.id) < tuple_(turn, job_id)
    is_of_class: ColumnElement[bool] = jobs.c.priority == priority
    return (jobs.c.priority > priority) | (is_of_class & is_earlier)


GOES_BEFORE = _goes_before()
"""With parameters; `Place.to_parameters` gives them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a new job of a key meets. turn: it would get; waiting: jobs, in all and of the key."""

    turn: int
    waiting: int
    waiting_of_key: int


def look_at(connection: Connection, key_id: str, priority: int) -> Arrival:
    """The queue as a job submitted now would meet it."""
    row = connection.execute(_ARRIVAL, {"key": key_id, "class": priority}).one()
    turn = max(int(row.present), int(row.own_last) + 1)
    return Arrival(turn, int(row.waiting), int(row.waiting_of_key))


def _build_arrival() -> Select[Any]:
    """The question of `look_at`; built once, as every accepted job asks it."""
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
        func.coalesce(next_one, newest, 0).label("present"),
        func.coalesce(own, -1).label("own_last"),
        count.scalar_subquery().label("waiting"),
        count.where(of_key).scalar_subquery().label("waiting_of_key"),
    )


_ARRIVAL = _build_arrival()

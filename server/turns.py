"""Whose turn it is: the order in which waiting jobs are given out.

Keys take turns, so that one with 500 waiting jobs delays another's single job by one. A job gets
the number of its turn when it is submitted: the one after its key's last, but none that has passed.
Lower turns go first; within one, who came first. Jobs of a higher priority go before all others.

A number given once stays true, so the next job, and a job's position, are looked up in an index.
"""

from collections.abc import Iterable
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

from server.database import jobs

IS_WAITING: ColumnElement[bool] = jobs.c.state == "queued"
"""The job waits for a worker."""

ORDER = (jobs.c.priority.desc(), jobs.c.turn, jobs.c.id)
"""First to last."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a new job of a key meets. turn: it would get; waiting: jobs, in all and of the key."""

    turn: int
    waiting: int
    waiting_of_key: int


class Line:
    """The queue as jobs meet it that are submitted in one transaction, one behind the other.

    owners: their keys and priorities; each is looked up once, before any of the jobs is written.
    """

    def __init__(self, connection: Connection, owners: Iterable[tuple[str, int]]) -> None:
        self._waiting = 0
        self._waiting_of: dict[str, int] = {}
        self._own_last: dict[tuple[str, int], int] = {}
        self._present: dict[int, int | None] = {}
        self._newest: dict[int, int | None] = {}
        for key_id, priority in owners:
            row = connection.execute(_ARRIVAL, {"key": key_id, "class": priority}).one()
            self._waiting = row.waiting
            self._waiting_of[key_id] = row.waiting_of_key
            self._own_last[key_id, priority] = row.own_last
            self._present[priority], self._newest[priority] = row.present, row.newest

    def look(self, key_id: str, priority: int) -> Arrival:
        """As a job submitted now would meet it."""
        present = self._present[priority]
        if present is None:  # none waits
            present = self._newest[priority] or 0
        turn = max(present, self._own_last[key_id, priority] + 1)
        return Arrival(turn, self._waiting, self._waiting_of[key_id])

    def join(self, key_id: str, priority: int) -> Arrival:
        """The same, for a job that is submitted."""
        arrival = self.look(key_id, priority)
        self._waiting += 1
        self._waiting_of[key_id] += 1
        self._own_last[key_id, priority] = arrival.turn
        if self._present[priority] is None:
            self._present[priority] = arrival.turn
        self._newest[priority] = max(self._newest[priority] or 0, arrival.turn)
        return arrival


def _build_arrival() -> Select[Any]:
    """The question of `Line`; built once, as every accepted job asks it."""
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


_ARRIVAL = _build_arrival()

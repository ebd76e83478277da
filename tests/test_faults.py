"""The store when its database fails: the n-th statement, the n-th commit, the n-th answer.

A run goes through every verb and makes each again until it is answered, as a worker does. It is
repeated with the fault at every place there is, until a run meets none. After each run the promises
are held against the rows: what was accepted is there, ended once, and told of once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import pytest
from sqlalchemy import Engine, delete, event, select
from sqlalchemy.exc import IntegrityError, OperationalError

from server.database import deliveries, delivery_attempts, jobs
from server.deliveries import Attempt, DeliveryStore
from server.jobs import MAX_ATTEMPTS, Job, JobState, JobStore
from tests.test_jobs import Clock, new_job

P = ParamSpec("P")
R = TypeVar("R")

TRIES = 5
LEASE_S = 60.0
DELIVERED = Attempt(0.0, 0.1, 200, "answered")
LIVE = (JobState.QUEUED, JobState.RUNNING)


@dataclass
class Fault:
    """Strikes once, at the n-th call of a kind."""

    at: int
    calls: int = 0
    has_struck: bool = False

    def count(self, *_arguments: Any) -> None:
        """Raises: OperationalError at the n-th call."""
        self.calls += 1
        if self.calls == self.at:
            self.has_struck = True
            raise OperationalError("a call", None, Exception("the disk is gone"))


@contextmanager
def statement_fails(engine: Engine, fault: Fault) -> Iterator[None]:
    """Nothing of it takes effect."""
    event.listen(engine, "before_cursor_execute", fault.count)
    yield
    event.remove(engine, "before_cursor_execute", fault.count)


@contextmanager
def commit_fails(engine: Engine, fault: Fault) -> Iterator[None]:
    """The transaction is undone."""
    event.listen(engine, "commit", fault.count)
    yield
    event.remove(engine, "commit", fault.count)


@contextmanager
def answer_is_lost(engine: Engine, fault: Fault) -> Iterator[None]:
    """The commit takes effect, and its caller does not learn of it."""
    dialect: Any = engine.dialect
    do_commit = dialect.do_commit

    def commit(connection: Any) -> None:
        do_commit(connection)
        fault.count()

    dialect.do_commit = commit
    yield
    del dialect.do_commit  # the class's own is there again


@dataclass
class Run:
    """One way through all verbs. accepted: the ids that were answered."""

    engine: Engine
    clock: Clock = field(default_factory=Clock)
    accepted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = JobStore(self.engine, clock=self.clock)
        self.sender = DeliveryStore(self.engine, lease_s=LEASE_S, clock=self.clock)

    def insist(self, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Until it is answered; the fault strikes once."""
        for _ in range(TRIES):
            try:
                return act(*args, **kwargs)
            except OperationalError:
                continue
        raise AssertionError("no answer")

    def submit(self, key_id: str, webhook: str | None = None) -> None:
        # A client that gets no answer asks anew: that is another job.
        job = self.insist(self.submit_new, key_id, webhook)
        self.accepted.append(job.id)

    def submit_new(self, key_id: str, webhook: str | None) -> Job:
        return self.store.submit(new_job(key_id=key_id, webhook=webhook))

    def claim(self, limit: int) -> list[Job]:
        return self.insist(self.store.claim, "w", limit)

    def act(self) -> None:
        """Every verb once, in an order that gives each something to do."""
        self.submit("a", "http://x/1")
        self.submit("b", "http://x/2")
        self.submit("a")
        for index, job in enumerate(self.claim(2)):
            self.insist(self.store.beat, job, 1, 2)
            if index == 0:
                self.insist(self.store.finish, job, [False])
            else:
                self.insist(self.store.fail, job, "reason")
        self.insist(self.store.cancel, self.accepted[2])
        self.deliver()
        self.submit("b", "http://x/3")
        for job in self.claim(1):
            self.insist(self.store.release, job)
        self.claim(1)
        self.insist(self.store.requeue_of, "w")

    def deliver(self) -> None:
        for delivery in self.insist(self.sender.claim_due, 9):
            try:
                self.insist(self.sender.record, delivery, DELIVERED)
            except IntegrityError:
                pass  # it was recorded, and the answer lost

    def settle(self) -> None:
        """What happens to all jobs in the end, when nothing fails any more."""
        for _ in range(2 * len(self.accepted) + MAX_ATTEMPTS):
            self.store.requeue_of("w")
            for job in self.store.claim("w", 9):
                assert self.store.finish(job, [True])
        self.clock.now += LEASE_S + 1
        self.deliver()

    def rows(self) -> dict[int, Any]:
        with self.engine.connect() as connection:
            return {row.id: row for row in connection.execute(select(jobs))}

    def delivery_states(self) -> dict[int, list[str]]:
        with self.engine.connect() as connection:
            found: dict[int, list[str]] = {}
            for row in connection.execute(select(deliveries)):
                found.setdefault(row.job_id, []).append(row.state)
            return found

    def check(self) -> None:
        """The promises, at any time."""
        rows, told = self.rows(), self.delivery_states()
        assert {*self.accepted} <= {*rows}, "accepted means kept"
        assert len({*self.accepted}) == len(self.accepted), "no id twice"
        for job_id, row in rows.items():
            is_due = row.webhook is not None and row.state not in LIVE
            assert len(told.get(job_id, [])) == int(is_due), "told of once, when it has ended"


FAULTS = {"statement": statement_fails, "commit": commit_fails, "answer": answer_is_lost}


@pytest.mark.parametrize("kind", FAULTS)
def test_promises_hold_wherever_a_call_fails(kind: str, engine: Engine) -> None:
    at, has_struck = 0, True
    while has_struck:
        at += 1
        assert at < 500
        clear(engine)
        run, fault = Run(engine), Fault(at)
        with FAULTS[kind](engine, fault):
            run.act()
        run.check()
        before = {
            job_id: (row.state, row.flagged, row.error, row.finished_at)
            for job_id, row in run.rows().items()
            if row.state not in LIVE
        }
        run.settle()
        run.check()
        rows = run.rows()
        assert {row.state for row in rows.values()} <= {"finished", "failed", "cancelled"}
        for job_id, end in before.items():
            row = rows[job_id]
            assert (row.state, row.flagged, row.error, row.finished_at) == end, "ended once"
        assert {state for states in run.delivery_states().values() for state in states} == {
            "delivered"
        }
        has_struck = fault.has_struck
    assert at > {"statement": 40, "commit": 12, "answer": 12}[kind], "the fault had its places"


def clear(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in (delivery_attempts, deliveries, jobs):
            connection.execute(delete(table))

"""Random histories of the store against a model: every promise about a job, after every step."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import Engine, delete, select

from server.core.errors import QueueFull
from server.jobs.job import Job, QueueShare
from server.jobs.leases import CHECK_INTERVAL_S, LEASE_S
from server.jobs.store import MAX_ATTEMPTS, JobStore
from server.storage.tables import deliveries, delivery_attempts, jobs
from server.webhooks.deliveries import Attempt, Delivery, DeliveryStore
from tests.support.clocks import Clock
from tests.support.jobs import new_job

CALL_LEASE_S = 60.0
MAX_WAITING = 6
MAX_WAITING_PER_KEY = 4
PRIORITIES = {"a": 0, "b": 0, "high": 1}
LIVE = ("queued", "running")


@dataclass
class Known:
    """What the model knows of a job.

    silent_s: how long its holder has not beaten, as far as was looked; None before the first look.
    marks: of its first result.
    """

    key_id: str
    has_webhook: bool
    state: str = "queued"
    attempt: int = 0
    fencing_token: int = 0
    worker: str = ""
    silent_s: float | None = None
    marks: list[bool] = field(default_factory=list)
    delivery: str | None = None


class History(RuleBasedStateMachine):
    """Every id is in exactly one state, ends at most once, and is told of once."""

    engine: Engine
    """Set once for all histories; ids go on from one to the next."""

    @initialize()
    def begin(self) -> None:
        with self.engine.begin() as connection:
            for table in (delivery_attempts, deliveries, jobs):
                connection.execute(delete(table))
        self.clock = Clock()
        self.store = JobStore(
            self.engine,
            max_waiting=MAX_WAITING,
            max_waiting_per_key=MAX_WAITING_PER_KEY,
            clock=self.clock,
            steady_clock=self.clock,
        )
        self.sender = DeliveryStore(
            self.engine, lease_s=CALL_LEASE_S, clock=self.clock, jitter=random.Random(0)
        )
        self.known: dict[int, Known] = {}
        self.claims: list[Job] = []
        self.calls: list[Delivery] = []
        self.made_until: dict[str, float] = {}
        self.marks = itertools.count()
        # Something to begin with: most steps of a history would find nothing to do otherwise.
        for key_id in PRIORITIES:
            self.add(key_id, has_webhook=True)
        self.take("w1", 2, is_idle=True)

    def waiting(self, key_id: str | None = None) -> list[int]:
        return [
            job_id
            for job_id, job in self.known.items()
            if job.state == "queued" and key_id in (None, job.key_id)
        ]

    @rule(key_id=st.sampled_from([*PRIORITIES]), has_webhook=st.booleans())
    def submit(self, key_id: str, has_webhook: bool) -> None:
        self.add(key_id, has_webhook)

    def add(self, key_id: str, has_webhook: bool) -> None:
        is_full = (
            len(self.waiting()) >= MAX_WAITING or len(self.waiting(key_id)) >= MAX_WAITING_PER_KEY
        )
        new = new_job(
            key_id=key_id,
            webhook="http://x/hook" if has_webhook else None,
            share=QueueShare(priority=PRIORITIES[key_id]),
        )
        try:
            job_id = self.store.submit(new).id
        except QueueFull:
            assert is_full
            return
        assert not is_full
        assert job_id > max(self.known, default=0)
        self.known[job_id] = Known(key_id, has_webhook)

    @precondition(lambda self: self.waiting())
    @rule(worker=st.sampled_from(["w1", "w2"]), limit=st.integers(1, 3), is_idle=st.booleans())
    def claim(self, worker: str, limit: int, is_idle: bool) -> None:
        self.take(worker, limit, is_idle)

    def take(self, worker: str, limit: int, is_idle: bool) -> None:
        waiting = self.waiting()
        claimed = self.store.claim(worker, limit, is_idle=is_idle)
        assert {job.id for job in claimed} <= {*waiting}
        if any(self.known[job.id].attempt for job in claimed):
            assert is_idle, "one that was lost joins nobody"
            assert len(claimed) == 1, "and nobody joins it"
        elif all(self.known[job_id].attempt == 0 for job_id in waiting):
            assert len(claimed) == min(limit, len(waiting))
        places = [-PRIORITIES[job.key_id] for job in claimed]
        assert places == sorted(places), "higher priorities first"
        for job in claimed:
            known = self.known[job.id]
            assert job.id == min(self.waiting(job.key_id)), "a key's jobs in their order"
            known.state, known.worker = "running", worker
            known.attempt += 1
            known.fencing_token += 1
            known.silent_s = None
            assert (job.attempt, job.fencing_token) == (known.attempt, known.fencing_token)
        self.claims += claimed

    def end(self, job_id: int, state: str) -> None:
        known = self.known[job_id]
        assert known.state in LIVE, "finished once"
        known.state = state
        known.delivery = "pending" if known.has_webhook else None

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), verb=st.sampled_from(["beat", "finish", "fail", "release"]))
    def report(self, data: st.DataObject, verb: str) -> None:
        """Any claim there ever was may report, however late."""
        job = data.draw(st.sampled_from(self.claims))
        known = self.known[job.id]
        is_held = self.is_held(job)
        mark = [bool(next(self.marks) % 3)]
        verbs: dict[str, Callable[[], bool]] = {
            "beat": lambda: self.store.heartbeat(job, 1, 2),
            "finish": lambda: self.store.finish(job, mark),
            "fail": lambda: self.store.fail(job, "reason"),
            "release": lambda: self.store.release(job),
        }
        assert verbs[verb]() == is_held
        if not is_held:
            return
        if verb == "beat":
            known.silent_s = 0.0 if known.silent_s is not None else None
        elif verb == "release":
            known.state = "queued"
            known.attempt -= 1
        else:
            self.end(job.id, "finished" if verb == "finish" else "failed")
            known.marks = mark if verb == "finish" else []

    def is_held(self, job: Job) -> bool:
        known = self.known[job.id]
        return known.state == "running" and known.fencing_token == job.fencing_token

    @precondition(lambda self: any(map(self.is_held, self.claims)))
    @rule(data=st.data(), worker=st.sampled_from(["w1", "w2"]))
    def release_twice(self, data: st.DataObject, worker: str) -> None:
        """The first one's answer is lost, and somebody claims before it is made again."""
        job = data.draw(st.sampled_from([*filter(self.is_held, self.claims)]))
        assert self.store.release(job)
        self.known[job.id].state = "queued"
        self.known[job.id].attempt -= 1
        self.take(worker, 1, is_idle=True)
        assert not self.store.release(job)

    def late_claims(self) -> list[Job]:
        """Claims of jobs that run by a later one."""
        running = {job_id: job for job_id, job in self.known.items() if job.state == "running"}
        return [
            claim
            for claim in self.claims
            if claim.id in running and running[claim.id].fencing_token != claim.fencing_token
        ]

    @precondition(lambda self: self.late_claims())
    @rule(data=st.data())
    def report_late(self, data: st.DataObject) -> None:
        """The one that holds the job is not disturbed."""
        job = data.draw(st.sampled_from(self.late_claims()))
        assert not self.store.heartbeat(job, 1, 2)
        assert not self.store.finish(job, [True])
        assert not self.store.fail(job, "late")
        assert not self.store.release(job)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.known)))
        is_live = self.known[job_id].state in LIVE
        assert self.store.cancel(job_id) == is_live
        if is_live:
            self.end(job_id, "cancelled")

    @rule(looks=st.integers(1, 9))
    def pass_time(self, looks: int) -> None:
        for _ in range(looks):
            self.clock.now += CHECK_INTERVAL_S
            self.look(CHECK_INTERVAL_S)

    @rule()
    def look_again(self) -> None:
        self.look(0.0)

    def look(self, passed_s: float) -> None:
        lost = []
        for job_id, job in self.known.items():
            if job.state == "running":
                job.silent_s = 0.0 if job.silent_s is None else job.silent_s + passed_s
                lost += [job_id] if job.silent_s > LEASE_S else []
        assert self.store.requeue_expired() == len(lost)
        self.lose(lost)

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def requeue_of(self, worker: str) -> None:
        self.lose_all_of(worker)

    @precondition(lambda self: any(job.state == "running" for job in self.known.values()))
    @rule(data=st.data())
    def start_again(self, data: st.DataObject) -> None:
        """A worker is lost and comes back, and knows nothing of its earlier claims."""
        holders = {job.worker for job in self.known.values() if job.state == "running"}
        worker = data.draw(st.sampled_from(sorted(holders)))
        self.lose_all_of(worker)
        self.take(worker, 1, is_idle=True)

    def lose_all_of(self, worker: str) -> None:
        lost = [
            job_id
            for job_id, job in self.known.items()
            if job.state == "running" and job.worker == worker
        ]
        assert self.store.requeue_of(worker) == len(lost)
        self.lose(lost)

    def lose(self, job_ids: list[int]) -> None:
        for job_id in job_ids:
            if self.known[job_id].attempt >= MAX_ATTEMPTS:
                self.end(job_id, "failed")
            else:
                self.known[job_id].state = "queued"

    @rule()
    def claim_deliveries(self) -> None:
        for call in self.sender.claim_due(3):
            assert self.known[call.job_id].delivery == "pending"
            until = self.made_until.get(call.id, 0.0)
            assert self.clock.now >= until, "nobody else makes it at the same time"
            self.made_until[call.id] = self.clock.now + CALL_LEASE_S
            self.calls.append(call)

    @precondition(lambda self: self.calls)
    @rule(status=st.sampled_from([200, 500, 410, None]))
    def answer_delivery(self, status: int | None) -> None:
        call = self.calls.pop(0)
        is_latest = all(later.id != call.id for later in self.calls)
        if is_latest:
            self.made_until[call.id] = 0.0
        self.sender.record(call, Attempt(self.clock.now, 0.1, status, "answered"))
        if is_latest and status in (200, 410):
            self.known[call.job_id].delivery = "delivered" if status == 200 else "dead"

    @precondition(lambda self: any(job.delivery for job in self.known.values()))
    @rule(data=st.data())
    def redeliver(self, data: st.DataObject) -> None:
        told = [job_id for job_id, job in self.known.items() if job.delivery]
        job_id = data.draw(st.sampled_from(told))
        self.sender.redeliver(job_id)
        self.known[job_id].delivery = "pending"

    @invariant()
    def rows_agree(self) -> None:
        with self.engine.connect().execution_options(is_read_only=True) as connection:
            rows = connection.execute(select(jobs)).all()
            told = connection.execute(select(deliveries.c.job_id, deliveries.c.state)).all()
        assert [row.id for row in sorted(rows, key=lambda row: row.id)] == sorted(self.known)
        for row in rows:
            known = self.known[row.id]
            assert (row.state, row.attempt, row.fencing_token) == (
                *(known.state, known.attempt),
                known.fencing_token,
            )
            assert (row.flagged or []) == known.marks, "the first result stays"
        states: dict[int, Any] = {job_id: job.delivery for job_id, job in self.known.items()}
        assert len(told) == len({job_id for job_id, _ in told}), "told of once"
        assert dict(told) == {job_id: state for job_id, state in states.items() if state}


@pytest.mark.slow
def test_random_histories(engine: Engine) -> None:
    History.engine = engine
    machine: Any = History.TestCase
    machine.settings = hypothesis_settings(
        max_examples=30, stateful_step_count=40, deadline=None, derandomize=True, database=None
    )
    machine().runTest()

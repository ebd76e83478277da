"""What stands under the server fails at the n-th call: database, file store, webhook receiver.

A run is repeated with the fault at every place there is, until it meets none. After each the
promises are held against what is left: what was accepted is there, ended once, and told of once.
"""

import asyncio
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import httpcore2
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine, delete, event, select
from sqlalchemy.exc import IntegrityError, OperationalError

from models.model_pool import ModelPool
from models.params import InpaintParams
from models.variants import ModelVariant
from server.api.dialects.registry import write_webhook
from server.core.errors import StorageUnavailable
from server.core.settings import Settings
from server.core.settings.sections import RetentionSettings, WebhookSettings
from server.jobs.job import Job, JobState
from server.jobs.outbox import DeliveryState
from server.jobs.receipts import Model
from server.jobs.retention import ORPHAN_S, Janitor
from server.jobs.store import MAX_ATTEMPTS, JobStore
from server.sandbox.decoded import DecodedPair
from server.storage.database import open_engine
from server.storage.files import Storage, StoredFile
from server.storage.tables import deliveries, delivery_attempts, jobs
from server.webhooks.deliveries import Attempt, DeliveryStore
from server.webhooks.sender import WebhookSender
from server.worker.loop import Worker
from tests.chaos.pipeline import ScriptedPipeline
from tests.support.clocks import Clock
from tests.support.databases import migrated_sqlite
from tests.support.egress import egress_client
from tests.support.faults import Fault, answer_is_lost, commit_fails
from tests.support.http_stub import Behaviour, answering, response, running_stub
from tests.support.jobs import new_job, submit_pair

pytestmark = pytest.mark.slow

P = ParamSpec("P")
R = TypeVar("R")

TRIES = 5
LEASE_S = 60.0
DELIVERED = Attempt(0.0, 0.1, 200, "answered")
LIVE = (JobState.QUEUED, JobState.RUNNING)


@contextmanager
def statement_fails(engine: Engine, fault: Fault) -> Iterator[None]:
    """Nothing of it takes effect; to begin a transaction is one too."""
    event.listen(engine, "begin", fault.count, insert=True)  # before ours, which begins it
    event.listen(engine, "before_cursor_execute", fault.count)
    yield
    event.remove(engine, "begin", fault.count)
    event.remove(engine, "before_cursor_execute", fault.count)


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
            self.insist(self.store.heartbeat, job, 1, 2)
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


STORED_JOBS = 2
PAIR = DecodedPair(np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8))


class FaultyStorage(Storage):
    """Fails at the n-th call. is_lost: it takes effect, and its caller does not learn of it."""

    def __init__(self, url: str, fault: Fault, *, is_lost: bool) -> None:
        super().__init__(url)
        self._fault = fault
        self._is_lost = is_lost

    @contextmanager
    def _at_risk(self) -> Iterator[None]:
        strikes = self._fault.strikes
        if strikes and not self._is_lost:
            raise StorageUnavailable("before")
        yield
        if strikes:
            raise StorageUnavailable("after")

    def put(self, key: str, content: bytes) -> None:
        """As the base class."""
        with self._at_risk():
            super().put(key, content)

    def get(self, key: str) -> bytes | None:
        """As the base class."""
        with self._at_risk():
            return super().get(key)

    def delete(self, key: str) -> None:
        """As the base class."""
        with self._at_risk():
            super().delete(key)

    def delete_all(self, keys: Sequence[str]) -> None:
        """As the base class."""
        with self._at_risk():
            super().delete_all(keys)

    def list(self, folder: str, batch: int = 500) -> Iterator[list[StoredFile]]:
        """As the base class."""
        with self._at_risk():
            found = [*super().list(folder, batch)]
        yield from found


class LastJobStops(JobStore):
    """The worker is told to stop with the end of the last job."""

    def __init__(self, engine: Engine, stopping: threading.Event) -> None:
        super().__init__(engine)
        self._stopping = stopping

    def finish(self, *arguments: Any, **named: Any) -> bool:
        """As the base class."""
        return self._look(super().finish(*arguments, **named))

    def fail(self, *arguments: Any, **named: Any) -> bool:
        """As the base class."""
        return self._look(super().fail(*arguments, **named))

    def _look(self, result: bool) -> bool:
        forecast = self.forecast(lambda _device: 1)
        if forecast.waiting + forecast.running == 0:
            self._stopping.set()
        return result


class PlainWorker(Worker):
    """The worker's own loop around a pipeline without weights."""

    def _open_models(self) -> ModelPool:
        return ModelPool.of(ModelVariant(self.settings.model), ScriptedPipeline())

    def _describe_model(self, job: Job) -> Model:
        return Model("scripted", None, "cpu", "float32")


def insist_on_files(act: Callable[[], R]) -> R:
    """Until the file store has answered; the fault strikes once."""
    for _ in range(TRIES):
        try:
            return act()
        except StorageUnavailable:
            continue
    raise AssertionError("no answer")


@pytest.mark.parametrize("is_lost", [False, True], ids=["nothing of it", "only its answer lost"])
def test_promises_hold_wherever_the_file_store_fails(is_lost: bool, tmp_path: Path) -> None:
    """A picture that is kept and stored later, and nothing but the pictures in the end."""
    engine = open_engine(migrated_sqlite(tmp_path))
    at, has_struck = 0, True
    while has_struck:
        at += 1
        assert at < 100
        clear(engine)
        folder, fault = tmp_path / f"files{at}", Fault(at)
        storage = FaultyStorage(folder.as_uri(), fault, is_lost=is_lost)
        accepted = run_with_files(engine, storage, tmp_path)
        store = JobStore(engine)
        ended = {job.id: job for job in store.ended(accepted)}
        assert {*ended} == {*accepted}
        for job in ended.values():
            assert (job.state, job.attempt) == (JobState.FINISHED, 1), f"call {at}: {job.error}"
            for key in job.output_keys:
                Image.open(folder / key).verify()
        later = Clock()
        later.now = max(job.finished_at or 0 for job in ended.values()) + ORPHAN_S + 60
        keeping = RetentionSettings(outputs_h=1_000, rows_h=1_000)
        insist_on_files(Janitor(engine, storage, keeping, later).sweep)
        files = {each.relative_to(folder).as_posix() for each in folder.rglob("*.*")}
        assert files == {key for job in ended.values() for key in job.output_keys}, f"call {at}"
        has_struck = fault.has_struck
    assert at > 8, "the fault had its places"
    engine.dispose()


def run_with_files(engine: Engine, storage: Storage, data_dir: Path) -> list[int]:
    """Submit jobs, as the intake does, and have a worker make them; the ids."""
    stopping = threading.Event()
    store = LastJobStops(engine, stopping)

    def accept() -> Job:
        params = InpaintParams(prompt="", seed=7, width=64, height=64, num_inference_steps=2)
        new = new_job(file_prefix=str(uuid.uuid4()), params=params)
        return submit_pair(store, storage, new, PAIR, None)

    accepted = [insist_on_files(accept).id for _ in range(STORED_JOBS)]
    PlainWorker("w", "cpu", Settings(data_dir=data_dir), store, storage, stopping).run()
    return accepted


HOOKS = 3
PHASES = 4
ANSWER = response("200 OK")


def resetting(fault: Fault) -> Behaviour:
    """A receiver that ends the n-th connection in the middle of its answer."""

    async def behave(_path: str, writer: asyncio.StreamWriter) -> None:
        strikes = fault.strikes
        writer.write(ANSWER[:20] if strikes else ANSWER)
        await writer.drain()
        if strikes:
            connection: socket.socket = writer.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    return behave


def falling_silent(fault: Fault) -> Behaviour:
    """A receiver that never answers the n-th request."""

    async def behave(_path: str, writer: asyncio.StreamWriter) -> None:
        if fault.strikes:
            await asyncio.Event().wait()
        writer.write(ANSWER)
        await writer.drain()

    return behave


class FailingDialler(httpcore2.AnyIOBackend):
    """The n-th connection is refused."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    async def connect_tcp(self, *arguments: Any, **named: Any) -> httpcore2.AsyncNetworkStream:
        if self._fault.strikes:
            raise httpcore2.ConnectError
        return await super().connect_tcp(*arguments, **named)


@pytest.mark.parametrize("kind", ["connect", "reset", "silence"])
def test_webhooks_arrive_wherever_a_call_fails(kind: str, engine: Engine) -> None:
    at, has_struck = 0, True
    while has_struck:
        at += 1
        assert at < 30
        clear(engine)
        fault = Fault(at)
        asyncio.run(deliver_in_spite(kind, fault, engine))
        has_struck = fault.has_struck
    assert at > HOOKS, "the fault had its places"


async def deliver_in_spite(kind: str, fault: Fault, engine: Engine) -> None:
    """End jobs that have a webhook, and send until all is received."""
    clock = Clock()
    store, calls = JobStore(engine, clock=clock), DeliveryStore(engine, clock=clock)
    settings = WebhookSettings.model_validate({"allow_cidrs": "127.0.0.0/8", "timeout_s": 1})
    behaviours = {"reset": resetting(fault), "silence": falling_silent(fault)}
    async with running_stub(behaviours.get(kind, answering(ANSWER))) as stub:
        for _ in range(HOOKS):
            store.submit(new_job(webhook=f"{stub.url}/hook"))
        held = store.claim("w", HOOKS)
        for job in held:
            store.finish(job, [False])
        for _ in range(PHASES):
            dialler = FailingDialler(fault) if kind == "connect" else httpcore2.AnyIOBackend()
            await send_what_is_due(settings, calls, store, dialler)
            rows = calls.list_of(None, state=None, limit=HOOKS + 1)
            if all(each.state is DeliveryState.DELIVERED for each in rows):
                break
            clock.now = max(each.due_at for each in rows) + 1
        heads = [head.lower() for head in stub.heads]
    assert [each.state for each in rows] == [DeliveryState.DELIVERED] * HOOKS
    assert {each.job_id for each in rows} == {job.id for job in held}, "one call for each job"
    for each in rows:
        received = sum(each.id in head for head in heads)
        assert 1 <= received <= len(each.attempts), "the same id on every try"
        assert all(try_.status == 200 or try_.status is None for _, try_ in each.attempts)


async def send_what_is_due(
    settings: WebhookSettings,
    calls: DeliveryStore,
    store: JobStore,
    dialler: httpcore2.AsyncNetworkBackend,
) -> None:
    """One life of a sender, until nothing is due."""

    def due() -> bool:
        rows = calls.list_of(None, state=DeliveryState.PENDING, limit=HOOKS)
        return any(len(each.attempts) < tried[each.id] + 1 for each in rows)

    every = calls.list_of(None, state=None, limit=HOOKS)
    tried = {each.id: len(each.attempts) for each in every}
    client = egress_client(dialler=dialler)
    sender = asyncio.create_task(WebhookSender(settings, calls, store, write_webhook, client).run())
    async with asyncio.timeout(60):
        # The rows are what a sender leaves behind; nothing tells of their change in one process.
        while await asyncio.to_thread(due):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    sender.cancel()
    await asyncio.wait([sender])

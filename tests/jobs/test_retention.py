"""Old pictures, rows and files are removed, and nothing that anybody still needs."""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, QueuePool, func, insert, select, update

from models.params import InpaintParams, OutputFormat
from server.core.errors import Conflict, ConflictKind, StorageUnavailable
from server.core.settings.sections import RetentionSettings
from server.jobs.job import Job, JobState
from server.jobs.outbox import MAX_AGE_S
from server.jobs.retention import HOUR_S, ORPHAN_S, Janitor, Removed
from server.jobs.store import JobStore
from server.storage.clock import EarlierClock
from server.storage.database import open_engine
from server.storage.files import Storage, StoredFile
from server.storage.tables import deliveries, jobs
from server.webhooks.deliveries import Attempt, DeliveryStore
from tests.support.clocks import Clock
from tests.support.databases import migrated_sqlite
from tests.support.jobs import PARAMS, ROW, claim_one, get, new_job, state_of
from tests.support.waiting import until

SETTINGS = RetentionSettings(outputs_h=10, inputs_h=1, uploads_h=2, rows_h=100)
DELIVERED = Attempt(0.0, 0.1, 200, "answered")


@dataclass
class House:
    """A store, its files and who tidies them, on one clock."""

    store: JobStore
    storage: Storage
    janitor: Janitor
    clock: Clock
    folder: Path

    def pass_hours(self, hours: float) -> None:
        self.clock.now += hours * HOUR_S

    def put(self, key: str) -> None:
        """A file as old as the clock says."""
        self.storage.put(key, b"content")
        os.utime(self.folder / key, (self.clock.now, self.clock.now))

    def submit(self, webhook: str | None = None, params: InpaintParams = PARAMS) -> Job:
        """A waiting job with its inputs."""
        new = new_job(file_prefix=str(uuid.uuid4()), webhook=webhook, params=params)
        job = self.store.submit(new)
        self.put(job.input_key)
        return job

    def finish(self, webhook: str | None = None, params: InpaintParams = PARAMS) -> Job:
        """A finished job with its pictures, whose worker removed the inputs."""
        self.submit(webhook, params)
        job = claim_one(self.store)
        for key in job.output_keys:
            self.put(key)
        self.store.finish(job, [False, False])
        self.storage.delete(job.input_key)
        return job

    def files(self) -> set[str]:
        return {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def house(engine: Engine, tmp_path: Path) -> House:
    clock = Clock()
    clock.now = time.time()
    folder = tmp_path / "files"
    storage = Storage(folder.as_uri())
    store = JobStore(engine, clock=clock)
    return House(store, storage, Janitor(engine, storage, SETTINGS, clock), clock, folder)


def test_pictures_expire_and_the_row_says_so(house: House) -> None:
    job = house.finish()
    house.pass_hours(9.9)
    assert house.janitor.expire() == Removed()
    assert house.files() == {*job.output_keys}
    house.pass_hours(0.2)
    assert house.janitor.expire() == Removed(outputs=1)
    assert house.files() == set()
    expired = get(house.store, job.id)
    assert (expired.state, expired.expired_at) == (JobState.FINISHED, house.clock.now)
    assert house.janitor.expire() == Removed()


@pytest.mark.parametrize("output_format", OutputFormat)
def test_pictures_of_every_format_expire(output_format: OutputFormat, house: House) -> None:
    job = house.finish(params=replace(PARAMS, output_format=output_format))
    assert all(key.endswith(output_format.suffix) for key in job.output_keys)
    assert house.janitor.sweep() == Removed()
    house.pass_hours(11)
    assert house.janitor.expire() == Removed(outputs=1)
    assert house.files() == set()


def test_pictures_of_rows_of_earlier_versions_expire(house: House, engine: Engine) -> None:
    job = house.finish()
    older = {name: value for name, value in PARAMS.to_json().items() if "output" not in name}
    with engine.begin() as connection:
        connection.execute(update(jobs).values(params=older))
    assert get(house.store, job.id).output_keys == job.output_keys
    assert house.janitor.sweep() == Removed()
    house.pass_hours(11)
    assert house.janitor.expire() == Removed(outputs=1)
    assert house.files() == set()


def test_rows_are_removed_last(house: House) -> None:
    job = house.finish()
    house.pass_hours(99)
    house.janitor.expire()
    assert house.store.get(job.id) is not None
    house.pass_hours(2)
    assert house.janitor.expire() == Removed(rows=1)
    assert house.store.get(job.id) is None
    assert house.submit().id > job.id, "its number is not given again"


@pytest.mark.parametrize("verb", ["fail", "cancel"])
def test_row_of_a_job_without_pictures_is_removed_too(verb: str, house: House) -> None:
    house.submit()
    job = claim_one(house.store)
    ends = {
        "fail": lambda: house.store.fail(job, "x"),
        "cancel": lambda: house.store.cancel(job.id),
    }
    assert ends[verb]()
    house.pass_hours(101)
    assert house.janitor.expire() == Removed(rows=1)


def test_live_jobs_stay_however_old(house: House) -> None:
    running, waiting = house.submit(), house.submit()
    claim_one(house.store)
    house.pass_hours(10_000)
    assert house.janitor.expire() == house.janitor.sweep() == Removed()
    assert house.files() == {running.input_key, waiting.input_key}
    assert state_of(house.store, running.id) is JobState.RUNNING


def test_job_with_a_pending_webhook_stays_whole(house: House, engine: Engine) -> None:
    job = house.finish(webhook="http://x/hook")
    house.pass_hours(MAX_AGE_S / HOUR_S - 0.1)
    assert house.janitor.expire() == house.janitor.sweep() == Removed()
    assert house.files() == {*job.output_keys}
    sender = DeliveryStore(engine, clock=house.clock)
    (delivery,) = sender.claim_due(1)
    sender.record(delivery, DELIVERED)
    assert house.janitor.expire() == Removed(outputs=1)
    house.pass_hours(100)
    assert house.janitor.expire() == Removed(rows=1)
    with engine.connect() as connection:
        count = select(func.count()).select_from(deliveries)
        assert connection.scalar(count) == 0, "its history goes with it"


def test_pending_webhook_keeps_nothing_beyond_its_schedule(house: House, engine: Engine) -> None:
    """Of a host that is dead or held; redelivering it does not make it younger."""
    house.finish(webhook="http://x/hook")
    sender = DeliveryStore(engine, clock=house.clock)
    (delivery,) = sender.claim_due(1)
    house.pass_hours(MAX_AGE_S / HOUR_S - 0.1)
    sender.redeliver(delivery.job_id)
    assert house.janitor.expire() == Removed()
    house.pass_hours(0.2)
    assert house.janitor.expire() == Removed(outputs=1)
    assert house.files() == set()
    house.pass_hours(100)
    assert house.janitor.expire() == Removed(rows=1)


@pytest.mark.parametrize("verb", ["fail", "cancel", "lose"])
def test_inputs_left_behind_are_removed(verb: str, house: House) -> None:
    """A cancelled or lost job has no worker that would."""
    job = house.submit()
    if verb == "lose":
        for _ in range(3):
            claim_one(house.store)
            house.store.requeue_of("w")
    elif verb == "cancel":
        house.store.cancel(job.id)
    else:
        house.store.fail(claim_one(house.store), "reason")
    house.pass_hours(0.9)
    assert house.janitor.sweep() == Removed()
    house.pass_hours(0.2)
    assert house.janitor.sweep() == Removed(files=1)
    assert house.files() == set()


@pytest.mark.parametrize("verb", ["finish", "cancel", "delete"])
def test_previews_left_behind_are_removed(verb: str, house: House) -> None:
    """Of a worker that died, or came too late."""
    house.submit()
    job = claim_one(house.store)
    house.put(job.preview_key)
    house.storage.delete(job.input_key)
    assert house.janitor.sweep() == Removed(), "it runs"
    if verb == "finish":
        house.store.finish(job, [False, False])
    else:
        house.store.cancel(job.id)
    if verb == "delete":
        house.pass_hours(SETTINGS.rows_h + 1)
        assert house.janitor.expire().rows == 1
    assert house.janitor.sweep() == Removed(files=1)
    assert house.files() == set()


def test_files_without_a_row_are_removed_after_a_day(house: House) -> None:
    orphans = {
        "inputs/" + str(uuid.uuid4()) + ".npy",
        "generations/" + str(uuid.uuid4()) + "-0.png",
    }
    for key in orphans:
        house.put(key)
    house.clock.now += ORPHAN_S - 1
    young = "inputs/" + str(uuid.uuid4()) + ".npy"
    house.put(young)
    assert house.janitor.sweep() == Removed()
    house.clock.now += 2
    assert house.janitor.sweep() == Removed(files=2)
    assert house.files() == {young}


def test_pictures_of_a_job_that_was_cancelled_meanwhile_are_removed(house: House) -> None:
    house.submit()
    job = claim_one(house.store)
    house.store.cancel(job.id)
    house.storage.delete(job.input_key)
    for key in job.output_keys:
        house.put(key)
    assert house.janitor.sweep() == Removed()
    house.clock.now += ORPHAN_S + 1
    assert house.janitor.sweep() == Removed(files=2)


def test_pictures_stored_after_their_expiry_are_removed(house: House) -> None:
    job = house.finish()
    house.pass_hours(11)
    house.janitor.expire()
    house.put(job.output_keys[0])
    assert house.janitor.sweep() == Removed(files=1)


def test_what_is_left_of_a_job_without_a_picture_stays_until_its_time(house: House) -> None:
    job = house.finish()
    house.storage.delete(job.output_keys[1])
    assert house.janitor.sweep() == Removed()
    assert get(house.store, job.id).has_pictures
    house.pass_hours(11)
    assert house.janitor.expire() == Removed(outputs=1)
    assert house.files() == set()


def test_many_rows_go_in_batches(house: House, engine: Engine) -> None:
    ended = {"state": "finished", "finished_at": 0.0, "params": {"samples": 1}}
    rows = [ROW | ended | {"file_prefix": str(uuid.uuid4())} for _ in range(35)]
    with engine.begin() as connection:
        connection.execute(insert(jobs), rows)
    for row in rows:
        house.put(f"generations/{row['file_prefix']}-0.png")
    small = Janitor(engine, house.storage, SETTINGS, house.clock, batch=10)
    assert small.expire() == Removed(outputs=35, rows=35)
    assert house.files() == set()


def test_missing_folders_are_empty(house: House) -> None:
    assert house.janitor.sweep() == Removed()


class BrokenStorage(Storage):
    """One that cannot delete until it is repaired. refused: released at each try."""

    is_broken = True

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.refused = threading.Semaphore(0)

    def delete_all(self, keys: Sequence[str]) -> None:
        if self.is_broken:
            self.refused.release()
            raise StorageUnavailable("cannot delete")
        super().delete_all(keys)


def test_store_that_fails_is_asked_again(house: House, engine: Engine) -> None:
    job = house.finish()
    house.pass_hours(11)
    storage = BrokenStorage(house.folder.as_uri())
    broken = Janitor(engine, storage, SETTINGS, house.clock)
    with pytest.raises(StorageUnavailable):
        broken.expire()
    assert get(house.store, job.id).expired_at is not None
    assert house.files() == {*job.output_keys}
    storage.is_broken = False
    assert broken.expire() == Removed()
    assert broken.sweep() == Removed(files=2)


class HastyStorage(Storage):
    """One whose first removal meets a webhook that is made again."""

    meanwhile: Callable[[], object] | None = None

    def delete_all(self, keys: Sequence[str]) -> None:
        if self.meanwhile is not None:
            act, self.meanwhile = self.meanwhile, None
            act()
        super().delete_all(keys)


def test_webhook_is_not_made_again_during_expiry(house: House, engine: Engine) -> None:
    job = house.finish(webhook="http://x/hook")
    sender = DeliveryStore(engine, clock=house.clock)
    (delivery,) = sender.claim_due(1)
    sender.record(delivery, DELIVERED)
    house.pass_hours(11)
    storage = HastyStorage(house.folder.as_uri())
    told: list[ConflictKind] = []

    def make_again() -> None:
        with pytest.raises(Conflict) as refused:
            sender.redeliver(job.id)
        told.append(refused.value.kind)

    storage.meanwhile = make_again
    assert Janitor(engine, storage, SETTINGS, house.clock).expire() == Removed(outputs=1)
    assert told == [ConflictKind.PICTURES_EXPIRED]
    assert house.files() == set()


class TellingStorage(Storage):
    """Counts removals that are done."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.deleted = threading.Semaphore(0)

    def delete_all(self, keys: Sequence[str]) -> None:
        """As the base class."""
        super().delete_all(keys)
        if keys:
            self.deleted.release()


def test_uploads_are_removed_after_their_time(house: House) -> None:
    old, young = (f"uploads/{uuid.uuid4()}.png" for _ in range(2))
    house.put(old)
    house.put(f"{old}.0123abcd.unfinished")
    house.pass_hours(1.9)
    house.put(young)
    assert house.janitor.sweep_uploads() == Removed()
    house.pass_hours(0.2)
    assert house.janitor.sweep_uploads() == Removed(files=2)
    assert house.files() == {young}


def test_sweep_of_the_other_files_leaves_uploads(house: House) -> None:
    upload = f"uploads/{uuid.uuid4()}.png"
    house.put(upload)
    house.pass_hours(30)
    assert house.janitor.sweep() == Removed()
    assert house.files() == {upload}


def test_kept_inputs_are_removed_soon_after_their_time(house: House, engine: Engine) -> None:
    due = house.finish()
    house.put(due.input_key)
    house.pass_hours(1.1)
    young = house.finish()
    house.put(young.input_key)
    keeping = SETTINGS.model_copy(update={"keep_inputs": True})
    janitor = Janitor(engine, house.storage, keeping, house.clock)
    assert janitor.works[janitor.sweep_inputs] <= HOUR_S / 4
    assert janitor.sweep_inputs() == Removed(files=1)
    assert young.input_key in house.files()
    assert due.input_key not in house.files()
    assert house.janitor.sweep_inputs not in house.janitor.works, "listings cost money"


async def end(task: asyncio.Task[None], engine: Engine) -> None:
    """Cancel a janitor's task, and wait until its threads have left the database."""
    task.cancel()
    await asyncio.wait([task])
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    await asyncio.to_thread(until, lambda: pool.checkedout() == 0, 20, "the threads end")


async def test_task_removes_uploads(house: House, engine: Engine) -> None:
    storage = TellingStorage(house.folder.as_uri())
    house.put(f"uploads/{uuid.uuid4()}.jpg")
    house.pass_hours(3)
    task = asyncio.create_task(Janitor(engine, storage, SETTINGS, house.clock).run())
    assert await asyncio.to_thread(storage.deleted.acquire, timeout=20)
    await end(task, engine)
    assert house.files() == set()


class EndlessStorage(TellingStorage):
    """One whose listing of pictures ends when the janitor's does. listing: set once it began."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.listing, self.ends = threading.Event(), threading.Event()

    def list(self, folder: str, batch: int = 500) -> Iterator[list[StoredFile]]:
        """As the base class."""
        if folder == "generations":
            self.listing.set()
            self.ends.wait()
        yield from super().list(folder, batch)


class HastyJanitor(Janitor):
    """The janitor, which does all its works at once and soon again."""

    @property
    def works(self) -> dict[Callable[[], Removed | None], float]:
        """As the base class."""
        return dict.fromkeys(super().works, 0.01)


async def test_long_listing_holds_up_no_removal(house: House, engine: Engine) -> None:
    house.finish()
    storage = EndlessStorage(house.folder.as_uri())
    task = asyncio.create_task(HastyJanitor(engine, storage, SETTINGS, house.clock).run())
    try:
        assert await asyncio.to_thread(storage.listing.wait, 20)
        house.put(f"uploads/{uuid.uuid4()}.png")
        house.pass_hours(11)
        removals = [await asyncio.to_thread(storage.deleted.acquire, timeout=20) for _ in range(2)]
    finally:
        storage.ends.set()
        await end(task, engine)
    assert all(removals)
    assert house.files() == set()


async def test_one_of_several_processes_lists_all_files(house: House, engine: Engine) -> None:
    """The other takes over when it ends."""
    other_engine = open_engine(engine.url.render_as_string(hide_password=False))
    first, second = (EndlessStorage(house.folder.as_uri()) for _ in range(2))
    first.ends.set()
    second.ends.set()
    leader = Janitor(engine, first, SETTINGS, house.clock)
    follower = Janitor(other_engine, second, SETTINGS, house.clock)
    task = asyncio.create_task(leader.run())
    assert await asyncio.to_thread(first.listing.wait, 20)

    await asyncio.to_thread(follower.sweep_in_turn)
    assert not second.listing.is_set()

    await end(task, engine)
    task = asyncio.create_task(follower.run())
    assert await asyncio.to_thread(second.listing.wait, 20)
    await end(task, other_engine)
    other_engine.dispose()


async def test_task_that_failed_removes_again_when_it_is_restarted(
    house: House, engine: Engine
) -> None:
    class Surprised(Exception):
        """One that nobody expects."""

    def surprise() -> None:
        raise Surprised

    house.finish()
    house.finish()
    house.pass_hours(11)
    storage = HastyStorage(house.folder.as_uri())
    storage.meanwhile = surprise
    janitor = Janitor(engine, storage, SETTINGS, house.clock, batch=1)
    with pytest.raises(ExceptionGroup):
        await janitor.run()
    assert house.files() != set()

    task = asyncio.create_task(janitor.run())
    await asyncio.to_thread(until, lambda: house.files() == set(), 20, "all is removed")
    await end(task, engine)


async def test_task_tidies_and_survives_a_broken_store(house: House, engine: Engine) -> None:
    house.finish()
    house.put(f"generations/{uuid.uuid4()}-0.png")
    house.pass_hours(25)
    storage = BrokenStorage(house.folder.as_uri())
    task_janitor = Janitor(engine, storage, SETTINGS, house.clock)
    task = asyncio.create_task(task_janitor.run())
    # The look at the rows is refused, and the one at the files is made all the same.
    tries = [await asyncio.to_thread(storage.refused.acquire, timeout=20) for _ in range(2)]
    await end(task, engine)
    assert task.cancelled()
    assert all(tries)
    assert len(house.files()) == 3


@pytest.mark.parametrize("days", [30, -30])
def test_jump_of_the_clock_makes_nothing_old(days: int, tmp_path: Path) -> None:
    """With SQLite; PostgreSQL has a clock of its own."""
    engine = open_engine(migrated_sqlite(tmp_path))
    wall, steady, folder = Clock(), Clock(), tmp_path / "files"
    wall.now = time.time()
    storage = Storage(folder.as_uri())
    janitor = Janitor(engine, storage, SETTINGS, EarlierClock(engine, wall, steady))
    store = JobStore(engine, clock=wall, steady_clock=steady)
    house = House(store, storage, janitor, wall, folder)
    house.finish()
    house.submit()

    wall.now += days * 86_400
    house.finish()
    house.submit()

    assert (janitor.expire(), janitor.sweep()) == (Removed(), Removed())
    wall.now += SETTINGS.outputs_h * HOUR_S + 1
    steady.now += SETTINGS.outputs_h * HOUR_S + 1
    assert janitor.expire() == Removed(outputs=1), "the one whose time has come by both clocks"
    engine.dispose()

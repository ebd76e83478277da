"""Jobs' ends go into real stores, whatever these refuse meanwhile; the clock is a test's own."""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DataError, IntegrityError, OperationalError, StatementError

from models.diffusion.pipeline import Picture, Source
from server.jobs.job import Failure, Job, JobState
from server.jobs.receipts import Model
from server.jobs.store import JobStore
from server.storage.files import Storage
from server.worker.finalizer import STORAGE_TIMEOUT_S, Finalizer, is_outage
from server.worker.results import Result, Stages, Stores
from tests.support.clocks import Clock
from tests.support.databases import rename_table
from tests.support.jobs import claim_one, get, new_job

WAIT_S = 60.0
BLANK = np.zeros((64, 64, 3), np.uint8)
HOLE = np.full((64, 64), 255, np.uint8)

Caption = Callable[[Picture], str]


@dataclass
class House:
    """A claimed job, the stores, and what brings its end into them.

    pictures: the folder of the stored pictures.
    """

    job: Job
    stores: Stores
    finalizer: Finalizer
    clock: Clock
    engine: Engine
    pictures: Path

    def finish(self, caption: Caption = lambda picture: "") -> None:
        """What happens when the engine has made the job's pictures."""
        result = Result(
            job=self.job,
            source=Source(BLANK, HOLE),
            stages=Stages(),
            pictures=[Picture(seed, BLANK, BLANK) for seed in range(self.job.params.samples)],
            stores=self.stores,
            caption=caption,
            model=Model("builtin", None, "cpu", "float32"),
        )
        self.finalizer.begin(self.job, result.steps)
        self.settle()

    def settle(self) -> None:
        """Until the thread has done what it had to do."""
        is_done = threading.Event()
        self.finalizer.begin(replace(self.job, id=-1), [is_done.set])  # behind all else
        assert is_done.wait(WAIT_S)

    def pass_time(self, seconds: float) -> None:
        """A look now, and one so much later."""
        for later_s in (0.0, seconds):
            self.clock.now += later_s
            self.finalizer.poll()
            self.settle()

    def block_pictures(self) -> None:
        """The folder cannot be written to: a file has its name."""
        shutil.rmtree(self.pictures, ignore_errors=True)
        self.pictures.write_bytes(b"in the way")

    def end(self) -> tuple[JobState, str | None]:
        """The job's state and error, as the database has them."""
        row = get(self.stores.jobs, self.job.id)
        return row.state, row.error

    @property
    def stored(self) -> set[str]:
        return {path.name for path in self.pictures.iterdir()}


@pytest.fixture
def house(engine: Engine, tmp_path: Path) -> Iterator[House]:
    folder = tmp_path / "files"
    stores = Stores(JobStore(engine), Storage(folder.as_uri()))
    job = stores.jobs.submit(new_job())
    stores.files.put(job.input_key, b"input")
    job = claim_one(stores.jobs)
    clock = Clock()
    finalizer = Finalizer(stores.steps_to_fail, clock)
    yield House(job, stores, finalizer, clock, engine, folder / "generations")
    finalizer.close()


def test_end_is_stored_and_told_of_once(house: House) -> None:
    house.finish()
    assert house.end() == (JobState.FINISHED, None)
    assert house.stored == {*house.job.output_names}
    assert house.stores.files.get(house.job.input_key) is None
    assert house.job.id in house.finalizer.poll()
    assert house.job.id not in house.finalizer.poll()


def test_input_of_a_finished_job_is_kept_for_replays(house: House) -> None:
    house.stores = replace(house.stores, keeps_inputs=True)
    house.finish()
    assert house.end() == (JobState.FINISHED, None)
    assert house.stores.files.get(house.job.input_key) == b"input"


def test_pictures_wait_for_the_file_store(house: House) -> None:
    house.block_pictures()
    house.finish()
    for _ in range(100):
        house.pass_time(30)
    assert house.end() == (JobState.RUNNING, None)
    assert house.stores.files.get(house.job.input_key) == b"input"
    house.pictures.unlink()
    house.pass_time(30)
    assert house.end() == (JobState.FINISHED, None)
    assert house.stored == {*house.job.output_names}


def test_job_fails_when_its_pictures_were_not_stored_for_an_hour(house: House) -> None:
    house.block_pictures()
    house.finish()
    house.pass_time(STORAGE_TIMEOUT_S - 1)
    house.pass_time(1)
    assert house.end() == (JobState.RUNNING, None)
    house.pass_time(30)
    house.pass_time(30)
    assert house.end() == (JobState.FAILED, Failure.NOT_STORED.sentence)
    assert house.stores.files.get(house.job.input_key) is None


def test_commit_waits_for_the_database_and_nothing_is_done_twice(house: House) -> None:
    captions: list[int] = []

    def caption(picture: Picture) -> str:
        captions.append(picture.seed)
        return ""

    rename_table(house.engine, "jobs", "gone")
    house.finish(caption)
    for _ in range(3):
        house.pass_time(3 * STORAGE_TIMEOUT_S)
    rename_table(house.engine, "gone", "jobs")
    house.pass_time(2)
    assert house.end() == (JobState.FINISHED, None)
    assert captions == [0, 1]


def test_what_cannot_be_encoded_fails_its_job_and_no_other(house: House) -> None:
    def caption(picture: Picture) -> str:
        raise MemoryError

    house.finish(caption)
    house.pass_time(1)
    assert house.end() == (JobState.FAILED, Failure.UNKNOWN.sentence)


def test_late_pictures_are_removed(house: House) -> None:
    house.stores.jobs.cancel(house.job.id)
    house.finish()
    assert house.end() == (JobState.CANCELLED, None)
    assert house.stored == set()


def test_lost_answer_of_a_commit_does_not_remove_the_pictures(house: House) -> None:
    house.stores.jobs.finish(house.job, [False, False])
    house.finish()
    assert house.stored == {*house.job.output_names}


def test_hung_store_is_noticed_and_does_not_keep_the_process(house: House) -> None:
    begun, answers = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        answers.wait(WAIT_S)

    house.finalizer.begin(house.job, [hang])
    assert begun.wait(WAIT_S)
    house.clock.now += 100
    assert house.finalizer.stuck_s == 100
    assert house.finalizer.close() == []  # it may yet end
    answers.set()


def test_close_gives_the_jobs_whose_ends_wait(house: House) -> None:
    house.block_pictures()
    house.finish()
    assert house.finalizer.close() == [house.job]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OperationalError("UPDATE", None, Exception("disk full")), True),
        (IntegrityError("UPDATE", None, Exception("no such row")), False),
        (DataError("UPDATE", None, Exception("no JSON")), False),
        (StatementError("no JSON", "UPDATE", None, TypeError()), False),
        (ValueError("ours"), False),
    ],
)
def test_what_the_job_itself_is_at_fault_for_is_not_tried_for_ever(
    error: Exception, expected: bool
) -> None:
    assert is_outage(error) is expected

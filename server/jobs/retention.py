"""`Janitor`: removes old files and rows, so that the disk does not fill.

    pictures of finished jobs     `outputs_h` after the end; the row stays, with `expired_at`
    rows of ended jobs            `rows_h` after the end, with their webhook history
    inputs of ended jobs          `inputs_h` after the end, if the worker could not remove them, or
                                  had to keep them (`keep_inputs`)
    previews of ended jobs        at once, if the worker could not remove them
    uploads                       `uploads_h` after the upload
    other files without a job     after a day

Pictures that somebody else removed are found missing when a client asks for them.

A job with a pending webhook keeps its row and its pictures, but no longer than the webhook's retry
schedule. Several janitors may run at once, because each removal is idempotent, but only one of them
lists all files.
"""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import anyio.to_thread
from sqlalchemy import ColumnElement, Engine, delete, exists, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from models.params import OutputFormat
from server.core.errors import StorageUnavailable
from server.core.logs import get_logger
from server.core.settings.sections import RetentionSettings
from server.jobs.job import (
    INPUT_FOLDER,
    OUTPUT_FOLDER,
    PREVIEW_FOLDER,
    UPLOAD_FOLDER,
    JobState,
    output_keys_of,
)
from server.jobs.outbox import MAX_AGE_S, DeliveryState
from server.storage.clock import EarlierClock
from server.storage.database import read_only
from server.storage.files import Storage, StoredFile
from server.storage.tables import deliveries, jobs
from server.storage.turns import only_one

logger = get_logger(__name__)

BATCH = 1_000
"""Rows and files per step: what S3 lists or removes in one request. A step writes for tens of
milliseconds, in which others wait for SQLite."""

EXPIRE_INTERVAL_S = 60.0
"""Between two checks of the rows."""

SWEEP_INTERVAL_S = 6 * 3_600.0
"""Between two listings of all files, which an object store charges for."""

TURN_INTERVAL_S = 600.0
"""Between two looks whether another process still makes these listings."""

SHORT_SWEEP_INTERVAL_S = 600.0
"""Seconds between two listings of the uploads, which are kept for an hour only, and of the inputs
where those of all finished jobs are kept, about a megabyte each."""

ORPHAN_S = 24 * 3_600.0
"""A file without a row is kept so long, because its job may be about to be submitted."""

HOUR_S = 3_600.0
UUID_LENGTH = 36

PICTURES = (
    jobs.c.file_prefix,
    jobs.c.params["samples"].as_integer(),
    jobs.c.fencing_token,
    # Rows of earlier versions name no format; their pictures are PNG files.
    func.coalesce(jobs.c.params["output_format"].as_string(), OutputFormat.PNG.value),
)
"""The parts of the storage keys of a job's pictures: arguments of `output_keys_of`."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What one round removed.

    outputs: jobs whose pictures expired. files: found by a listing.
    """

    outputs: int = 0
    rows: int = 0
    files: int = 0


class Janitor:
    """`expire` and `sweep` are synchronous; `run` is a background task of the server.

    clock: seconds since the epoch; an `EarlierClock` if None. batch: rows or files per step.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        settings: RetentionSettings,
        clock: Callable[[], float] | None = None,
        batch: int = BATCH,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._settings = settings
        self._clock = clock or EarlierClock(engine)
        self._batch = batch
        self._is_stopping = threading.Event()

    async def run(self) -> None:
        """Run until cancelled. A failed removal is tried again in the next round."""
        self._is_stopping.clear()
        try:
            # Each in a task of its own, because a listing of millions of files takes hours.
            async with asyncio.TaskGroup() as tasks:
                for work, interval_s in self.works.items():
                    tasks.create_task(self._repeat(work, interval_s))
        finally:
            # Cancelling does not stop a thread, which would go through all files first.
            self._is_stopping.set()

    @property
    def works(self) -> dict[Callable[[], Removed | None], float]:
        """What is done again and again, each with the seconds from its end to the next time."""
        works: dict[Callable[[], Removed | None], float] = {
            self.expire: EXPIRE_INTERVAL_S,
            self.sweep_uploads: SHORT_SWEEP_INTERVAL_S,
            self.sweep_in_turn: TURN_INTERVAL_S,
        }
        if self._settings.keep_inputs:
            works[self.sweep_inputs] = SHORT_SWEEP_INTERVAL_S
        return works

    async def _repeat(self, work: Callable[[], Removed | None], interval_s: float) -> None:
        while True:
            await anyio.to_thread.run_sync(self._try, work)
            await asyncio.sleep(interval_s)

    def _try(self, work: Callable[[], Removed | None]) -> None:
        try:
            removed = work()
        except (SQLAlchemyError, StorageUnavailable):
            logger.exception("old files and rows not removed")
            return
        if removed and removed != Removed():
            logger.info("old files and rows removed", detail=str(removed))

    def sweep_in_turn(self) -> None:
        """Sweep every few hours while no other process does, until the janitor is stopped.

        Returns at once where another process does. Raises: SQLAlchemyError.
        """
        with only_one(self._engine) as is_ours:
            while is_ours() and not self._is_stopping.is_set():
                self._try(self.sweep)
                self._is_stopping.wait(SWEEP_INTERVAL_S)

    def expire(self) -> Removed:
        """Remove all pictures and rows that are due.

        Raises: SQLAlchemyError, StorageUnavailable.
        """
        outputs = sum(self._batches(self._expire_batch))
        return Removed(outputs=outputs, rows=sum(self._batches(self._delete_batch)))

    def sweep(self) -> Removed:
        """Remove all files that no job needs.

        Uploads belong to no job and are left to `sweep_uploads`.

        Raises: SQLAlchemyError, StorageUnavailable.
        """
        sweeps = (
            self.sweep_inputs(),
            self._sweep(PREVIEW_FOLDER, self._unneeded_previews),
            self._sweep(OUTPUT_FOLDER, self._unneeded_outputs),
        )
        return Removed(files=sum(each.files for each in sweeps))

    def sweep_inputs(self) -> Removed:
        """Remove all inputs that are due. Raises: SQLAlchemyError, StorageUnavailable."""
        return self._sweep(INPUT_FOLDER, self._unneeded_inputs)

    def sweep_uploads(self) -> Removed:
        """Remove all uploads that are due. Raises: StorageUnavailable."""
        due_at = self._clock() - self._settings.uploads_h * HOUR_S
        files = itertools.chain.from_iterable(self._list(UPLOAD_FOLDER))
        return self._remove(file.key for file in files if file.changed_at < due_at)

    def _batches(self, step: Callable[[], int]) -> Iterator[int]:
        """Run steps until one finds nothing to do; yields the count of each."""
        while not self._is_stopping.is_set() and (count := step()):
            yield count

    def _expire_batch(self) -> int:
        due = (
            select(jobs.c.id)
            .where(
                jobs.c.state == JobState.FINISHED,
                jobs.c.expired_at.is_(None),
                jobs.c.finished_at < self._clock() - self._settings.outputs_h * HOUR_S,
                ~self._has_pending_delivery(),
            )
            .order_by(jobs.c.finished_at)
            .limit(self._batch)
        )
        expire = (
            update(jobs)
            .where(jobs.c.id.in_(due), jobs.c.expired_at.is_(None))
            .values(expired_at=self._clock())
            .returning(*PICTURES)
        )
        # Rows are marked first, because a webhook that is requested meanwhile must not name
        # pictures that are about to be removed. The next sweep finds files whose removal failed.
        with self._engine.begin() as connection:
            rows = connection.execute(expire).all()
        self._storage.delete_all([key for files in rows for key in output_keys_of(*files)])
        return len(rows)

    def _has_pending_delivery(self) -> ColumnElement[bool]:
        is_pending = deliveries.c.state == DeliveryState.PENDING
        is_on_schedule = jobs.c.finished_at > self._clock() - MAX_AGE_S
        return is_on_schedule & exists().where(deliveries.c.job_id == jobs.c.id, is_pending)

    def _delete_batch(self) -> int:
        """Remove rows of ended jobs; of finished jobs only after their pictures."""
        is_finished = jobs.c.state == JobState.FINISHED
        due = (
            select(jobs.c.id)
            .where(
                jobs.c.finished_at < self._clock() - self._settings.rows_h * HOUR_S,
                ~is_finished | jobs.c.expired_at.is_not(None),
                ~self._has_pending_delivery(),
            )
            .order_by(jobs.c.finished_at)
            .limit(self._batch)
        )
        with self._engine.begin() as connection:
            return connection.execute(delete(jobs).where(jobs.c.id.in_(due))).rowcount

    def _sweep(self, folder: str, unneeded: Callable[[Sequence[str]], set[str]]) -> Removed:
        pages = (self._removable(files, unneeded) for files in self._list(folder))
        return self._remove(itertools.chain.from_iterable(pages))

    def _list(self, folder: str) -> Iterator[list[StoredFile]]:
        """All files under a folder, some at a time, until the janitor is stopped."""
        for files in self._storage.list(folder, self._batch):
            if self._is_stopping.is_set():
                return
            yield files

    def _remove(self, keys: Iterator[str]) -> Removed:
        """Remove files in full batches, however few of each page of a listing they are."""
        count = 0
        while some := [*itertools.islice(keys, self._batch)]:
            self._storage.delete_all(some)
            count += len(some)
        return Removed(files=count)

    def _removable(
        self, files: Sequence[StoredFile], unneeded: Callable[[Sequence[str]], set[str]]
    ) -> Iterator[str]:
        prefixes = {file: prefix_of(file.key) for file in files}
        # Queried after the listing, so that an old file without a row now will never have one.
        known = self._known([*prefixes.values()])
        removable = unneeded([*known])
        for file, prefix in prefixes.items():
            is_orphan = prefix not in known and file.changed_at < self._clock() - ORPHAN_S
            if is_orphan or prefix in removable:
                yield file.key

    def _known(self, prefixes: Sequence[str]) -> set[str]:
        return self._prefixes(jobs.c.file_prefix.in_(prefixes))

    def _unneeded_inputs(self, prefixes: Sequence[str]) -> set[str]:
        ended_before = self._clock() - self._settings.inputs_h * HOUR_S
        return self._prefixes(
            jobs.c.file_prefix.in_(prefixes) & (jobs.c.finished_at < ended_before)
        )

    def _unneeded_previews(self, prefixes: Sequence[str]) -> set[str]:
        return self._prefixes(jobs.c.file_prefix.in_(prefixes) & jobs.c.finished_at.is_not(None))

    def _unneeded_outputs(self, prefixes: Sequence[str]) -> set[str]:
        """Pictures of expired jobs, and those that a late worker stored for a failed job."""
        has_none = jobs.c.state.in_([JobState.FAILED, JobState.CANCELLED])
        is_over = has_none & (jobs.c.finished_at < self._clock() - ORPHAN_S)
        return self._prefixes(
            jobs.c.file_prefix.in_(prefixes) & (jobs.c.expired_at.is_not(None) | is_over)
        )

    def _prefixes(self, which: ColumnElement[bool]) -> set[str]:
        with read_only(self._engine) as connection:
            return {*connection.scalars(select(jobs.c.file_prefix).where(which))}


def prefix_of(key: str) -> str:
    """The `file_prefix` in the storage key of an input or a picture."""
    return key.rpartition("/")[2][:UUID_LENGTH]

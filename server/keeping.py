"""`Keeper`: makes a durable job of a decoded pair, its input and row at once where that may be."""

from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from server.errors import ApiError, StorageUnavailable
from server.idempotency import Idempotency
from server.job_store import JobStore
from server.jobs import NewJob, Submitted
from server.sandbox import DecodedPair
from server.storage import Storage
from server.threads import Threads, settled


@dataclass(frozen=True, slots=True)
class Kept:
    """A job on its way to the disk. row: None where it has to wait for the input."""

    new: NewJob
    once: Idempotency | None
    stored: Future[None]
    row: Future[Submitted] | None


@dataclass(frozen=True, slots=True)
class Keeper:
    """Stores inputs and rows. threads: for what is to be done where one of the two has failed.

    A job that can be claimed has its input. The disk is waited for once, not for each of the two,
    where nobody can be told of the job before both are there.
    """

    store: JobStore
    storage: Storage
    threads: Threads

    def begin(self, new: NewJob, pair: DecodedPair, once: Idempotency | None) -> Kept:
        """Start both; does not wait for the disk. Raises: StorageUnavailable."""
        stored = self.storage.put_early(new.input_key, pair.to_bytes())
        is_told_early = once is not None or new.webhook is not None
        must_wait = is_told_early or not self.storage.shows_early
        row = None if must_wait else self.store.begin_submit(new, once)
        return Kept(new, once, stored, row)

    async def finish(self, kept: Kept) -> Submitted:
        """Once both are there for good. Raises: QueueFull, Conflict, StorageUnavailable."""
        new, stored, row = kept.new, kept.stored, kept.row
        try:
            if row is None:
                await settled(stored)
                stored.result()
                row = self.store.begin_submit(new, kept.once)
            await settled(stored, row)
            submitted = row.result()
        except ApiError:  # refused for certain
            # Not after any other: the commit may have taken effect, and only its answer be lost.
            # Where it did not, the janitor finds a file without a row.
            await self.threads.call(self.storage.delete, new.input_key)
            raise
        if submitted.job.file_prefix != new.file_prefix:
            await self.threads.call(self.storage.delete, new.input_key)
        elif stored.exception() is not None:
            return await self.threads.call(self._take_back, submitted, stored)
        return submitted

    def _take_back(self, submitted: Submitted, stored: Future[None]) -> Submitted:
        """A job whose input may not be on the disk, unless it has ended and needs none.

        Raises: StorageUnavailable.
        """
        job = submitted.job
        if not self.store.withdraw(job):
            return Submitted(self.store.get(job.id) or job, None)
        with suppress(StorageUnavailable):
            self.storage.delete(job.input_key)
        stored.result()
        return submitted

"""`Keeper`: makes a durable job of a decoded pair, its input and row at once where that may be."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from server.decoders import DecodedPair
from server.errors import ApiError, StorageUnavailable
from server.idempotency import Idempotency
from server.job_store import JobStore
from server.jobs import NewJob, Submitted
from server.storage import Storage
from server.threads import Threads, settled


@dataclass(frozen=True, slots=True)
class Keeper:
    """Stores inputs and rows. threads: for what is to be done where one of the two has failed.

    A job that can be claimed has its input. The disk is waited for once, not for each of the two,
    where nobody can be told of the job before both are there.
    """

    store: JobStore
    storage: Storage
    threads: Threads

    async def keep(
        self, write: Callable[[], NewJob], pair: DecodedPair, once: Idempotency | None
    ) -> Submitted:
        """The job, once its row and its input are there for good.

        write: the job, called in a thread. Raises: QueueFull, Conflict, StorageUnavailable; what
        that raises.
        """
        written: list[NewJob] = []
        rows: list[Future[Submitted]] = []

        def make() -> tuple[str, bytes]:
            written.append(new := write())
            return new.input_key, pair.to_bytes()

        def begin_row() -> None:
            (new,) = written
            if once is None and new.webhook is None:  # else somebody could be told at once
                rows.append(self.store.begin_submit(new, None))

        stored = self.storage.put_early(make, begin_row)
        await settled(stored, more=lambda: rows)
        if not written:
            stored.result()
        (new,) = written
        try:
            if not rows:
                stored.result()
                rows.append(self.store.begin_submit(new, once))
                await settled(*rows)
            submitted = rows[0].result()
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
            return Submitted(self.store.get(job.id) or job, is_new=False)
        with suppress(StorageUnavailable):
            self.storage.delete(job.input_key)
        stored.result()
        return submitted

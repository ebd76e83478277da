"""Jobs' ends as steps for `Finalizer`: a `Result` with pictures, a failure, a job given back."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.diffusion.pipeline import Picture, Source
from models.imaging.images import encode_png
from server.core.errors import StorageUnavailable
from server.core.logs import get_logger
from server.jobs.job import Failure, Job, JobState
from server.jobs.receipts import Model, Receipt
from server.jobs.store import JobStore
from server.storage.files import Storage
from server.worker.finalizer import Step
from server.worker.inspection import Stages, inspect_pictures, repaired_parts, run_times, versions

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stores:
    """Where jobs' ends go."""

    jobs: JobStore
    files: Storage

    def steps_to_fail(self, job: Job, failure: Failure) -> list[Step]:
        """An end without pictures."""

        def fail() -> None:
            if self.jobs.fail(job, failure.sentence):
                self.drop_input(job)

        return [fail]

    def steps_to_release(self, job: Job) -> list[Step]:
        """Not an end: another worker may have it, and its attempt does not count."""

        def release() -> None:
            self.jobs.release(job)

        return [release]

    def drop_input(self, job: Job) -> None:
        """An ended job is never made again; its input is a megabyte that nobody reads."""
        try:
            self.files.delete(job.input_key)
        except StorageUnavailable:
            logger.warning("input not deleted", job_id=job.id)

    def drop_pictures(self, job: Job) -> None:
        """Of a job that has ended otherwise in the meantime; nothing names them."""
        try:
            for key in job.output_keys:
                self.files.delete(key)
        except StorageUnavailable:
            logger.warning("late pictures not deleted", job_id=job.id)


@dataclass(slots=True)
class Result:
    """A job's pictures between the engine and the stores.

    pictures: of all samples, in order; let go once they are encoded.
    caption: what stands in a picture's file beside the pixels. model: for the receipt.
    """

    job: Job
    source: Source
    stages: Stages
    pictures: Sequence[Picture]
    stores: Stores
    caption: Callable[[Picture], dict[str, str]]
    model: Callable[[], Model]
    _files: list[bytes] = field(default_factory=list)
    _commit: Callable[[], bool] = field(init=False)
    _coverage: float | None = None

    @property
    def steps(self) -> list[Step]:
        """The row is committed when the last picture is stored."""
        puts = [functools.partial(self._put, index) for index in range(len(self.pictures))]
        return [self._encode, *puts, self._finish]

    def _encode(self) -> None:
        self._files = [
            encode_png(each.image, self.caption(each), self.source.icc_profile)
            for each in self.pictures
        ]
        coverage, box, receipts = inspect_pictures(
            self.job, self.source, self.pictures, self._files
        )
        self._coverage = coverage
        encoded_s = time.perf_counter()
        if repaired := repaired_parts(self.pictures):
            logger.warning("the VAE needed float32", job_id=self.job.id, detail=repaired)
        flagged = [each.is_flagged for each in self.pictures]

        def commit() -> bool:
            receipt = Receipt(
                model=self.model(),
                versions=versions(),
                times=run_times(self.stages, encoded_s),
                coverage=coverage,
                box=box,
                pictures=tuple(receipts),
            )
            return self.stores.jobs.finish(self.job, flagged, receipt)

        self._commit = commit
        self.pictures = ()

    def _put(self, index: int) -> None:
        self.stores.files.put(self.job.output_keys[index], self._files[index])

    def _finish(self) -> None:
        is_ours = self._commit() or self._was_ours()
        if is_ours:
            self.stores.drop_input(self.job)
        else:
            self.stores.drop_pictures(self.job)
        intake = self.job.request.intake
        logger.info(
            "job finished" if is_ours else "job finished by another",
            job_id=self.job.id,
            coverage=self._coverage,
            mask_read_as=intake.mask_read_as if intake else None,
            warnings=", ".join(self.job.request.warnings_at(self._coverage)),
        )

    def _was_ours(self) -> bool:
        """An earlier commit may have been made, and only its answer lost with the connection."""
        now = self.stores.jobs.get(self.job.id)
        if now is None:
            return False
        return now.state is JobState.FINISHED and now.fencing_token == self.job.fencing_token

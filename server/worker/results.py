"""Ends of jobs as steps for `finalizer`: a `Result` with pictures and receipt, failure, release."""

import functools
import hashlib
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.diffusion.pipeline import Picture, Source
from models.imaging.canvas import repainted_area
from models.imaging.captions import CAPTION_KEYWORD
from models.imaging.images import encode_jpeg, encode_png, encode_webp
from models.imaging.masks import Box, measure_fidelity
from models.params import InpaintParams, OutputFormat
from server.core.errors import StorageUnavailable
from server.core.logs import get_logger
from server.jobs.job import Failure, Job, JobState
from server.jobs.receipts import Model, PictureReceipt, Receipt, RunTimes
from server.jobs.store import JobStore
from server.storage.files import Storage
from server.worker.figures import WorkerFigures
from server.worker.finalizer import Step
from server.worker.traces import trace_failed, trace_finished

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores that take the ends of jobs.

    keeps_inputs: those of finished jobs stay, so that they can be replayed.
    figures: count what the stores have taken.
    """

    jobs: JobStore
    files: Storage
    keeps_inputs: bool = False
    figures: WorkerFigures = field(default_factory=WorkerFigures)

    def steps_to_fail(self, job: Job, failure: Failure) -> list[Step]:
        """The steps of an end without pictures."""

        def fail() -> None:
            if self.jobs.fail(job, failure.sentence):
                self.figures.count_failed(job, failure)
                trace_failed(job, failure)
                self.drop_input(job)

        return [fail]

    def steps_to_release(self, job: Job) -> list[Step]:
        """The steps that queue the job again for another worker; the attempt does not count."""

        def release() -> None:
            self.jobs.release(job)

        return [release]

    def drop_input(self, job: Job) -> None:
        """Remove the input of an ended job, about a megabyte that is never read again."""
        try:
            self.files.delete(job.input_key)
        except StorageUnavailable:
            logger.warning("input not deleted", job_id=job.id)

    def drop_pictures(self, job: Job) -> None:
        """Remove the pictures of a job that ended otherwise meanwhile; no row names them."""
        try:
            for key in job.output_keys:
                self.files.delete(key)
        except StorageUnavailable:
            logger.warning("late pictures not deleted", job_id=job.id)


@dataclass(slots=True)
class Stages:
    """Times at which a job's stages ended: `time.perf_counter`, 0 for stages to come."""

    claimed_s: float = field(default_factory=time.perf_counter)
    prepared_s: float = 0.0
    denoised_s: float = 0.0
    decoded_s: float = 0.0


@dataclass(slots=True)
class Result:
    """A job's pictures between the engine and the stores.

    pictures: of all samples, in order; released once they are encoded.
    caption: of a picture, for its file; "" for none. model: for the receipt.
    """

    job: Job
    source: Source
    stages: Stages
    pictures: Sequence[Picture]
    stores: Stores
    caption: Callable[[Picture], str]
    model: Model
    _files: list[bytes] = field(default_factory=list)
    _flagged: Sequence[bool | None] = ()
    _receipt: Callable[[], Receipt] = field(init=False)
    _coverage: float | None = None

    @property
    def steps(self) -> list[Step]:
        """Encode, store each picture, commit. The commit is last, so a row's pictures exist."""
        puts = [functools.partial(self._put, index) for index in range(len(self.pictures))]
        return [self._encode, *puts, self._finish]

    def _encode(self) -> None:
        self._files = [
            encode_picture(self.job.params, each, self.caption(each), self.source.icc_profile)
            for each in self.pictures
        ]
        coverage, box, receipts = inspect_pictures(
            self.job.params, self.source, self.pictures, self._files
        )
        self._coverage = coverage
        encoded_s = time.perf_counter()
        if repaired := repaired_parts(self.pictures):
            logger.warning("the VAE needed float32", job_id=self.job.id, detail=repaired)
        self._flagged = [each.is_flagged for each in self.pictures]
        self._receipt = lambda: Receipt(
            model=self.model,
            versions=versions(),
            times=run_times(self.stages, encoded_s),
            coverage=coverage,
            box=box,
            pictures=tuple(receipts),
        )
        self.pictures = ()

    def _put(self, index: int) -> None:
        self.stores.files.put(self.job.output_keys[index], self._files[index])

    def _finish(self) -> None:
        receipt = self._receipt()
        is_ours = self.stores.jobs.finish(self.job, self._flagged, receipt) or self._was_ours()
        if is_ours:
            self.stores.figures.count_finished(self.job, receipt)
            trace_finished(self.job, receipt)
        else:
            self.stores.drop_pictures(self.job)
        if is_ours and not self.stores.keeps_inputs:
            self.stores.drop_input(self.job)
        intake = self.job.request.intake
        logger.info(
            "job finished" if is_ours else "job finished by another",
            job_id=self.job.id,
            coverage=self._coverage,
            mask_read_as=intake.mask_read_as if intake else None,
            warnings=", ".join(self.job.request.warnings_at(self._coverage)),
        )

    def _was_ours(self) -> bool:
        """Whether an earlier try committed this result, and only its reply was lost."""
        now = self.stores.jobs.get(self.job.id)
        if now is None:
            return False
        return now.state is JobState.FINISHED and now.fencing_token == self.job.fencing_token


def encode_picture(
    params: InpaintParams, picture: Picture, caption: str, icc_profile: bytes
) -> bytes:
    """The file of a picture, as the job asks for it. caption: "" for none."""
    if params.output_format is OutputFormat.PNG:
        text = {CAPTION_KEYWORD: caption} if caption else {}
        return encode_png(picture.image, text, icc_profile)
    encode = encode_jpeg if params.output_format is OutputFormat.JPEG else encode_webp
    return encode(picture.image, params.output_quality, caption, icc_profile)


def repaired_parts(pictures: Sequence[Picture]) -> str:
    """The VAE's parts that were repeated in float32: "encode", "decode", both or ""."""
    parts = {
        "encode": any(picture.is_encoded_again for picture in pictures),
        "decode": any(picture.is_decoded_again for picture in pictures),
    }
    return ", ".join(name for name, is_repaired in parts.items() if is_repaired)


def inspect_pictures(
    params: InpaintParams, source: Source, pictures: Sequence[Picture], files: Sequence[bytes]
) -> tuple[float, Box | None, list[PictureReceipt]]:
    """Coverage and box of the repainted area, and a receipt for each picture.

    files: the pictures as they are stored. Differences are those of the pictures before they were
        encoded: JPEG, and WebP below a quality of 100, change all pixels a little afterwards.
    """
    area = repainted_area(params, source.mask)
    measured = [measure_fidelity(source.init_image, each.image, area) for each in pictures]
    receipts = [
        PictureReceipt(
            sha256=hashlib.sha256(file).hexdigest(),
            seed=picture.seed,
            is_flagged=picture.is_flagged,
            changed_outside=None if picture.is_flagged else fidelity.changed_outside,
            largest_difference_outside=(
                None if picture.is_flagged else fidelity.largest_difference_outside
            ),
        )
        for picture, file, fidelity in zip(pictures, files, measured, strict=True)
    ]
    return measured[0].coverage, measured[0].box, receipts


def run_times(stages: Stages, encoded_s: float) -> RunTimes:
    """Lengths of the stages in milliseconds; the last stage, storing, ends now."""
    moments = (
        *(stages.claimed_s, stages.prepared_s, stages.denoised_s, stages.decoded_s),
        *(encoded_s, time.perf_counter()),
    )
    lengths = [round((end - start) * 1000, 1) for start, end in itertools.pairwise(moments)]
    return RunTimes(*lengths)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide a picture's pixels."""
    found = {}
    for name, distribution in (
        ("server", "inpaint-server"),
        ("torch", "torch"),
        ("diffusers", "diffusers"),
    ):
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"  # run from a checkout that was not installed
    return found

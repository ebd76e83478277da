"""The GPU process: claims jobs, runs the engine, stores pictures, reports ends.

Shares job rows and stored files with the API process, and nothing else. The only server file that
imports the engine.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import diffusers.utils.logging
import transformers.utils.logging
from sqlalchemy.exc import SQLAlchemyError

from models.captions import CAPTION_KEYWORD, write_caption
from models.engine import EngineLimits, Event, Failed, Finished, Generation, InpaintEngine, Progress
from models.errors import (
    InvalidInput,
    ModelUnavailable,
    NoSafetyChecker,
    OutOfMemory,
    UnusablePicture,
)
from models.images import encode_png
from models.pipeline import Picture, Source
from models.residency import Residency
from server.checkpoints import Checkpoints
from server.database import open_engine
from server.errors import StorageUnavailable
from server.failures import Failure
from server.inspection import Stages, inspect_pictures, repaired_parts, run_times, versions
from server.jobs import Job, JobState, JobStore, WorkerStatus
from server.receipts import Model, Receipt
from server.sandbox import DecodedPair
from server.settings import Settings
from server.storage import Storage
from server.telemetry import get_logger

logger = get_logger(__name__)

IDLE_POLL_S = 0.01
"""Between two looks for new jobs; each costs microseconds."""

BEAT_S = 0.5
"""Between two writes of the running jobs' leases and progress."""

REPORT_S = 5.0
"""Between two signs of life in the workers table."""

PAUSE_S = 5.0
"""Without claims after the file store did not answer."""

INSIST_S = 60.0
"""How long the database may be away before the worker gives up."""

FINISH_S = 20.0
"""After being told to stop, for the jobs that run; less than the supervisor's grace."""

P = ParamSpec("P")
R = TypeVar("R")

FAILURES: dict[type[Exception], Failure] = {
    ModelUnavailable: Failure.MODEL_UNAVAILABLE,
    NoSafetyChecker: Failure.NO_SAFETY_CHECKER,
    InvalidInput: Failure.PROMPT_TOO_LONG,
    OutOfMemory: Failure.OUT_OF_MEMORY,
    UnusablePicture: Failure.UNUSABLE_PICTURE,
}


@dataclass(slots=True)
class Held:
    """A job this worker has claimed. storing: once its pictures are on their way to the store."""

    job: Job
    source: Source
    stages: Stages
    step: int = 0
    total_steps: int = 0
    storing: Future[None] | None = None


@dataclass(slots=True)
class Worker:
    """One engine's loop over the job table. parent: of which process it must be the child."""

    worker_id: str
    device: str
    settings: Settings
    store: JobStore
    storage: Storage
    stopping: threading.Event
    parent: int | None = None
    _held: dict[int, Held] = field(default_factory=dict)
    _beaten_at: float = 0.0
    _reported_at: float = 0.0
    _pause_until: float = 0.0
    _stop_by: float | None = None
    _checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        self._checkpoints = Checkpoints(self.settings, self.device)

    def run(self) -> None:
        """Work until told to stop; what runs then is finished, what waits is given back.

        Raises: models.errors.ModelUnavailable, models.errors.DeviceLost.
        """
        limits = EngineLimits(
            max_generations=self.settings.max_in_flight,
            is_reproducible=self.settings.reproducible,
        )
        models = self._open_models()
        engine = InpaintEngine(models, limits)
        self.report("ready", "ready")
        logger.info("worker ready", worker_id=self.worker_id, pid=os.getpid())
        # Encoding and storing go on beside the device's next steps.
        with (
            closing(models),
            ThreadPoolExecutor(max_workers=1) as storing,
            self.store.change_signal() as signal,
        ):
            while self._held or not self.stopping.is_set():
                if self.parent not in (None, os.getppid()):
                    logger.warning("the server that started this worker is gone")
                    return
                self._keep_up(engine)
                if self.stopping.is_set():
                    self._give_back(engine)
                elif self._may_claim(engine) and signal.has_changed():
                    self._claim(engine)
                for event in engine.step():
                    self._handle(event, storing)
                if engine.is_resting:
                    time.sleep(IDLE_POLL_S)  # half as dear as waiting for the event

    def _may_claim(self, engine: InpaintEngine) -> bool:
        """Not beside a job that was lost before: it may be what kills workers."""
        is_alone = any(held.job.attempt > 1 for held in self._held.values())
        return engine.free_places > 0 and not is_alone and time.monotonic() > self._pause_until

    def _give_back(self, engine: InpaintEngine) -> None:
        """While stopping: jobs that have not begun, and in the end those that take too long."""
        now = time.monotonic()
        self._stop_by = self._stop_by or now + FINISH_S
        for held in [*self._held.values()]:
            if held.storing is None and (held.total_steps == 0 or now > self._stop_by):
                engine.cancel(held.job.id)
                self._insist(self.store.release, held.job)
                del self._held[held.job.id]

    def _keep_up(self, engine: InpaintEngine) -> None:
        """What is due from time to time: leases, signs of life, jobs of the dead, stored jobs."""
        now = time.monotonic()
        for held in [*self._held.values()]:
            if held.storing is not None and held.storing.done():
                held.storing.result()
                del self._held[held.job.id]
        if self._held and now - self._beaten_at > BEAT_S:
            self._beaten_at = now
            self._beat(engine)
        if now - self._reported_at > REPORT_S:
            self._insist(self.store.requeue_expired)
            self.report("ready", "ready")

    def _beat(self, engine: InpaintEngine) -> None:
        """Renew the leases; forget the jobs that were cancelled or given to another."""
        progress = [(held.job, held.step, held.total_steps) for held in self._held.values()]
        for job in self._insist(self.store.beat_all, progress):
            # One that is being stored may just have finished.
            if self._held[job.id].storing is None:
                logger.warning("job was taken away", job_id=job.id)
                engine.cancel(job.id)
                del self._held[job.id]

    def _insist(self, change: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """A call of the store, made again while the database does not answer.

        Raises: SQLAlchemyError after `INSIST_S`.
        """
        give_up_at = time.monotonic() + INSIST_S
        while True:
            try:
                return change(*args, **kwargs)
            except SQLAlchemyError:
                if time.monotonic() > give_up_at:
                    raise
                logger.exception("the database does not answer")
                time.sleep(1)

    def _open_models(self) -> Residency:
        """The models that jobs may ask for. Raises: ModelUnavailable."""
        return self._checkpoints.open(lambda detail: self.report("loading", detail))

    def _claim(self, engine: InpaintEngine) -> None:
        claimed = self._insist(
            self.store.claim, self.worker_id, engine.free_places, is_idle=not self._held
        )
        for job in claimed:
            stages = Stages()
            logger.info("job claimed", job_id=job.id)
            try:
                source = self._read_input(job)
            except StorageUnavailable:
                logger.warning("input cannot be read now", job_id=job.id)
                self._pause_until = time.monotonic() + PAUSE_S
                self._insist(self.store.release, job)
                continue
            if source is None:
                self._fail(job, Failure.INPUT_LOST)
                continue
            self._held[job.id] = Held(job, source, stages)
            engine.add(Generation(job.id, self._model_of(job), job.params, source))

    def _read_input(self, job: Job) -> Source | None:
        """The job's pictures, None where they are missing or damaged."""
        content = self.storage.get(job.input_key)
        try:
            pair = DecodedPair.from_bytes(content or b"")
        except (ValueError, EOFError, IndexError):
            return None
        return Source(pair.init_image, pair.mask)

    def _handle(self, event: Event, storing: ThreadPoolExecutor) -> None:
        held = self._held[event.generation_id]
        match event:
            case Progress(step=step, total_steps=total_steps):
                held.step, held.total_steps = step, total_steps
                now = time.perf_counter()
                held.stages.prepared_s = held.stages.prepared_s or now
                held.stages.denoised_s = now
            case Finished():
                held.stages.decoded_s = time.perf_counter()
                held.storing = storing.submit(self._finish, held, event)
            case Failed(error=error):
                self._fail(held.job, FAILURES.get(type(error), Failure.UNKNOWN))
                detail = str(error) if isinstance(error, ModelUnavailable) else ""
                logger.warning(
                    "job failed", job_id=held.job.id, error=type(error).__name__, detail=detail
                )
                del self._held[held.job.id]

    def _finish(self, held: Held, event: Finished) -> None:
        job = held.job
        files = [
            encode_png(picture.image, self._png_text(job, picture)) for picture in event.pictures
        ]
        coverage, box, pictures = inspect_pictures(job, held.source, event.pictures, files)
        encoded_s = time.perf_counter()
        try:
            for key, file in zip(job.output_keys, files, strict=True):
                self.storage.put(key, file)
        except StorageUnavailable:
            logger.exception("pictures not stored", job_id=job.id)
            self._fail(job, Failure.NOT_STORED)
            return
        if repaired := repaired_parts(event.pictures):
            logger.warning("the VAE needed float32", job_id=job.id, detail=repaired)
        receipt = Receipt(
            model=self._describe_model(job),
            versions=versions(),
            times=run_times(held.stages, encoded_s),
            coverage=coverage,
            box=box,
            pictures=tuple(pictures),
        )
        flagged = [picture.is_flagged for picture in event.pictures]
        is_ours = self._insist(self.store.finish, job, flagged, receipt)
        if is_ours:
            self._drop_input(job)
        else:
            self._drop_late_pictures(job)
        logger.info("job finished" if is_ours else "job finished by another", job_id=job.id)

    def _png_text(self, job: Job, picture: Picture) -> dict[str, str]:
        """What stands in the file beside the pixels."""
        if not self.settings.png_metadata:
            return {}
        caption = write_caption(job.params, picture.seed, picture.scheduler, self._model_of(job))
        return {CAPTION_KEYWORD: caption}

    def _describe_model(self, job: Job) -> Model:
        return self._checkpoints.describe(self._model_of(job))

    def _model_of(self, job: Job) -> str:
        return job.params.model or self.settings.model

    def _fail(self, job: Job, failure: Failure) -> None:
        if self._insist(self.store.fail, job, failure.sentence):
            self._drop_input(job)

    def _drop_late_pictures(self, job: Job) -> None:
        """Of a job that has ended otherwise in the meantime; nothing names them."""
        now = self._insist(self.store.get, job.id)
        # The finish may have been ours, and only its answer lost with the database's connection.
        if now and now.state is JobState.FINISHED and now.attempt == job.attempt:
            return
        try:
            for key in job.output_keys:
                self.storage.delete(key)
        except StorageUnavailable:
            logger.warning("late pictures not deleted", job_id=job.id)

    def _drop_input(self, job: Job) -> None:
        """An ended job is never made again; its input is a megabyte that nobody reads."""
        try:
            self.storage.delete(job.input_key)
        except StorageUnavailable:
            logger.warning("input not deleted", job_id=job.id)

    def report(self, state: str, detail: str) -> None:
        """Say how this worker stands, for readiness."""
        self._reported_at = time.monotonic()
        self._insist(
            self.store.report_worker,
            WorkerStatus(
                id=self.worker_id,
                device=self.device,
                model=self.settings.model,
                state=state,
                detail=detail,
                seen_at=time.time(),
            ),
        )


def run(
    settings: Settings,
    worker_id: str,
    device: str,
    stopping: threading.Event,
    parent: int | None = None,
) -> None:
    """Open what a worker needs and run it.

    Raises: models.errors.ModelUnavailable, models.errors.DeviceLost.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()  # ours covers the whole checkpoint
        library.set_verbosity_error()
    engine = open_engine(settings.sqlalchemy_url)
    store = JobStore(engine)
    storage = Storage(settings.storage_url)
    worker = Worker(worker_id, device, settings, store, storage, stopping, parent)
    is_explained = False
    try:
        worker.run()
    except ModelUnavailable as error:
        # The row stays, and tells operators why nothing is ready.
        worker.report("failed", str(error))
        is_explained = True
        raise
    finally:
        store.requeue_of(worker_id)
        if not is_explained:
            store.forget_worker(worker_id)
        engine.dispose()

"""`Worker`: the loop of the process that owns a device. It claims jobs and runs the engine.

A worker shares job rows and stored files with API processes, and nothing else. No other module of
the server imports the engine. While the database is unavailable, the engine goes on and writes are
retried. The fencing token of each job then decides whether a late write still counts.
"""

import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import diffusers.utils.logging
import transformers.utils.logging
from sqlalchemy.exc import SQLAlchemyError

from models.diffusion.pipeline import Picture, Source
from models.engine import (
    EngineLimits,
    Event,
    Failed,
    Finished,
    Generation,
    InpaintEngine,
    Progress,
)
from models.errors import (
    DeviceUnavailable,
    InvalidInput,
    ModelUnavailable,
    NoSafetyChecker,
    OutOfMemory,
    UnusablePicture,
)
from models.executors import background_of
from models.imaging.captions import write_caption
from models.model_pool import ModelPool
from models.variants import ModelVariant
from server.core.errors import StorageUnavailable
from server.core.logs import get_logger
from server.core.settings import Settings
from server.jobs.job import Failure, Heartbeat, Job
from server.jobs.leases import FAIR_SHARE_S
from server.jobs.receipts import Model
from server.jobs.store import JobStore
from server.jobs.workers import WorkerStatus
from server.sandbox.decoded import DecodedPair, UnknownFormat
from server.storage.database import DatabaseFileGone, Topic, open_engine
from server.storage.files import Storage
from server.worker.checkpoints import Checkpoints, pick_device, warm_up
from server.worker.figures import WorkerFigures
from server.worker.finalizer import Finalizer
from server.worker.previews import DaemonThread, PreviewFiles
from server.worker.results import Result, Stages, Stores

logger = get_logger(__name__)

IDLE_POLL_S = 0.01
"""Longest wait of an idle engine. PostgreSQL ends it for a new job. All else, and a new job on
SQLite, is found by polling, which costs microseconds."""

HEARTBEAT_S = 0.5
"""Interval of heartbeats, which renew the leases of running jobs and write their progress."""

REPORT_S = 5.0
"""Interval of writes to this worker's row in the workers table."""

STORAGE_BACKOFF_S = 5.0
"""Time without claims after the file store has failed."""

DATABASE_BACKOFF_S = 2.0
"""Time without queries after the database has failed. A query can take seconds to fail, and the
engine's steps wait for it."""

REQUEUE_GRACE_S = 10.0
"""Time after an outage of the database in which no lease expires, because no other worker could
renew its leases either."""

STEP_STALL_S = 90.0
"""A finalizer whose step takes so long hangs. The worker then stops reporting, and the supervisor
replaces it."""

DRAIN_S = 20.0
"""Time for running jobs after a request to stop; less than the supervisor's grace."""

CONNECTIONS = 4
"""Connections to PostgreSQL, of which the loop and the finalizer need one each. `LISTENERS` come on
top."""

FAILURES_OF_FIELDS = {
    "clip_skip": Failure.CLIP_SKIP_TOO_LARGE,
    "noise_spacing": Failure.NO_SUCH_NOISE_SPACING,
}
"""Parameters that only the loaded model can judge; of all others that is the prompts' length."""

FAILURES: dict[type[Exception], Failure] = {
    ModelUnavailable: Failure.MODEL_UNAVAILABLE,
    NoSafetyChecker: Failure.NO_SAFETY_CHECKER,
    OutOfMemory: Failure.OUT_OF_MEMORY,
    UnusablePicture: Failure.UNUSABLE_PICTURE,
}


@dataclass(slots=True)
class RunningJob:
    """A job whose lease this worker holds, until its end is in the stores."""

    job: Job
    source: Source
    stages: Stages
    step: int = 0
    total_steps: int = 0


@dataclass(slots=True)
class Worker:
    """One engine's loop over the job table. parent: id of the process that must stay its parent."""

    worker_id: str
    device: str
    settings: Settings
    store: JobStore
    storage: Storage
    stopping: threading.Event
    parent: int | None = None
    _running: dict[int, RunningJob] = field(default_factory=dict)
    _heartbeat_at: float = 0.0
    _report_at: float = 0.0
    _claim_at: float = 0.0
    _requeue_at: float = 0.0
    _may_be_queued: bool = True
    _second_claim_at: float = math.inf
    _stop_by: float | None = None
    _max_in_flight: int = field(init=False)
    _checkpoints: Checkpoints = field(init=False)
    _models: ModelPool = field(init=False)
    _figures: WorkerFigures = field(init=False)
    _stores: Stores = field(init=False)
    _finalizer: Finalizer = field(init=False)
    _previews: PreviewFiles = field(init=False)

    def __post_init__(self) -> None:
        self._max_in_flight = self.settings.places_on(self.device)
        self._checkpoints = Checkpoints(self.settings, self.device)
        keeps_inputs = self.settings.retention.keep_inputs
        self._figures = WorkerFigures(self.device)
        self._stores = Stores(self.store, self.storage, keeps_inputs, self._figures)
        self._finalizer = Finalizer(self._stores.steps_to_fail)
        self._previews = PreviewFiles(self.storage, DaemonThread("previews"))

    def run(self) -> None:
        """Work until `stopping` is set, then finish running jobs and release the others.

        Raises: models.errors.DeviceUnavailable, ModelUnavailable, DeviceLost; DatabaseFileGone.
        """
        limits = EngineLimits(
            max_generations=self._max_in_flight,
            is_reproducible=self.settings.reproducible,
        )
        self._models = models = self._open_models()
        background = background_of(pick_device(self.device), is_reproducible=limits.is_reproducible)
        engine = InpaintEngine(models, limits, background)
        if self._checkpoints.must_warm_up:
            self.report("loading", "warming up")
            warm_up(engine, ModelVariant(self.settings.model))
        self.report("ready", "ready")
        logger.info("worker ready", worker_id=self.worker_id, pid=os.getpid())
        with (
            ending(background),
            closing(models),
            closing(self._finalizer),
            self.store.change_signal(Topic.QUEUED) as signal,
        ):
            while not self._must_end():
                self.store.check_file()
                self._run_periodic(engine)
                if self.stopping.is_set():
                    self._release_unstarted(engine)
                elif capacity := self._capacity(engine):
                    is_second = time.monotonic() >= self._second_claim_at
                    self._may_be_queued = self._may_be_queued or is_second or signal.has_changed()
                    if self._may_be_queued:
                        self._claim(engine, capacity)
                for event in engine.step():
                    self._handle(event)
                self._figures.observe_steps(engine.take_step_times())
                if engine.is_resting and not engine.wait(IDLE_POLL_S):
                    signal.wait(IDLE_POLL_S)
            self._release_remaining()

    def _must_end(self) -> bool:
        if self.parent not in (None, os.getppid()):
            logger.warning("the server that started this worker is gone")
            return True
        if not self.stopping.is_set():
            return False
        self._stop_by = self._stop_by or time.monotonic() + DRAIN_S
        is_done = not self._running and not self._finalizer
        return is_done or time.monotonic() > self._stop_by

    def _capacity(self, engine: InpaintEngine) -> int:
        """How many jobs may be claimed now.

        A job that was lost before runs alone, because it may be the cause of the loss. Ends that
        wait for a store count as running, which is the back-pressure of an unavailable store.
        """
        is_alone = any(running.job.attempt > 1 for running in self._running.values())
        if is_alone or self._is_stuck() or time.monotonic() < self._claim_at:
            return 0
        # Not below 0, because a negative LIMIT means no limit in SQLite.
        return max(0, min(engine.free_places, self._max_in_flight - len(self._finalizer)))

    def _release_unstarted(self, engine: InpaintEngine) -> None:
        """Release the jobs that the engine has not begun."""
        for job_id, running in self._running.items():
            if running.total_steps == 0 and job_id not in self._finalizer:
                engine.cancel(job_id)
                self._finalizer.begin(running.job, self._stores.steps_to_release(running.job))

    def _release_remaining(self) -> None:
        """Queue the remaining jobs again for other workers. Their attempts do not count."""
        self._remove_ended()
        jobs = [each.job for each in self._running.values() if each.job.id not in self._finalizer]
        for job in [*jobs, *self._finalizer.close()]:
            try:
                self.store.release(job)
            except SQLAlchemyError:
                logger.exception("job not released, its lease runs out", job_id=job.id)

    def _run_periodic(self, engine: InpaintEngine) -> None:
        """Poll the finalizer; send heartbeats, report, and requeue expired leases when due."""
        self._remove_ended()
        if self._is_stuck():
            return  # Without reports the supervisor replaces this worker, and its leases run out.
        now = time.monotonic()
        try:
            if self._running and now > self._heartbeat_at:
                self._heartbeat_at = now + HEARTBEAT_S
                self._heartbeat(engine)
            if now > self._report_at:
                self._write_status("ready", "ready")
                if now > self._requeue_at:
                    self.store.requeue_expired()
        except SQLAlchemyError:
            self._back_off()

    def _is_stuck(self) -> bool:
        """Whether a load or the finalizer hangs in its thread."""
        is_stalled = self._checkpoints.stalled_s > self.settings.worker_load_stall_s
        return is_stalled or self._finalizer.stuck_s > STEP_STALL_S

    def _back_off(self) -> None:
        """Make no queries for a while after the database has failed."""
        logger.exception("the database does not answer")
        now = time.monotonic()
        self._heartbeat_at = self._report_at = self._claim_at = now + DATABASE_BACKOFF_S
        self._requeue_at = now + DATABASE_BACKOFF_S + REQUEUE_GRACE_S

    def _heartbeat(self, engine: InpaintEngine) -> None:
        """Renew the leases and write progress; drop jobs whose lease this worker has lost.

        A lease is lost when the job was cancelled or claimed by another worker.
        Raises: SQLAlchemyError.
        """
        self._make_previews(engine)
        heartbeats = [
            Heartbeat(
                running.job, running.step, running.total_steps, self._previews.step_of(running.job)
            )
            for running in self._running.values()
        ]
        for job in self.store.heartbeat_all(heartbeats):
            # A job in the finalizer may have ended a moment ago, which ends its lease too.
            if job.id not in self._finalizer:
                logger.warning("job lease lost", job_id=job.id)
                engine.cancel(job.id)
                self._remove(job)

    def _make_previews(self, engine: InpaintEngine) -> None:
        """Store previews of the jobs that want them. Making one waits for the device."""
        for running in self._running.values():
            if self._previews.is_due(running.job, running.step):
                picture = engine.preview(running.job.id)
                if picture is not None:
                    self._previews.store(running.job, running.step, picture)
        self._previews.collect()

    def _remove_ended(self) -> None:
        for job_id in self._finalizer.poll():
            if job_id in self._running:
                self._remove(self._running[job_id].job)

    def _remove(self, job: Job) -> None:
        """Remove a job that has ended, or whose lease is lost."""
        del self._running[job.id]
        # A job that must run alone may have stayed in the queue until now.
        self._may_be_queued = True
        self._previews.drop(job)

    def _open_models(self) -> ModelPool:
        """The models that jobs may use. Raises: DeviceUnavailable, ModelUnavailable."""
        return self._checkpoints.open(lambda detail: self.report("loading", detail))

    def _claim(self, engine: InpaintEngine, capacity: int) -> None:
        try:
            claimed = self.store.claim(self.worker_id, capacity, is_idle=not self._running)
        except SQLAlchemyError:
            self._back_off()
            return
        # A claim takes at most this worker's share and skips rows that another claim has locked, so
        # more jobs may be queued.
        self._may_be_queued = bool(claimed)
        now = time.monotonic()
        # Jobs that their share's worker has not claimed by then may be claimed by any worker. One
        # empty second claim is enough; a change of the queue triggers the next.
        is_second = now >= self._second_claim_at
        self._second_claim_at = math.inf if claimed or is_second else now + FAIR_SHARE_S
        for job in claimed:
            stages = Stages()
            logger.info("job claimed", job_id=job.id)
            self._figures.observe_claim(job)
            try:
                source = self._read_input(job)
            except StorageUnavailable:
                logger.warning("input cannot be read now", job_id=job.id)
                self._claim_at = time.monotonic() + STORAGE_BACKOFF_S
                self._finalizer.begin(job, self._stores.steps_to_release(job))
                continue
            if isinstance(source, Failure):
                self._finalizer.fail(job, source)
                continue
            self._running[job.id] = RunningJob(job, source, stages)
            engine.add(Generation(job.id, self._variant_of(job), job.params, source))

    def _read_input(self, job: Job) -> Source | Failure:
        """The job's input, or the failure of a job whose input cannot be read."""
        content = self.storage.get(job.input_key)
        try:
            pair = DecodedPair.from_bytes(content or b"")
        except UnknownFormat as error:
            logger.warning("input of another version", job_id=job.id, detail=str(error))
            return Failure.INPUT_OF_ANOTHER_VERSION
        except ValueError:
            return Failure.INPUT_LOST
        return Source(pair.init_image, pair.mask, pair.icc_profile)

    def _handle(self, event: Event) -> None:
        running = self._running[event.generation_id]
        match event:
            case Progress(step=step, total_steps=total_steps):
                running.step, running.total_steps = step, total_steps
                now = time.perf_counter()
                running.stages.prepared_s = running.stages.prepared_s or now
                running.stages.denoised_s = now
            case Finished():
                running.stages.decoded_s = time.perf_counter()
                self._finalizer.begin(running.job, self._result(running, event).steps)
            case Failed(error=error):
                self._finalizer.fail(running.job, failure_of(error))
                detail = str(error) if isinstance(error, ModelUnavailable) else ""
                logger.warning(
                    "job failed", job_id=running.job.id, error=type(error).__name__, detail=detail
                )

    def _result(self, running: RunningJob, event: Finished) -> Result:
        job = running.job
        return Result(
            job=job,
            source=running.source,
            stages=running.stages,
            pictures=event.pictures,
            stores=self._stores,
            caption=lambda picture: self._caption(job, picture),
            model=self._describe_model(job),
        )

    def _caption(self, job: Job, picture: Picture) -> str:
        """What a picture was made of, for its file; "" where the operator wants none."""
        if not self.settings.png_metadata:
            return ""
        model = self._variant_of(job).model
        return write_caption(job.params, picture.seed, picture.scheduler, model)

    def _describe_model(self, job: Job) -> Model:
        """The model's entry in a receipt. Asked for before the next step may unload the model."""
        variant = self._variant_of(job)
        digest = self._models.pipeline(variant).weights_sha256
        return self._checkpoints.describe(variant, digest)

    def _variant_of(self, job: Job) -> ModelVariant:
        return ModelVariant(job.params.model or self.settings.model, job.params.loras)

    def report(self, state: str, detail: str) -> None:
        """Write this worker's status, which readiness checks read. Skipped in an outage."""
        try:
            self._write_status(state, detail)
        except SQLAlchemyError:
            logger.exception("the database does not answer")

    def _write_status(self, state: str, detail: str) -> None:
        """Raises: SQLAlchemyError."""
        self._report_at = time.monotonic() + REPORT_S
        self.store.workers.report(
            WorkerStatus(
                id=self.worker_id,
                device=self.device,
                model=self.settings.model,
                state=state,
                detail=detail,
                seen_at=time.time(),
            ),
            self._figures.text(),
        )


def failure_of(error: Exception) -> Failure:
    """The job's failure for an error of the engine."""
    if isinstance(error, InvalidInput):
        field = error.violations[0].field
        return FAILURES_OF_FIELDS.get(field, Failure.PROMPT_TOO_LONG)
    return FAILURES.get(type(error), Failure.UNKNOWN)


def requeue_left(store: JobStore, worker_id: str) -> None:
    """Queue the jobs again that an earlier process of this id held when it was killed.

    A service manager gives the next process the same id, and its jobs need not wait for their
    leases to expire. Two processes must not share an id.
    """
    try:
        count = store.requeue_of(worker_id)
    except SQLAlchemyError:
        logger.exception("jobs not requeued, their leases run out", worker_id=worker_id)
        return
    if count:
        logger.warning("jobs of an earlier run requeued", worker_id=worker_id, count=count)


def run(
    settings: Settings,
    worker_id: str,
    device: str,
    stopping: threading.Event,
    parent: int | None = None,
) -> None:
    """Open what a worker needs and run it.

    Raises: models.errors.DeviceUnavailable, ModelUnavailable, DeviceLost; DatabaseFileGone.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()  # Our bar covers the whole checkpoint.
        library.set_verbosity_error()
    engine = open_engine(settings.sqlalchemy_url, must_exist=True, connections=CONNECTIONS)
    store = JobStore(engine)
    storage = Storage(settings.storage_url, settings.store_options)
    worker = Worker(worker_id, device, settings, store, storage, stopping, parent)
    is_explained = False
    requeue_left(store, worker_id)
    try:
        worker.run()
    except (DeviceUnavailable, ModelUnavailable) as error:
        # The row stays, because readiness shows operators the reason.
        worker.report("failed", str(error))
        is_explained = True
        raise
    finally:
        try:
            # Jobs that were not released, for example because the device was lost.
            store.requeue_of(worker_id)
            if not is_explained:
                store.workers.remove(worker_id)
        except DatabaseFileGone:
            pass  # The rows are gone with the file.
        except SQLAlchemyError:
            logger.exception("jobs not requeued, their leases run out", worker_id=worker_id)
        engine.dispose()


@contextmanager
def ending(background: Executor) -> Iterator[None]:
    """At the end what the background has not begun is dropped, since nobody takes its results."""
    try:
        yield
    finally:
        background.shutdown(wait=False, cancel_futures=True)

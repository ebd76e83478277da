"""The GPU process: claims jobs, runs the engine, and has their ends brought into the stores.

Shares job rows and stored files with the API process, and nothing else. The only server file that
imports the engine. A database that is away does not stop it: what is due to be written is written
later, and the job's attempt decides whether it still counts.
"""

import math
import os
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field

import diffusers.utils.logging
import transformers.utils.logging
from sqlalchemy.exc import SQLAlchemyError

from models.diffusion.pipeline import Picture, Source
from models.engine import EngineLimits, Event, Failed, Finished, Generation, InpaintEngine, Progress
from models.errors import (
    DeviceUnavailable,
    InvalidInput,
    ModelUnavailable,
    NoSafetyChecker,
    OutOfMemory,
    UnusablePicture,
)
from models.imaging.captions import CAPTION_KEYWORD, write_caption
from models.model_pool import ModelPool
from server.core.errors import StorageUnavailable
from server.core.logs import get_logger
from server.core.settings import Settings
from server.jobs.job import Failure, Heartbeat, Job
from server.jobs.receipts import Model
from server.jobs.store import FAIR_SHARE_S, JobStore
from server.jobs.workers import WorkerStatus
from server.sandbox.decoded import DecodedPair, UnknownFormat
from server.storage.database import DatabaseFileGone, Topic, open_engine
from server.storage.files import Storage
from server.worker.checkpoints import Checkpoints
from server.worker.finalizer import Finalizer
from server.worker.inspection import Stages
from server.worker.previews import DaemonThread, PreviewFiles
from server.worker.results import Result, Stores

logger = get_logger(__name__)

IDLE_POLL_S = 0.01
"""Between two looks for new jobs; each costs microseconds."""

BEAT_S = 0.5
"""Between two writes of the running jobs' leases and progress."""

REPORT_S = 5.0
"""Between two signs of life in the workers table."""

PAUSE_S = 5.0
"""Without claims after the file store did not answer."""

AWAY_S = 2.0
"""After the database did not answer, until it is asked again: a look may take seconds, and the
engine's steps wait for it."""

RETURN_S = 10.0
"""After the database was away, until jobs of others are taken for lost: they could not renew their
leases either."""

HANG_S = 90.0
"""A store that takes so long over one file hangs, and this worker with it."""

FINISH_S = 20.0
"""After being told to stop, for the jobs that run; less than the supervisor's grace."""

FAILURES: dict[type[Exception], Failure] = {
    ModelUnavailable: Failure.MODEL_UNAVAILABLE,
    NoSafetyChecker: Failure.NO_SAFETY_CHECKER,
    OutOfMemory: Failure.OUT_OF_MEMORY,
    UnusablePicture: Failure.UNUSABLE_PICTURE,
}


@dataclass(slots=True)
class Held:
    """A job this worker makes, until its end is in the stores."""

    job: Job
    source: Source
    stages: Stages
    step: int = 0
    total_steps: int = 0


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
    _beat_at: float = 0.0
    _report_at: float = 0.0
    _claim_at: float = 0.0
    _requeue_at: float = 0.0
    _may_be_waiting: bool = True
    _look_again_at: float = math.inf
    _stop_by: float | None = None
    _max_in_flight: int = field(init=False)
    _checkpoints: Checkpoints = field(init=False)
    _stores: Stores = field(init=False)
    _endings: Finalizer = field(init=False)
    _previews: PreviewFiles = field(init=False)

    def __post_init__(self) -> None:
        self._max_in_flight = self.settings.places_on(self.device)
        self._checkpoints = Checkpoints(self.settings, self.device)
        self._stores = Stores(self.store, self.storage)
        self._endings = Finalizer(self._stores.steps_to_fail)
        self._previews = PreviewFiles(self.storage, DaemonThread("previews"))

    def run(self) -> None:
        """Work until told to stop; what runs then is finished, what waits is given back.

        Raises: models.errors.DeviceUnavailable, ModelUnavailable, DeviceLost; DatabaseFileGone.
        """
        limits = EngineLimits(
            max_generations=self._max_in_flight,
            is_reproducible=self.settings.reproducible,
        )
        models = self._open_models()
        engine = InpaintEngine(models, limits)
        self.report("ready", "ready")
        logger.info("worker ready", worker_id=self.worker_id, pid=os.getpid())
        with (
            closing(models),
            closing(self._endings),
            self.store.change_signal(Topic.QUEUED) as signal,
        ):
            while not self._is_over():
                self.store.check_file()
                self._keep_up(engine)
                if self.stopping.is_set():
                    self._wind_up(engine)
                elif places := self._places(engine):
                    is_again = time.monotonic() >= self._look_again_at
                    self._may_be_waiting = self._may_be_waiting or is_again or signal.has_changed()
                    if self._may_be_waiting:
                        self._claim(engine, places)
                for event in engine.step():
                    self._handle(event)
                if engine.is_resting:
                    time.sleep(IDLE_POLL_S)  # half as dear as waiting for the event
            self._hand_back()

    def _is_over(self) -> bool:
        if self.parent not in (None, os.getppid()):
            logger.warning("the server that started this worker is gone")
            return True
        if not self.stopping.is_set():
            return False
        self._stop_by = self._stop_by or time.monotonic() + FINISH_S
        is_done = not self._held and not self._endings
        return is_done or time.monotonic() > self._stop_by

    def _places(self, engine: InpaintEngine) -> int:
        """How many jobs may be claimed now.

        None beside a job that was lost before: it may be what kills workers. None for which there
        would be no room while a store does not take the results.
        """
        is_alone = any(held.job.attempt > 1 for held in self._held.values())
        if is_alone or self._is_stuck() or time.monotonic() < self._claim_at:
            return 0
        # Never below none: a database takes that for all.
        return max(0, min(engine.free_places, self._max_in_flight - len(self._endings)))

    def _wind_up(self, engine: InpaintEngine) -> None:
        """While stopping: give back the jobs that have not begun."""
        for job_id, held in self._held.items():
            if held.total_steps == 0 and job_id not in self._endings:
                engine.cancel(job_id)
                self._endings.begin(held.job, self._stores.steps_to_release(held.job))

    def _hand_back(self) -> None:
        """In the end: what others must make. The attempt does not count, no job is at fault."""
        self._let_go_of_ended()
        running = [held.job for held in self._held.values() if held.job.id not in self._endings]
        for job in [*running, *self._endings.close()]:
            try:
                self.store.release(job)
            except SQLAlchemyError:
                logger.exception("job not given back, its lease runs out", job_id=job.id)

    def _keep_up(self, engine: InpaintEngine) -> None:
        """What is due from time to time: ends, leases, signs of life, jobs of the dead."""
        self._let_go_of_ended()
        if self._is_stuck():
            return  # the supervisor hears nothing and acts, and the leases run out
        now = time.monotonic()
        try:
            if self._held and now > self._beat_at:
                self._beat_at = now + BEAT_S
                self._beat(engine)
            if now > self._report_at:
                self._say("ready", "ready")
                if now > self._requeue_at:
                    self.store.requeue_expired()
        except SQLAlchemyError:
            self._be_patient()

    def _is_stuck(self) -> bool:
        """Something hangs that the engine's steps do not wait for."""
        is_loading = self._checkpoints.silent_s > self.settings.worker_load_stall_s
        return is_loading or self._endings.stuck_s > HANG_S

    def _be_patient(self) -> None:
        """The database did not answer; nothing is lost but time."""
        logger.exception("the database does not answer")
        now = time.monotonic()
        self._beat_at = self._report_at = self._claim_at = now + AWAY_S
        self._requeue_at = now + AWAY_S + RETURN_S

    def _beat(self, engine: InpaintEngine) -> None:
        """Renew the leases, show what has changed; forget the jobs that were cancelled or given to
        another.

        Raises: SQLAlchemyError.
        """
        self._make_previews(engine)
        heartbeats = [
            Heartbeat(held.job, held.step, held.total_steps, self._previews.step_of(held.job))
            for held in self._held.values()
        ]
        for job in self.store.heartbeat_all(heartbeats):
            # One whose end is on its way may just have ended.
            if job.id not in self._endings:
                logger.warning("job was taken away", job_id=job.id)
                engine.cancel(job.id)
                self._let_go(job)

    def _make_previews(self, engine: InpaintEngine) -> None:
        """Of the jobs that asked for them; the device is waited for, which only they cost."""
        for held in self._held.values():
            if self._previews.is_due(held.job, held.step):
                picture = engine.preview(held.job.id)
                if picture is not None:
                    self._previews.store(held.job, held.step, picture)
        self._previews.settle()

    def _let_go_of_ended(self) -> None:
        for job_id in self._endings.look():
            if job_id in self._held:
                self._let_go(self._held[job_id].job)

    def _let_go(self, job: Job) -> None:
        """A job that has ended, or is somebody else's from now on."""
        del self._held[job.id]
        self._may_be_waiting = True  # a job that is given out alone is not claimed beside others
        self._previews.drop(job)

    def _open_models(self) -> ModelPool:
        """The models that jobs may ask for. Raises: DeviceUnavailable, ModelUnavailable."""
        return self._checkpoints.open(lambda detail: self.report("loading", detail))

    def _claim(self, engine: InpaintEngine, places: int) -> None:
        try:
            claimed = self.store.claim(self.worker_id, places, is_idle=not self._held)
        except SQLAlchemyError:
            self._be_patient()
            return
        # A claim takes no more than its share, and what was locked by another's claim is not seen.
        self._may_be_waiting = bool(claimed)
        now = time.monotonic()
        # What others have not claimed by then is anybody's: one more look, and no third.
        is_second = now >= self._look_again_at
        self._look_again_at = math.inf if claimed or is_second else now + FAIR_SHARE_S
        for job in claimed:
            stages = Stages()
            logger.info("job claimed", job_id=job.id)
            try:
                source = self._read_input(job)
            except StorageUnavailable:
                logger.warning("input cannot be read now", job_id=job.id)
                self._claim_at = time.monotonic() + PAUSE_S
                self._endings.begin(job, self._stores.steps_to_release(job))
                continue
            if isinstance(source, Failure):
                self._endings.fail(job, source)
                continue
            self._held[job.id] = Held(job, source, stages)
            engine.add(Generation(job.id, self._model_of(job), job.params, source))

    def _read_input(self, job: Job) -> Source | Failure:
        """The job's pictures, or why they cannot be read."""
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
        held = self._held[event.generation_id]
        match event:
            case Progress(step=step, total_steps=total_steps):
                held.step, held.total_steps = step, total_steps
                now = time.perf_counter()
                held.stages.prepared_s = held.stages.prepared_s or now
                held.stages.denoised_s = now
            case Finished():
                held.stages.decoded_s = time.perf_counter()
                self._endings.begin(held.job, self._result(held, event).steps)
            case Failed(error=error):
                self._endings.fail(held.job, failure_of(error))
                detail = str(error) if isinstance(error, ModelUnavailable) else ""
                logger.warning(
                    "job failed", job_id=held.job.id, error=type(error).__name__, detail=detail
                )

    def _result(self, held: Held, event: Finished) -> Result:
        job = held.job
        return Result(
            job=job,
            source=held.source,
            stages=held.stages,
            pictures=event.pictures,
            stores=self._stores,
            caption=lambda picture: self._png_text(job, picture),
            model=lambda: self._describe_model(job),
        )

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

    def report(self, state: str, detail: str) -> None:
        """Say how this worker stands, for readiness; left out where the database is away."""
        try:
            self._say(state, detail)
        except SQLAlchemyError:
            logger.exception("the database does not answer")

    def _say(self, state: str, detail: str) -> None:
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
            )
        )


def failure_of(error: Exception) -> Failure:
    """What a client is told of an engine's error."""
    if isinstance(error, InvalidInput):
        fields = {violation.field for violation in error.violations}
        is_skip = "clip_skip" in fields
        return Failure.CLIP_SKIP_TOO_LARGE if is_skip else Failure.PROMPT_TOO_LONG
    return FAILURES.get(type(error), Failure.UNKNOWN)


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
        library.disable_progress_bar()  # ours covers the whole checkpoint
        library.set_verbosity_error()
    engine = open_engine(settings.sqlalchemy_url, must_exist=True)
    store = JobStore(engine)
    storage = Storage(settings.storage_url)
    worker = Worker(worker_id, device, settings, store, storage, stopping, parent)
    is_explained = False
    try:
        worker.run()
    except (DeviceUnavailable, ModelUnavailable) as error:
        # The row stays, and tells operators why nothing is ready.
        worker.report("failed", str(error))
        is_explained = True
        raise
    finally:
        try:
            # What it could not hand back, or died of.
            store.requeue_of(worker_id)
            if not is_explained:
                store.workers.remove(worker_id)
        except DatabaseFileGone:
            pass  # its rows are gone with the file
        except SQLAlchemyError:
            logger.exception("jobs not taken back, their leases run out", worker_id=worker_id)
        engine.dispose()

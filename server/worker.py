"""The GPU process: claims jobs, runs the engine, stores pictures, reports ends.

Shares job rows and stored files with the API process, and nothing else. The only server file that
imports the engine.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import diffusers.utils.logging
import torch
import transformers.utils.logging
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from models.engine import EngineLimits, Event, Failed, Finished, Generation, InpaintEngine, Progress
from models.errors import InvalidInput, ModelUnavailable, OutOfMemory, UnusablePicture
from models.images import encode_png
from models.pipeline import InpaintPipeline, Source
from models.registry import find_model, load_components, read_catalog
from server.database import open_engine
from server.errors import StorageUnavailable
from server.jobs import Job, JobState, JobStore, WorkerStatus
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

REASONS: dict[type[Exception], str] = {
    InvalidInput: "The prompt is longer than this model can read",
    OutOfMemory: "The picture is too large for this server's memory",
    UnusablePicture: "The model could not make this picture",
}
UNKNOWN_REASON = "Something went wrong while making this picture"


@dataclass(slots=True)
class Held:
    """A job this worker has claimed. storing: once its pictures are on their way to the store."""

    job: Job
    step: int = 0
    total_steps: int = 0
    storing: Future[None] | None = None


@dataclass(slots=True)
class Worker:
    """One engine's loop over the job table."""

    worker_id: str
    device: str
    settings: Settings
    store: JobStore
    storage: Storage
    stopping: threading.Event
    _held: dict[int, Held] = field(default_factory=dict)
    _beaten_at: float = 0.0
    _reported_at: float = 0.0
    _pause_until: float = 0.0
    _stop_by: float | None = None

    def run(self) -> None:
        """Work until told to stop; what runs then is finished, what waits is given back.

        Raises: models.errors.ModelUnavailable, models.errors.DeviceLost.
        """
        limits = EngineLimits(
            max_generations=self.settings.max_in_flight,
            is_reproducible=self.settings.reproducible,
        )
        engine = InpaintEngine(self._load(), limits)
        self.report("ready", "ready")
        logger.info("worker ready", worker_id=self.worker_id, pid=os.getpid())
        parent = os.getppid()
        # Encoding and storing go on beside the device's next steps.
        with ThreadPoolExecutor(max_workers=1) as storing, self.store.change_signal() as signal:
            while self._held or not self.stopping.is_set():
                if os.getppid() != parent:
                    logger.warning("the server that started this worker is gone")
                    return
                self._keep_up(engine)
                if self.stopping.is_set():
                    self._give_back(engine)
                elif self._may_claim(engine) and signal.has_changed():
                    self._claim(engine)
                for event in engine.step():
                    self._handle(event, storing)
                if engine.is_idle:
                    self.stopping.wait(IDLE_POLL_S)

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

    def _load(self) -> InpaintPipeline:
        spec = find_model(self.settings.model, read_catalog(self.settings.models_file))
        device = pick_device(self.device)
        started = time.perf_counter()
        # `disable=None` shows the bar on a terminal only.
        with tqdm(total=100, desc=f"loading {spec.id}", unit="%", disable=None) as bar:

            def report(share: float, name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update(round(share * 100) - bar.n)
                self.report("loading", f"loading model {share:.0%}")

            report(0.0, "files")
            pipeline = InpaintPipeline(load_components(spec, device, pick_dtype(device), report))
        if not pipeline.has_safety_checker and self.settings.safety.force:
            raise ModelUnavailable(
                f"model {spec.id!r} has no safety checker, and safety.force asks for one"
            )
        if not pipeline.has_safety_checker:
            logger.warning("this model has no safety checker: nothing is checked", model=spec.id)
        seconds = round(time.perf_counter() - started, 2)
        logger.info("model loaded", model=spec.id, device=str(device), seconds=seconds)
        return pipeline

    def _claim(self, engine: InpaintEngine) -> None:
        claimed = self._insist(
            self.store.claim, self.worker_id, engine.free_places, is_idle=not self._held
        )
        for job in claimed:
            logger.info("job claimed", job_id=job.id)
            try:
                source = self._read_input(job)
            except StorageUnavailable:
                logger.warning("input cannot be read now", job_id=job.id)
                self._pause_until = time.monotonic() + PAUSE_S
                self._insist(self.store.release, job)
                continue
            if source is None:
                self._fail(job, "The stored images are gone")
                continue
            self._held[job.id] = Held(job)
            engine.add(Generation(job.id, job.params, source))

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
            case Finished():
                held.storing = storing.submit(self._finish, held.job, event)
            case Failed(error=error):
                reason = REASONS.get(type(error), UNKNOWN_REASON)
                self._fail(held.job, reason)
                logger.warning("job failed", job_id=held.job.id, error=type(error).__name__)
                del self._held[held.job.id]

    def _finish(self, job: Job, event: Finished) -> None:
        try:
            for key, picture in zip(job.output_keys, event.pictures, strict=True):
                self.storage.put(key, encode_png(picture.image))
        except StorageUnavailable:
            logger.exception("pictures not stored", job_id=job.id)
            self._fail(job, "The pictures could not be stored")
            return
        flagged = [picture.is_flagged for picture in event.pictures]
        is_ours = self._insist(self.store.finish, job, flagged)
        if is_ours:
            self._drop_input(job)
        else:
            self._drop_late_pictures(job)
        logger.info("job finished" if is_ours else "job finished by another", job_id=job.id)

    def _fail(self, job: Job, reason: str) -> None:
        if self._insist(self.store.fail, job, reason):
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


def pick_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """Half precision where it is fast."""
    return torch.float16 if device.type == "cuda" else torch.float32


def run(settings: Settings, worker_id: str, device: str, stopping: threading.Event) -> None:
    """Open what a worker needs and run it.

    Raises: models.errors.ModelUnavailable, models.errors.DeviceLost.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()  # ours covers the whole checkpoint
        library.set_verbosity_error()
    engine = open_engine(settings.sqlalchemy_url)
    store = JobStore(engine)
    worker = Worker(worker_id, device, settings, store, Storage(settings.storage_url), stopping)
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

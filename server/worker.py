"""The GPU process: claims jobs, runs the engine, stores pictures, reports ends.

Shares job rows and stored files with the API process, and nothing else. The only server file that
imports the engine.
"""

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import diffusers.utils.logging
import torch
import transformers.utils.logging
from tqdm import tqdm

from models.engine import EngineLimits, Event, Failed, Finished, Generation, InpaintEngine, Progress
from models.errors import InvalidInput, ModelUnavailable, OutOfMemory, UnusablePicture
from models.images import encode_png
from models.pipeline import InpaintPipeline, Source
from models.registry import find_model, load_components, read_catalog
from server.database import open_engine
from server.errors import StorageUnavailable
from server.jobs import Job, JobStore, WorkerStatus
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

    def run(self) -> None:
        """Work until told to stop; what is in hand is finished first.

        Raises: models.errors.ModelUnavailable, models.errors.DeviceLost.
        """
        limits = EngineLimits(
            max_generations=self.settings.max_in_flight,
            is_reproducible=self.settings.reproducible,
        )
        engine = InpaintEngine(self._load(), limits)
        self._report("ready", "ready")
        logger.info("worker ready", worker_id=self.worker_id, pid=os.getpid())
        parent = os.getppid()
        # Encoding and storing go on beside the device's next steps.
        with ThreadPoolExecutor(max_workers=1) as storing, self.store.change_signal() as signal:
            while self._held or not self.stopping.is_set():
                if os.getppid() != parent:
                    logger.warning("the server that started this worker is gone")
                    return
                self._keep_up(engine)
                if engine.free_places and not self.stopping.is_set() and signal.has_changed():
                    self._claim(engine)
                for event in engine.step():
                    self._handle(event, storing)
                if engine.is_idle:
                    self.stopping.wait(IDLE_POLL_S)

    def _keep_up(self, engine: InpaintEngine) -> None:
        """What is due from time to time: leases, signs of life, jobs of the dead, stored jobs."""
        now = time.monotonic()
        for held in [each for each in self._held.values() if each.storing is not None]:
            if held.storing is not None and held.storing.done():
                held.storing.result()
                del self._held[held.job.id]
        if self._held and now - self._beaten_at > BEAT_S:
            self._beaten_at = now
            for job in self._beat():
                logger.warning("job was taken away", job_id=job.id)
                engine.cancel(job.id)
                del self._held[job.id]
        if now - self._reported_at > REPORT_S:
            self.store.requeue_expired()
            self._report("ready", "ready")

    def _beat(self) -> list[Job]:
        """Renew the leases; the jobs that were cancelled or given to another."""
        progress = [
            (held.job, held.step, held.total_steps)
            for held in self._held.values()
            if held.storing is None
        ]
        return self.store.beat_all(progress)

    def _load(self) -> InpaintPipeline:
        spec = find_model(self.settings.model, read_catalog(self.settings.models_file))
        device = pick_device(self.device)
        started = time.perf_counter()
        # `disable=None` shows the bar on a terminal only.
        with tqdm(total=100, desc=f"loading {spec.id}", unit="%", disable=None) as bar:

            def report(share: float, name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update(round(share * 100) - bar.n)
                self._report("loading", f"loading model {share:.0%}")

            report(0.0, "files")
            pipeline = InpaintPipeline(load_components(spec, device, pick_dtype(device), report))
        if not pipeline.has_safety_checker and self.settings.safety.force:
            raise ModelUnavailable(
                f"model {spec.id!r} has no safety checker, and safety.force asks for one"
            )
        seconds = round(time.perf_counter() - started, 2)
        logger.info("model loaded", model=spec.id, device=str(device), seconds=seconds)
        return pipeline

    def _claim(self, engine: InpaintEngine) -> None:
        for job in self.store.claim(self.worker_id, engine.free_places):
            logger.info("job claimed", job_id=job.id)
            try:
                content = self.storage.get(job.input_key)
            except StorageUnavailable:
                content = None
            if content is None:
                self.store.fail(job, "The stored images are gone")
                continue
            pair = DecodedPair.from_bytes(content)
            self._held[job.id] = Held(job)
            engine.add(Generation(job.id, job.params, Source(pair.init_image, pair.mask)))

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
        is_ours = self.store.finish(job, [picture.is_flagged for picture in event.pictures])
        if is_ours:
            self._drop_input(job)
        logger.info("job finished" if is_ours else "job finished by another", job_id=job.id)

    def _fail(self, job: Job, reason: str) -> None:
        if self.store.fail(job, reason):
            self._drop_input(job)

    def _drop_input(self, job: Job) -> None:
        """An ended job is never made again; its input is a megabyte that nobody reads."""
        try:
            self.storage.delete(job.input_key)
        except StorageUnavailable:
            logger.warning("input not deleted", job_id=job.id)

    def _report(self, state: str, detail: str) -> None:
        self._reported_at = time.monotonic()
        self.store.report_worker(
            WorkerStatus(
                id=self.worker_id,
                device=self.device,
                model=self.settings.model,
                state=state,
                detail=detail,
                seen_at=time.time(),
            )
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
    try:
        worker.run()
    finally:
        store.requeue_of(worker_id)
        store.forget_worker(worker_id)
        engine.dispose()

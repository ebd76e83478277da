"""The GPU process: claims jobs, runs the engine, stores pictures, reports ends.

Shares job rows and stored files with the API process, and nothing else. The only server file that
imports the engine.
"""

import os
import threading
import time
from dataclasses import dataclass, field

import diffusers.utils.logging
import torch
import transformers.utils.logging
from tqdm import tqdm

from models.engine import Event, Failed, Finished, Generation, InpaintEngine, Progress
from models.errors import EngineError, InvalidInput, ModelUnavailable, OutOfMemory, UnusablePicture
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
"""Between two writes of a running job's progress."""

REPORT_S = 5.0
"""Between two signs of life in the workers table."""

REASONS: dict[type[EngineError], str] = {
    InvalidInput: "The prompt is longer than this model can read",
    OutOfMemory: "The picture is too large for this server's memory",
    UnusablePicture: "The model could not make this picture",
}
UNKNOWN_REASON = "Something went wrong while making this picture"


@dataclass(slots=True)
class Worker:
    """One engine's loop over the job table."""

    worker_id: str
    device: str
    settings: Settings
    store: JobStore
    storage: Storage
    stopping: threading.Event
    _held: dict[int, Job] = field(default_factory=dict)
    _beaten_at: dict[int, float] = field(default_factory=dict)
    _reported_at: float = 0.0

    def run(self) -> None:
        """Work until told to stop; the job in hand is finished first.

        Raises: models.errors.ModelUnavailable, models.errors.DeviceLost.
        """
        engine = InpaintEngine(self._load(), max_generations=1)
        self._report("ready", "ready")
        logger.info("worker ready", worker_id=self.worker_id, pid=os.getpid())
        signal = self.store.change_signal()
        parent = os.getppid()
        while not (self.stopping.is_set() and engine.is_idle):
            if os.getppid() != parent:
                logger.warning("the server that started this worker is gone")
                return
            if time.monotonic() - self._reported_at > REPORT_S:
                self.store.requeue_expired()
                self._report("ready", "ready")
            if engine.free_places and not self.stopping.is_set() and signal.has_changed():
                self._claim(engine)
            for event in engine.step():
                self._handle(event)
            if engine.is_idle:
                self.stopping.wait(IDLE_POLL_S)
        signal.close()

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
            self._held[job.id] = job
            engine.add(Generation(job.id, job.params, Source(pair.init_image, pair.mask)))

    def _handle(self, event: Event) -> None:
        job = self._held[event.generation_id]
        match event:
            case Progress(step=step, total_steps=total_steps):
                self._beat(job, step, total_steps)
            case Finished():
                self._finish(job, event)
            case Failed(error=error):
                reason = REASONS.get(type(error), UNKNOWN_REASON)  # type: ignore[arg-type]
                self.store.fail(job, reason)
                logger.warning("job failed", job_id=job.id, error=type(error).__name__)
        if not isinstance(event, Progress):
            del self._held[job.id]

    def _beat(self, job: Job, step: int, total_steps: int) -> None:
        now = time.monotonic()
        if now - self._beaten_at.get(job.id, 0.0) > BEAT_S:
            self._beaten_at = {job.id: now}
            self.store.beat(job, step, total_steps)

    def _finish(self, job: Job, event: Finished) -> None:
        try:
            for key, picture in zip(job.output_keys, event.pictures, strict=True):
                self.storage.put(key, encode_png(picture.image))
        except StorageUnavailable:
            logger.exception("pictures not stored", job_id=job.id)
            self.store.fail(job, "The pictures could not be stored")
            return
        is_ours = self.store.finish(job, [picture.is_flagged for picture in event.pictures])
        logger.info("job finished" if is_ours else "job finished by another", job_id=job.id)

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

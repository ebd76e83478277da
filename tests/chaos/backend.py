"""A worker process of ours around a model that does what the job's prompt asks for.

`python -m tests.chaos.backend --worker-id ID --device cpu --data-dir DIR`, as the supervisor starts
it: our worker's command, loop, engine, store and file store are the real ones. Pictures follow from
the seed alone, so that a job made twice can be compared.
"""

from tests.chaos import light_libraries, shifted_clock

light_libraries.install()
shifted_clock.install()

import ctypes  # noqa: E402 - the stand-ins come first
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

import server.worker  # noqa: E402
from models.canvas import prepare_canvas  # noqa: E402
from models.errors import DeviceLost, OutOfMemory, UnusablePicture  # noqa: E402
from models.params import InpaintParams  # noqa: E402
from models.pipeline import InpaintPipeline, Picture, Sample, Source  # noqa: E402
from models.residency import Residency  # noqa: E402
from server.cli import main  # noqa: E402
from server.jobs import Job, JobStore  # noqa: E402
from server.receipts import Model  # noqa: E402
from server.storage import Storage  # noqa: E402
from server.worker import Worker  # noqa: E402
from tests.chaos.scripts import (  # noqa: E402
    FOLDER_VARIABLE,
    HUNG_LOAD,
    LEDGER,
    FaultKind,
    Script,
    Stage,
)


def strike(prompt: str, stage: Stage) -> None:
    """Do what the prompt asks for at this stage, if anything."""
    script = Script.parse(prompt)
    if not script.strikes(stage):
        return
    match script.fault:
        case FaultKind.EXIT:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultKind.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case FaultKind.HANG:
            ctypes.PyDLL(None).pause()
        case FaultKind.WAIT:
            threading.Event().wait()
        case FaultKind.OUT_OF_MEMORY:
            raise OutOfMemory("asked for")
        case FaultKind.UNUSABLE:
            raise UnusablePicture("asked for")
        case FaultKind.DEVICE_LOST:
            raise DeviceLost("asked for")
        case FaultKind.ERROR:
            raise ValueError("asked for")


class ScriptedPipeline(InpaintPipeline):
    """The verbs of the real one, without weights."""

    def __init__(self) -> None:
        self._safety = None

    def prepare_together(self, jobs: Sequence[tuple[InpaintParams, Source]]) -> list[list[Sample]]:
        """Samples of the right shapes, of as many steps as were asked for."""
        return [self._samples(params, source) for params, source in jobs]

    def _samples(self, params: InpaintParams, source: Source) -> list[Sample]:
        strike(params.prompt, Stage.PREPARED)
        canvas = prepare_canvas(params, source.init_image, source.mask)
        latents: Any = np.zeros((1, 4, params.height // 8, params.width // 8), np.float32)
        conditioning: Any = np.zeros((2, 77, 1), np.float32)
        timesteps: Any = [*range(params.num_inference_steps)]
        return [
            Sample(
                params=params,
                canvas=canvas,
                seed=params.sample_seed(index),
                scheduler=None,
                step_arguments={},
                timesteps=timesteps,
                conditioning=conditioning,
                added_conditions={},
                latents=latents,
                noise=latents,
                mask=latents,
                strengths=latents,
                masked_image_latents=latents,
                image_latents=None,
            )
            for index in range(params.samples)
        ]

    def denoise_step(self, samples: Sequence[Sample]) -> list[Any]:
        """Takes its time; the slowest of the samples decides."""
        for sample in samples:
            if sample.step_index == sample.total_steps // 2:
                strike(sample.params.prompt, Stage.HALF)
        time.sleep(max(Script.parse(sample.params.prompt).step_s for sample in samples))
        return [sample.latents for sample in samples]

    def advance(self, sample: Sample, prediction: Any) -> None:
        """Nothing changes but the count."""
        sample.step_index += 1

    def decode(self, samples: Sequence[Sample]) -> list[Picture]:
        """Noise of the seed, put into the hole."""
        return [self._paint(sample) for sample in samples]

    def device_time_s(self) -> float:
        return time.perf_counter()

    def release_memory(self) -> None:
        """Nothing is kept."""

    def _paint(self, sample: Sample) -> Picture:
        strike(sample.params.prompt, Stage.DECODED)
        is_unrepeatable = Script.parse(sample.params.prompt).unrepeatable
        seed = [sample.seed, time.monotonic_ns() if is_unrepeatable else 0]
        shape = sample.canvas.init_image.shape
        generated = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        return Picture(sample.seed, sample.canvas.put_back(generated), generated)


class ScriptedWorker(Worker):
    """The worker's own loop around `ScriptedPipeline`."""

    def _open_models(self) -> Residency:
        hung = Path(os.environ[FOLDER_VARIABLE]) / HUNG_LOAD
        if hung.exists():
            self.report("loading", "model weights")
            hung.unlink()
            threading.Event().wait()
        return Residency.of(self.settings.model, ScriptedPipeline())

    def _describe_model(self, job: Job) -> Model:
        return Model("scripted", None, "cpu", "float32")


class ScriptedStore(JobStore):
    """The real store; strikes around its commits, and writes down which finish was the first."""

    def claim(self, *arguments: Any, **named: Any) -> list[Job]:
        """As the base class."""
        claimed = super().claim(*arguments, **named)
        for job in claimed:
            ScriptedStorage.prompts[job.file_prefix] = job.params.prompt
            strike(job.params.prompt, Stage.CLAIMED)
        return claimed

    def finish(self, job: Job, *arguments: Any, **named: Any) -> bool:
        """As the base class."""
        strike(job.params.prompt, Stage.STORED)
        is_ours = super().finish(job, *arguments, **named)
        strike(job.params.prompt, Stage.COMMITTED)
        note = {
            "job_id": job.id,
            "is_ours": is_ours,
            "digest": ScriptedStorage.digests.get(job.file_prefix),
        }
        with (Path(os.environ[FOLDER_VARIABLE]) / LEDGER).open("a") as ledger:
            ledger.write(json.dumps(note) + "\n")
        return is_ours


class ScriptedStorage(Storage):
    """The real file store; strikes before the first file of a job.

    prompts, digests: by the file prefix, which is all that a key tells of its job.
    """

    prompts: dict[str, str] = {}
    digests: dict[str, str] = {}

    def put(self, key: str, content: bytes) -> None:
        """As the base class."""
        name = Path(key).name
        prefix = name[:36]
        strike(self.prompts.get(prefix, ""), Stage.BEFORE_STORE)
        super().put(key, content)
        if name.startswith(f"{prefix}-0"):
            self.digests[prefix] = hashlib.sha256(content).hexdigest()


def run() -> int:
    """Our worker's command, with the four parts above in the places of their own."""
    for name, part in (
        ("Worker", ScriptedWorker),
        ("JobStore", ScriptedStore),
        ("Storage", ScriptedStorage),
    ):
        setattr(server.worker, name, part)
    return main(["worker", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run())

"""A pipeline without weights, whose verbs do what the job's prompt asks for."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from models.acceleration.transfers import HostMark
from models.diffusion.pipeline import InpaintPipeline, Picture, Queued, Sample, Unchecked
from models.errors import DeviceLost, OutOfMemory, UnusablePicture
from models.imaging.canvas import Canvas
from models.params import InpaintParams
from tests.chaos.scripts import FaultKind, Script, Stage


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

    def prepare_together(
        self, jobs: Sequence[tuple[InpaintParams, Canvas]]
    ) -> list[Queued[list[Sample]]]:
        """Samples of the right shapes, of as many steps as were asked for."""
        return [Queued(HostMark(), partial(self._samples, *job)) for job in jobs]

    def _samples(self, params: InpaintParams, canvas: Canvas) -> list[Sample]:
        strike(params.prompt, Stage.PREPARED)
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

    def decode_together(self, samples: Sequence[Sample]) -> list[Queued[Picture | Unchecked]]:
        """Noise of the seed, put into the hole."""
        return [Queued(HostMark(), partial(self._paint, sample)) for sample in samples]

    def mark(self) -> Queued[None]:
        """There is no queue."""
        return Queued(HostMark(), lambda: None)

    def release_memory(self) -> None:
        """Nothing is kept."""

    def _paint(self, sample: Sample) -> Picture:
        strike(sample.params.prompt, Stage.DECODED)
        is_unrepeatable = Script.parse(sample.params.prompt).unrepeatable
        seed = [sample.seed, time.monotonic_ns() if is_unrepeatable else 0]
        shape = sample.canvas.init_image.shape
        generated = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        return Picture(sample.seed, sample.canvas.put_back(generated), generated)

"""A worker whose model returns the init image: all that is left is the host's work.

`python -m benchmarks.noop_worker --data-dir DIR`
"""

import argparse
import signal
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from models.acceleration.transfers import HostMark
from models.diffusion.pipeline import InpaintPipeline, Picture, Queued, Sample, Unchecked
from models.imaging.canvas import Canvas
from models.model_pool import ModelPool
from models.params import InpaintParams
from models.variants import ModelVariant
from server.core.logs import configure_logging
from server.core.settings import load_settings
from server.jobs.store import JobStore
from server.storage.database import open_engine
from server.storage.files import Storage
from server.worker.loop import Worker

SCHEDULER = DDIMScheduler()


class NoopPipeline(InpaintPipeline):
    """The verbs of the real one without weights; pictures are still pasted back."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._safety = None

    def prepare_together(
        self, jobs: Sequence[tuple[InpaintParams, Canvas]]
    ) -> list[Queued[list[Sample]]]:
        """Samples of the right shapes and of one step."""
        return [Queued(HostMark(), partial(self._samples, *job)) for job in jobs]

    def _samples(self, params: InpaintParams, canvas: Canvas) -> list[Sample]:
        latents = torch.zeros(1, 4, params.height // 8, params.width // 8)
        return [
            Sample(
                params=params,
                canvas=canvas,
                seed=params.sample_seed(index),
                scheduler=SCHEDULER,
                step_arguments={},
                timesteps=[torch.tensor(0)],
                conditioning=torch.zeros(2, 77, 1),
                added_conditions={},
                latents=latents,
                noise=latents,
                mask=latents[:, :1],
                strengths=latents[:, :1],
                masked_image_latents=latents,
                image_latents=None,
            )
            for index in range(params.samples)
        ]

    def denoise_step(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Nothing is predicted."""
        return [sample.latents for sample in samples]

    def advance(self, sample: Sample, prediction: torch.Tensor) -> None:
        """Nothing changes but the count."""
        sample.step_index += 1

    def decode_together(self, samples: Sequence[Sample]) -> list[Queued[Picture | Unchecked]]:
        """The init image, put together with itself as any picture is."""
        return [Queued(HostMark(), partial(self._paste, sample)) for sample in samples]

    def _paste(self, sample: Sample) -> Picture:
        generated = sample.canvas.init_image
        return Picture(sample.seed, sample.canvas.put_back(generated), generated)


class NoopWorker(Worker):
    """The worker's own loop around `NoopPipeline`."""

    def _open_models(self) -> ModelPool:
        return ModelPool.of(ModelVariant(self.settings.model), NoopPipeline())


def main() -> None:
    """Work until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    settings = load_settings(data_dir=parser.parse_args().data_dir)
    configure_logging()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    store = JobStore(open_engine(settings.sqlalchemy_url))
    NoopWorker("noop", "cpu", settings, store, Storage(settings.storage_url), stopping).run()


if __name__ == "__main__":
    main()

"""`inpaint-server worker` whose engine only waits: a picture takes as long as its prompt says.

`python -m benchmarks.scripted_worker --worker-id ID --data-dir DIR`. Loop, engine, stores and
pictures are the worker's own; torch is not imported, so that eight of them start on two cores.
"""

from tests.chaos.backend import ScriptedWorker  # first: it puts the stand-ins for torch in place

# isort: split

import sys
import time
from collections.abc import Sequence
from typing import Any

import server.worker.loop
from models.diffusion.pipeline import Sample
from models.model_pool import ModelPool
from models.variants import ModelVariant
from server.cli.main import main
from tests.chaos.pipeline import ScriptedPipeline
from tests.chaos.scripts import Script


class OneByOne(ScriptedPipeline):
    """A device that gains nothing by batches, so that its throughput is known."""

    def denoise_step(self, samples: Sequence[Sample]) -> list[Any]:
        """Takes the time of one step after the other."""
        time.sleep(sum(Script.parse(sample.params.prompt).step_s for sample in samples))
        return [sample.latents for sample in samples]


class TimedWorker(ScriptedWorker):
    """The worker's own loop around `OneByOne`."""

    def _open_models(self) -> ModelPool:
        return ModelPool.of(ModelVariant(self.settings.model), OneByOne())


if __name__ == "__main__":
    # `setattr`, because mypy holds a class of a module to be final.
    setattr(server.worker.loop, "Worker", TimedWorker)  # noqa: B010
    sys.exit(main(["worker", *sys.argv[1:]]))

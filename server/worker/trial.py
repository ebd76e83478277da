"""`python -m server.worker.trial DEVICE`: makes one picture with the built-in model, for `doctor`.

It uses no database, no data folder and no network. The result is a JSON object on standard output.
"""

import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from models.acceleration.fusion import why_no_kernels
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import load_components
from models.diffusion.pipeline import InpaintPipeline, Source
from models.engine import Failed, Finished, Generation, InpaintEngine
from models.errors import EngineError
from models.model_pool import ModelPool
from models.params import InpaintParams
from models.variants import ModelVariant
from server.worker.checkpoints import pick_device, pick_dtype

MODEL = ModelVariant("builtin")
SIDE, STEPS = 512, 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the seconds of the load and of the picture. Returns 1 with the reason if it fails."""
    (device,) = sys.argv[1:] if arguments is None else arguments
    try:
        answer = make_picture(device)
    except (EngineError, RuntimeError, AssertionError) as error:  # torch raises the last two
        answer = {"error": str(error).partition("\n")[0] or type(error).__name__}
    print(json.dumps(answer))  # noqa: T201 - the program's output
    return 1 if "error" in answer else 0


def make_picture(device_name: str) -> dict[str, object]:
    """Load the model and repaint the middle of a grey picture. Raises: EngineError, torch's own."""
    device = pick_device(device_name)
    started = time.perf_counter()
    components = load_components(ModelSpec(MODEL.model, MODEL.model), device, pick_dtype(device))
    loaded = time.perf_counter()
    engine = InpaintEngine(ModelPool.of(MODEL, InpaintPipeline(components)))
    run(engine)
    ended = time.perf_counter()
    return {
        "device": str(device),
        "load_s": round(loaded - started, 2),
        "picture_s": round(ended - loaded, 2),
        "kernels_problem": why_no_kernels(device) if device.type == "cuda" else None,
    }


def run(engine: InpaintEngine) -> None:
    """Run one generation to its end. Raises: the error of a failed one."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = 255
    source = Source(np.full((SIDE, SIDE, 3), 128, np.uint8), mask)
    params = InpaintParams(
        prompt="a red circle", seed=1, width=SIDE, height=SIDE, num_inference_steps=STEPS
    )
    engine.add(Generation(1, MODEL, params, source))
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return


if __name__ == "__main__":
    sys.exit(main())

"""The whole engine on a simulated device, which never runs out of work between two pieces."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoints.families import Family
from models.checkpoints.registry import Components, ModelSpec, load_components
from models.diffusion.pipeline import InpaintPipeline
from models.engine import EngineLimits, Event, Failed, Finished, InpaintEngine, Progress
from models.model_pool import ModelPool
from tests.support.engines import MODEL, make_generation, pictures_of, run_all
from tests.support.executors import HeldBack
from tests.support.paper_device import PaperDevice, move_to_paper
from tests.support.pipelines import difference
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
LIMITS = EngineLimits(max_generations=3, first_rows=8, first_pictures=4)


class Awake(HeldBack):
    """Another thread, which gets its turn between two steps, and does not sleep until the device
    has come to a mark: what is submitted behind such a call would have to wait as long."""

    def __init__(self, device: PaperDevice) -> None:
        super().__init__()
        self._device = device

    def run(self) -> None:
        reached = self._device.reached
        super().run()
        assert self._device.reached == reached


def on_paper(components: Components) -> Components:
    modules = {name: copy.deepcopy(getattr(components, name)) for name in MODULES}
    moved: dict[str, Any] = {
        name: module and move_to_paper(module) for name, module in modules.items()
    }
    return dataclasses.replace(components, **moved)


def run_on_paper(
    components: Components, jobs: list[dict[str, Any]]
) -> tuple[list[Event], list[str]]:
    """The events of jobs that fill the engine until none is left, and the waits until then."""
    events: list[Event] = []
    waits: list[str] = []
    with PaperDevice() as paper:
        pipeline = InpaintPipeline(on_paper(components))
        background = Awake(paper)
        engine = InpaintEngine(ModelPool.of(MODEL, pipeline), LIMITS, background)
        paper.waits.clear()
        left = [make_generation(number, **job) for number, job in enumerate(jobs, start=1)]
        while not engine.is_idle or left:
            while left and engine.free_places:
                engine.add(left.pop(0))
            has_begun = any(isinstance(event, Progress) for event in events)
            before = len(paper.waits)
            events += engine.step()
            background.run()
            if has_begun and left:
                waits += paper.waits[before:]
    return events, waits


JOBS: list[dict[str, Any]] = [
    {"num_inference_steps": 2},
    {"prompt": "a (blue:1.3) star", "num_inference_steps": 4},
    {"strength": 0.6, "prompt": "many words " * 60, "soft_mask": True},
    {"guidance_scale": 1.0, "samples": 2, "num_inference_steps": 2},
    {"clip_skip": 1, "num_inference_steps": 6},
]


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_nothing_waits_while_generations_come_and_go(tmp_path: Path, family: Family) -> None:
    """The pictures are those of the CPU, although every result is late."""
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9, family)
    components = load_components(ModelSpec("tiny", str(folder)), torch.device("cpu"), torch.float32)

    events, waits = run_on_paper(components, JOBS)

    assert waits == []
    ends = {event.generation_id: event for event in events if isinstance(event, Finished | Failed)}
    plain = InpaintEngine(
        ModelPool.of(MODEL, InpaintPipeline(components)),
        dataclasses.replace(LIMITS, max_generations=99),
    )
    expected = run_all(plain, *(make_generation(n, **job) for n, job in enumerate(JOBS, start=1)))
    for number, end in expected.items():
        for ours, theirs in zip(pictures_of(ends[number]), pictures_of(end), strict=True):
            assert ours.seed == theirs.seed
            assert difference(ours.generated, theirs.generated).max() <= 2
            assert np.count_nonzero(difference(ours.image, theirs.image) > 1) <= 20

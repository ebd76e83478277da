"""The whole engine on a simulated device, which never runs out of work between two pieces."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.families import Family
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline, Picture
from models.engine import EngineLimits, Event, Failed, Finished, InpaintEngine, Progress
from models.model_pool import ModelPool
from tests.support.checkers import cosines, processor, tiny_checker
from tests.support.engines import MODEL, make_generation, pictures_of, run_all
from tests.support.executors import HeldBack
from tests.support.paper_device import PaperDevice, move_to_paper
from tests.support.pipelines import difference
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

MODULES = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")
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
    {"strength": 0.6, "prompt": "many words " * 60, "soft_mask": True, "safety_check": False},
    {"guidance_scale": 1.0, "samples": 2, "num_inference_steps": 2},
    {"clip_skip": 1, "num_inference_steps": 6},
]


def run_plainly(components: Components) -> dict[int, tuple[Picture, ...]]:
    """The pictures of the jobs, made on the CPU."""
    limits = dataclasses.replace(LIMITS, max_generations=99)
    engine = InpaintEngine(ModelPool.of(MODEL, InpaintPipeline(components)), limits)
    ends = run_all(engine, *(make_generation(n, **job) for n, job in enumerate(JOBS, start=1)))
    return {number: pictures_of(end) for number, end in ends.items()}


def with_checker(components: Components) -> Components:
    """A checker that flags some of the pictures of the jobs, and none that is hardly flagged."""
    checker = tiny_checker(0)
    checker.concept_embeds_weights.data.fill_(2)
    checker.special_care_embeds_weights.data.fill_(2)
    checked = dataclasses.replace(components, safety_checker=checker, feature_extractor=processor())
    made = [each.image for pictures in run_plainly(checked).values() for each in pictures]
    scores = cosines(checker, made)[0][:, 0].sort().values
    widest = int(scores.diff().argmax())
    checker.concept_embeds_weights.data[0] = scores[widest : widest + 2].mean()
    return checked


@pytest.mark.parametrize("family", [Family.SD15, Family.SDXL])
def test_nothing_waits_while_generations_come_and_go(tmp_path: Path, family: Family) -> None:
    """The pictures and verdicts are those of the CPU, although every result is late."""
    folder = save_tiny_checkpoint(tmp_path / "tiny", 9, family)
    spec = ModelSpec("tiny", str(folder))
    components = with_checker(load_components(spec, torch.device("cpu"), torch.float32))

    events, waits = run_on_paper(components, JOBS)

    assert waits == []
    ends = {event.generation_id: event for event in events if isinstance(event, Finished | Failed)}
    flags = set()
    for number, pictures in run_plainly(components).items():
        for ours, theirs in zip(pictures_of(ends[number]), pictures, strict=True):
            assert (ours.seed, ours.is_flagged) == (theirs.seed, theirs.is_flagged)
            assert difference(ours.generated, theirs.generated).max() <= 2
            assert np.count_nonzero(difference(ours.image, theirs.image) > 1) <= 20
            flags.add(ours.is_flagged)
    assert flags == {True, False, None}

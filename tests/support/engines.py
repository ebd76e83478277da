"""Generations of an engine, run to their ends."""

from typing import Any

from models.diffusion.pipeline import Picture
from models.engine import Event, Failed, Finished, Generation, InpaintEngine, Progress
from models.variants import ModelVariant
from tests.support.pipelines import SOURCE, make_params

MODEL = ModelVariant("tiny")


def make_generation(generation_id: int, model: ModelVariant = MODEL, **changes: Any) -> Generation:
    """Of its own seeds."""
    params = make_params(seed=10 * generation_id, **changes)
    return Generation(generation_id, model, params, SOURCE)


def drain(engine: InpaintEngine) -> list[Event]:
    """Every event until the engine is idle."""
    events: list[Event] = []
    for _ in range(10_000):
        if engine.is_idle:
            return events
        events += engine.step()
    raise AssertionError("the engine never becomes idle")


def run_all(engine: InpaintEngine, *generations: Generation) -> dict[int, Finished | Failed]:
    """The end of each generation."""
    for generation in generations:
        engine.add(generation)
    return {
        event.generation_id: event for event in drain(engine) if not isinstance(event, Progress)
    }


def pictures_of(end: Finished | Failed) -> tuple[Picture, ...]:
    assert isinstance(end, Finished), end
    return end.pictures


def error_of(end: Finished | Failed) -> Exception:
    assert isinstance(end, Failed), end
    return end.error

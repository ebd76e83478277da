"""Several checkpoints under one budget: who is loaded, who leaves, and who must not."""

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import Components, load_components
from models.diffusion.pipeline import InpaintPipeline
from models.engine import EngineLimits, Event, Failed, Finished, InpaintEngine, Progress
from models.errors import ModelUnavailable
from models.model_pool import MAX_VARIANTS, ModelPool, Readiness
from tests.support.engines import drain, error_of, make_generation, pictures_of, run_all
from tests.support.pipelines import generated, make_params
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints: an inpainting one, and an ordinary one that is a little smaller."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "inpaint": save_tiny_checkpoint(folder / "a", 9),
        "ordinary": save_tiny_checkpoint(folder / "b", 4),
    }


@dataclass
class Reading:
    """Reads the checkpoints; notes in which order, and waits where it is told to.

    placed: the pipelines made of them, as long as somebody else holds them.
    """

    folders: dict[str, Path]
    loads: list[str] = field(default_factory=list)
    placed: dict[str, weakref.ref[InpaintPipeline]] = field(default_factory=dict)
    may_read: threading.Event = field(default_factory=threading.Event)

    def load(self, model: str) -> Components:
        assert self.may_read.wait(60)
        self.loads.append(model)
        if model not in self.folders:
            raise ModelUnavailable(f"no model {model!r}")
        return load_components(ModelSpec(model, str(self.folders[model])), CPU, torch.float32)

    def place(self, components: Components) -> InpaintPipeline:
        pipeline = InpaintPipeline(components)
        self.placed[self.loads[-1]] = weakref.ref(pipeline)
        return pipeline


@pytest.fixture
def reading(folders: dict[str, Path]) -> Reading:
    reading = Reading(folders)
    reading.may_read.set()
    return reading


@pytest.fixture
def fits_one(reading: Reading) -> Iterator[ModelPool]:
    """A budget for either of the two, but not for both."""
    size_bytes = reading.load("inpaint").size_bytes
    reading.loads.clear()
    models = ModelPool(reading.load, reading.place, budget_bytes=size_bytes + 1)
    yield models
    models.close()


def run_engine(models: ModelPool, names: Sequence[str]) -> list[Event]:
    """The events of a generation of each of these models, in one engine."""
    engine = InpaintEngine(models, EngineLimits(max_generations=8))
    for number, name in enumerate(names, start=1):
        engine.add(make_generation(number, name, num_inference_steps=2))
    return drain_slowly(engine, models)


def drain_slowly(engine: InpaintEngine, models: ModelPool) -> list[Event]:
    """Every event; where only loading is left to wait for, it is waited for."""
    events: list[Event] = []
    for _ in range(1000):
        if engine.is_idle:
            return events
        events += engine.step()
        if engine.is_resting:
            for loading in [*models._loading.values()]:
                loading.exception(60)
    raise AssertionError("the engine never becomes idle")


def test_size_is_that_of_the_parameters(reading: Reading) -> None:
    components = reading.load("inpaint")
    parts = (components.unet, components.vae, components.text_encoder)
    numbers = sum(each.numel() for part in parts for each in part.parameters())

    assert components.size_bytes >= 4 * numbers
    assert components.size_bytes < 4 * numbers * 1.1, "buffers are few"


def test_model_is_read_beside_other_work(fits_one: ModelPool, reading: Reading) -> None:
    reading.may_read.clear()
    assert fits_one.request("inpaint") is Readiness.LOADING
    assert fits_one.request("inpaint") is Readiness.LOADING
    reading.may_read.set()

    assert fits_one.wait_for("inpaint") is fits_one.pipeline("inpaint")
    assert reading.loads == ["inpaint"]


def test_model_asked_for_longest_ago_makes_room(fits_one: ModelPool, reading: Reading) -> None:
    fits_one.wait_for("inpaint")
    fits_one.wait_for("ordinary")
    gc.collect()

    assert fits_one.resident == ["ordinary"]
    assert reading.placed["inpaint"]() is None, "its memory is free"
    fits_one.wait_for("inpaint")
    assert reading.loads == ["inpaint", "ordinary", "inpaint"]


def test_least_recent_of_several_leaves(reading: Reading) -> None:
    reading.folders = reading.folders | {"third": reading.folders["ordinary"]}
    size_bytes = reading.load("inpaint").size_bytes
    models = ModelPool(reading.load, reading.place, budget_bytes=2 * size_bytes + 1)
    for model in ("inpaint", "ordinary", "inpaint", "third"):
        models.wait_for(model)

    assert models.resident == ["inpaint", "third"]
    models.close()


def test_model_in_use_stays(fits_one: ModelPool) -> None:
    fits_one.wait_for("inpaint")
    fits_one.request("ordinary")
    fits_one._loading["ordinary"].exception(60)

    assert fits_one.request("ordinary", {"inpaint"}) is Readiness.CROWDED
    assert fits_one.resident == ["inpaint"]
    assert fits_one.request("ordinary") is Readiness.READY


def test_model_larger_than_the_budget_is_refused(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place, budget_bytes=1000)
    with pytest.raises(ModelUnavailable, match="GB"):
        models.wait_for("inpaint")
    models.close()


def test_failed_load_is_tried_again(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match="no model"):
            models.wait_for("missing")
    reading.folders = reading.folders | {"missing": reading.folders["inpaint"]}
    models.wait_for("missing")
    assert reading.loads == ["missing"] * 3
    models.close()


def test_jobs_of_two_models_take_turns_where_one_fits(
    fits_one: ModelPool, reading: Reading
) -> None:
    events = run_engine(fits_one, ["inpaint", "ordinary", "inpaint"])
    ends = {each.generation_id: each for each in events if isinstance(each, Finished | Failed)}

    for number, name in enumerate(["inpaint", "ordinary", "inpaint"], start=1):
        (picture,) = pictures_of(ends[number])
        alone = InpaintPipeline(reading.load(name))
        expected = generated(alone, make_params(seed=10 * number, num_inference_steps=2))
        np.testing.assert_allclose(picture.generated.astype(int), expected.astype(int), atol=2)


def test_both_models_run_side_by_side_where_they_fit(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    run_engine(models, ["inpaint", "ordinary", "inpaint", "ordinary"])

    assert sorted(reading.loads) == ["inpaint", "ordinary"]
    assert sorted(models.resident) == ["inpaint", "ordinary"]
    models.close()


def test_running_model_is_not_starved_of_and_does_not_starve(
    fits_one: ModelPool, reading: Reading
) -> None:
    """One that waits for room keeps those behind it from taking the room again and again."""
    fits_one.wait_for("inpaint")
    engine = InpaintEngine(fits_one, EngineLimits(max_generations=9))
    engine.add(make_generation(1, "inpaint", num_inference_steps=4))
    engine.step()
    engine.add(make_generation(2, "ordinary", num_inference_steps=1))
    fits_one.request("ordinary", {"inpaint"})
    fits_one._loading["ordinary"].exception(60)
    for number in range(3, 8):
        engine.add(make_generation(number, "inpaint", num_inference_steps=4))
    ends = [
        event.generation_id
        for event in drain_slowly(engine, fits_one)
        if isinstance(event, Finished)
    ]

    assert ends[:2] == [1, 2]
    assert sorted(ends) == [*range(1, 8)]


def test_job_of_a_model_that_cannot_be_loaded_fails_alone(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    events = run_engine(models, ["inpaint", "missing"])
    ends = {each.generation_id: each for each in events if isinstance(each, Finished | Failed)}

    assert pictures_of(ends[1])
    assert isinstance(error_of(ends[2]), ModelUnavailable)
    models.close()


def test_engine_rests_while_a_model_is_read(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    engine = InpaintEngine(models)
    reading.may_read.clear()
    engine.add(make_generation(1, "inpaint", num_inference_steps=1))

    assert engine.step() == []
    assert engine.is_resting
    assert not engine.is_idle
    reading.may_read.set()
    assert isinstance(drain_slowly(engine, models)[-1], Finished)
    models.close()


def test_only_model_of_a_fixed_room_is_served(tiny_pipeline: InpaintPipeline) -> None:
    engine = InpaintEngine(ModelPool.of("only", tiny_pipeline))
    ends = run_all(engine, make_generation(1, "only", num_inference_steps=1))
    assert pictures_of(ends[1])
    engine.add(make_generation(2, "other"))
    assert isinstance(drain_slowly(engine, engine.models)[-1], Failed)
    assert drain(engine) == []


def test_model_that_finds_no_memory_at_first_is_placed_once_more(reading: Reading) -> None:
    attempts: list[Components] = []

    def place(components: Components) -> InpaintPipeline:
        attempts.append(components)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("full")
        return reading.place(components)

    models = ModelPool(reading.load, place)
    try:
        assert isinstance(models.wait_for("inpaint"), InpaintPipeline)
    finally:
        models.close()
    assert len(attempts) == 2


@pytest.fixture
def variants(reading: Reading) -> Iterator[ModelPool]:
    """A pool without a budget, where names that begin with "v" are variants."""
    names = [f"v{number}" for number in range(9)]
    reading.folders = reading.folders | dict.fromkeys(names, reading.folders["ordinary"])
    models = ModelPool(reading.load, reading.place, is_variant=lambda model: model[0] == "v")
    yield models
    # transformers cannot load in two threads at a time, so the next test waits for this one's.
    models._reader.shutdown(wait=True, cancel_futures=True)


def test_least_recent_variant_makes_place_and_other_models_stay(variants: ModelPool) -> None:
    variants.wait_for("inpaint")
    for number in (*range(MAX_VARIANTS), 0):
        variants.wait_for(f"v{number}")
    variants.wait_for("v8")

    assert variants.resident == ["inpaint", "v2", "v3", "v0", "v8"]


def test_variants_in_use_and_those_being_read_leave_no_place(
    variants: ModelPool, reading: Reading
) -> None:
    variants.wait_for("v0")
    reading.may_read.clear()
    for number in range(1, MAX_VARIANTS):
        assert variants.request(f"v{number}", {"v0"}) is Readiness.LOADING
    assert variants.request("v8", {"v0"}) is Readiness.CROWDED
    assert variants.request("inpaint", {"v0"}) is Readiness.LOADING, "no variant"
    assert variants.request("v8") is Readiness.LOADING, "v0 leaves"
    assert variants.resident == []
    reading.may_read.set()


def test_loads_that_nobody_waits_for_are_dropped(variants: ModelPool, reading: Reading) -> None:
    engine = InpaintEngine(variants)
    reading.may_read.clear()
    for number in range(MAX_VARIANTS):
        engine.add(make_generation(number, f"v{number}", num_inference_steps=1))
    engine.add(make_generation(8, "v8", num_inference_steps=1))
    assert engine.step() == []
    assert variants.request("v8") is Readiness.CROWDED
    for number in range(MAX_VARIANTS):
        engine.cancel(number)
    assert variants._loading == {}
    reading.may_read.set()
    (end,) = [each for each in drain_slowly(engine, variants) if not isinstance(each, Progress)]

    assert isinstance(end, Finished)
    assert variants.resident == ["v8"]

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
from models.params import Lora
from models.variants import ModelVariant
from tests.support.engines import drain, error_of, make_generation, pictures_of, run_all
from tests.support.pipelines import generated, make_params
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
INPAINT, ORDINARY, THIRD, MISSING = map(ModelVariant, ("inpaint", "ordinary", "third", "missing"))
WITH_INK = [ModelVariant("ordinary", (Lora("ink", number / 8),)) for number in range(9)]


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

    folders: by the model's own id; LoRAs are not read.
    placed: the pipelines made of them, as long as somebody else holds them.
    """

    folders: dict[str, Path]
    loads: list[ModelVariant] = field(default_factory=list)
    placed: dict[ModelVariant, weakref.ref[InpaintPipeline]] = field(default_factory=dict)
    may_read: threading.Event = field(default_factory=threading.Event)

    def load(self, model: ModelVariant) -> Components:
        assert self.may_read.wait(60)
        self.loads.append(model)
        if model.model not in self.folders:
            raise ModelUnavailable(f"no model {model}")
        spec = ModelSpec(model.model, str(self.folders[model.model]))
        return load_components(spec, CPU, torch.float32)

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
    size_bytes = reading.load(INPAINT).size_bytes
    reading.loads.clear()
    models = ModelPool(reading.load, reading.place, budget_bytes=size_bytes + 1)
    yield models
    models.close()


def run_engine(models: ModelPool, asked: Sequence[ModelVariant]) -> list[Event]:
    """The events of a generation of each of these models, in one engine."""
    engine = InpaintEngine(models, EngineLimits(max_generations=8))
    for number, model in enumerate(asked, start=1):
        engine.add(make_generation(number, model, num_inference_steps=2))
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
    components = reading.load(INPAINT)
    parts = (components.unet, components.vae, components.text_encoder)
    numbers = sum(each.numel() for part in parts for each in part.parameters())

    assert components.size_bytes >= 4 * numbers
    assert components.size_bytes < 4 * numbers * 1.1, "buffers are few"


def test_model_is_read_beside_other_work(fits_one: ModelPool, reading: Reading) -> None:
    reading.may_read.clear()
    assert fits_one.request(INPAINT) is Readiness.LOADING
    assert fits_one.request(INPAINT) is Readiness.LOADING
    reading.may_read.set()

    assert fits_one.wait_for(INPAINT) is fits_one.pipeline(INPAINT)
    assert reading.loads == [INPAINT]


def test_model_asked_for_longest_ago_makes_room(fits_one: ModelPool, reading: Reading) -> None:
    fits_one.wait_for(INPAINT)
    fits_one.wait_for(ORDINARY)
    gc.collect()

    assert fits_one.resident == [ORDINARY]
    assert reading.placed[INPAINT]() is None, "its memory is free"
    fits_one.wait_for(INPAINT)
    assert reading.loads == [INPAINT, ORDINARY, INPAINT]


def test_least_recent_of_several_leaves(reading: Reading) -> None:
    reading.folders = reading.folders | {"third": reading.folders["ordinary"]}
    size_bytes = reading.load(INPAINT).size_bytes
    models = ModelPool(reading.load, reading.place, budget_bytes=2 * size_bytes + 1)
    for model in (INPAINT, ORDINARY, INPAINT, THIRD):
        models.wait_for(model)

    assert models.resident == [INPAINT, THIRD]
    models.close()


def test_model_in_use_stays(fits_one: ModelPool) -> None:
    fits_one.wait_for(INPAINT)
    fits_one.request(ORDINARY)
    fits_one._loading[ORDINARY].exception(60)

    assert fits_one.request(ORDINARY, {INPAINT}) is Readiness.CROWDED
    assert fits_one.resident == [INPAINT]
    assert fits_one.request(ORDINARY) is Readiness.READY


def test_model_larger_than_the_budget_is_refused(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place, budget_bytes=1000)
    with pytest.raises(ModelUnavailable, match="GB"):
        models.wait_for(INPAINT)
    models.close()


def test_failed_load_is_tried_again(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match="no model"):
            models.wait_for(MISSING)
    reading.folders = reading.folders | {"missing": reading.folders["inpaint"]}
    models.wait_for(MISSING)
    assert reading.loads == [MISSING] * 3
    models.close()


def test_jobs_of_two_models_take_turns_where_one_fits(
    fits_one: ModelPool, reading: Reading
) -> None:
    events = run_engine(fits_one, [INPAINT, ORDINARY, INPAINT])
    ends = {each.generation_id: each for each in events if isinstance(each, Finished | Failed)}

    for number, model in enumerate([INPAINT, ORDINARY, INPAINT], start=1):
        (picture,) = pictures_of(ends[number])
        alone = InpaintPipeline(reading.load(model))
        expected = generated(alone, make_params(seed=10 * number, num_inference_steps=2))
        np.testing.assert_allclose(picture.generated.astype(int), expected.astype(int), atol=2)


def test_both_models_run_side_by_side_where_they_fit(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    run_engine(models, [INPAINT, ORDINARY, INPAINT, ORDINARY])

    assert sorted(reading.loads, key=str) == [INPAINT, ORDINARY]
    assert sorted(models.resident, key=str) == [INPAINT, ORDINARY]
    models.close()


def test_running_model_is_not_starved_of_and_does_not_starve(
    fits_one: ModelPool, reading: Reading
) -> None:
    """One that waits for room keeps those behind it from taking the room again and again."""
    fits_one.wait_for(INPAINT)
    engine = InpaintEngine(fits_one, EngineLimits(max_generations=9))
    engine.add(make_generation(1, INPAINT, num_inference_steps=4))
    engine.step()
    engine.add(make_generation(2, ORDINARY, num_inference_steps=1))
    fits_one.request(ORDINARY, {INPAINT})
    fits_one._loading[ORDINARY].exception(60)
    for number in range(3, 8):
        engine.add(make_generation(number, INPAINT, num_inference_steps=4))
    ends = [
        event.generation_id
        for event in drain_slowly(engine, fits_one)
        if isinstance(event, Finished)
    ]

    assert ends[:2] == [1, 2]
    assert sorted(ends) == [*range(1, 8)]


def test_job_of_a_model_that_cannot_be_loaded_fails_alone(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    events = run_engine(models, [INPAINT, MISSING])
    ends = {each.generation_id: each for each in events if isinstance(each, Finished | Failed)}

    assert pictures_of(ends[1])
    assert isinstance(error_of(ends[2]), ModelUnavailable)
    models.close()


def test_engine_rests_while_a_model_is_read(reading: Reading) -> None:
    models = ModelPool(reading.load, reading.place)
    engine = InpaintEngine(models)
    reading.may_read.clear()
    engine.add(make_generation(1, INPAINT, num_inference_steps=1))

    assert engine.step() == []
    assert engine.is_resting
    assert not engine.is_idle
    reading.may_read.set()
    assert isinstance(drain_slowly(engine, models)[-1], Finished)
    models.close()


def test_only_model_of_a_fixed_room_is_served(tiny_pipeline: InpaintPipeline) -> None:
    engine = InpaintEngine(ModelPool.of(ModelVariant("only"), tiny_pipeline))
    ends = run_all(engine, make_generation(1, ModelVariant("only"), num_inference_steps=1))
    assert pictures_of(ends[1])
    engine.add(make_generation(2, ModelVariant("other")))
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
        assert isinstance(models.wait_for(INPAINT), InpaintPipeline)
    finally:
        models.close()
    assert len(attempts) == 2


@pytest.fixture
def fits_all(reading: Reading) -> Iterator[ModelPool]:
    """A pool without a budget."""
    models = ModelPool(reading.load, reading.place)
    yield models
    # transformers cannot load in two threads at a time, so the next test waits for this one's.
    models._reader.shutdown(wait=True, cancel_futures=True)


def test_least_recent_variant_makes_place_and_other_models_stay(fits_all: ModelPool) -> None:
    fits_all.wait_for(INPAINT)
    for number in (*range(MAX_VARIANTS), 0):
        fits_all.wait_for(WITH_INK[number])
    fits_all.wait_for(WITH_INK[8])

    assert fits_all.resident == [INPAINT, WITH_INK[2], WITH_INK[3], WITH_INK[0], WITH_INK[8]]


def test_variants_in_use_and_those_being_read_leave_no_place(
    fits_all: ModelPool, reading: Reading
) -> None:
    fits_all.wait_for(WITH_INK[0])
    reading.may_read.clear()
    for number in range(1, MAX_VARIANTS):
        assert fits_all.request(WITH_INK[number], {WITH_INK[0]}) is Readiness.LOADING
    assert fits_all.request(WITH_INK[8], {WITH_INK[0]}) is Readiness.CROWDED
    assert fits_all.request(INPAINT, {WITH_INK[0]}) is Readiness.LOADING, "it has no LoRAs"
    assert fits_all.request(WITH_INK[8]) is Readiness.LOADING, "the first one leaves"
    assert fits_all.resident == []
    reading.may_read.set()


def test_loads_that_nobody_waits_for_are_dropped(fits_all: ModelPool, reading: Reading) -> None:
    engine = InpaintEngine(fits_all)
    reading.may_read.clear()
    for number in range(MAX_VARIANTS):
        engine.add(make_generation(number, WITH_INK[number], num_inference_steps=1))
    engine.add(make_generation(8, WITH_INK[8], num_inference_steps=1))
    assert engine.step() == []
    assert fits_all.request(WITH_INK[8]) is Readiness.CROWDED
    for number in range(MAX_VARIANTS):
        engine.cancel(number)
    assert fits_all._loading == {}
    reading.may_read.set()
    (end,) = [each for each in drain_slowly(engine, fits_all) if not isinstance(each, Progress)]

    assert isinstance(end, Finished)
    assert fits_all.resident == [WITH_INK[8]]

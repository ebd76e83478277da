"""Who runs next and who hears of it: every generation gets one end, and disturbs no other."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.acceleration.transfers import HostMark
from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline, Picture, Queued, Source, Unchecked
from models.engine import (
    EngineLimits,
    Event,
    Failed,
    Finished,
    Generation,
    InpaintEngine,
    Progress,
    StepTime,
)
from models.errors import DeviceLost, InvalidInput, OutOfMemory, UnusablePicture, Violation
from models.imaging.canvas import Canvas
from models.model_pool import ModelPool
from models.params import FlaggedAs, InpaintParams, SchedulerName
from tests.support.engines import MODEL, drain, error_of, make_generation, pictures_of, run_all
from tests.support.executors import HeldBack
from tests.support.pipelines import (
    SOURCE,
    UNetAnswer,
    difference,
    generated,
    make_params,
    make_source,
    reference,
    with_fault,
)

pytestmark = pytest.mark.slow

T = TypeVar("T")


@dataclass(slots=True)
class ToySample:
    """What the engine looks at in a sample; arrays for their shapes only."""

    params: InpaintParams
    seed: int
    total_steps: int
    latents: NDArray[np.uint8]
    conditioning: NDArray[np.uint8]
    step_index: int = 0

    @property
    def is_denoised(self) -> bool:
        return self.step_index >= self.total_steps

    @property
    def rows(self) -> int:
        return len(self.conditioning)


@dataclass(slots=True)
class ToyPipeline:
    """The verbs without tensors; verbs fail where they are told to.

    faults: (verb, seed) to what the verb raises for the sample of that seed.
    calls: the samples of each UNet call.
    prepared, decoded: how many jobs and pictures each call of these verbs was for.
    most_pictures: what memory suffices for in one call.
    call_s, row_s, picture_s: what a UNet call takes, each of its rows, and a picture's decoding.
    """

    faults: dict[tuple[str, int], Exception] = field(default_factory=dict)
    calls: list[list[ToySample]] = field(default_factory=list)
    prepared: list[int] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    most_pictures: int = 99
    call_s: float = 0.0
    row_s: float = 0.0
    picture_s: float = 0.0
    now_s: float = 0.0
    is_warm: bool = False

    def prepare_together(
        self, jobs: Sequence[tuple[InpaintParams, Canvas]]
    ) -> list[Queued[list[ToySample]]]:
        self.prepared.append(len(jobs))
        self._fail_for_many(len(jobs))
        return [self._queued(self._prepare(params), "prepared", params.seed) for params, _ in jobs]

    def _prepare(self, params: InpaintParams) -> list[ToySample]:
        self._fail_for("prepare", params.seed)
        tokens = 77 * (1 + len(params.prompt) // 75)
        return [
            ToySample(
                params,
                params.sample_seed(index),
                params.num_inference_steps,
                np.empty((1, 4, params.height // 8, params.width // 8), np.uint8),
                np.empty((1 if params.guidance_scale <= 1 else 2, tokens, 1), np.uint8),
            )
            for index in range(params.samples)
        ]

    def denoise_step(self, samples: Sequence[ToySample]) -> list[int]:
        self.calls.append([*samples])
        self.now_s += self.call_s + self.row_s * sum(sample.rows for sample in samples)
        for sample in samples:
            self._fail_for("denoise_step", sample.seed)
        return [sample.seed for sample in samples]

    def advance(self, sample: ToySample, prediction: int) -> None:
        assert prediction == sample.seed
        self._fail_for("advance", sample.seed)
        sample.step_index += 1

    def decode_together(self, samples: Sequence[ToySample]) -> list[Queued[Unchecked]]:
        self.decoded.append(len(samples))
        self._fail_for_many(len(samples))
        self.now_s += self.picture_s * len(samples) ** 0.9
        assert len({sample.latents.shape for sample in samples}) == 1
        for sample in samples:
            assert sample.is_denoised
            self._fail_for("decode", sample.seed)
        blank = np.zeros((1, 1, 3), np.uint8)
        return [
            self._queued(
                Unchecked(Picture(sample.seed, blank, blank), FlaggedAs.BLANK, torch.empty),
                "paste",
                sample.seed,
            )
            for sample in samples
        ]

    def check(self, unchecked: Unchecked) -> Queued[Picture]:
        picture = unchecked.picture
        self._fail_for("check", picture.seed)
        return self._queued(picture, "hide", picture.seed)

    def preview(self, sample: ToySample) -> NDArray[np.uint8] | None:
        self._fail_for("preview", sample.seed)
        return np.full((1, 1, 3), sample.seed, np.uint8) if sample.step_index else None

    def mark(self) -> Queued[None]:
        return Queued(HostMark(self.now_s), lambda: None)

    def warm_up(self) -> None:
        self.is_warm = True

    def usual_job(self) -> tuple[InpaintParams, Source]:
        return make_params(width=512, height=512, num_inference_steps=1), SOURCE

    def prepare(self, params: InpaintParams, source: Source) -> list[ToySample]:
        return self._prepare(params)

    def _queued(self, result: T, verb: str, seed: int) -> Queued[T]:
        def complete() -> T:
            self._fail_for(verb, seed)
            return result

        return Queued(HostMark(self.now_s), complete)

    def release_memory(self) -> None:
        """There is none."""

    def _fail_for_many(self, pictures: int) -> None:
        if pictures > self.most_pictures:
            raise OutOfMemory("full")

    def _fail_for(self, verb: str, seed: int) -> None:
        if (verb, seed) in self.faults:
            raise self.faults[verb, seed]


FAULTS: list[Callable[[], Exception]] = [
    lambda: InvalidInput([Violation("prompt", reason="is too long")]),
    lambda: OutOfMemory("full"),
    lambda: UnusablePicture("not finite"),
    lambda: ValueError("a bug"),
]
VERBS = "prepare prepared denoise_step advance decode paste check hide".split()
"""Also what the host makes of samples, and of pictures that are decoded or checked."""


def make_engine(
    pipeline: InpaintPipeline | ToyPipeline, samples_per_call: int = 1, max_generations: int = 4
) -> InpaintEngine:
    limits = EngineLimits(
        max_generations=max_generations,
        first_rows=2 * samples_per_call,
        max_rows=2 * samples_per_call,
        first_pictures=samples_per_call,
        is_reproducible=samples_per_call == 1,
    )
    return InpaintEngine(ModelPool.of(MODEL, cast(InpaintPipeline, pipeline)), limits)


# --- with the real pipeline ---------------------------------------------------------------------


@pytest.mark.parametrize("samples_per_call", [1, 2])
def test_events_come_in_order(tiny_pipeline: InpaintPipeline, samples_per_call: int) -> None:
    engine = make_engine(tiny_pipeline, samples_per_call)
    engine.add(make_generation(1, samples=2, num_inference_steps=3))
    *progress, end = drain(engine)

    assert progress[0] == Progress(1, step=0, total_steps=6)
    assert [each.step for each in progress if isinstance(each, Progress)] == [
        *range(0, 7, samples_per_call)
    ]
    assert isinstance(end, Finished)
    assert [picture.seed for picture in end.pictures] == [10, 11]


def test_pictures_are_the_pipelines(tiny_pipeline: InpaintPipeline) -> None:
    ends = run_all(
        make_engine(tiny_pipeline),
        make_generation(1, samples=2, scheduler=SchedulerName.EULER_ANCESTRAL),
        make_generation(2, strength=0.6),
    )

    for end in ends.values():
        for picture in pictures_of(end):
            changes: dict[str, Any] = (
                {"strength": 0.6}
                if end.generation_id == 2
                else {"scheduler": SchedulerName.EULER_ANCESTRAL}
            )
            alone = generated(tiny_pipeline, make_params(seed=picture.seed, **changes))
            np.testing.assert_array_equal(picture.generated, alone)


def test_shared_calls_change_no_picture(tiny_pipeline: InpaintPipeline) -> None:
    generations = [
        make_generation(1, num_inference_steps=5),
        make_generation(2, samples=2, scheduler=SchedulerName.EULER),
        make_generation(3, guidance_scale=1.0),
    ]
    alone = run_all(make_engine(tiny_pipeline), *generations)

    together = run_all(make_engine(tiny_pipeline, samples_per_call=4), *generations)

    assert_same_pictures(together, alone)


def assert_same_pictures(
    ours: dict[int, Finished | Failed], expected: dict[int, Finished | Failed]
) -> None:
    for generation_id, end in expected.items():
        pairs = zip(pictures_of(ours[generation_id]), pictures_of(end), strict=True)
        for picture, alone in pairs:
            assert picture.seed == alone.seed
            assert difference(picture.generated, alone.generated).max() <= 2


def test_previews_change_no_picture(tiny_pipeline: InpaintPipeline) -> None:
    generations = [make_generation(1, samples=2), make_generation(2, strength=0.6)]
    plain = run_all(make_engine(tiny_pipeline), *generations)
    engine = make_engine(tiny_pipeline)
    for generation in generations:
        engine.add(generation)
    ends: dict[int, Finished | Failed] = {}
    previews = 0
    for _ in range(10_000):
        if engine.is_idle:
            break
        events = engine.step()
        previews += sum(engine.preview(each.id) is not None for each in generations)
        ends |= {each.generation_id: each for each in events if not isinstance(each, Progress)}

    assert previews > 8
    for generation_id, end in plain.items():
        pairs = zip(pictures_of(ends[generation_id]), pictures_of(end), strict=True)
        for picture, expected in pairs:
            np.testing.assert_array_equal(picture.image, expected.image)


def test_sizer_tells_calls_apart_by_size_and_not_by_prompt() -> None:
    first, longer = make_generation(1), make_generation(2, prompt="many words " * 60)
    assert first.call_kind == longer.call_kind
    assert first.call_kind != make_generation(3, width=128).call_kind


def test_times_of_unet_calls_are_told_once() -> None:
    engine = make_engine(ToyPipeline(row_s=0.25), samples_per_call=2)
    run_all(engine, make_generation(1, samples=2, num_inference_steps=3, width=64, height=128))

    times = engine.take_step_times()

    assert times == 3 * [StepTime(pixels=64 * 128, rows=4, seconds=1.0)]
    assert engine.take_step_times() == []


@dataclass
class LateMark:
    """A mark that the device comes to when it is told."""

    at_s: float
    is_past: bool = False

    def wait(self) -> None:
        self.is_past = True

    def s_since(self, earlier: "LateMark") -> float:
        return self.at_s - earlier.at_s


class LatePipeline(ToyPipeline):
    """Its device is behind its host."""

    def mark(self) -> Queued[None]:
        return Queued(LateMark(self.now_s), lambda: None)


def test_calls_under_way_have_no_time_yet() -> None:
    engine = make_engine(LatePipeline(row_s=0.25))
    engine.add(make_generation(1, num_inference_steps=1))
    while not engine._timed_calls:
        engine.step()
    assert engine.take_step_times() == []
    engine._timed_calls[0].ended.result()
    assert [each.seconds for each in engine.take_step_times()] == [0.5]


CULPRIT_PROMPT = "poison"


def spoiled_by(culprit: torch.Tensor, error: Exception | None) -> UNetAnswer:
    """Raises when a call has a row of this conditioning; without an error such rows become NaN."""

    def answer(real: Callable[[], torch.Tensor], conditioning: torch.Tensor) -> torch.Tensor:
        # Not to the last bit: it may have been encoded together with other texts.
        is_culprit = torch.isclose(conditioning, culprit, atol=1e-4).all(dim=(1, 2))
        if error is not None and is_culprit.any():
            raise error
        predictions = real()
        predictions[is_culprit] = torch.nan
        return predictions

    return answer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("full"), OutOfMemory),
        (ValueError("a bug"), ValueError),
        (None, UnusablePicture),
    ],
    ids=["out of memory", "bug", "not finite"],
)
def test_culprit_alone_fails(
    tiny_components: Components,
    tiny_pipeline: InpaintPipeline,
    error: Exception | None,
    expected: type[Exception],
) -> None:
    bystanders = [make_generation(1), make_generation(3, samples=2)]
    culprit = make_generation(2, prompt=CULPRIT_PROMPT, guidance_scale=1.0)
    alone = run_all(make_engine(tiny_pipeline), *bystanders)
    (sample,) = tiny_pipeline.prepare(culprit.params, SOURCE)
    pipeline = with_fault(tiny_components, spoiled_by(sample.conditioning, error))
    engine = make_engine(pipeline, samples_per_call=4)

    ends = run_all(engine, bystanders[0], culprit, bystanders[1])

    assert isinstance(error_of(ends[2]), expected)
    assert_same_pictures(ends, alone)


def test_call_too_large_for_memory_is_done_in_parts(
    tiny_components: Components, tiny_pipeline: InpaintPipeline
) -> None:
    def answer(real: Callable[[], torch.Tensor], conditioning: torch.Tensor) -> torch.Tensor:
        if len(conditioning) > 2:
            raise torch.OutOfMemoryError("full")
        return real()

    generations = [make_generation(1, samples=2), make_generation(2)]
    alone = run_all(make_engine(tiny_pipeline), *generations)
    engine = make_engine(with_fault(tiny_components, answer), samples_per_call=4)

    assert_same_pictures(run_all(engine, *generations), alone)


@pytest.mark.parametrize("samples_per_call", [1, 4])
def test_lost_device_ends_the_engine_at_once(
    tiny_components: Components, samples_per_call: int
) -> None:
    calls = itertools.count()

    def answer(real: Callable[[], torch.Tensor], conditioning: torch.Tensor) -> torch.Tensor:
        next(calls)
        raise torch.AcceleratorError("an illegal memory access")

    engine = make_engine(with_fault(tiny_components, answer), samples_per_call)
    engine.add(make_generation(1))
    engine.add(make_generation(2))

    with pytest.raises(DeviceLost):
        drain(engine)
    assert next(calls) == 1  # no retry


def test_sizes_do_not_mix(tiny_pipeline: InpaintPipeline) -> None:
    large = replace(make_generation(1, width=136, height=64), source=make_source(136, 64))
    ends = run_all(make_engine(tiny_pipeline, samples_per_call=4), large, make_generation(2))

    assert pictures_of(ends[1])[0].image.shape == (64, 136, 3)
    assert pictures_of(ends[2])[0].image.shape == (64, 72, 3)


JOBS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["a red circle", "a (blue:1.3) star", "many words " * 10]),
        "guidance_scale": st.sampled_from([1.0, 5.0]),
        "strength": st.sampled_from([0.6, 1.0]),
        "scheduler": st.sampled_from(
            [None, SchedulerName.EULER_ANCESTRAL, SchedulerName.DPM_MULTISTEP]
        ),
        "width": st.sampled_from([72, 136]),
        "num_inference_steps": st.integers(1, 3),
        "samples": st.integers(1, 2),
    }
)
ARRIVALS = st.lists(st.tuples(JOBS, st.integers(0, 4), st.booleans()), min_size=2, max_size=5)
"""Jobs, how many turns of the engine pass before the next comes, and who is then cancelled."""


@pytest.fixture(scope="module")
def paint_alone(tiny_components: Components) -> Callable[[InpaintParams], NDArray[np.uint8]]:
    """One sample without neighbours; remembered, as many examples ask for the same."""
    pipeline = InpaintPipeline(tiny_components)
    return functools.cache(
        lambda params: generated(pipeline, params, make_source(params.width, params.height))
    )


@settings(max_examples=6)
@given(arrivals=ARRIVALS)
@pytest.mark.parametrize("is_reproducible", [True, False], ids=["reproducible", "shared"])
def test_picture_does_not_depend_on_what_else_runs(
    tiny_components: Components,
    paint_alone: Callable[[InpaintParams], NDArray[np.uint8]],
    is_reproducible: bool,
    arrivals: list[tuple[dict[str, Any], int, bool]],
) -> None:
    limits = EngineLimits(first_rows=8, first_pictures=4, is_reproducible=is_reproducible)
    engine = InpaintEngine(ModelPool.of(MODEL, InpaintPipeline(tiny_components)), limits)
    events: list[Event] = []
    jobs: dict[int, InpaintParams] = {}
    for number, (changes, turns, is_cancelled) in enumerate(arrivals):
        params = make_params(**{**changes, "seed": number % 2})
        jobs[number] = params
        engine.add(Generation(number, MODEL, params, make_source(params.width, params.height)))
        for _ in range(turns):
            events += engine.step()
        if is_cancelled:
            engine.cancel(number)
    events += drain(engine)

    for end in (event for event in events if not isinstance(event, Progress)):
        for picture in pictures_of(end):
            one = replace(jobs[end.generation_id], samples=1, seed=picture.seed)
            apart = difference(picture.generated, paint_alone(one))
            assert apart.max() <= (0 if is_reproducible else 2)
            assert np.count_nonzero(apart > 1) <= apart.size / 1000


def test_pictures_made_together_are_those_of_diffusers(tiny_components: Components) -> None:
    jobs = [
        make_params(seed=3, num_inference_steps=5),
        make_params(seed=4, scheduler=SchedulerName.EULER_ANCESTRAL, guidance_scale=1.0),
        make_params(seed=5, scheduler=SchedulerName.DPM_MULTISTEP, strength=0.6, prompt="a star"),
        make_params(seed=6, scheduler=SchedulerName.LCM, num_inference_steps=3),
    ]
    pipeline = InpaintPipeline(tiny_components)
    engine = InpaintEngine(
        ModelPool.of(MODEL, pipeline), EngineLimits(first_rows=8, first_pictures=4)
    )

    ends = run_all(engine, *(Generation(n, MODEL, job, SOURCE) for n, job in enumerate(jobs)))

    for number, params in enumerate(jobs):
        (picture,) = pictures_of(ends[number])
        apart = difference(picture.generated, reference(tiny_components, params))
        assert apart.max() <= 2
        assert np.count_nonzero(apart > 1) <= apart.size / 1000


# --- policy, with the toy -----------------------------------------------------------------------


def test_idle_engine_does_nothing() -> None:
    engine = make_engine(ToyPipeline())

    assert engine.is_idle
    assert engine.step() == []
    assert engine.is_idle


def test_places_are_taken_until_the_end() -> None:
    engine = make_engine(ToyPipeline(), max_generations=2)
    assert engine.free_places == 2

    engine.add(make_generation(1, num_inference_steps=1))
    engine.add(make_generation(2, num_inference_steps=1))
    assert engine.free_places == 0
    assert not engine.is_idle
    while not any(isinstance(event, Finished) for event in engine.step()):
        assert engine.free_places == 0
    assert engine.free_places == 1
    assert not engine.is_idle

    drain(engine)
    assert engine.free_places == 2


def test_cancelling_a_waiting_generation_frees_its_place() -> None:
    pipeline = ToyPipeline()
    engine = make_engine(pipeline, max_generations=1)
    engine.add(make_generation(1))
    engine.cancel(1)

    assert engine.free_places == 1
    assert engine.is_idle
    assert engine.step() == []
    assert not pipeline.calls


@pytest.mark.parametrize("steps_done", range(1, 6))
def test_cancelling_takes_effect_before_the_next_step(steps_done: int) -> None:
    pipeline = ToyPipeline()
    engine = make_engine(pipeline)
    engine.add(make_generation(1, num_inference_steps=4))
    for _ in range(steps_done):
        engine.step()
    calls = len(pipeline.calls)
    engine.cancel(1)

    assert engine.is_idle
    assert drain(engine) == []
    assert len(pipeline.calls) == calls


def test_cancelling_leaves_the_others_alone() -> None:
    engine = make_engine(ToyPipeline(), samples_per_call=4)
    for generation_id in (1, 2, 3):
        engine.add(make_generation(generation_id))
    for _ in range(4):
        engine.step()
    engine.cancel(2)

    events = drain(engine)

    assert {event.generation_id for event in events} == {1, 3}
    assert sum(isinstance(event, Finished) for event in events) == 2


def test_cancelling_an_unknown_id_is_harmless() -> None:
    engine = make_engine(ToyPipeline())
    engine.cancel(99)
    engine.add(make_generation(1))
    engine.cancel(99)

    assert isinstance(drain(engine)[-1], Finished)
    engine.cancel(1)  # finished long ago
    assert engine.is_idle


@pytest.mark.parametrize("samples_per_call", [1, 4])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make_error", FAULTS)
def test_failure_in_any_verb_ends_its_generation_only(
    verb: str, make_error: Callable[[], Exception], samples_per_call: int
) -> None:
    error = make_error()
    engine = make_engine(ToyPipeline({(verb, 20): error}), samples_per_call)
    generations = [make_generation(each, samples=2) for each in (1, 2, 3)]

    ends = run_all(engine, *generations)

    assert error_of(ends[2]) is error
    for neighbour in (1, 3):
        assert [each.seed for each in pictures_of(ends[neighbour])] == [
            10 * neighbour,
            10 * neighbour + 1,
        ]


@pytest.mark.parametrize("verb", VERBS)
def test_generation_whose_samples_all_fail_ends_once(verb: str) -> None:
    faults = {(verb, seed): OutOfMemory("full") for seed in (10, 11, 12, 13)}
    engine = make_engine(ToyPipeline(cast(Any, faults)), samples_per_call=4)
    engine.add(make_generation(1, samples=4))

    ends = [event for event in drain(engine) if not isinstance(event, Progress)]

    assert len(ends) == 1
    assert isinstance(ends[0], Failed)


@pytest.mark.parametrize("verb", VERBS)
def test_lost_device_is_raised_from_any_verb(verb: str) -> None:
    engine = make_engine(ToyPipeline({(verb, 10): DeviceLost("gone")}), samples_per_call=4)
    engine.add(make_generation(1))
    engine.add(make_generation(2))

    with pytest.raises(DeviceLost, match="gone"):
        drain(engine)


def test_unexpected_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    run_all(make_engine(ToyPipeline({("advance", 10): ValueError("a bug")})), make_generation(1))
    assert "a bug" in caplog.text

    caplog.clear()
    run_all(make_engine(ToyPipeline({("advance", 10): OutOfMemory("full")})), make_generation(1))
    assert not caplog.records


def test_preview_is_of_the_first_picture_of_a_running_generation() -> None:
    engine = make_engine(ToyPipeline())
    engine.add(make_generation(1, samples=2))
    assert engine.preview(1) is None, "it waits"
    engine.step()
    assert engine.preview(1) is None, "it has not taken a step"
    engine.step()
    preview = engine.preview(1)
    assert preview is not None
    assert preview[0, 0, 0] == 10, "its seed"
    drain(engine)
    assert engine.preview(1) is None, "it has ended"


@pytest.mark.parametrize("error", [make() for make in FAULTS], ids=repr)
def test_preview_that_fails_hurts_nobody(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(ToyPipeline({("preview", 10): error}))
    engine.add(make_generation(1))
    engine.step()
    assert engine.preview(1) is None
    assert "no preview" in caplog.text
    assert isinstance(drain(engine)[-1], Finished)


def test_preview_of_a_lost_device_ends_the_engine() -> None:
    engine = make_engine(ToyPipeline({("preview", 10): DeviceLost("gone")}))
    engine.add(make_generation(1))
    engine.step()
    with pytest.raises(DeviceLost, match="gone"):
        engine.preview(1)


def test_waiting_generation_joins_a_running_one() -> None:
    pipeline = ToyPipeline()
    engine = make_engine(pipeline, samples_per_call=4)
    engine.add(make_generation(1, num_inference_steps=9))
    for _ in range(4):
        engine.step()
    engine.add(make_generation(2, num_inference_steps=2))
    drain(engine)

    assert [len(call) for call in pipeline.calls] == [1, 1, 1, 2, 2, 1, 1, 1, 1]


def test_waiting_generations_of_a_size_are_prepared_together() -> None:
    pipeline = ToyPipeline()
    engine = make_engine(pipeline, samples_per_call=4, max_generations=8)

    ends = run_all(engine, *(make_generation(n, width=64 if n == 3 else 128) for n in range(7)))

    assert len(ends) == 7
    # The rest beside running samples, of which nobody knows yet how long they may wait.
    assert pipeline.prepared == [4, 1, 1, 1]


def test_finished_samples_of_a_size_are_decoded_together() -> None:
    pipeline = ToyPipeline()
    engine = make_engine(pipeline, samples_per_call=8, max_generations=8)

    run_all(engine, *(make_generation(n, samples=2) for n in range(3)))

    assert pipeline.decoded == [6]


def test_reproducible_engine_shares_no_call() -> None:
    pipeline = ToyPipeline()
    run_all(make_engine(pipeline), *(make_generation(n, samples=2) for n in range(4)))

    assert {*pipeline.prepared} == {*pipeline.decoded} == {1}
    assert {len(call) for call in pipeline.calls} == {1}


def test_reproducible_engine_lets_generations_join() -> None:
    engine = make_engine(ToyPipeline())
    engine.add(make_generation(1, num_inference_steps=50))
    engine.step()
    engine.add(make_generation(2, num_inference_steps=2))

    ends = [each.generation_id for each in drain(engine) if isinstance(each, Finished)]

    assert ends == [2, 1]


@pytest.mark.parametrize("samples_per_call", [1, 4])
def test_sizes_take_turns(samples_per_call: int) -> None:
    """A large picture delays the small ones by one of its steps at a time, and none is left out."""
    pipeline = ToyPipeline()
    engine = make_engine(pipeline, samples_per_call, max_generations=8)
    small = [make_generation(n, width=64, num_inference_steps=6) for n in range(1, 4)]
    large = make_generation(9, width=1024, height=1024, num_inference_steps=12)

    run_all(engine, large, *small)

    widths = [call[0].latents.shape[3] * 8 for call in pipeline.calls]
    first, last = widths.index(64), len(widths) - widths[::-1].index(64)
    runs = {
        width: [len([*run]) for each, run in groupby(widths[first:last]) if each == width]
        for width in (64, 1024)
    }
    assert max(runs[1024]) == 1
    assert max(runs[64]) <= len(small)
    assert widths.count(1024) == 12


def test_decoding_lets_running_samples_wait_for_two_steps_at_most() -> None:
    pipeline = ToyPipeline(row_s=0.5, picture_s=0.5)
    engine = make_engine(pipeline, samples_per_call=16, max_generations=16)
    run_all(engine, *(make_generation(n, samples=4) for n in range(1, 5)))  # measures
    pipeline.decoded.clear()

    quick = [make_generation(n, samples=3, num_inference_steps=2) for n in range(1, 6)]
    run_all(engine, make_generation(9, num_inference_steps=99), *quick)

    assert max(pipeline.decoded) == 5  # 2.1 steps of the two rows that run
    assert sum(pipeline.decoded) == 16


def test_call_of_the_vae_too_large_for_memory_is_done_in_parts() -> None:
    pipeline = ToyPipeline(most_pictures=2)
    engine = make_engine(pipeline, samples_per_call=8, max_generations=8)

    ends = run_all(engine, *(make_generation(n) for n in range(7)))

    assert all(pictures_of(end) for end in ends.values())
    assert pipeline.prepared == [7, 3, 1, 2, 4, 2, 2]
    assert pipeline.decoded == [2, 2, 2, 1], "what preparing them taught"


@pytest.mark.parametrize("crowded", ["paste", "check", "hide"])
def test_lack_of_memory_behind_the_decoder_is_tried_again(crowded: str) -> None:
    tries = itertools.count()

    class Crowded(ToyPipeline):
        def _fail_for(self, verb: str, seed: int) -> None:
            if verb == crowded and next(tries) == 0:
                raise OutOfMemory("full")

    (end,) = run_all(make_engine(Crowded()), make_generation(1)).values()

    assert [each.seed for each in pictures_of(end)] == [10]
    assert next(tries) == 2


def test_warm_up_learns_how_large_calls_should_be() -> None:
    """The first calls for clients are as large as pays, and none is needed to find out."""
    pipeline = ToyPipeline(call_s=1.0, row_s=0.01, picture_s=0.1)
    limits = EngineLimits(max_generations=16)
    engine = InpaintEngine(ModelPool.of(MODEL, cast(InpaintPipeline, pipeline)), limits)
    engine.warm_up(MODEL)
    assert pipeline.is_warm
    assert engine.is_idle
    pipeline.calls.clear()
    pipeline.decoded.clear()

    run_all(engine, *(make_generation(n, width=512, height=512) for n in range(1, 17)))

    assert pipeline.prepared == pipeline.decoded == [16]
    assert {len(call) for call in pipeline.calls} == {16}


def test_warm_up_makes_calls_where_a_first_one_has_fewer_rows_than_a_sample() -> None:
    pipeline = ToyPipeline(call_s=1.0, row_s=0.01, picture_s=0.1)
    limits = EngineLimits(first_rows=1)
    InpaintEngine(ModelPool.of(MODEL, cast(InpaintPipeline, pipeline)), limits).warm_up(MODEL)
    assert pipeline.calls


@dataclass(slots=True)
class HeldMark:
    """The end of work that the device is done with when the test, or a wait, says so."""

    is_past: bool = False

    def wait(self) -> None:
        self.is_past = True

    def s_since(self, earlier: Any) -> float:
        return 0.0


@dataclass(slots=True)
class SlowDecoder(ToyPipeline):
    """Whose pictures are decoded when the test says so. decoding: their mark."""

    decoding: HeldMark = field(default_factory=HeldMark)

    def decode_together(self, samples: Sequence[ToySample]) -> list[Queued[Unchecked]]:
        queued = ToyPipeline.decode_together(self, samples)
        return [Queued(self.decoding, each.complete) for each in queued]


def test_background_is_free_while_the_device_decodes() -> None:
    """Two threads that waited for pictures would keep the canvas of the next generation waiting."""
    pipeline, background = SlowDecoder(), HeldBack()
    engine = make_engine(pipeline, samples_per_call=4)
    engine.background = background
    engine.add(make_generation(1, num_inference_steps=1))
    engine.add(make_generation(2, num_inference_steps=99))
    background.run()
    while not pipeline.decoded:
        engine.step()
    for _ in range(3):
        engine.step()
    assert background.calls == 0

    pipeline.decoding.is_past = True
    engine.step()
    assert background.calls == 1


def test_picture_is_checked_after_it_was_pasted_and_then_hidden() -> None:
    """The background is asked twice, and the device in between."""
    background = HeldBack()
    engine = make_engine(ToyPipeline())
    engine.background = background
    engine.add(make_generation(1, num_inference_steps=1))
    ends: list[Finished] = []
    for _ in range(3):  # the canvas, the paste, the end
        assert ends == []
        background.run()
        ends = [event for _ in range(4) for event in engine.step() if isinstance(event, Finished)]

    assert len(ends) == 1


def test_engine_without_anything_else_to_do_waits_for_the_decoder() -> None:
    pipeline, background = SlowDecoder(), HeldBack()
    engine = make_engine(pipeline)
    engine.background = background
    engine.add(make_generation(1, num_inference_steps=1))
    background.run()
    while not pipeline.decoded:
        engine.step()
    engine.step()
    assert pipeline.decoding.is_past
    assert not engine.is_resting, "the picture is yet to be pasted"
    engine.step()
    assert engine.is_resting


def test_background_works_while_samples_run() -> None:
    """Neither a canvas nor a picture that is not there yet keeps the others from their steps."""
    background = HeldBack()
    pipeline = ToyPipeline()
    engine = make_engine(pipeline, samples_per_call=4)
    engine.background = background
    engine.add(make_generation(1, num_inference_steps=2))
    assert engine.step() == []
    assert engine.is_resting
    background.run()
    engine.step()
    engine.add(make_generation(2, num_inference_steps=9))
    background.run()
    while engine.step() != [Progress(2, 0, 9)]:
        assert not engine.is_resting
    engine.add(make_generation(3))
    events = [event for _ in range(12) for event in engine.step()]
    assert Progress(2, 9, 9) in events
    assert not any(isinstance(event, Finished) for event in events)
    assert engine.is_resting
    assert engine.wait(0.0)
    background.run()
    events = engine.step()
    assert not any(isinstance(event, Finished) for event in events), "checked, but not hidden yet"
    background.run()

    assert [type(event) for event in engine.step()] == [Finished, Finished]


@dataclass(frozen=True, slots=True)
class Plan:
    """A generation to be, and the verb that fails for its n-th sample."""

    samples: int
    steps: int
    width: int
    guidance_scale: float
    words: int
    verb: str | None
    culprit: int
    error: int

    def generation(self, generation_id: int) -> Generation:
        return make_generation(
            generation_id,
            samples=self.samples,
            num_inference_steps=self.steps,
            width=self.width,
            guidance_scale=self.guidance_scale,
            prompt="x" * self.words,
        )

    def faults(self, generation_id: int) -> dict[tuple[str, int], Exception]:
        if self.verb is None:
            return {}
        index = 0 if self.verb.startswith("prepare") else self.culprit % self.samples
        return {(self.verb, 10 * generation_id + index): FAULTS[self.error]()}


PLANS = st.builds(
    Plan,
    samples=st.integers(1, 4),
    steps=st.integers(1, 4),
    width=st.sampled_from([64, 128]),
    guidance_scale=st.sampled_from([1.0, 5.0]),
    words=st.sampled_from([1, 80]),
    verb=st.none() | st.sampled_from(VERBS),
    culprit=st.integers(0, 3),
    error=st.integers(0, len(FAULTS) - 1),
)
ACTIONS = st.lists(PLANS | st.just("step") | st.integers(1, 6), max_size=25)
"""A plan is added, a number is cancelled."""


@settings(max_examples=200)
@given(ACTIONS, st.integers(1, 5), st.integers(1, 3))
def test_every_generation_gets_exactly_one_end(
    actions: list[Plan | str | int], samples_per_call: int, max_generations: int
) -> None:
    pipeline = ToyPipeline()
    engine = make_engine(pipeline, samples_per_call, max_generations)
    added: dict[int, Plan] = {}
    alive: set[int] = set()
    cancelled: set[int] = set()
    heard: defaultdict[int, list[Event]] = defaultdict(list)

    def step() -> None:
        for event in engine.step():
            assert event.generation_id in alive, "an event after the end"
            heard[event.generation_id].append(event)
            if not isinstance(event, Progress):
                alive.remove(event.generation_id)

    for action in itertools.chain(actions, itertools.repeat("step", 500)):
        if isinstance(action, Plan) and engine.free_places:
            generation_id = len(added) + 1
            added[generation_id] = action
            alive.add(generation_id)
            pipeline.faults |= action.faults(generation_id)
            engine.add(action.generation(generation_id))
        elif isinstance(action, int):
            engine.cancel(action)
            cancelled |= alive & {action}
            alive.discard(action)
        else:
            step()
        assert engine.free_places == max_generations - len(alive)
        assert engine.is_idle == (not alive)

    assert engine.is_idle
    for generation_id, plan in added.items():
        check_events(generation_id, plan, heard[generation_id], generation_id in cancelled)
    for call in pipeline.calls:
        assert 1 <= sum(each.rows for each in call) <= 2 * samples_per_call
        assert len({(each.latents.shape, each.conditioning.shape[1]) for each in call}) == 1


def check_events(generation_id: int, plan: Plan, events: list[Event], is_cancelled: bool) -> None:
    progress = [event for event in events if isinstance(event, Progress)]
    ends = [event for event in events if not isinstance(event, Progress)]
    steps = [event.step for event in progress]
    total = plan.samples * plan.steps

    assert all(event.total_steps == total for event in progress)
    assert steps == sorted(set(steps))
    assert not steps or steps[0] == 0
    assert len(ends) == (0 if is_cancelled else 1)
    if plan.verb is not None and ends:
        assert isinstance(ends[0], Failed)
    elif ends:
        assert events[-1] == ends[0]
        assert steps[-1] == total
        seeds = [picture.seed for picture in pictures_of(ends[0])]
        assert seeds == [10 * generation_id + index for index in range(plan.samples)]

"""The rows of a UNet call follow what was measured."""

import pytest

from models.batching import MEASUREMENTS, BatchSizer, CallKind, stall_s
from models.variants import ModelVariant

MODEL = ModelVariant("model")
KIND = CallKind(MODEL, area=256 * 256)


def grow(budget: BatchSizer, seconds_per_row: dict[int, float]) -> list[int]:
    """The limits that a run of full calls goes through; a row costs what is said of its number."""
    limits = []
    for _ in range(20):
        rows = budget.units(KIND)
        if rows not in limits:
            limits.append(rows)
        if budget.wants_measurement(KIND, rows):
            budget.observe(KIND, rows, rows * seconds_per_row[rows])
    return limits


def test_rows_double_while_that_pays() -> None:
    budget = BatchSizer(first=2, most=32)
    assert grow(budget, {2: 0.012, 4: 0.010, 8: 0.008, 16: 0.0079}) == [2, 4, 8, 16]
    assert budget.units(KIND) == 8


def test_rows_stay_where_the_device_is_saturated() -> None:
    budget = BatchSizer(first=2, most=32)
    grow(budget, {2: 0.036, 4: 0.0355})
    assert budget.units(KIND) == 2


def test_rows_never_exceed_the_most() -> None:
    budget = BatchSizer(first=2, most=4)
    assert grow(budget, {2: 0.012, 4: 0.006}) == [2, 4]


def test_one_slow_call_decides_nothing() -> None:
    budget = BatchSizer(first=2, most=4)
    for seconds in (0.9, 0.024, 0.8):
        budget.observe(KIND, 2, seconds)
    for seconds in (0.7, 0.9, 0.030):
        budget.observe(KIND, 4, seconds)
    assert budget.units(KIND) == 4


def test_sizes_are_measured_apart() -> None:
    budget = BatchSizer(first=2, most=8)
    for _ in range(MEASUREMENTS):
        budget.observe(KIND, 2, 0.02)
    assert budget.units(KIND) == 4
    assert budget.units(CallKind(MODEL, area=512 * 512)) == 2


@pytest.mark.parametrize(("rows", "left"), [(8, 4), (2, 1), (1, 1)])
def test_rows_halve_for_good_when_memory_is_short(rows: int, left: int) -> None:
    budget = BatchSizer(first=8, most=32)
    budget.shrink(KIND, rows)
    assert budget.units(KIND) == left
    assert not budget.wants_measurement(KIND, left)


def test_calls_of_several_pictures_stay_below_the_most_area() -> None:
    budget = BatchSizer(first=1, most=32, most_area=3 * KIND.area)
    assert grow(budget, {1: 0.010, 2: 0.007}) == [1, 2]

    large = CallKind(MODEL, 4 * KIND.area)
    for _ in range(2 * MEASUREMENTS):
        budget.observe(large, 1, 0.04)
    assert budget.units(large) == 1


def test_call_beside_running_samples_is_as_large_as_they_may_wait() -> None:
    budget = BatchSizer(first=1, most=8)
    assert budget.units_within(KIND, seconds=9.0) == 1, "nothing was measured yet"
    grow(budget, {1: 0.010, 2: 0.009, 4: 0.008, 8: 0.007})

    assert budget.units_within(KIND, seconds=0.03) == 4
    assert budget.units_within(KIND, seconds=0.001) == 1
    assert budget.units_within(KIND, seconds=float("inf")) == 8


def test_running_samples_wait_for_two_of_their_quickest_steps() -> None:
    steps = BatchSizer(first=2, most=8)
    quick, slow = CallKind(MODEL, 32 * 32), CallKind(MODEL, 64 * 64)
    assert stall_s(steps, {}) == float("inf")
    steps.observe(quick, 2, 0.010)
    assert stall_s(steps, {quick: 2}) == pytest.approx(0.020)
    assert stall_s(steps, {quick: 2, slow: 2}) == 0, "one of them was not timed yet"
    steps.observe(slow, 2, 0.050)
    assert stall_s(steps, {slow: 2, quick: 2}) == pytest.approx(0.020)


def test_steps_are_reckoned_by_the_rows_that_run() -> None:
    steps = BatchSizer(first=2, most=8)
    grow(steps, {2: 0.010, 4: 0.008, 8: 0.006})
    assert steps.units(KIND) == 8

    assert stall_s(steps, {KIND: 2}) == pytest.approx(2 * 2 * 0.006)
    assert stall_s(steps, {KIND: 99}) == pytest.approx(2 * 8 * 0.006), "no call has so many"

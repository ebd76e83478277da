"""The rows of a UNet call follow what was measured."""

import pytest

from models.batching import MEASUREMENTS, BatchKey, RowBudget

KEY = BatchKey(latent_height=32, latent_width=32, conditioning_tokens=77)


def grow(budget: RowBudget, seconds_per_row: dict[int, float]) -> list[int]:
    """The limits that a run of full calls goes through; a row costs what is said of its number."""
    limits = []
    for _ in range(20):
        rows = budget.rows(KEY)
        if rows not in limits:
            limits.append(rows)
        if budget.wants_measurement(KEY, rows):
            budget.observe(KEY, rows, rows * seconds_per_row[rows])
    return limits


def test_rows_double_while_that_pays() -> None:
    budget = RowBudget(first=2, most=32)
    assert grow(budget, {2: 0.012, 4: 0.010, 8: 0.008, 16: 0.0079}) == [2, 4, 8, 16]
    assert budget.rows(KEY) == 8


def test_rows_stay_where_the_device_is_saturated() -> None:
    budget = RowBudget(first=2, most=32)
    grow(budget, {2: 0.036, 4: 0.0355})
    assert budget.rows(KEY) == 2


def test_rows_never_exceed_the_most() -> None:
    budget = RowBudget(first=2, most=4)
    assert grow(budget, {2: 0.012, 4: 0.006}) == [2, 4]


def test_one_slow_call_decides_nothing() -> None:
    budget = RowBudget(first=2, most=4)
    for seconds in (0.9, 0.024, 0.8):
        budget.observe(KEY, 2, seconds)
    for seconds in (0.7, 0.9, 0.030):
        budget.observe(KEY, 4, seconds)
    assert budget.rows(KEY) == 4


def test_sizes_are_measured_apart() -> None:
    budget = RowBudget(first=2, most=8)
    for _ in range(MEASUREMENTS):
        budget.observe(KEY, 2, 0.02)
    assert budget.rows(KEY) == 4
    assert budget.rows(BatchKey(64, 64, 77)) == 2
    assert budget.rows(BatchKey(32, 32, 154)) == 4, "prompt length does not change the cost much"


@pytest.mark.parametrize(("rows", "left"), [(8, 4), (2, 1), (1, 1)])
def test_rows_halve_for_good_when_memory_is_short(rows: int, left: int) -> None:
    budget = RowBudget(first=8, most=32)
    budget.shrink(KEY, rows)
    assert budget.rows(KEY) == left
    assert not budget.wants_measurement(KEY, left)

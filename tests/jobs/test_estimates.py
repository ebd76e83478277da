"""When jobs will end, against what a simulated worker makes of them."""

import statistics

import pytest

from server.jobs.estimates import (
    CACHED_S,
    COST_FACTOR,
    GUESSED_SPEED,
    MARGIN,
    OVERHEAD_S,
    SLOW_FACTOR,
    Estimator,
    FinishedWork,
    Forecast,
    PendingWork,
    QuotedEstimates,
    Throughput,
    measure_throughput,
    simulate,
)
from server.jobs.job import NewJob
from tests.support.clocks import Clock
from tests.support.queue_simulation import CPU, GPU, Device, Simulation, share_in_time

SPEED = 1_000.0
STEADY = Throughput(SPEED)


def equal_jobs(count: int, *, is_running: bool = False, first_id: int = 1) -> list[PendingWork]:
    """Of 1,000 pixel steps each, in 10 steps."""
    return [PendingWork(first_id + index, is_running, 100.0, 10.0) for index in range(count)]


def test_jobs_that_run_side_by_side_end_together() -> None:
    ends = simulate(equal_jobs(6), 8, STEADY, 0.0).ends_s
    assert len({round(each, 6) for each in ends.values()}) == 1
    alone = simulate(equal_jobs(1), 8, STEADY, 0.0).ends_s[1]
    assert ends[1] == pytest.approx(6 * alone)


def test_those_beyond_the_places_wait_for_the_first_to_end() -> None:
    forecast = simulate(equal_jobs(6), 2, STEADY, 0.0)
    ends = [round(forecast.ends_s[job_id], 6) for job_id in range(1, 7)]
    assert ends[0] == ends[1] < ends[2] == ends[3] < ends[4] == ends[5]
    assert forecast.wait_s == pytest.approx(ends[5])
    assert forecast.positions == {job_id: job_id for job_id in range(1, 7)}


def test_a_short_job_ends_before_a_long_one_beside_it() -> None:
    live = [PendingWork(1, True, 100.0, 50.0), PendingWork(2, True, 100.0, 5.0)]
    ends = simulate(live, 2, STEADY, 0.0).ends_s
    assert ends[2] < ends[1] / 2


def test_a_pause_comes_first() -> None:
    assert simulate(equal_jobs(1), 1, STEADY, 30.0).ends_s[1] > 30
    assert simulate([], 1, STEADY, 30.0).wait_s == 30


def test_jobs_are_expected_to_be_followed_by_others() -> None:
    busy = Throughput(SPEED, (), usual_jobs=4.0, usual_pixels=300.0)
    alone = simulate(equal_jobs(1), 8, STEADY, 0.0).ends_s[1]
    assert simulate(equal_jobs(1), 8, busy, 0.0).ends_s[1] == pytest.approx(4 * alone)


def test_an_estimate_is_longer_than_the_forecast() -> None:
    forecast = Forecast(1, 0, {1: 10.0, 2: 20.0}, {2: 1}, 15.0)
    assert forecast.eta_s(1) == round(OVERHEAD_S + 10 * MARGIN, 1)
    assert forecast.eta_s(99) == forecast.eta_s(2), "one that is not known comes last"
    assert [forecast.position(job_id) for job_id in (1, 2, 99)] == [1, 1, 2]


class TestMeasuring:
    def test_without_jobs_it_is_a_guess(self) -> None:
        assert measure_throughput([], 3, 0.0) == Throughput(3 * GUESSED_SPEED)
        useless = [FinishedWork(1.0, 1.0, 1.0, 0.0), FinishedWork(1.0, 1.0, 1.0, -5.0)]
        assert measure_throughput(useless, 1, 0.0) == Throughput(GUESSED_SPEED)

    @pytest.mark.parametrize("count", [1, 4])
    def test_what_ran_side_by_side_counts_together(self, count: int) -> None:
        done = [FinishedWork(100.0, 17.0, 50.0, 4.0)] * count
        found = measure_throughput(done, 1, 50.0)
        assert found.at(count) == pytest.approx(count * 100 * 20 / 4)
        assert (found.usual_jobs, found.usual_pixels) == (count, 100.0 * (count - 1))

    def test_after_a_rest_nothing_is_usual(self) -> None:
        found = measure_throughput([FinishedWork(100.0, 17.0, 50.0, 4.0)] * 4, 1, 5_000.0)
        assert (found.usual_jobs, found.usual_pixels) == (0.0, 0.0)

    def test_speed_depends_on_how_many_run(self) -> None:
        alone = [FinishedWork(100.0, 17.0, 100.0 * number, 4.0) for number in range(1, 5)]
        together = [FinishedWork(100.0, 17.0, 1_000.0, 8.0)] * 8
        found = measure_throughput([*alone, *together], 1, 0.0)
        assert found.at(1) == pytest.approx(2_000 / 4)
        assert found.at(8) == found.at(16) == pytest.approx(8 * 2_000 / 8)
        assert measure_throughput(together, 1, 0.0).at(1) < found.at(8), "one job fills no batch"

    def test_one_slow_job_does_not_rule(self) -> None:
        quick = [FinishedWork(100.0, 17.0, 100.0 * number, 4.0) for number in range(1, 8)]
        slow = FinishedWork(100.0, 17.0, 10_000.0, 9_000.0)
        found = measure_throughput([*quick, slow], 1, 0.0)
        assert found.at(1) == pytest.approx(2_000 / 4)
        assert min(found.measured)[1] >= 2_000 / 4 / SLOW_FACTOR


class TestEstimator:
    def test_looks_again_after_a_moment_or_for_a_new_job(self) -> None:
        clock, ends = Clock(), {1: 1.0}
        looks: list[dict[int, float]] = []

        def look(_new: NewJob | None) -> Forecast:
            looks.append({**ends})
            return Forecast(0, len(ends), {**ends}, {}, 0.0)

        estimator = Estimator(look, clock)
        assert estimator.forecast(1) is estimator.forecast(1)
        ends[2] = 2.0
        assert 2 in estimator.forecast(2).ends_s
        clock.now += 2 * CACHED_S
        estimator.forecast(1)
        assert len(looks) == 3

    def test_a_dear_look_counts_longer(self) -> None:
        clock = Clock()
        looks = []

        def look(_new: NewJob | None) -> Forecast:
            clock.now += 0.05
            looks.append(clock.now)
            return Forecast(0, 0, {}, {}, 0.0)

        estimator = Estimator(look, clock)
        for _ in range(100):
            estimator.forecast(7)
            clock.now += 0.05
        assert 5 < len(looks) <= 1.5 * 100 / COST_FACTOR


def test_the_first_estimate_is_held_against_the_truth() -> None:
    clock = Clock()
    quotes = QuotedEstimates(clock)
    assert (quotes.quote(1, 30.0), quotes.quote(2, 5.0)) == (30.0, 5.0)
    start = clock.now
    clock.now += 10
    quotes.quote(1, 20.0)
    assert quotes.pop_ratio(1, start + 20) == 1.5
    assert quotes.pop_ratio(1, start + 20) is None, "once"
    assert quotes.pop_ratio(2, start) is None, "it had ended before"
    assert quotes.pop_ratio(3, start) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "rests_s", "holds_s"), [(CPU, (0.5, 120), 25), (GPU, (0.5, 20), 5)]
)
def test_one_look_after_the_estimate_finds_the_job_ended(
    device: Device, rests_s: tuple[float, float], holds_s: float
) -> None:
    """Random arrivals of 1 to 64 clients, of one size and mixed; told at once, and after a hold."""
    told = [
        each
        for clients in (1, 2, 4, 8, 16, 32, 64)
        for hold_s in (0.2, holds_s)
        for is_mixed in (False, True)
        for rest_s in rests_s
        for each in Simulation(device, clients, hold_s, rest_s, is_mixed, seed=clients).run(
            60 + 3 * clients
        )
    ]
    assert len(told) > 1_500
    assert share_in_time(told) >= 0.95
    # Seconds count where a job takes less than the grain of an estimate.
    ratios = [each.eta_s / max(each.true_s, OVERHEAD_S) for each in told]
    assert statistics.median(ratios) <= 1.5

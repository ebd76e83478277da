"""The simulation of a fleet agrees with queueing theory, and the fleet itself can be measured."""

import json
from pathlib import Path

import pytest

from benchmarks import commits, fleet
from benchmarks.simulate import (
    CHECK_HEAD,
    RESULTS,
    Costs,
    Kind,
    Load,
    Simulation,
    Speed,
    check,
    foretell,
    main,
    parse_mix,
    parse_speed,
    workers_needed,
)
from tests.support.postgres import PostgresServer, find_binaries

ONE_A_SECOND = Speed(((1, 1.0),), places=8)
UNLIMITED = Speed(((1, 1.0),), places=1_000)
COSTS = Costs(overhead_s=0.0, api_cpu_s=0.02)


def ends(workers: int, speed: Speed, *arrivals: tuple[float, float]) -> list[float]:
    """Moments at which jobs of these arrivals and works end."""
    simulation = Simulation(workers, speed)
    simulation.run(iter(arrivals))
    return [round(end, 6) for _, end in simulation.ended]


def test_jobs_share_a_worker_in_equal_parts() -> None:
    assert ends(1, ONE_A_SECOND, (0.0, 1.0), (0.5, 1.0)) == [1.5, 2.0]


def test_batches_that_gain_end_sooner() -> None:
    gaining = Speed(((1, 1.0), (2, 2.0)), places=8)
    assert ends(1, gaining, (0.0, 1.0), (0.0, 1.0)) == [1.0, 1.0]


def test_burst_is_shared_out() -> None:
    assert ends(4, ONE_A_SECOND, *[(0.0, 1.0)] * 8) == [2.0] * 8


def test_worker_holds_no_more_than_its_places() -> None:
    single = Speed(((1, 1.0),), places=1)
    assert ends(1, single, (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)) == [1.0, 2.0, 3.0]


def test_later_job_finds_the_idle_worker() -> None:
    assert ends(2, ONE_A_SECOND, (0.0, 1.0), (0.1, 1.0)) == [1.0, 1.1]


@pytest.mark.parametrize(
    ("speed", "mean_s"),
    [
        pytest.param(UNLIMITED, 1 / (1 - 0.5), id="shared: M/G/1-PS"),
        pytest.param(Speed(((1, 1.0),), places=1), 1 + 0.5 / (2 * 0.5), id="in turn: M/D/1"),
    ],
)
def test_latency_of_one_worker_agrees_with_theory(speed: Speed, mean_s: float) -> None:
    simulation = Simulation(1, speed)
    simulation.run(Load(per_s=0.5, seconds=100_000).arrivals())

    latencies = [end - began for began, end in simulation.ended]

    assert sum(latencies) / len(latencies) == pytest.approx(mean_s, rel=0.03)


@pytest.mark.parametrize("burst", [1.0, 5.0])
def test_arrivals_keep_their_rate_and_are_the_same_again(burst: float) -> None:
    load = Load(per_s=10, seconds=5_000, burst=burst)
    arrivals = [*load.arrivals()]

    groups = len({moment for moment, _ in arrivals})
    assert arrivals == [*load.arrivals()]
    assert len(arrivals) / 5_000 == pytest.approx(10, rel=0.05)
    assert len(arrivals) / groups == pytest.approx(burst, rel=0.05)


def test_bursts_wait_longer_than_single_jobs() -> None:
    single, grouped = (
        foretell(4, Load(2.8, 500, burst=burst), ONE_A_SECOND, COSTS) for burst in (1.0, 8.0)
    )
    assert grouped["p95_s"] > 1.5 * single["p95_s"]


def test_needed_workers_are_the_fewest() -> None:
    load = Load(per_s=10, seconds=200)

    needed = workers_needed(load, ONE_A_SECOND, COSTS, p95_s=2.0)

    assert foretell(needed, load, ONE_A_SECOND, COSTS)["p95_s"] <= 2.0
    assert foretell(needed - 1, load, ONE_A_SECOND, COSTS)["p95_s"] > 2.0


def test_impossible_latency_is_refused() -> None:
    with pytest.raises(ValueError, match="no number of workers"):
        workers_needed(Load(per_s=1, seconds=20), ONE_A_SECOND, COSTS, p95_s=0.5)


def test_larger_pictures_load_the_store_and_the_workers_more() -> None:
    small, large = (
        foretell(4, Load(1, 200, mix), ONE_A_SECOND, COSTS)
        for mix in (parse_mix("512x20"), parse_mix("1024x10"))
    )
    assert large["store_out_mb_per_s"] == 4 * small["store_out_mb_per_s"]
    assert large["p50_s"] >= 2 * small["p50_s"]


def test_latency_without_a_rate_is_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--p95-s", "2"])


def test_words_of_the_command_line() -> None:
    assert parse_mix("512x20:0.7,1024x30:0.3") == (Kind(512, 20, 0.7), Kind(1024, 30, 0.3))
    assert parse_speed("8:6.5,1:4").pictures_per_s == ((1, 4.0), (8, 6.5))
    assert parse_speed("serving_h100").at(1) == pytest.approx(4.14, abs=0.01)


def test_simulation_of_the_measured_run_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    report = RESULTS / "fleet.json"

    main(["--check", str(report)])
    rows = check(json.loads(report.read_text()))

    errors = [float(str(row[3]).removesuffix(" %")) for row in rows]
    assert capsys.readouterr().out.count("|") == (len(CHECK_HEAD) + 1) * (len(rows) + 2)
    assert max(map(abs, errors)) <= 15


def test_command_prints_a_row_for_each_number_of_workers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--workers", "2,5", "--seconds", "5"])
    main(["--per-s", "20", "--p95-s", "2", "--seconds", "20"])

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("| ")][1:4] == ["---", "2", "5"]


@pytest.mark.process
@pytest.mark.postgres
@pytest.mark.slow
def test_fleet_is_measured_with_real_workers(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    size = fleet.Size(
        workers=(1, 2),
        picture_s=0.2,
        arrivals_s=2.0,
        settle_s=0.5,
        window_s=1.5,
        idle_s=1.5,
        bursts=1,
        wakes=3,
    )
    with fleet.running_fleet(postgres_server, tmp_path) as running:
        findings = fleet.measure(running, size)

    figures = findings["figures"]
    machine = {"cpu": "x", "cores": 2, "gpu": None, "versions": {}, "load_average_before": 0}
    text = fleet.to_text(findings | {"machine": machine, "load_average_after": 0})
    assert {target.figure for target in fleet.TARGETS} <= figures.keys()
    assert 0 < figures["efficiency"] < 1.5
    assert 1 <= figures["burst_most"] <= 2
    assert all(each["open"]["p50_s"] > 0.2 for each in findings["by_workers"].values())
    assert text.count("| met |") + text.count("| short |") == len(fleet.TARGETS)
    assert [row[0] for row in check(json.loads(json.dumps(findings)))] == ["1", "2"]


@pytest.mark.process
@pytest.mark.postgres
def test_heartbeats_are_counted_with_and_without_their_notification(
    postgres_server: PostgresServer,
) -> None:
    binaries = find_binaries()
    assert binaries is not None

    found = commits.measure(postgres_server, binaries, commits.Size((1, 2), 1, 1))

    assert [*found] == [*commits.SCRIPTS]
    assert all(rate > 0 for rates in found.values() for rate in rates.values())

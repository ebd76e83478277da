"""The benchmarks' arithmetic and fairness; what they measure is run by hand, see their README."""

import ast
import asyncio
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from benchmarks import measure, report
from benchmarks.checkpoints import COSTS, PEAK_TFLOPS, add_safety_checker, checker_config
from benchmarks.disks import MEMORY_FILESYSTEMS, filesystem_of, fsync_ms
from benchmarks.load import (
    LIVING,
    TARGETS,
    Size,
    accept,
    call_webhooks,
    fetch,
    recover,
    running_api,
    to_text,
    wait_together,
)
from benchmarks.measure import Deadline, median_ratio, percentile, rotated, run_in_turns
from benchmarks.orders import example_image, make_orders, mixed_steps
from benchmarks.serving import ScenarioMaker, make_scenarios
from benchmarks.soak import Fate, growth_of, make_calls, parts_of
from benchmarks.soak import run as soak
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import load_components
from models.diffusion.safety import SafetyChecker
from server.core.settings import Settings
from server.storage.database import open_engine
from tests.support.programs import program
from tests.support.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.process

BENCHMARKS = Path(measure.__file__).parent


@dataclass(frozen=True)
class Turn:
    name: str
    work: float = 1.0
    max_rounds: int = 2


def test_every_side_is_first_in_some_round() -> None:
    seen: list[str] = []

    def note(case: Turn, side: str, number: int) -> str:
        seen.append(f"{case.name}{number}{side}")
        return side

    results = run_in_turns([Turn("x"), Turn("y", max_rounds=1)], "ab", note, Deadline(60))

    assert seen == ["x0a", "x0b", "y0a", "y0b", "x1b", "x1a"]
    assert results[Turn("x")] == {"a": ["a", "a"], "b": ["b", "b"]}


def test_turns_without_time_left_are_skipped_but_not_the_first() -> None:
    case = Turn("x", max_rounds=9)

    assert run_in_turns([case], "ab", lambda *_: 1, Deadline(0)) == {case: {"a": [1], "b": [1]}}


def test_rotation_goes_round() -> None:
    assert [rotated("abc", by) for by in (0, 1, 5)] == [[*"abc"], [*"bca"], [*"cab"]]


def test_percentiles_interpolate_and_nothing_has_none() -> None:
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)
    assert math.isnan(percentile([], 50))


def test_ratio_is_taken_round_by_round() -> None:
    assert median_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == 2.0


def test_floor_agrees_with_the_table_it_comes_from() -> None:
    """SD 1.5 at 512², 20 steps, one encode: 45.5 ms with the safety checker's 0.2 ms."""
    assert COSTS["sd15", 512].floor_s([20]) * 1000 == pytest.approx(45.3, abs=0.1)
    assert COSTS["sd15", 512].floor_s([20, 20]) == 2 * COSTS["sd15", 512].floor_s([20])
    assert PEAK_TFLOPS == 790


def test_added_safety_checker_is_loaded_and_flags_nothing(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, 9)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    add_safety_checker(folder, CLIPConfig(vision_config=vision, projection_dim=8))
    spec = ModelSpec("tiny", str(folder))

    parts = load_components(spec, torch.device("cpu"), torch.float32)

    checker = SafetyChecker(parts.safety_checker, parts.feature_extractor)
    pictures = [np.array(example_image(32, seed)) for seed in range(4)]
    assert checker.is_flagged(pictures) == [False] * 4


def test_safety_checker_has_the_size_of_the_published_one() -> None:
    """Its file of float32 weights has 1,216 MB."""
    with torch.device("meta"):
        checker = StableDiffusionSafetyChecker(checker_config())

    assert sum(each.numel() for each in checker.parameters()) == 303_981_588


def test_mixed_steps_have_equal_shares_in_a_seeded_order() -> None:
    mixed = mixed_steps([20, 30, 50], 9, seed=3)

    assert sorted(mixed) == [20] * 3 + [30] * 3 + [50] * 3
    assert mixed == mixed_steps([20, 30, 50], 9, seed=3)
    assert mixed != sorted(mixed)


def test_no_two_orders_share_picture_prompt_or_seed() -> None:
    orders = make_orders(64, [20] * 5, seed=10)

    assert len({order.init_image.tobytes() for order in orders}) == 5
    assert len({order.prompt for order in orders}) == 5
    assert {order.seed for order in orders} == {*range(10, 15)}
    assert len({order.kind for order in orders}) == 1
    assert example_image(64, 10).tobytes() == orders[0].init_image.tobytes()


def test_no_two_calls_of_a_session_share_a_seed() -> None:
    scenarios = make_scenarios(256, per_s=1.0)
    rounds = [each.in_round(n) for each in scenarios for n in range(each.max_rounds)]
    seeds = [call.seed for each in rounds for call in each.calls]

    assert len(seeds) == len(set(seeds))


def test_poisson_arrivals_keep_their_rate_and_are_the_same_again() -> None:
    first, again = (ScenarioMaker(64).poisson(99, per_s=5.0) for _ in range(2))
    times = [call.arrives_s for call in first.calls]

    assert first == again
    assert times == sorted(times)
    assert 99 / times[-1] == pytest.approx(5.0, rel=0.3)


def test_only_the_late_call_of_a_pair_is_judged() -> None:
    scenario = ScenarioMaker(64).behind(3)

    assert [[call.num_inference_steps for call in part] for part in scenario.parts] == [
        [50, 20]
    ] * 3
    assert all(late.arrives_s > early.arrives_s for early, late in scenario.parts)
    assert scenario.judged_steps == 20


def test_report_writes_three_files_and_no_invalid_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    charts = [report.Chart("ratio", {"case": {"ours": 2.0, "plain": float("nan")}}, 1.0)]

    report.write_report(tmp_path, "x", {"value": float("nan"), "list": (1,)}, "# Title\n", charts)

    assert json.loads((tmp_path / "x.json").read_text()) == {"value": None, "list": [1]}
    assert (tmp_path / "x.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
    assert (tmp_path / "x.png").stat().st_size > 1_000


def test_table_shows_three_digits_and_dashes() -> None:
    text = report.table(["case", "x", "y"], [["a", 1.23456, None], ["b", 1234.5, 7]])

    assert text.splitlines()[2:] == ["| a | 1.23 | – |", "| b | 1234 | 7 |"]


def modules_needed_by(name: str) -> set[str]:
    """What a benchmark imports, through the benchmarks' own modules."""
    found: set[str] = set()
    waiting = {f"benchmarks.{name}"}
    while waiting:
        module = waiting.pop()
        found.add(module)
        if not module.startswith("benchmarks."):
            continue
        path = BENCHMARKS.parent / (module.replace(".", "/") + ".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = node.module or ""
                is_package = package in ("benchmarks", "benchmarks.device")
                names = [f"{package}.{a.name}" if is_package else package for a in node.names]
            waiting |= {*names} - found
    return found


DEVICE_PHASES = "ceilings profiles shapes switches stages pictures".split()


@pytest.mark.parametrize("name", ["engine", *(f"device.{each}" for each in DEVICE_PHASES)])
def test_benchmarks_of_the_engine_need_no_web_and_no_database(name: str) -> None:
    """A machine with a GPU may have torch and little else."""
    needed = {module.split(".")[0] for module in modules_needed_by(name)}

    assert "models" in needed
    assert not needed & {"server", "tests", "fastapi", "httpx", "psutil", "sqlalchemy", "uvicorn"}


def test_soak_has_every_fate_and_size_and_is_the_same_again() -> None:
    calls = make_calls(2_000)

    assert calls == make_calls(2_000)
    assert {call.fate for call in calls} == set(Fate)
    assert sum(call.fate is Fate.CANCEL for call in calls) == pytest.approx(100, rel=0.3)
    assert len({(call.width, call.height) for call in calls}) == 4


def test_growth_is_measured_after_the_first_part() -> None:
    values = [10] * 10 + [100] * 80 + [103] * 10

    assert parts_of(values) == [10.0, *[100.0] * 8, 103.0]
    assert growth_of(parts_of(values)) == pytest.approx(0.03)
    assert growth_of(parts_of([5])) == 0.0


@pytest.mark.process
def test_small_soak_loses_no_call_and_no_job(tmp_path: Path) -> None:
    findings = soak(30, tmp_path)

    assert [fault for fault in findings["faults"] if "grew" not in fault] == []
    assert sum(findings["answers"].values()) == sum(findings["jobs"].values()) == 30
    assert findings["jobs"]["failed"] == findings["fates"][Fate.FAILURE] > 0


@pytest.mark.process
def test_load_is_measured_on_a_real_server(tmp_path: Path) -> None:
    size = Size(accept_s=0.5, fetch_s=0.2, waiting=10, webhooks=100)
    engine = open_engine(Settings(data_dir=tmp_path / "data").sqlalchemy_url)
    figures: dict[str, float] = {}
    with running_api(tmp_path / "data") as server:
        for part in (accept, fetch, wait_together, call_webhooks, recover):
            figures |= asyncio.run(part(server, engine, size))
    engine.dispose()

    assert figures["accept_jobs"] > 10
    assert figures["webhooks_arrived"] == LIVING
    assert all(value > 0 for name, value in figures.items() if name != "accept_growth_percent")
    measured_elsewhere = {"overhead_p50_ms", "start_p50_s"}
    assert {target.figure for target in TARGETS} <= figures.keys() | measured_elsewhere


def test_load_report_says_which_targets_are_met() -> None:
    findings = {
        "machine": {"cpu": "x", "cores": 2, "gpu": None, "versions": {}, "load_average_before": 0},
        "database": "SQLite",
        "filesystem": "ext4",
        "fsync_ms": 4.0,
        "figures": {target.figure: 60.0 for target in TARGETS} | {"accept_jobs": 7},
    }
    text = to_text(findings)

    assert "| accept at 100/s, p50, ms | ≤ 20 | 60 | short |" in text
    assert "| accept at 100/s, p99, ms | ≤ 80 | 60 | met |" in text
    assert "| fetches per second | ≥ 500 | 60 | short |" in text
    assert "| webhooks per second, 10 % dead receivers | ≥ 50 | 60 | met |" in text
    assert "| accept jobs | 7 |" in text


def test_disk_is_told_from_memory(tmp_path: Path) -> None:
    assert fsync_ms(tmp_path, count=3) > 0
    assert not list(tmp_path.iterdir())
    assert filesystem_of(Path("/proc")) == "proc"
    assert "proc" not in MEMORY_FILESYSTEMS


SLOW_DISK = """
import sys
from pathlib import Path
from benchmarks.disks import fsync_ms, is_slowed_down, run_again_on_slow_disk
folder = Path(sys.argv[1])
if not is_slowed_down():
    raise SystemExit(run_again_on_slow_disk(30, sys.orig_argv[1:]))
print(fsync_ms(folder, count=3))
"""


def test_disk_is_as_slow_as_asked_for(tmp_path: Path) -> None:
    program("cc")  # for the slow disk, which is a library in C
    command = [sys.executable, "-c", SLOW_DISK, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(answer.stdout) >= 30

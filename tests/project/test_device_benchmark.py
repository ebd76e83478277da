"""The benchmark of a GPU runs here too, on small models, and keeps what a killed phase found."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.overrides import TorchFunctionMode

from benchmarks.device import pictures, profiles, searched, stages, subjects
from benchmarks.device.__main__ import PHASES, limit_of, main, parse, run_phase
from benchmarks.device.bench import TINY, Bench
from benchmarks.device.gpu_tests import note_verdicts
from benchmarks.device.summary import to_text
from benchmarks.device.switches import (
    ALL,
    EXTREMES,
    NONE,
    OF_VAES,
    PREPARED,
    Switches,
    compared,
    variants,
)
from models.acceleration.fusion import Fusions

pytestmark = [pytest.mark.process, pytest.mark.slow]

SLACK = "20"
"""Other tests run beside, and the limits are for a machine of its own."""


@pytest.mark.parametrize("name", PHASES)
def test_each_phase_runs_on_a_cpu(name: str, tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--phases", name, "--slack", SLACK, "--budget-s", "600"])

    phase = json.loads((tmp_path / "device.json").read_text())["phases"][name]
    assert phase["end"] == "done", phase
    assert phase["findings"]
    assert faults_in(phase["findings"]) == []
    assert f"| {name} |" in (tmp_path / "device.md").read_text()


def faults_in(findings: Any) -> list[str]:
    """What went wrong; a CPU has not all of torch's attention kernels."""
    if not isinstance(findings, dict):
        return []
    own = [str(findings["error"])] if isinstance(findings.get("error"), str) else []
    own += [str(each) for each in findings.get("faults", {}).values()]
    inner = [fault for each in findings.values() for fault in faults_in(each)]
    return [fault for fault in own + inner if "No viable backend" not in fault]


def test_phase_is_killed_at_its_limit_and_keeps_what_it_found(tmp_path: Path) -> None:
    options = parse(["--out", str(tmp_path), "--tiny"])
    part = tmp_path / "http.part"

    phase = run_phase("http", 1.0, options)

    assert phase["end"].startswith("killed after 1 s")
    assert phase["seconds"] < 20
    assert not part.exists()
    assert "killed after 1 s" in to_text({"scale": "tiny", "phases": {"http": phase}})


def test_phases_without_time_left_are_named(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--budget-s", "0", "--phases", "ceilings,http"])

    phases = json.loads((tmp_path / "device.json").read_text())["phases"]
    assert {each["end"] for each in phases.values()} == {"no time left"}


def test_limits_fit_into_one_command_of_ten_minutes() -> None:
    assert sum(PHASES.values()) <= 560 < parse(["--out", "x"]).budget_s < 590


def test_last_phase_has_the_time_that_is_left() -> None:
    options = parse(["--out", "x", "--phases", "ceilings,http,gpu_tests", "--slack", "2"])

    limits = [limit_of(name, options, 100.0) for name in options.phases]

    assert limits == [2 * PHASES["ceilings"], 100.0, 100.0]
    assert limit_of("ceilings", options, 3.0) == 3.0


def test_verdict_of_each_gpu_test_is_noted(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "part", TINY)
    note_verdicts(
        bench,
        [
            "tests/a.py::test_one[float32] PASSED  [ 50%]\n",
            "tests/a.py::test_two FAILED  [100%]\n",
            "FAILED tests/a.py::test_two - assert 1 == 2\n",
        ],
    )

    assert bench.findings == {"test_one[float32]": "PASSED", "test_two": "FAILED"}
    assert json.loads(bench.part.read_text()) == bench.findings


def test_unknown_phase_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as refusal:
        main(["--out", str(out), "--phases", "http,nope"])
    assert refusal.value.code == 2
    assert "no such phase: nope" in capsys.readouterr().err
    assert not out.exists()


def test_every_switch_is_tried_alone_and_left_out() -> None:
    made = dict(variants())

    assert {field.name for field in fields(Fusions)} <= {*Switches.names(), *OF_VAES}
    for name in Switches.names():
        if name in PREPARED:
            assert made[f"all and {name}"] == ALL.turned(name, True) != ALL
            continue
        assert made[f"only {name}"] != NONE
        assert made[f"only {name}"].turned(name, False) == NONE
        assert made[f"all but {name}"].turned(name, True) == ALL
    assert made["none"] == made["none again"] == NONE


def test_comparison_that_ends_early_keeps_its_first_rounds(tmp_path: Path) -> None:
    """As when its time is over."""

    class Unlucky(Bench):
        runs = 0

        def ms_in_queue(self, work: Callable[[], object], count: int | None = None) -> float:
            Unlucky.runs += 1
            if self.runs > 2 * len(EXTREMES):
                raise RuntimeError("no time left")
            return super().ms_in_queue(work, count)

    bench = Unlucky(tmp_path / "part", TINY)
    call = bench.scale.compared[0]
    bench.attempt("step", lambda: compared(bench, "step", call, EXTREMES.items()))

    found = json.loads(bench.part.read_text())["step"]
    assert [*found["variants"]] == [*EXTREMES]
    assert found["blocks"] == 2
    assert found["error"] == "RuntimeError: no time left"
    text = to_text({"scale": "tiny", "phases": {"switches": phase_of({"step": found})}})
    assert "Ended after 2 rounds: RuntimeError: no time left" in text


def phase_of(findings: dict[str, Any]) -> dict[str, Any]:
    """One that has ended."""
    return {"end": "done", "seconds": 1.0, "findings": findings}


def test_profiler_takes_marked_modules_for_operators(tmp_path: Path) -> None:
    """It links kernels that no operator has started to them, and to no user's note."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    bench = Bench(tmp_path / "part", TINY)
    events = profiles.profile_of(bench, model, lambda: model(torch.ones(1, 4)))

    marked = [event for event in events if event.name.startswith(profiles.SCOPE)]
    assert [event.name for event in marked] == ["module:", "module:0"] * profiles.PROFILED_CALLS
    assert {event.scope for event in marked} == {OPERATOR_SCOPE}
    assert not any(event.is_user_annotation for event in marked)
    products = [event for event in events if event.name == "aten::addmm"]
    assert {profiles.module_of(event) for event in products} == {"0"}


OPERATOR_SCOPE = 0
"""`at::RecordScope::FUNCTION`."""


@pytest.mark.parametrize("is_linked", [True, False])
def test_kernel_that_no_module_is_known_for_is_missed(is_linked: bool) -> None:
    """As the profiler of a device gives a launch: the module's call, and what the device did."""
    module = event_of("module:norm", 1, (0.0, 10.0), DeviceType.CPU)
    kernel = event_of("_norm_small_group", 2, (20.0, 50.0), DeviceType.CUDA)
    if is_linked:
        module.append_kernel(kernel.name, 0, 30.0)  # type: ignore[no-untyped-call]

    kernels, modules = profiles.sums_of([module, kernel], is_cuda=True)

    us = 30.0 / profiles.PROFILED_CALLS
    assert profiles.device_us([module, kernel]) == us
    expected = [us] if is_linked else []
    assert [each["us"] for each in kernels.values()] == expected
    assert [each["us"] for name, each in modules.items() if name == "norm"] == expected


def event_of(
    name: str, number: int, span_us: tuple[float, float], device: DeviceType
) -> FunctionEvent:
    """A profiler's."""
    return FunctionEvent(  # type: ignore[no-untyped-call]
        number, name, 0, *span_us, device_type=device, use_device="cuda", is_user_annotation=False
    )


class Convolutions(TorchFunctionMode):
    """The settings under which convolutions are made: TF32, and cuDNN's search."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[tuple[bool, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            cudnn = torch.backends.cudnn
            self.settings.append((cudnn.allow_tf32, cudnn.benchmark))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pictures", "stages"])
def test_float32_references_are_not_rounded_to_tf32(name: str, tmp_path: Path) -> None:
    """And what is compared with them is computed as production does."""
    bench = Bench(tmp_path / "part", TINY)
    with Convolutions() as convolutions:
        if name == "pictures":
            pictures.alike(bench, subjects.components(bench, "tiny"))
        else:
            stages.scaled_decoder(bench, bench.scale.side_px)

    settings = [allows_tf32 for allows_tf32, _ in convolutions.settings]
    reference = settings.index(False)
    after = settings.index(True, reference)
    assert all(settings[after:])
    assert torch.backends.cudnn.allow_tf32


def test_search_is_on_before_the_first_convolution(tmp_path: Path) -> None:
    """torch would keep a plan that a heuristic has found, and never search for that shape.

    References are computed without a search, which does no harm: TF32 is part of what torch
    knows a plan by, and is off for them.
    """
    cudnn = torch.backends.cudnn
    bench = Bench(tmp_path / "part", dataclasses.replace(TINY, replays=1))
    before = cudnn.benchmark
    try:
        with Convolutions() as convolutions:
            searched.run(bench)
    finally:
        cudnn.benchmark = before

    assert set(convolutions.settings) == {(True, True), (False, False)}
    assert faults_in(bench.findings) == []

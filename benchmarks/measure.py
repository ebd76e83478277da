"""What the benchmarks share in measuring: the machine's name, fair turns, figures of merit.

Nothing here knows a server or a model, and nothing heavy is imported before it is needed.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

PACKAGES = ("torch", "diffusers", "transformers")
REPOSITORY = Path(__file__).parents[1]
T = TypeVar("T")


def describe_machine() -> dict[str, Any]:
    """What a result has to name: figures of another machine compare by their ratios only."""
    return {
        "cpu": cpu_name(),
        "cores": core_count(),
        "gpu": gpu_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def words(text: str) -> tuple[str, ...]:
    """`one,two` of a command line."""
    return tuple(text.split(","))


def core_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """The processor as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu_name() -> str | None:
    """The first CUDA device; None on a machine without."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def commit() -> str | None:
    """The checkout that was measured; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in one line, for tables and plots."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    device = f"{machine['gpu']}, " if machine["gpu"] else ""
    return f"{device}{machine['cpu']}, {machine['cores']} cores; {versions}"


class Case(Protocol):
    """One thing to measure. work: its size, in any unit; max_rounds: how often at most."""

    @property
    def work(self) -> float: ...
    @property
    def max_rounds(self) -> int: ...


C = TypeVar("C", bound=Case)
R = TypeVar("R")


class Deadline:
    """A bound on wall time, counted from its making."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then; negative afterwards."""
        return self._ends_at - time.monotonic()


def run_in_turns(
    cases: Sequence[C],
    sides: Sequence[str],
    measure: Callable[[C, str, int], R],
    deadline: Deadline,
) -> dict[C, dict[str, list[R]]]:
    """Measure each case on every side, turn and turn about, in rounds over all cases.

    So whatever else the machine does hits all sides alike, and entry i of each side's list was
    measured at about the same time. The first turn is always taken; one that would
    probably pass the deadline is left out.
    cases: most important first; hashable. measure: told the case, the side and the round.
    """
    results: dict[C, dict[str, list[R]]] = {case: {side: [] for side in sides} for case in cases}
    rounds = range(max(case.max_rounds for case in cases))
    plan = [(number, case) for number in rounds for case in cases if number < case.max_rounds]
    slowest = 0.0  # seconds per unit of work, all sides together
    for number, case in tqdm(plan, desc="turns", unit="turn"):
        if slowest and deadline.left_s <= case.work * slowest:
            continue
        started = time.monotonic()
        for side in rotated(sides, number):
            results[case][side].append(measure(case, side, number))
        slowest = max(slowest, (time.monotonic() - started) / case.work)
    return results


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items in a circle, beginning `by` places later: no side is always the first."""
    start = by % len(items)
    return [*items[start:], *items[:start]]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated between neighbours; NaN of nothing."""
    return float(np.percentile(values, percent)) if values else float("nan")


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of quotients taken round by round, which slow drift leaves alone."""
    pairs = zip(above, below, strict=True)
    quotients = [one / other for one, other in pairs]
    return statistics.median(quotients) if quotients else float("nan")

"""Our engine against plain diffusers, in one process: `python -m benchmarks.engine --out DIR`.

Each case is a number of orders of mixed step counts that arrive together. Ours has them all in
flight; the plain pipeline, which cannot, makes one after the other, or (`plain, batched`) those of
equal step counts in one call. Needs torch, transformers and diffusers; no web, no database.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import checkpoints, measure, report
from benchmarks.orders import Order, make_orders, mixed_steps
from benchmarks.rivals.plain import build_pipeline, paint
from models.diffusion.pipeline import InpaintPipeline
from models.engine import (
    EngineLimits,
    Failed,
    Finished,
    Generation,
    InpaintEngine,
)
from models.errors import OutOfMemory
from models.executors import background_of
from models.model_pool import ModelPool
from models.variants import ModelVariant

OURS, PLAIN, BATCHED, COMPILED = "ours", "plain", "plain, batched", "plain, compiled"
Pictures: TypeAlias = list[NDArray[np.uint8]]
Painter: TypeAlias = Callable[[Sequence[Order]], Pictures]
"""Makes the pictures of some orders, in any order it likes; result in order of the orders."""

MODEL = ModelVariant("benchmarked")

LONGEST_WAIT_S = 1.0
"""For the engine's background. It ends as soon as something is done."""

MOST_ROUNDS = 12
"""Of the smallest case; a case of n orders has an nth of it, and two at least."""


@dataclass(frozen=True, slots=True)
class EngineCase:
    """So many orders of one size at once."""

    family: str
    side_px: int
    in_flight: int
    step_counts: tuple[int, ...]

    @property
    def label(self) -> str:
        """For tables and plots."""
        return f"{self.family} {self.side_px} px, {self.in_flight} in flight"

    @property
    def work(self) -> float:
        """Pixel steps."""
        return float(sum(self.step_counts) * self.side_px**2)

    @property
    def max_rounds(self) -> int:
        """More of small cases, which are quick and noisy."""
        return max(2, MOST_ROUNDS // self.in_flight)

    def orders(self, number: int) -> list[Order]:
        """Those of a round: the same for every side, and never the same again."""
        seed = (number + 1) * 10_000 + self.in_flight * 100
        return make_orders(self.side_px, self.step_counts, seed)


class OurEngine:
    """`InpaintEngine` as a worker uses it; it keeps what it learns about batches."""

    def __init__(self, folder: Path, most_in_flight: int) -> None:
        pipeline = InpaintPipeline(checkpoints.load(folder))
        limits = EngineLimits(max_generations=most_in_flight)
        background = background_of(pipeline.device, is_reproducible=False)
        self._engine = InpaintEngine(ModelPool.of(MODEL, pipeline), limits, background)
        self._ids = count()

    def __call__(self, orders: Sequence[Order]) -> Pictures:
        finished: dict[int, NDArray[np.uint8]] = {}
        ids = [next(self._ids) for _ in orders]
        for generation_id, order in zip(ids, orders, strict=True):
            generation = Generation(generation_id, MODEL, order.params(), order.source())
            self._engine.add(generation)
        while not self._engine.is_idle:
            for event in self._engine.step():
                if isinstance(event, Failed):
                    for each in ids:
                        self._engine.cancel(each)
                    raise event.error
                if isinstance(event, Finished):
                    # Before paste-back, as a plain pipeline returns it.
                    finished[event.generation_id] = event.pictures[0].generated
            if self._engine.is_resting:
                self._engine.wait(LONGEST_WAIT_S)
        return [picture for _, picture in sorted(finished.items())]


def paint_singly(pipeline: Any) -> Painter:
    """One call per order."""
    return lambda orders: [np.asarray(paint(pipeline, [order])[0]) for order in orders]


def paint_grouped(pipeline: Any) -> Painter:
    """One call per step count: the best that batching whole requests can do."""

    def painter(orders: Sequence[Order]) -> Pictures:
        made: dict[int, NDArray[np.uint8]] = {}
        for kind in dict.fromkeys(order.kind for order in orders):
            places = [place for place, order in enumerate(orders) if order.kind == kind]
            pictures = paint(pipeline, [orders[place] for place in places])
            made |= {place: np.asarray(each) for place, each in zip(places, pictures, strict=True)}
        return [made[place] for place in sorted(made)]

    return painter


def make_painters(folder: Path, most_in_flight: int, *, with_compiled: bool) -> dict[str, Painter]:
    """The sides. Ours loads weights of its own: it may change their layout."""
    pipeline = build_pipeline(checkpoints.load(folder))
    painters: dict[str, Painter] = {
        OURS: OurEngine(folder, most_in_flight),
        PLAIN: paint_singly(pipeline),
        BATCHED: paint_grouped(pipeline),
    }
    if with_compiled:
        compiled = build_pipeline(checkpoints.load(folder))
        compiled.unet = torch.compile(compiled.unet, fullgraph=True, dynamic=False)
        painters[COMPILED] = paint_singly(compiled)
    return painters


def timed(painter: Painter, orders: Sequence[Order]) -> float:
    """Seconds until all pictures are on the host; NaN where memory does not suffice."""
    began = time.perf_counter()
    try:
        painter(orders)
    except (torch.OutOfMemoryError, OutOfMemory):
        torch.cuda.empty_cache()
        return math.nan
    return time.perf_counter() - began


def warm_up(painters: dict[str, Painter], case: EngineCase, deadline: measure.Deadline) -> float:
    """Pay for first calls and let ours find its batch size; PSNR (dB) of ours against plain.

    case: the largest of a size. A few steps are enough, and sides for which no time is left warm up
    in their first round.
    """
    orders = make_orders(case.side_px, [8] * case.in_flight, seed=1)
    for name, painter in painters.items():
        if deadline.left_s > 0:
            timed(painter, orders if name in (OURS, BATCHED) else orders[:1])
    ours, plain = painters[OURS](orders[:1])[0], painters[PLAIN](orders[:1])[0]
    error = float(np.mean((ours.astype(np.float64) - plain) ** 2))
    return min(99.0, 10 * math.log10(255**2 / max(error, 1e-9)))


def summarise(case: EngineCase, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over rounds; ratios are of times, above 1 where ours is faster."""
    medians = {side: statistics.median(each) for side, each in seconds.items()}
    cost = checkpoints.COSTS.get((case.family, case.side_px))
    is_on_gpu = checkpoints.default_device().type == "cuda"
    floor_s = cost.floor_s(case.step_counts) if cost and is_on_gpu else None
    rivals = [side for side in seconds if side != OURS]
    return {
        "family": case.family,
        "side_px": case.side_px,
        "in_flight": case.in_flight,
        "step_counts": case.step_counts,
        "rounds": len(seconds[OURS]),
        "pictures_per_s": {side: case.in_flight / each for side, each in medians.items()},
        "ms_per_step": {
            side: 1000 * each / sum(case.step_counts) for side, each in medians.items()
        },
        "times_faster_than": {
            side: measure.median_ratio(seconds[side], seconds[OURS]) for side in rivals
        },
        "share_of_floor": floor_s / medians[OURS] if floor_s else None,
        "seconds": seconds,
    }


def to_text(findings: dict[str, Any]) -> str:
    """Ratios first: they hold on other machines of the kind, and absolute figures do not."""
    rows = findings["cases"]
    sides = findings["sides"]
    lines = [
        f"# Engine: {measure.machine_line(findings['machine'])}",
        "",
        "Times ours is faster than each side, median of rounds measured in turns. Plain is",
        "`StableDiffusionInpaintPipeline`, one order after the other; batched: those of equal step",
        f"counts in one call (for one order the same as plain). Steps: {findings['steps']}.",
        *findings["notes"],
        "",
        report.table(
            ["case", *(f"÷ {side}" for side in sides if side != OURS), "of floor", "rounds"],
            [
                [
                    row["label"],
                    *row["times_faster_than"].values(),
                    row["share_of_floor"],
                    row["rounds"],
                ]
                for row in rows
            ],
        ),
        report.table(
            ["case", *(f"{side}, pictures/s" for side in sides), "ours, ms per step"],
            [
                [row["label"], *row["pictures_per_s"].values(), row["ms_per_step"][OURS]]
                for row in rows
            ],
        ),
        *(
            f"- Overhead at one order, {row['family']} {row['side_px']} px: "
            f"{100 * (1 / row['times_faster_than'][PLAIN] - 1):+.1f} % of plain diffusers."
            for row in rows
            if row["in_flight"] == 1
        ),
        *(
            f"- Ours against plain, {size}: {value:.1f} dB PSNR."
            for size, value in findings["psnr_db"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def to_charts(findings: dict[str, Any]) -> list[report.Chart]:
    """The ratios, and pictures per second of every side."""
    rows = findings["cases"]
    return [
        report.Chart(
            "Times faster than",
            {row["label"]: row["times_faster_than"] for row in rows},
            reference=1.0,
        ),
        report.Chart("Pictures per second", {row["label"]: row["pictures_per_s"] for row in rows}),
    ]


def plan_cases(options: argparse.Namespace) -> list[EngineCase]:
    """Small numbers first: they are the quickest and say the most per second."""
    return [
        EngineCase(family, side_px, number, tuple(mixed_steps(options.steps, number, seed=number)))
        for number in options.in_flight
        for family in options.families
        for side_px in options.sides
        if family != "sdxl" or side_px >= 1024  # it was not trained for less
    ]


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the checkpoints, warm up, measure."""
    deadline = measure.Deadline(options.budget_s)
    notes = [f"- {each}: this tree cannot load it." for each in options.unsupported]
    cases = plan_cases(options)
    painters = {
        family: make_painters(
            checkpoints.checkpoint_folder(family, scratch),
            max(options.in_flight),
            with_compiled=options.compiled,
        )
        for family in options.families
    }
    largest = {(case.family, case.side_px): case for case in cases}
    psnr_db = {
        f"{family} {side_px} px": warm_up(painters[family], case, deadline)
        for (family, side_px), case in largest.items()
    }
    sides = list(painters[options.families[0]])
    results = measure.run_in_turns(
        cases,
        sides,
        lambda case, side, number: timed(painters[case.family][side], case.orders(number)),
        deadline,
    )
    return {
        "machine": measure.describe_machine(),
        "steps": "/".join(map(str, options.steps)),
        "sides": sides,
        "notes": notes
        + [f"- {case.label}: no time left." for case in cases if is_empty(results[case])],
        "psnr_db": psnr_db,
        "cases": [
            {"label": case.label, **summarise(case, results[case])}
            for case in sorted(cases, key=lambda case: (case.family, case.side_px, case.in_flight))
            if not is_empty(results[case])
        ],
    }


def is_empty(seconds: dict[str, list[float]]) -> bool:
    """True for a case whose turn never came."""
    return not seconds[OURS]


def numbers(text: str) -> list[int]:
    """`1,2,4` as integers."""
    return [int(word) for word in text.split(",")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; defaults are what the machine can do in the time."""
    is_on_gpu = checkpoints.default_device().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--families", default="sd15,sdxl" if is_on_gpu else "builtin", help="builtin, sd15, sdxl"
    )
    parser.add_argument(
        "--sides", type=numbers, default=[512, 1024] if is_on_gpu else [256, 512], help="pixels"
    )
    parser.add_argument(
        "--in-flight", type=numbers, default=[1, 2, 4, 8, 16, 32] if is_on_gpu else [1, 2, 4, 8, 16]
    )
    parser.add_argument(
        "--steps", type=numbers, default=[20, 30, 50] if is_on_gpu else [10, 15, 25]
    )
    parser.add_argument("--compiled", action="store_true", help="also a torch.compile'd UNet")
    parser.add_argument("--budget-s", type=float, default=480, help="wall time, about")
    options = parser.parse_args(arguments)
    asked = options.families.split(",")
    options.families = [family for family in asked if checkpoints.is_supported(family)]
    options.unsupported = [family for family in asked if family not in options.families]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `engine.json`, `.md` and `.png`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as scratch:
        findings = run(options, Path(scratch))
    report.write_report(options.out, "engine", findings, to_text(findings), to_charts(findings))


if __name__ == "__main__":
    main()

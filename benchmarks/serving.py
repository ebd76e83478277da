"""Our server against the obvious ones, over HTTP: `python -m benchmarks.serving --out DIR`.

Three servers with the same checkpoint and the same number of threads run at once, and one at a
time is driven: `ours` (`inpaint-server serve`), `obvious` (one pipeline and a lock) and `batched`
(whole requests in one call). All get the same calls, fetch the same pictures and answer with PNGs.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, measure, report
from benchmarks.clients import (
    TIMEOUT_S,
    Answer,
    Call,
    Ours,
    Rival,
    Target,
    drive,
    save_images,
    wait_until_ready,
)
from benchmarks.orders import mixed_steps
from server.serving.server import bind
from tests.support.processes import image_host, serving

OURS, OBVIOUS, BATCHED = "ours", "obvious", "batched"
SIDES = (OURS, OBVIOUS, BATCHED)
STEPS = (20, 30, 50)
START_TIMEOUT_S = 180.0
BEHIND_S = 0.2
"""How long after the 50-step call the 20-step one comes."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Calls and who makes them.

    parts: driven one after the other, each by `clients` clients.
    judged_steps: only calls of this step count are timed; None for all.
    """

    name: str
    clients: int
    parts: tuple[tuple[Call, ...], ...]
    max_rounds: int = 4
    judged_steps: int | None = None

    @property
    def calls(self) -> list[Call]:
        """All calls of one round."""
        return [call for part in self.parts for call in part]

    @property
    def work(self) -> float:
        """Denoising steps."""
        return float(sum(call.num_inference_steps for call in self.calls))

    def in_round(self, number: int) -> "Scenario":
        """The same with calls that no server has seen."""
        parts = [[replace(c, seed=c.seed + 10_000 * number) for c in part] for part in self.parts]
        return replace(self, parts=tuple(map(tuple, parts)))


@dataclass(frozen=True, slots=True)
class Run:
    """One scenario on one server."""

    answers: list[Answer]
    elapsed_s: float
    judged_steps: int | None

    @property
    def per_s(self) -> float:
        """Pictures per second."""
        return len(self.answers) / self.elapsed_s

    @property
    def judged(self) -> list[Answer]:
        """The answers that count for latency."""
        wanted = self.judged_steps
        return [each for each in self.answers if wanted in (None, each.num_inference_steps)]


@dataclass(slots=True)
class ScenarioMaker:
    """Makes scenarios whose calls differ in seed, prompt and picture."""

    side_px: int
    steps: Sequence[int] = STEPS
    _made: int = 0

    def closed(self, clients: int, count: int, max_rounds: int = 4) -> Scenario:
        """Clients that call again as soon as they are answered."""
        return Scenario(f"{clients} clients", clients, (self._mixed(count),), max_rounds)

    def burst(self, count: int) -> Scenario:
        """All at once."""
        return Scenario(f"burst of {count}", count, (self._mixed(count),))

    def poisson(self, count: int, per_s: float) -> Scenario:
        """Arrivals of a rate, whatever the answers do; the same times for every server."""
        rng, at_s = random.Random(self._made), 0.0
        calls = []
        for call in self._mixed(count):
            at_s += rng.expovariate(per_s)
            calls.append(replace(call, arrives_s=at_s))
        return Scenario(f"Poisson, {per_s:.2f} per s", count, (tuple(calls),))

    def behind(self, pairs: int) -> Scenario:
        """A 20-step call that comes while a 50-step one is worked on."""
        parts = tuple(self._calls([max(STEPS), min(STEPS)]) for _ in range(pairs))
        parts = tuple((first, replace(second, arrives_s=BEHIND_S)) for first, second in parts)
        return Scenario("20 steps behind 50", 2, parts, judged_steps=min(STEPS))

    def _mixed(self, count: int) -> tuple[Call, ...]:
        return self._calls(mixed_steps(self.steps, count, seed=count))

    def _calls(self, step_counts: Sequence[int]) -> tuple[Call, ...]:
        first = self._made = self._made + 100
        return tuple(
            Call(steps, seed, self.side_px) for seed, steps in enumerate(step_counts, start=first)
        )


def make_scenarios(side_px: int, per_s: float, steps: Sequence[int] = STEPS) -> list[Scenario]:
    """What says most comes first, what takes longest comes last and once.

    steps: mixed in equal shares, but for the pairs of a long and a short call.
    """
    maker = ScenarioMaker(side_px, steps)
    return [
        maker.behind(5),
        maker.closed(8, 24),
        maker.closed(1, 3),
        maker.closed(4, 9),
        maker.closed(16, 24),
        maker.burst(16),
        maker.poisson(12, per_s),
        maker.closed(64, 64, max_rounds=1),
    ]


class Bench:
    """The servers, and the pictures they fetch."""

    def __init__(self, targets: dict[str, Target], images: Path) -> None:
        self._targets = targets
        self._images = images

    def run(self, scenario: Scenario, side: str, number: int) -> Run:
        """A scenario's calls of a round, on one server."""
        of_round = scenario.in_round(number)
        save_images(self._images, of_round.calls)
        answers: list[Answer] = []
        elapsed_s = 0.0
        for part in of_round.parts:
            some, seconds = asyncio.run(drive(self._targets[side], part, scenario.clients))
            answers += some
            elapsed_s += seconds
        return Run(answers, elapsed_s, scenario.judged_steps)

    def warm_up(self, side_px: int) -> float:
        """Two calls to each server; pictures per second of the obvious one over the mix."""
        per_s = 0.0
        for side in self._targets:
            for seed in (1, 2):
                call = Call(min(STEPS), seed, side_px)
                run = self.run(Scenario("warm-up", 1, ((call,),)), side, 0)
            if side == OBVIOUS:
                per_s = run.per_s * min(STEPS) * len(STEPS) / sum(STEPS)
        return per_s


@contextmanager
def running_servers(folder: Path, scratch: Path, threads_each: int) -> Iterator[Bench]:
    """All three with the same checkpoint, ready; stopped at the end."""
    images = scratch / "images"
    images.mkdir()
    threads = {"OMP_NUM_THREADS": str(threads_each)}
    settings = {"INPAINT_HOLD_S": str(TIMEOUT_S), "INPAINT_STEPS_POLICY": "exact"}
    data_dir = scratch / "data"
    with ExitStack() as stack:
        images_url = stack.enter_context(image_host(images))
        ours = stack.enter_context(
            serving(data_dir, {**threads, **settings}, "--model", str(folder))
        )
        targets: dict[str, Target] = {OURS: Ours(ours.url, images_url, data_dir)}
        for side in (OBVIOUS, BATCHED):
            url = stack.enter_context(running_rival(side, folder, scratch, threads))
            targets[side] = Rival(url, images_url)
        yield Bench(targets, images)


@contextmanager
def running_rival(name: str, folder: Path, scratch: Path, threads: dict[str, str]) -> Iterator[str]:
    """A program of `benchmarks.rivals`, ready; gives its base URL."""
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", f"benchmarks.rivals.{name}"]
    with (scratch / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--model", str(folder), "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=measure.REPOSITORY,
            env={**os.environ, **threads},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/openapi.json", START_TIMEOUT_S)
        yield url
    finally:
        process.terminate()
        process.wait()


def summarise(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Figures of one scenario per server, over all rounds, and their ratios to the obvious one."""
    figures = {side: figures_of(each) for side, each in runs.items()}
    base = figures[OBVIOUS]
    return {
        "rounds": len(runs[OURS]),
        "servers": figures,
        "throughput_ratio": {
            side: measure.median_ratio(
                [run.per_s for run in runs[side]], [run.per_s for run in runs[OBVIOUS]]
            )
            for side in runs
        },
        "p50_ratio": {side: each["p50_s"] / base["p50_s"] for side, each in figures.items()},
        "p95_ratio": {side: each["p95_s"] / base["p95_s"] for side, each in figures.items()},
    }


def figures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Throughput, and percentiles of the judged calls."""
    judged = [answer for run in runs for answer in run.judged]
    latencies = [answer.latency_s for answer in judged]
    delays = [answer.start_delay_s for answer in judged]
    return {
        "calls": len(judged),
        "pictures_per_s": sum(len(run.answers) for run in runs) / sum(r.elapsed_s for r in runs),
        "p50_s": measure.percentile(latencies, 50),
        "p95_s": measure.percentile(latencies, 95),
        "p99_s": measure.percentile(latencies, 99),
        "start_p50_s": measure.percentile(delays, 50),
        "start_p95_s": measure.percentile(delays, 95),
        "latencies_s": [round(each, 4) for each in latencies],
    }


def to_text(findings: dict[str, Any]) -> str:
    """Ratios first: they hold on other machines of the kind, and absolute figures do not."""
    cases = findings["scenarios"]
    ratios = [
        [
            name,
            *(row["throughput_ratio"][side] for side in (OURS, BATCHED)),
            *(row["p50_ratio"][side] for side in (OURS, BATCHED)),
            *(row["p95_ratio"][side] for side in (OURS, BATCHED)),
            row["rounds"],
        ]
        for name, row in cases.items()
    ]
    keys = ("pictures_per_s", "p50_s", "p95_s", "p99_s", "start_p50_s", "start_p95_s", "calls")
    absolute = [
        [name, side, *(figures[key] for key in keys)]
        for name, row in cases.items()
        for side, figures in row["servers"].items()
    ]
    names = ("ours", "batched")
    steps = "/".join(map(str, findings["steps"]))
    lines = [
        f"# Serving: {measure.machine_line(findings['machine'])}",
        "",
        f"{findings['model']}, {findings['side_px']}², {steps} steps mixed,",
        "relative to the obvious server (one pipeline, one lock). Throughput: more is better;",
        "latency: less is better. Behind: the 20-step call alone is timed.",
        *(f"- {name}: no time left." for name in findings["left_out"]),
        "",
        report.table(
            [
                "scenario",
                *(f"throughput, {name}" for name in names),
                *(f"p50, {name}" for name in names),
                *(f"p95, {name}" for name in names),
                "rounds",
            ],
            ratios,
        ),
        "Seconds until the last byte of the PNG; start: until the first step could begin.",
        "",
        report.table(
            [
                "scenario",
                "server",
                "pictures/s",
                "p50",
                "p95",
                "p99",
                "start p50",
                "start p95",
                "n",
            ],
            absolute,
        ),
    ]
    return "\n".join(lines)


def to_charts(findings: dict[str, Any]) -> list[report.Chart]:
    """The two ratios that matter."""
    cases = findings["scenarios"]
    return [
        report.Chart(
            title,
            {
                name: {side: row[key][side] for side in (OURS, BATCHED)}
                for name, row in cases.items()
            },
            reference=1.0,
        )
        for title, key in (
            ("Throughput, times the obvious server's (longer is better)", "throughput_ratio"),
            ("p95 latency, times the obvious server's (shorter is better)", "p95_ratio"),
        )
    ]


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start the servers, warm them, drive them in turns."""
    deadline = measure.Deadline(options.budget_s)
    machine = measure.describe_machine()
    folder = checkpoints.checkpoint_folder(options.family, scratch)
    with running_servers(folder, scratch, options.threads) as bench:
        capacity_per_s = bench.warm_up(options.side)
        scenarios = [
            each
            for each in make_scenarios(options.side, options.load * capacity_per_s, options.steps)
            if each.name.startswith(options.only)
        ]
        results = measure.run_in_turns(scenarios, SIDES, bench.run, deadline)
    return {
        "machine": machine,
        "model": options.family,
        "side_px": options.side,
        "steps": options.steps,
        "threads": options.threads,
        "left_out": [each.name for each in scenarios if not results[each][OURS]],
        "scenarios": {
            each.name: summarise(results[each]) for each in scenarios if results[each][OURS]
        },
    }


def numbers(text: str) -> tuple[int, ...]:
    """`20,30` as integers."""
    return tuple(map(int, text.split(",")))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; defaults are what the machine can do in the time."""
    is_on_gpu = checkpoints.default_device().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--family", default="sd15" if is_on_gpu else "builtin", help="builtin, sd15 or sdxl"
    )
    parser.add_argument("--side", type=int, default=512 if is_on_gpu else 256, help="pixels")
    parser.add_argument(
        "--load", type=float, default=0.7, help="Poisson rate, times the obvious server's capacity"
    )
    parser.add_argument(
        "--threads", type=int, default=measure.core_count(), help="of each server, for torch"
    )
    parser.add_argument(
        "--only", type=measure.words, default=("",), help="scenarios whose names begin so"
    )
    parser.add_argument("--steps", type=numbers, default=STEPS, help="mixed in equal shares")
    parser.add_argument("--budget-s", type=float, default=480, help="wall time, about")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `serving.json`, `.md` and `.png`."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as scratch:
        findings = run(options, Path(scratch))
    report.write_report(options.out, "serving", findings, to_text(findings), to_charts(findings))


if __name__ == "__main__":
    main()

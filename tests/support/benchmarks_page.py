"""`make docs`: writes `docs/benchmarks.md` from the reports in `benchmarks/results`.

Only what the JSON files hold is on the page, so that a new report changes it and nothing else does.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.load import TARGETS
from benchmarks.measure import machine_line
from benchmarks.report import Cell, table
from tests.support.repository import REPOSITORY

PAGE = REPOSITORY / "docs" / "benchmarks.md"
RESULTS = REPOSITORY / "benchmarks" / "results"

Findings = dict[str, Any]

_HEAD = """\
# Benchmarks

What was measured, on which machine, and the command that repeats it. Ratios compare sides that took
turns in one run; absolute figures hold for the named machine only.
[benchmarks/README.md](../benchmarks/README.md) says how each benchmark measures. Each report
has further tables. `make bench` runs four of the benchmarks into `out/bench`.
`make docs` writes this page from the JSON files in `benchmarks/results`.
"""

_DEVICE = """
## Kernels and switches on a GPU

<!-- needs: gpu, time -->
```sh
python -m benchmarks.device --out out/bench
```

This program has not run on a GPU yet: [device.md](../benchmarks/results/device.md) comes from a
CPU with small models and shows that the program runs. [engine.md](engine.md) has figures of one
H100.
"""


def page() -> str:
    """The content of `docs/benchmarks.md`."""
    of_servers = (serving, engine, host, load, soak, fleet, commits, depth)
    sections = (*of_servers, roofline, guidance, quality, photographs)
    return _HEAD + "".join("".join(section()) for section in sections) + _DEVICE


def read(name: str) -> Findings:
    found: Findings = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def heading(title: str, text: str, command: str, needs: str = "time") -> str:
    """The head of a section. command: what repeats it, in a checkout after `make install`."""
    run = f"<!-- needs: {needs} -->\n```sh\n{command}\n```\n"
    return f"\n## {title}\n\n{text}\n\n{run}"


def source(name: str, findings: Findings) -> str:
    """Where figures come from: the report, the machine, and the commit."""
    machine = findings["machine"]
    state = f"commit {machine['commit']}, load average before {machine['load_average_before']:g}"
    return f"\n[{name}.md](../benchmarks/results/{name}.md): {machine_line(machine)}; {state}.\n\n"


# --- one machine ---


def serving() -> Iterator[str]:
    yield heading(
        "Pictures over HTTP",
        "Against an obvious server (one pipeline, one lock) and one that batches whole requests. "
        "Latency in seconds\nuntil the PNG's last byte; throughput over that of the other server.",
        "python -m benchmarks.serving --out out/bench",
    )
    for name in ("serving_h100", "serving", "serving_512", "serving_64"):
        findings = read(name)
        yield source(name, findings)
        yield table(
            [
                f"{findings['model']}, {findings['side_px']}²",
                *("pictures/s", "p50", "p95", "÷ obvious", "÷ batched"),
            ],
            [serving_row(label, each) for label, each in findings["scenarios"].items()],
        )


def serving_row(label: str, scenario: Findings) -> list[Cell]:
    ours, ratios = scenario["servers"]["ours"], scenario["throughput_ratio"]
    return [
        label,
        *(ours[name] for name in ("pictures_per_s", "p50_s", "p95_s")),
        ratios["ours"],
        ratios["ours"] / ratios["batched"],
    ]


def engine() -> Iterator[str]:
    yield heading(
        "The engine against diffusers",
        "In one process. Plain is diffusers' pipeline, one order after the other; batched, those "
        "of equal step\ncounts in one call.",
        "python -m benchmarks.engine --out out/bench",
    )
    for name in ("engine_h100", "engine"):
        findings = read(name)
        yield source(name, findings)
        yield table(
            ["orders of mixed step counts", "pictures/s", "÷ plain", "÷ plain, batched"],
            [
                [
                    case["label"],
                    case["pictures_per_s"]["ours"],
                    case["times_faster_than"]["plain"],
                    case["times_faster_than"]["plain, batched"],
                ]
                for case in findings["cases"]
            ],
        )


def host() -> Iterator[str]:
    findings = read("host")
    yield heading(
        "Processor time besides the model",
        "For one 512² picture by URL, with a model that returns the init image, ms.",
        "python -m benchmarks.host --out out/bench",
    )
    yield source("host", findings)
    yield table(
        ["clients", "API", "worker", "both", "wall"],
        [
            [number, *(each[f"{name}_ms"] for name in ("api", "worker", "total", "wall"))]
            for number, each in findings["clients"].items()
        ],
    )


def load() -> Iterator[str]:
    yield heading(
        "What one API process bears",
        "Two runs: on this machine's disk, and with every fsync made 4 ms longer. SQLite.",
        "python -m benchmarks.load --out out/bench\n"
        "python -m benchmarks.load --out out/bench --fsync-ms 4",
    )
    runs = {name: read(name) for name in ("load", "load_4ms")}
    for name, findings in runs.items():
        yield source(name, findings)
    run_figures = runs["load"]["figures"]
    yield table(
        ["figure", "target", *(f"fsync {run['fsync_ms']:.2g} ms" for run in runs.values())],
        [
            [
                *target.row(run_figures)[:2],
                *(run["figures"][target.figure] for run in runs.values()),
            ]
            for target in TARGETS
        ],
    )


def soak() -> Iterator[str]:
    findings = read("soak")
    yield heading(
        "Memory over many jobs",
        f"{findings['calls']:,} calls of eight clients; a call without an answer, or a job without "
        "an end, fails the run.",
        "python -m benchmarks.soak --out out/bench",
    )
    yield source("soak", findings)
    yield table(
        ["process", "MiB after warm-up", "MiB at the end", "growth, %"],
        [
            [process, kib[1] / 1024, kib[-1] / 1024, 100 * findings["growth"][process]]
            for process, kib in findings["memory_kib"].items()
        ],
    )


# --- many machines ---


def fleet() -> Iterator[str]:
    findings = read("fleet")
    yield heading(
        "Many workers",
        "Workers on one PostgreSQL and one S3 server, with an engine that waits a second for each "
        "picture.",
        "python -m benchmarks.fleet --out out/bench",
    )
    yield source("fleet", findings)
    yield table(
        [
            "workers",
            "pictures/s, full queue",
            "efficiency",
            "commits/s",
            "p50, s, at 0.7 of it",
            "p95, s",
        ],
        [
            [
                number,
                *(each["full"][name] for name in ("pictures_per_s", "efficiency", "commits_per_s")),
                *(each["open"][name] for name in ("p50_s", "p95_s")),
            ]
            for number, each in findings["by_workers"].items()
        ],
    )


def commits() -> Iterator[str]:
    findings = read("commits")
    rates: Findings = findings["per_s"]
    yield heading(
        "What PostgreSQL bears",
        f"Per second, on a disk with an fsync of {findings['fsync_ms']:.2g} ms.",
        "python -m benchmarks.commits --out out/bench",
    )
    yield source("commits", findings)
    clients: Sequence[str] = [*next(iter(rates.values()))]
    yield table(
        ["clients", *rates],
        [[number, *(rate[number] for rate in rates.values())] for number in clients],
    )


def depth() -> Iterator[str]:
    findings = read("depth")
    yield heading(
        "Deep queues",
        "Median of database calls on PostgreSQL, ms.",
        "python -m benchmarks.depth --out out/bench",
    )
    yield source("depth", findings)
    yield table(
        ["call", *findings["databases"]],
        [[call, *times] for call, times in findings["median_ms"].items()],
    )


# --- no server ---


def roofline() -> Iterator[str]:
    yield heading(
        "Kernels per call, modelled",
        "Counted without a GPU; the times are a model of an H100 and not measured "
        "([roofline.md](../benchmarks/results/roofline.md)).",
        "python -m benchmarks.roofline --out out/bench",
    )
    yield "\n"
    yield table(
        ["call", "kernels", "TFLOP", "floor, ms", "modelled, ms"],
        [
            [call, *(each[name] for name in ("kernels", "tflop", "floor_ms", "modelled_ms"))]
            for call, each in read("roofline")["calls"].items()
        ],
    )


def guidance() -> Iterator[str]:
    findings = read("guidance")
    yield heading(
        "Guidance that ends early",
        "Rows of UNet calls and time as a share of those with guidance to the end, and the PSNR "
        "inside the mask against these pictures, dB. The built-in model.",
        "python -m benchmarks.guidance --out out/bench",
    )
    yield source("guidance", findings)
    yield table(
        ["guidance_end", "rows", "time", "PSNR"],
        [
            [share, *(each[name] for name in ("rows", "time", "psnr_db"))]
            for share, each in findings["shares"].items()
        ],
    )


def quality() -> Iterator[str]:
    findings = read("builtin_quality")
    yield heading(
        "What the built-in model paints",
        "Share of pictures with the right colour and shape, % "
        "([builtin_quality.md](../benchmarks/results/builtin_quality.md)).",
        "python -m models.builtin.training.quality --out out/quality",
    )
    yield "\n"
    yield table(
        ["mode", "cases", "colour", "shape", "both"],
        [
            [mode, each["cases"], *(100 * each[name] for name in ("colour", "shape", "both"))]
            for mode, each in findings["modes"].items()
        ],
    )


def photographs() -> Iterator[str]:
    findings = read("builtin_photographs")
    yield heading(
        "What it makes of photographs",
        "Held-out photographs with an empty prompt, inside the mask: the error of blurred colours "
        "(0 to 441), the PSNR in dB, gradients over those around, and across the mask's edge "
        "([builtin_photographs.md](../benchmarks/results/builtin_photographs.md)).",
        "python -m benchmarks.builtin_photographs --photographs photographs --out out/quality",
    )
    yield "\n"
    yield table(
        ["", "cases", "colour", "PSNR", "texture", "seam"],
        [
            [who, *(each[name] for name in ("cases", "colour", "psnr_db", "texture", "seam"))]
            for who, each in findings["fills"].items()
        ],
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

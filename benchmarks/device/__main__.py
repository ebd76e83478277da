"""All that a GPU has to answer in ten minutes: `python -m benchmarks.device --out DIR`.

Nine phases, each a process that is killed at its limit. `device.json` and `device.md` are written
anew after each of them, and a phase's findings as they come, so that nothing that was measured is
lost. A phase that fails is reported and the next one begins; the exit status is 0 all the same.
With --tiny, or where there is no CUDA device, small models show that the program runs.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.device.bench import FULL, TINY, Bench
from benchmarks.device.summary import phase_table, to_text
from models.checkpoints.files.fingerprint import write_whole

PHASES = {
    "ceilings": 20.0,
    "profiles": 65.0,
    "shapes": 45.0,
    "switches": 135.0,
    "searched": 60.0,
    "stages": 40.0,
    "pictures": 25.0,
    "http": 120.0,
    "gpu_tests": 40.0,
}
"""Modules beside this one, in order, and the seconds that each may take."""

GRACE_S = 3.0
"""Between the signal that a phase can answer and the one that it cannot."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the phases, or, as a child of this program, one of them."""
    options = parse(arguments)
    scale = TINY if options.tiny else FULL
    if options.child:
        bench = Bench(options.child, scale)
        if not bench.is_cuda:
            torch.set_num_threads(1)  # more of them wait for one another on small tensors
        importlib.import_module(f"benchmarks.device.{options.phases[0]}").run(bench)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = measure.Deadline(options.budget_s)
    findings: dict[str, Any] = {"scale": "tiny" if options.tiny else "full", "phases": {}}
    for name in options.phases:
        limit_s = limit_of(name, options, deadline.left_s)
        findings["phases"][name] = run_phase(name, limit_s, options)
        write_whole(options.out / "device.json", json.dumps(findings, indent=1) + "\n")
        write_whole(options.out / "device.md", to_text(findings))
        print(phase_table(findings["phases"]), flush=True)
    print((options.out / "device.md").read_text())


def limit_of(name: str, options: argparse.Namespace, left_s: float) -> float:
    """Seconds that a phase may take; the last one has all that the others have left."""
    is_last = name == options.phases[-1]
    return left_s if is_last else min(options.slack * PHASES[name], left_s)


def run_phase(name: str, limit_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """What it found, how it ended and how long it took."""
    if limit_s <= 0:
        return {"end": "no time left", "seconds": 0.0, "findings": {}}
    part = options.out / f"{name}.part"
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.device", "--out", str(options.out)]
    command += ["--phases", name, "--child", str(part), *(["--tiny"] if options.tiny else [])]
    began = time.monotonic()
    with (options.out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=measure.REPOSITORY, start_new_session=True
        )
        end = end_of(process, limit_s)
    seconds = round(time.monotonic() - began, 1)
    findings = json.loads(part.read_text()) if part.exists() else {}
    part.unlink(missing_ok=True)
    if end != "done":
        end += ": " + (options.out / f"{name}.log").read_text(errors="replace")[-600:]
    return {"end": end, "seconds": seconds, "findings": findings}


def end_of(process: subprocess.Popen[bytes], limit_s: float) -> str:
    """Wait for a phase, and end it with all its children when its time is over."""
    try:
        status = process.wait(limit_s)
        return "done" if status == 0 else f"failed with {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        return f"killed after {limit_s:.0f} s"
    finally:
        # Its servers are in its process group, and would hold the device for the next phase.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.device", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=570, help="wall time of all phases")
    parser.add_argument("--phases", type=phases, default=[*PHASES], help=",".join(PHASES))
    parser.add_argument("--slack", type=float, default=1.0, help="times a phase's limit")
    parser.add_argument("--tiny", action="store_true", help="small models, as on a CPU")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    options.tiny = options.tiny or measure.gpu_name() is None
    return options


def phases(text: str) -> list[str]:
    """`profiles,http` in the order given. Raises: argparse.ArgumentTypeError."""
    asked = text.split(",")
    if unknown := [name for name in asked if name not in PHASES]:
        raise argparse.ArgumentTypeError(f"no such phase: {', '.join(unknown)}")
    return asked


if __name__ == "__main__":
    main()

"""Phase 8: the quickest of the tests that need a device, one finding each as it ends."""

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec

from benchmarks import measure
from benchmarks.device.bench import Bench

TESTS = "tests/models/acceleration/test_gpu.py"
QUICK = "replayed or padded or dropped or attention or fused or reproducible"


def run(bench: Bench) -> None:
    """Last, because only its verdict counts: it may take what time is left."""
    if not bench.is_cuda or find_spec("pytest") is None:
        bench.note("left out", "no CUDA device, or no pytest")
        return
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-k", QUICK, TESTS]
    with subprocess.Popen(
        command, cwd=measure.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        note_verdicts(bench, process.stdout or ())
    bench.note("status", process.returncode)


def note_verdicts(bench: Bench, lines: Iterable[str]) -> None:
    """Note each test's as pytest prints it; what stands after them goes into the phase's log."""
    for line in lines:
        print(line, end="", flush=True)
        if verdict := re.match(r"\S+::(\S+.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
            bench.note(*verdict.groups())

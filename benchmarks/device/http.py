"""Phase 7: our server over HTTP, stage by stage; then a few calls of the obvious one."""

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, measure
from benchmarks.clients import Answer, Call, Ours, Rival, Target, drive, save_images
from benchmarks.device.bench import Bench, fields_of
from benchmarks.serving import OBVIOUS, START_TIMEOUT_S, running_rival
from server.core.settings import Settings
from server.jobs.store import JobStore
from server.storage.database import open_engine
from tests.support.processes import image_host, serving

PICTURES_PER_S = 21.3
"""The floor of SD 1.5 at 512² with 20 steps, on an H100."""

SETTINGS = {"INPAINT_HOLD_S": "600", "INPAINT_STEPS_POLICY": "exact"}


def run(bench: Bench) -> None:
    """Ours is driven first: the rival's time is no loss where it runs out."""
    is_tiny = bench.scale.steps[0][0] == "tiny"
    memory = Path("/dev/shm")
    root = memory if memory.is_dir() and bench.is_cuda else None
    with tempfile.TemporaryDirectory(prefix="bench-device-", dir=root) as name:
        scratch = Path(name)
        folder = checkpoints.checkpoint_folder("builtin" if is_tiny else "sd15", scratch)
        if not is_tiny:
            checkpoints.add_safety_checker(folder, checkpoints.checker_config())
        (scratch / "images").mkdir()
        with image_host(scratch / "images") as images_url:
            drive_ours(bench, folder, scratch, images_url)
            drive_rival(bench, folder, scratch, images_url)


def drive_ours(bench: Bench, folder: Path, scratch: Path, images_url: str) -> None:
    """Closed loops of so many clients, after one call that warms up."""
    data_dir = scratch / "data"
    with serving(data_dir, SETTINGS, "--model", str(folder)) as server:
        ours = Ours(server.url, images_url, data_dir)
        closed_loop(scratch, ours, made_calls(bench, 1, 0), 1)
        for clients, number in bench.scale.clients:
            calls = made_calls(bench, number, 100 * clients)
            answers, elapsed_s = closed_loop(scratch, ours, calls, clients)
            bench.note(f"{clients} clients", figures_of(bench, data_dir, answers, elapsed_s))
        clients, number = bench.scale.clients[1]
        checked = [replace(call, is_checked=True) for call in made_calls(bench, number + 1, 5_000)]
        name = f"{clients} clients, checked"
        bench.attempt(name, lambda: drive_checked(bench, scratch, ours, checked, clients))


def drive_checked(
    bench: Bench, scratch: Path, ours: Ours, calls: Sequence[Call], clients: int
) -> dict[str, Any]:
    """Of all calls but the first, with which the checker warms up."""
    closed_loop(scratch, ours, calls[:1], 1)
    answers, elapsed_s = closed_loop(scratch, ours, calls[1:], clients)
    return figures_of(bench, ours.data_dir, answers, elapsed_s)


def figures_of(
    bench: Bench, data_dir: Path, answers: Sequence[Answer], elapsed_s: float
) -> dict[str, Any]:
    """Of a closed loop with our server."""
    per_s = len(answers) / elapsed_s
    return {
        **latencies_of(answers),
        "pictures_per_s": per_s,
        "share_of_floor": per_s / PICTURES_PER_S if bench.is_cuda else None,
        "stages_ms": stages_of(data_dir, answers),
    }


def drive_rival(bench: Bench, folder: Path, scratch: Path, images_url: str) -> None:
    """For the ratio."""
    threads = {"OMP_NUM_THREADS": str(measure.core_count())}
    with running_rival(OBVIOUS, folder, scratch, threads) as url:
        rival = Rival(url, images_url)
        closed_loop(scratch, rival, made_calls(bench, 1, 0), 1)
        calls = made_calls(bench, bench.scale.rival_calls, 9_000)
        answers, elapsed_s = closed_loop(scratch, rival, calls, 1)
        bench.note(
            "obvious, 1 client", {**latencies_of(answers), "pictures_per_s": len(calls) / elapsed_s}
        )


def made_calls(bench: Bench, number: int, seed: int) -> list[Call]:
    """The seeds begin after the one that is given."""
    steps, side_px = bench.scale.denoising_steps, bench.scale.side_px
    return [Call(steps, each, side_px) for each in range(seed + 1, seed + 1 + number)]


def closed_loop(
    scratch: Path, target: Target, calls: Sequence[Call], clients: int
) -> tuple[list[Answer], float]:
    """By so many clients at a time, and the seconds of all together."""
    save_images(scratch / "images", calls)
    return asyncio.run(asyncio.wait_for(drive(target, calls, clients), START_TIMEOUT_S))


def latencies_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Until the last byte of the PNG."""
    latencies = [1e3 * answer.latency_s for answer in answers]
    return {
        "p50_ms": measure.percentile(latencies, 50),
        "p95_ms": measure.percentile(latencies, 95),
    }


def stages_of(data_dir: Path, answers: Sequence[Answer]) -> dict[str, float]:
    """Median of each time in the jobs' receipts."""
    engine = open_engine(Settings(data_dir=data_dir).sqlalchemy_url)
    store = JobStore(engine)
    receipts = [store.receipt_of(answer.job_id or 0) for answer in answers]
    engine.dispose()
    times: dict[str, list[float]] = {}
    for receipt in receipts:
        stages: dict[str, Any] = fields_of(receipt.times) if receipt is not None else {}
        for name, value in stages.items():
            times.setdefault(name, []).append(value)
    return {name: statistics.median(each) for name, each in times.items()}

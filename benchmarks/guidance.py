"""`python -m benchmarks.guidance --out DIR`: what `guidance_end` saves, and what it changes.

The built-in model paints objects on drawn scenes, with guidance to the end and with guidance that
ends earlier. Reported per share: rows of UNet calls and time against those of the exact pictures,
interleaved, and the PSNR inside the mask against them.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import describe_machine, machine_line
from benchmarks.report import Cell, table, write_report
from models.builtin.training.captions import random_thing
from models.builtin.training.scenes import make_scene
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import load_components
from models.diffusion.pipeline import InpaintPipeline, Source
from models.params import InpaintParams

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
WEIGHTS = Path(__file__).parents[1] / "models" / "builtin" / "weights"
SIDE_PX = 512
SEED = 11


def paint(
    pipeline: InpaintPipeline, job: tuple[InpaintParams, Source]
) -> tuple[NDArray[np.uint8], int]:
    """The picture `(h, w, 3)`, and the rows of its UNet calls."""
    (sample,) = pipeline.prepare(*job)
    rows = 0
    while not sample.is_denoised:
        rows += sample.rows
        (prediction,) = pipeline.denoise_step([sample])
        pipeline.advance(sample, prediction)
    return pipeline.decode([sample])[0].image, rows


def jobs_of(count: int, share: float) -> list[tuple[InpaintParams, Source]]:
    """The same scenes for every share."""
    rng = np.random.default_rng(SEED)
    jobs = []
    for number in range(count):
        scene = make_scene(rng, SIDE_PX)
        thing = random_thing(rng, scene.allowed_colours())
        source = Source(scene.background, scene.mask.astype(np.uint8) * 255)
        prompt = f"a {thing.colour} {thing.shape}"
        params = InpaintParams(prompt=prompt, seed=number, strength=1.0, guidance_end=share)
        jobs.append((params, source))
    return jobs


def psnr_db(picture: NDArray[np.uint8], exact: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float:
    """Inside the mask; infinite for equal pictures."""
    error = picture[mask > 0].astype(np.float64) - exact[mask > 0]
    square = float(np.mean(error**2))
    return float("inf") if square == 0 else 10 * float(np.log10(255.0**2 / square))


def measure(count: int) -> dict[float, dict[str, float]]:
    """Medians over the scenes, by share."""
    components = load_components(
        ModelSpec("builtin", str(WEIGHTS)), torch.device("cpu"), torch.float32
    )
    pipeline = InpaintPipeline(components)
    jobs = {share: jobs_of(count, share) for share in SHARES}
    rows: dict[float, list[float]] = {share: [] for share in SHARES}
    times: dict[float, list[float]] = {share: [] for share in SHARES}
    apart: dict[float, list[float]] = {share: [] for share in SHARES}
    paint(pipeline, jobs[1.0][0])
    for number in range(count):
        exact = None
        for share in SHARES:
            job = jobs[share][number]
            started = time.perf_counter()
            picture, used = paint(pipeline, job)
            times[share].append(time.perf_counter() - started)
            rows[share].append(used)
            exact = picture if exact is None else exact
            apart[share].append(psnr_db(picture, exact, job[1].mask))
    return {
        share: {
            "rows": statistics.median(rows[share]) / statistics.median(rows[1.0]),
            "time": statistics.median(times[share]) / statistics.median(times[1.0]),
            "psnr_db": statistics.median(apart[share]),
        }
        for share in SHARES
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=12)
    options = parser.parse_args(arguments)
    machine = describe_machine()
    found = measure(options.scenes)
    lines: list[Sequence[Cell]] = [
        [str(share), each["rows"], each["time"], each["psnr_db"]] for share, each in found.items()
    ]
    text = (
        f"# End of guidance: {machine_line(machine)}\n\n"
        f"The built-in model, {SIDE_PX} px, 20 steps, guidance 7.5; medians of {options.scenes} "
        "scenes, rows and time as a share of those with guidance to the end; load average before "
        f"{machine['load_average_before']}.\n\n"
    )
    header = ["guidance_end", "UNet rows", "time", "PSNR in the mask, dB"]
    findings = {"machine": machine, "scenes": options.scenes, "shares": found}
    write_report(options.out, "guidance", findings, text + table(header, lines))


if __name__ == "__main__":
    main()

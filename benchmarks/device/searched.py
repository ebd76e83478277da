"""Phase 4: convolutions and whole steps where cuDNN searches among its kernels.

A process of its own, with the search on from the first call: torch remembers one plan for each
shape, whether a heuristic or a search has found it, and never asks again. Compare with the phases
`shapes` and `switches`.
"""

import torch

from benchmarks.device.bench import Bench
from benchmarks.device.shapes import by_cudnn, convolved, shapes_of
from benchmarks.device.switches import EXTREMES, compared


@torch.inference_mode()
def run(bench: Bench) -> None:
    """Steps first, because they decide."""
    torch.backends.cudnn.benchmark = True  # among ten for each shape, as torch has it
    for call in bench.scale.compared:
        family, side_px, rows = call
        name = f"{family} {side_px}², {rows} rows"
        bench.attempt(name, lambda: compared(bench, name, call, EXTREMES.items()))  # noqa: B023
    for call in bench.scale.compared:
        layers, _ = shapes_of(bench, *call)
        for shape in sorted(layers.convolutions):
            bench.attempt(f"convolution {shape}", lambda: searched(bench, *shape))  # noqa: B023


def searched(
    bench: Bench, shape: tuple[int, ...], channels: int, side: int, stride: int
) -> dict[str, dict[str, float]]:
    """By the quickest that is found."""
    images, weight, exact = convolved(bench, shape, channels, side, stride)
    return {"searched": by_cudnn(bench, images, weight, stride, exact)}

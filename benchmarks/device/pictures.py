"""Phase 6: pictures with every switch on, against float32 without any."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import checkpoints
from benchmarks.device import subjects
from benchmarks.device.bench import Bench, exact_arithmetic
from benchmarks.device.switches import NO_FUSIONS
from benchmarks.orders import make_orders
from models.acceleration.stack import USUAL, Acceleration
from models.checkpoints.catalog import BUILTIN_FOLDER
from models.checkpoints.registry import Components
from models.diffusion.pipeline import InpaintPipeline, Sample

LEAST_DB = 45.0
PLAIN = Acceleration(graph_memory_share=0, measures_attention=False, fusions=NO_FUSIONS)


def run(bench: Bench) -> None:
    """Random weights of the published architecture, and the built-in model."""
    family = bench.scale.steps[0][0]
    bench.attempt(family, lambda: alike(bench, subjects.components(bench, family)))
    bench.attempt("builtin", lambda: alike(bench, checkpoints.load(BUILTIN_FOLDER)))


def alike(bench: Bench, components: Components) -> dict[str, Any]:
    """PSNR in dB of one picture, 99 for equal ones."""
    exact = InpaintPipeline(in_float32(components), PLAIN)
    ours = InpaintPipeline(components, USUAL)
    (order,) = make_orders(bench.scale.side_px, [bench.scale.denoising_steps], 1)
    (sample,) = ours.prepare(order.params(), order.source())
    start = copy.deepcopy(sample)
    with exact_arithmetic():
        expected = picture(exact, sample_in_float32(start))
    found = psnr_db(picture(ours, sample), expected)
    return {"psnr_db": found, "least_db": LEAST_DB, "is_alike": found >= LEAST_DB}


def in_float32(components: Components) -> Components:
    """Other copies of all models."""
    names = ("text_encoder", "vae", "unet")
    copies = {name: copy.deepcopy(getattr(components, name)).float() for name in names}
    return dataclasses.replace(components, **copies)


def sample_in_float32(sample: Sample) -> Sample:
    """The same start: torch draws other numbers in each dtype."""
    tensors: dict[str, Any] = {
        field.name: value.float()
        for field in dataclasses.fields(sample)
        if isinstance(value := getattr(sample, field.name), torch.Tensor)
    }
    return dataclasses.replace(sample, **tensors)


def picture(pipeline: InpaintPipeline, sample: Sample) -> NDArray[np.uint8]:
    """All steps, and the decoder's picture."""
    while not sample.is_denoised:
        (prediction,) = pipeline.denoise_step([sample])
        pipeline.advance(sample, prediction)
    return pipeline.decode([sample])[0].generated


def psnr_db(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> float:
    """99 at most."""
    error = float(np.mean((left.astype(np.float64) - right.astype(np.float64)) ** 2))
    return min(99.0, 10 * math.log10(255**2 / max(error, 1e-9)))

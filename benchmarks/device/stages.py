"""Phase 5: what stands before the first step and behind the last one."""

import copy
import math
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import nn

from benchmarks import checkpoints
from benchmarks.device import subjects
from benchmarks.device.bench import Bench, exact_arithmetic, replayed
from benchmarks.orders import make_orders
from models.acceleration.attention import KERNELS
from models.acceleration.autoencoder import attended, halve
from models.acceleration.fusion import Fusions, fuse
from models.diffusion.pipeline import InpaintPipeline


def run(bench: Bench) -> None:
    """Prepare, decode, the decoder's attention, SDXL's decoder."""
    family = bench.scale.steps[0][0]
    pipeline = InpaintPipeline(subjects.components(bench, family))
    bench.attempt("prepare", lambda: prepared(bench, pipeline))
    bench.attempt("decode", lambda: decoded(bench, pipeline))
    bench.attempt("decoder", lambda: decoder(bench, bench.scale.side_px, bench.dtype))
    side_px = 1024 if bench.is_cuda else bench.scale.side_px
    bench.attempt("decoder scaled into float16", lambda: scaled_decoder(bench, side_px))
    tokens = (bench.scale.side_px // 8) ** 2
    bench.attempt("attention of width 512", lambda: wide_attention(bench, tokens))
    if bench.is_cuda:
        for dtype in (torch.float32, torch.float16):
            bench.attempt(f"decoder 1024² {dtype}", lambda: decoder(bench, 1024, dtype))  # noqa: B023
        bench.attempt("attention of width 512, 1024²", lambda: wide_attention(bench, 128**2))


def prepared(bench: Bench, pipeline: InpaintPipeline) -> dict[str, float]:
    """ms of each part, waited for. new: neither text nor picture was seen before.

    The host's part of it is what the engine's thread is busy for.
    """
    seeds = count(1)

    def order() -> Any:
        return make_orders(bench.scale.side_px, [1], next(seeds))[0]

    known = order()
    params, source = known.params(), known.source()
    pipeline.prepare(params, source)

    def new() -> None:
        each = order()
        pipeline.prepare(each.params(), each.source())

    def new_picture() -> None:
        pipeline.prepare(params, order().source())

    orders = [order() for _ in range(bench.scale.replays)]
    jobs = iter([(each.params(), each.source().canvas(each.params())) for each in orders])
    return {
        "making an order (not ours)": bench.ms_of(order),
        "canvas": bench.ms_of(lambda: source.canvas(params)),
        "new": bench.ms_of(new),
        "known text, new picture": bench.ms_of(new_picture),
        "all known": bench.ms_of(lambda: pipeline.prepare(params, source)),
        "host's part of new": bench.host_ms_of(lambda: pipeline.prepare_together([next(jobs)])),
    }


def decoded(bench: Bench, pipeline: InpaintPipeline) -> dict[str, float]:
    """ms until the pictures are on the host, pasted back."""
    (order,) = make_orders(bench.scale.side_px, [1], 1)
    (sample,) = pipeline.prepare(order.params(), order.source())
    found = {
        f"{number} pictures": bench.ms_of(lambda: pipeline.decode([sample] * number))  # noqa: B023
        for number in (1, 4)
    }
    host_ms = bench.host_ms_of(lambda: pipeline.decode_together([sample]))
    return {**found, "host's part of 1 picture": host_ms}


@torch.inference_mode()
def decoder(bench: Bench, side_px: int, dtype: torch.dtype) -> dict[str, float]:
    """ms of the VAE alone, plain and fused, as it is and as a graph."""
    vae = make_vae(bench, side_px, dtype)
    latents = bench.random(1, 4, side_px // 8, side_px // 8, dtype=dtype)
    fused, narrow = copy.deepcopy(vae), copy.deepcopy(vae)
    fuse(fused)
    fuse(narrow, Fusions(wide_attention=False))

    def decode_with(model: Any) -> Callable[[], object]:
        return lambda: model.decode(latents, return_dict=False)

    return {
        "plain": bench.ms_of(decode_with(vae)),
        "fused": bench.ms_of(decode_with(fused)),
        "fused but for wide_attention": bench.ms_of(decode_with(narrow)),
        "plain, graph": bench.ms_of(replayed(bench, decode_with(vae))),
        "fused, graph": bench.ms_of(replayed(bench, decode_with(fused))),
    }


def make_vae(bench: Bench, side_px: int, dtype: torch.dtype) -> Any:
    """On the device; the full one or, for the smallest pictures, the tiny one."""
    is_tiny = side_px == 64
    make = subjects.make_tiny_vae if is_tiny else lambda: checkpoints.make_vae(0.18215)
    return subjects.placed(bench, make, dtype)


@torch.inference_mode()
def scaled_decoder(bench: Bench, side_px: int) -> dict[str, float]:
    """ms of a float32 decoder and of the same in float16, and how far apart their pictures are."""
    exact = make_vae(bench, side_px, torch.float32)
    scaled = halve(copy.deepcopy(exact))
    fuse(exact)
    fuse(scaled)
    latents = bench.random(1, 4, side_px // 8, side_px // 8, dtype=torch.float32)
    with exact_arithmetic():
        expected = exact.decode(latents).sample.double()
    found = scaled.decode(latents.half()).sample.double()
    error = float((found - expected).square().mean())
    return {
        "float32, ms": bench.ms_of(lambda: exact.decode(latents)),
        "scaled, ms": bench.ms_of(lambda: scaled.decode(latents.half())),
        "PSNR of values that span 2, dB": 10 * math.log10(4 / max(error, 1e-20)),
    }


@torch.inference_mode()
def wide_attention(bench: Bench, tokens: int) -> dict[str, Any]:
    """The VAE's only head, by each kernel and by two products in chunks."""
    query, key, value = (bench.random(1, 1, tokens + n, 512)[:, :, :tokens] for n in range(3))
    parts = [each[:, 0].contiguous() for each in (query / 512**0.5, key, value)]
    found: dict[str, Any] = {"products": bench.ms_of(replayed(bench, lambda: attended(*parts)))}
    for kernel in KERNELS:
        with torch.nn.attention.sdpa_kernel([kernel]):
            try:
                found[kernel.name] = bench.ms_of(
                    replayed(
                        bench,
                        lambda: nn.functional.scaled_dot_product_attention(query, key, value),
                    )
                )
            except Exception as error:  # noqa: BLE001 - one kernel's fault is its own
                found[kernel.name] = str(error)[:120]
    return found

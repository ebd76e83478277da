"""Phase 4: what stands before the first step and behind the last one."""

import copy
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import checkpoints
from benchmarks.device import subjects
from benchmarks.device.bench import Bench, replayed
from benchmarks.orders import make_orders
from models.acceleration.attention import KERNELS
from models.acceleration.fusion import fuse
from models.diffusion.pipeline import InpaintPipeline
from models.imaging.canvas import prepare_canvas

QUERIES = 2048
"""Of a chunk of attention by two products."""


def run(bench: Bench) -> None:
    """Prepare, decode, the decoder's attention, SDXL's decoder."""
    family = bench.scale.steps[0][0]
    pipeline = InpaintPipeline(subjects.components(bench, family))
    bench.attempt("prepare", lambda: prepared(bench, pipeline))
    bench.attempt("decode", lambda: decoded(bench, pipeline))
    bench.attempt("decoder", lambda: decoder(bench, bench.scale.side_px, bench.dtype))
    tokens = (bench.scale.side_px // 8) ** 2
    bench.attempt("attention of width 512", lambda: wide_attention(bench, tokens))
    if bench.is_cuda:
        for dtype in (torch.float32, torch.float16):
            bench.attempt(f"decoder 1024² {dtype}", lambda: decoder(bench, 1024, dtype))  # noqa: B023
        bench.attempt("attention of width 512, 1024²", lambda: wide_attention(bench, 128**2))


def prepared(bench: Bench, pipeline: InpaintPipeline) -> dict[str, float]:
    """ms of each part, waited for. new: neither text nor picture was seen before."""
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

    return {
        "making an order (not ours)": bench.ms_of(order),
        "canvas": bench.ms_of(lambda: prepare_canvas(params, source.init_image, source.mask)),
        "new": bench.ms_of(new),
        "known text, new picture": bench.ms_of(new_picture),
        "all known": bench.ms_of(lambda: pipeline.prepare(params, source)),
    }


def decoded(bench: Bench, pipeline: InpaintPipeline) -> dict[str, float]:
    """ms until the pictures are on the host, pasted back."""
    (order,) = make_orders(bench.scale.side_px, [1], 1)
    (sample,) = pipeline.prepare(order.params(), order.source())
    return {
        f"{number} pictures": bench.ms_of(lambda: pipeline.decode([sample] * number))  # noqa: B023
        for number in (1, 4)
    }


@torch.inference_mode()
def decoder(bench: Bench, side_px: int, dtype: torch.dtype) -> dict[str, float]:
    """ms of the VAE alone, plain and fused, as it is and as a graph."""
    is_tiny = side_px == 64
    make = subjects.make_tiny_vae if is_tiny else lambda: checkpoints.make_vae(0.18215)
    vae = subjects.placed(bench, make, dtype)
    latents = bench.random(1, 4, side_px // 8, side_px // 8, dtype=dtype)
    fused = copy.deepcopy(vae)
    fuse(fused)

    def decode_with(model: Any) -> Callable[[], object]:
        return lambda: model.decode(latents, return_dict=False)

    return {
        "plain": bench.ms_of(decode_with(vae)),
        "fused": bench.ms_of(decode_with(fused)),
        "plain, graph": bench.ms_of(replayed(bench, decode_with(vae))),
        "fused, graph": bench.ms_of(replayed(bench, decode_with(fused))),
    }


@torch.inference_mode()
def wide_attention(bench: Bench, tokens: int) -> dict[str, Any]:
    """The VAE's only head, by each kernel and by two products in chunks."""
    query, key, value = (bench.random(1, 1, tokens + n, 512)[:, :, :tokens] for n in range(3))

    def products() -> Tensor:
        chunks = [
            (part.float() @ key.float().transpose(-1, -2) / 512**0.5).softmax(-1).to(value.dtype)
            @ value
            for part in torch.split(query, QUERIES, dim=2)
        ]
        return torch.cat(chunks, dim=2)

    found: dict[str, Any] = {"products": bench.ms_of(replayed(bench, products))}
    for kernel in KERNELS:
        with torch.nn.attention.sdpa_kernel([kernel]):
            try:
                found[kernel.name] = bench.ms_of(
                    replayed(
                        bench,
                        lambda: nn.functional.scaled_dot_product_attention(query, key, value),
                    )
                )
            except RuntimeError as error:
                found[kernel.name] = str(error)[:120]
    return found

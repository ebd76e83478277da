"""How long a call should take on an H100, from its kernels: `python -m benchmarks.roofline`.

Needs no GPU. A kernel takes the longer of its arithmetic and its memory traffic, and 2 µs to start;
products and convolutions are cut into tiles, of which each of the 132 multiprocessors takes one at
a time. The rates of `Card` were fitted to three measured steps of Stable Diffusion 1.5 (7.3, 19.0
and 71.4 ms for 2, 8 and 32 rows), so other sizes are predictions. Needs Triton for its kernels.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import checkpoints, report
from benchmarks.kernel_list import META, Kernel, kernels_of
from models.acceleration.fusion import ALL_FUSIONS, Fusions, fuse_modules

TILES = {
    **{(128, 256): 1.0, (256, 128): 1.0, (128, 192): 0.97, (128, 160): 0.93},
    **{(128, 128): 0.88, (256, 96): 0.85, (256, 80): 0.80, (128, 96): 0.78},
    **{(256, 64): 0.75, (64, 256): 0.75, (128, 64): 0.68, (64, 128): 0.68, (64, 64): 0.42},
}
"""Share of the peak that a tile of such sides reaches."""

PADDED_WIDTHS = (64, 96, 128, 192, 256, 512)
"""Head widths that attention kernels have; others are filled up to the next."""

QUERY_TILE = 128
TILE_S = 1e-6
"""Begin and end of a tile, when the tensor cores have nothing to do."""

CACHED_BYTES = 60e6
"""What a kernel moves at most for its operands to be found in the L2 cache."""


@dataclass(frozen=True, slots=True)
class Card:
    """Rates of a GPU. launch_s: from the start of a kernel to that of an empty one after it."""

    flops_per_s: float = checkpoints.PEAK_TFLOPS * 1e12
    attention_flops_per_s: float = 250e12
    bytes_per_s: float = 3.0e12
    cached_bytes_per_s: float = 5.0e12
    multiprocessors: int = 132
    launch_s: float = 2e-6


H100 = Card()


@dataclass(frozen=True, slots=True)
class CountedCall:
    """A model's call at a size, on the meta device."""

    label: str
    kernels: tuple[Kernel, ...]

    @property
    def tflop(self) -> float:
        return sum(kernel.flops for kernel in self.kernels) / 1e12

    @property
    def megabytes(self) -> float:
        """Moved by all kernels."""
        return sum(kernel.moved_bytes for kernel in self.kernels) / 1e6

    @property
    def floor_ms(self) -> float:
        """What the arithmetic alone needs at the peak."""
        return 1e3 * self.tflop / checkpoints.PEAK_TFLOPS

    @property
    def modelled_ms(self) -> float:
        return 1e3 * sum(seconds_of(kernel) for kernel in self.kernels)


def seconds_of(kernel: Kernel, card: Card = H100) -> float:
    """Of one launch."""
    is_cached = kernel.moved_bytes <= CACHED_BYTES
    rate = card.cached_bytes_per_s if is_cached else card.bytes_per_s
    return max(arithmetic_s(kernel, card), kernel.moved_bytes / rate) + card.launch_s


def arithmetic_s(kernel: Kernel, card: Card) -> float:
    """Without memory: 0 for a pass over it."""
    if kernel.kind in ("product", "convolution"):
        m, n, k = kernel.shape
        return min(tiled_s(m, n, k, tile, card) for tile in TILES)
    if kernel.kind == "attention":
        rows, heads, tokens, _, width = kernel.shape
        padded = next((each for each in PADDED_WIDTHS if each >= width), width)
        blocks = rows * heads * math.ceil(tokens / QUERY_TILE)
        idle = max(1.0, card.multiprocessors / blocks)
        return idle * kernel.flops * padded / width / card.attention_flops_per_s
    return 0.0


def tiled_s(m: int, n: int, k: int, tile: tuple[int, int], card: Card) -> float:
    """A product `(m, k)` by `(k, n)` in such tiles, each of which runs over all of k."""
    height, width = tile
    rounds = math.ceil(math.ceil(m / height) * math.ceil(n / width) / card.multiprocessors)
    rate = card.flops_per_s / card.multiprocessors * TILES[tile]
    return rounds * (2 * height * width * math.ceil(k / 64) * 64 / rate + TILE_S)


def on_meta(
    make: Callable[[], nn.Module],
    dtype: torch.dtype = torch.float16,
    fusions: Fusions = ALL_FUSIONS,
) -> nn.Module:
    """A model without weights, laid out and fused as on a CUDA device."""
    checkpoints.quieten_libraries()
    with META:
        model = make()
    model.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fuse_modules(model, fusions)
    return model


def step_of(family: str, side_px: int, rows: int, fusions: Fusions = ALL_FUSIONS) -> CountedCall:
    """A UNet call."""
    unet: Any = on_meta(checkpoints.UNETS[family], fusions=fusions)
    config = unet.config
    side = side_px // 8
    with META:
        latents = torch.empty(rows, config.in_channels, side, side, dtype=unet.dtype)
        text = torch.empty(rows, 77, config.cross_attention_dim, dtype=unet.dtype)
        timesteps = torch.empty(rows)
        pooled = torch.empty(rows, 1280, dtype=unet.dtype)
        time_ids = torch.empty(rows, 6, dtype=unet.dtype)
    added: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        added["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    kernels = kernels_of(
        unet,
        lambda: unet(latents, timesteps, encoder_hidden_states=text, return_dict=False, **added),
    )
    return CountedCall(f"{family} {side_px}², step of {rows} rows", tuple(kernels))


def decode_of(
    side_px: int, dtype: torch.dtype = torch.float16, fusions: Fusions = ALL_FUSIONS
) -> CountedCall:
    """One picture out of the VAE."""
    vae: Any = on_meta(lambda: checkpoints.make_vae(1.0), dtype, fusions)
    latents = torch.empty(1, 4, side_px // 8, side_px // 8, dtype=dtype, device=META)
    kernels = kernels_of(vae, lambda: vae.decode(latents, return_dict=False))
    return CountedCall(f"VAE {side_px}², decode", tuple(kernels))


def encode_of(side_px: int) -> CountedCall:
    """One picture into the VAE."""
    vae: Any = on_meta(lambda: checkpoints.make_vae(1.0))
    picture = torch.empty(1, 3, side_px, side_px, dtype=vae.dtype, device=META)
    kernels = kernels_of(vae, lambda: vae.encode(picture))
    return CountedCall(f"VAE {side_px}², encode", tuple(kernels))


def all_calls() -> list[CountedCall]:
    """Those that decide how long a picture takes."""
    return [
        *(step_of("sd15", 512, rows) for rows in (2, 16, 32)),
        *(step_of("sdxl", 1024, rows) for rows in (2, 4)),
        encode_of(512),
        decode_of(512),
        decode_of(1024),
    ]


def without_each() -> dict[str, CountedCall]:
    """A step of SD 1.5 with all fusions, and with all but one; a decoder for what UNets lack."""
    found = {"all": step_of("sd15", 512, 2)}
    for field in fields(Fusions):
        left = replace(ALL_FUSIONS, **{field.name: False})
        if field.name != "wide_attention" and left != ALL_FUSIONS:
            found[f"all but {field.name}"] = step_of("sd15", 512, 2, left)
    found["decoder, all"] = decode_of(512)
    found["decoder, all but wide_attention"] = decode_of(
        512, fusions=replace(ALL_FUSIONS, wide_attention=False)
    )
    return found


def by_kind(call: CountedCall) -> dict[str, list[Kernel]]:
    """The kernels of each kind, those that take longest first."""
    kinds: dict[str, list[Kernel]] = {}
    for kernel in call.kernels:
        kinds.setdefault(kernel.kind, []).append(kernel)
    return dict(sorted(kinds.items(), key=lambda item: -sum(map(seconds_of, item[1]))))


def findings_of(calls: Sequence[CountedCall], fusions: Mapping[str, CountedCall]) -> dict[str, Any]:
    """For the report. fusions: the same step with other fusions, by name."""
    return {
        "fusions": {
            name: {"kernels": len(call.kernels), "modelled_ms": call.modelled_ms}
            for name, call in fusions.items()
        },
        "calls": {
            call.label: {
                "kernels": len(call.kernels),
                "tflop": call.tflop,
                "megabytes": call.megabytes,
                "floor_ms": call.floor_ms,
                "modelled_ms": call.modelled_ms,
                "kinds": {
                    kind: {
                        "kernels": len(kernels),
                        "gflop": sum(each.flops for each in kernels) / 1e9,
                        "megabytes": sum(each.moved_bytes for each in kernels) / 1e6,
                        "modelled_ms": 1e3 * sum(map(seconds_of, kernels)),
                    }
                    for kind, kernels in by_kind(call).items()
                },
            }
            for call in calls
        },
    }


def to_text(findings: dict[str, Any]) -> str:
    """All calls in one table, then each one's kinds of kernels."""
    keys = ("kernels", "tflop", "megabytes", "floor_ms", "modelled_ms")
    lines = [
        "# Kernels per call, counted on the meta device",
        "",
        "Modelled: an H100 with the rates of `benchmarks/roofline.py`. Nothing here was measured.",
        "",
        report.table(
            ["call", "kernels", "TFLOP", "MB", "floor, ms", "modelled, ms"],
            [[label, *(call[key] for key in keys)] for label, call in findings["calls"].items()],
        ),
    ]
    lines += [
        "A step of SD 1.5 of 2 rows, and its decoder, without each of the fusions:",
        "",
        report.table(
            ["fusions", "kernels", "modelled, ms"],
            [[name, *each.values()] for name, each in findings["fusions"].items()],
        ),
    ]
    for label, call in findings["calls"].items():
        rows = [[kind, *kinds.values()] for kind, kinds in call["kinds"].items()]
        lines += [f"## {label}", "", report.table(["kind", "kernels", "GFLOP", "MB", "ms"], rows)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and write `roofline.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    findings = findings_of(all_calls(), without_each())
    report.write_report(options.out, "roofline", findings, to_text(findings))


if __name__ == "__main__":
    main()

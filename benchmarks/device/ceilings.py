"""Phase 0: what the card can do, against which all else is held."""

import subprocess

import torch

from benchmarks.device.bench import Bench, machine, replayed
from models.acceleration.fusion import why_no_kernels


def run(bench: Bench) -> None:
    """Bandwidth, arithmetic, and the cost of a kernel in a graph."""
    bench.note("machine", machine())
    bench.attempt("nvidia-smi", nvidia_smi)
    # Where they cannot be built, every switch of a fusion would measure torch's kernels.
    bench.attempt("our kernels run", lambda: bench.is_cuda and runs_kernels(bench.device))
    bench.attempt("copy, TB/s", lambda: copied_tb_per_s(bench))
    bench.attempt("product, TFLOP/s", lambda: product_tflop_per_s(bench))
    bench.attempt("launch in a graph, µs", lambda: launch_us(bench))


def runs_kernels(device: torch.device) -> bool | str:
    """Whether our kernels run on a GPU, or why not."""
    return why_no_kernels(device) or True


def nvidia_smi() -> str | None:
    """Name, memory, clocks and driver; None without the program."""
    fields = "name,memory.total,clocks.sm,clocks.mem,power.limit,driver_version"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip()


def copied_tb_per_s(bench: Bench) -> float:
    """Bytes read and written."""
    source = torch.ones(bench.scale.copied_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = bench.ms_in_queue(lambda: target.copy_(source))
    return 2 * source.numel() / ms / 1e9


def product_tflop_per_s(bench: Bench) -> float:
    """On random numbers: zeros need less power and run faster."""
    side = bench.scale.product
    left, right = bench.random(side, side), bench.random(side, side + 1)[:, :side].contiguous()
    return 2 * side**3 / bench.ms_in_queue(lambda: left @ right) / 1e9


def launch_us(bench: Bench) -> float:
    """Of kernels that do nothing, one after the other."""
    number = torch.zeros(1, device=bench.device)

    def launches() -> None:
        for _ in range(bench.scale.launches):
            number.add_(1)

    return 1e3 * bench.ms_in_queue(replayed(bench, launches)) / bench.scale.launches

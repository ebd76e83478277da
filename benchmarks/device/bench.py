"""What the phases share: the device, times on it, and findings that are written as they come."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import checkpoints, measure, report
from models.checkpoints.files.fingerprint import write_whole


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. sizes: `(family, side in pixels, rows)` of the UNet calls."""

    steps: tuple[tuple[str, int, int], ...]
    compared: tuple[tuple[str, int, int], ...]
    side_px: int
    denoising_steps: int
    replays: int
    product: int
    copied_bytes: int
    launches: int
    clients: tuple[tuple[int, int], ...]
    rival_calls: int


FULL = Scale(
    steps=(("sd15", 512, 2), ("sd15", 512, 16), ("sd15", 512, 32)),
    compared=(("sd15", 512, 2), ("sd15", 512, 16)),
    side_px=512,
    denoising_steps=20,
    replays=10,
    product=8192,
    copied_bytes=8 * 10**9,
    launches=1000,
    clients=((1, 12), (8, 24), (16, 48)),
    rival_calls=3,
)
TINY = Scale(
    steps=(("tiny", 64, 2),),
    compared=(("tiny", 64, 2),),
    side_px=64,
    denoising_steps=2,
    replays=2,
    product=128,
    copied_bytes=10**6,
    launches=10,
    clients=((1, 1), (2, 2)),
    rival_calls=1,
)
"""For a CPU, where figures mean nothing and the code has to run."""


@dataclass(slots=True)
class Bench:
    """A phase's place. part: the file its findings are in, whole after each of them."""

    part: Path
    scale: Scale
    device: torch.device = field(default_factory=checkpoints.default_device)
    findings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return checkpoints.default_dtype(self.device)

    def note(self, name: str, value: Any) -> None:
        """Keep a finding, also if the phase is killed right afterwards."""
        self.findings[name] = value
        write_whole(self.part, json.dumps(report.without_nan(self.findings), indent=1) + "\n")

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Note what comes of it, or why not more did: one fault must not cost the phase."""
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - it is the finding
            noted = self.findings.get(name)
            value = dict(noted) if isinstance(noted, dict) else {}
            value["error"] = f"{type(error).__name__}: {error}"[:500]
        self.note(name, value)
        return value

    def wait(self) -> None:
        """Until the device has done all that was started."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def ms_of(self, work: Callable[[], object], count: int | None = None) -> float:
        """Median milliseconds of one run after the one that warms up, each waited for."""
        work()
        self.wait()
        times = []
        for _ in range(count or self.scale.replays):
            began = time.perf_counter()
            work()
            self.wait()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)

    def host_ms_of(self, work: Callable[[], object]) -> float:
        """Median milliseconds until one run returns, whose queue is empty before and after."""
        times = []
        for _ in range(self.scale.replays):
            began = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began))
            self.wait()
        return statistics.median(times)

    def ms_in_queue(self, work: Callable[[], object], count: int | None = None) -> float:
        """Mean milliseconds of runs that the device does one after the other without a pause."""
        work()
        self.wait()
        runs = count or self.scale.replays
        began = time.perf_counter()
        for _ in range(runs):
            work()
        self.wait()
        return 1e3 * (time.perf_counter() - began) / runs

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers on the device, the same in every run."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(
            shape, generator=generator, device=self.device, dtype=dtype or self.dtype
        )


def replayed(bench: Bench, work: Callable[[], object]) -> Callable[[], object]:
    """The same as a CUDA graph's replay; itself where there is no CUDA."""
    if not bench.is_cuda:
        return work
    stream = torch.cuda.Stream(bench.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, float32 is not rounded to TF32, and cuDNN searches nothing, which is no reference."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    products.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Of norms, against the exact result in double precision."""
    difference = found.double() - exact.double()
    return float(difference.norm() / exact.double().norm())


def fields_of(value: Any) -> dict[str, Any]:
    """A dataclass as JSON has it."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def machine() -> dict[str, Any]:
    """The machine, with the packages that decide about speed."""
    return {**measure.describe_machine(), "triton": triton_version()}


def triton_version() -> str | None:
    """None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)

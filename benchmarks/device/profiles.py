"""Phase 1: where a step's time goes, by kernel and by module, beside what the model expects."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import checkpoints
from benchmarks.device import subjects
from benchmarks.device.bench import Bench, replayed
from benchmarks.kernel_list import META, kernels_of
from benchmarks.roofline import seconds_of
from models.acceleration.fusion import fuse, fuse_modules
from models.acceleration.unet import EagerUNet, UNetInputs

PROFILED_CALLS = 3
LISTED = 60
"""Kernels and modules that are kept, the slowest first."""

SCOPE = "module:"


@torch.inference_mode()
def run(bench: Bench) -> None:
    """UNet steps, then the VAE, then the text encoder."""
    for family, side_px, rows in bench.scale.steps:
        name = f"{family} {side_px}², {rows} rows"
        bench.attempt(name, lambda: step(bench, family, side_px, rows))  # noqa: B023 - at once
    is_tiny = bench.scale.steps[0][0] == "tiny"
    make = subjects.make_tiny_vae if is_tiny else lambda: checkpoints.make_vae(0.18215)
    vae = subjects.placed(bench, make)
    fuse(vae)
    side = bench.scale.side_px
    for count in (1, 4):
        latents = bench.random(count, 4, side // 8, side // 8)
        pictures = bench.random(count, 3, side, side)
        bench.attempt(
            f"decode of {count}",
            lambda: profiled(bench, vae, lambda: vae.decode(latents, return_dict=False)),  # noqa: B023
        )
        bench.attempt(
            f"encode of {count}",
            lambda: profiled(bench, vae, lambda: vae.encode(pictures, return_dict=False)),  # noqa: B023
        )


def step(bench: Bench, family: str, side_px: int, rows: int) -> dict[str, Any]:
    """A UNet call, with what the roofline expects of each module."""
    unet = subjects.placed(bench, subjects.UNETS[family])
    fuse(unet)
    inputs = subjects.inputs_of(bench, unet, side_px, rows)
    call = EagerUNet(unet)
    found = profiled(bench, unet, lambda: call(inputs))
    expected = expected_us(family, unet, inputs)
    for name, module in found["modules"].items():
        module["expected_us"] = expected.get(name)
    return found


@torch.inference_mode(False)  # in which composite operations would be seen whole
def expected_us(family: str, unet: Any, inputs: UNetInputs) -> dict[str, float]:
    """Microseconds per module, of the kernels that the fused code starts; empty without Triton."""
    with META:
        twin = subjects.UNETS[family]().to(unet.dtype).to(memory_format=torch.channels_last)
    found: dict[str, float] = defaultdict(float)
    try:
        fuse_modules(twin)
        alike = UNetInputs(
            torch.empty_like(inputs.latents, device=META),
            torch.empty_like(inputs.timesteps, device=META),
            torch.empty_like(inputs.conditioning, device=META),
            {name: torch.empty_like(each, device=META) for name, each in inputs.added.items()},
        )
        for kernel in kernels_of(twin, lambda: EagerUNet(twin)(alike)):
            found[kernel.module] += 1e6 * seconds_of(kernel)
    except ImportError:
        return {}
    return found


def profiled(bench: Bench, model: nn.Module, call: Callable[[], object]) -> dict[str, Any]:
    """replay_ms: as a graph; eager_ms: started one by one; the rest from torch's profiler."""
    replay_ms = bench.ms_of(replayed(bench, call), 3 * bench.scale.replays)
    eager_ms = bench.ms_of(call)
    activities = [ProfilerActivity.CPU]
    if bench.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found, ExitStack() as stack:
        for name, module in model.named_modules():
            follow(stack, name, module)
        for _ in range(PROFILED_CALLS):
            call()
        bench.wait()
    kernels, modules = sums_of(found.events() or [], bench.is_cuda)
    kernel_ms = sum(each["us"] for each in kernels.values()) / 1e3
    return {
        "replay_ms": replay_ms,
        "eager_ms": eager_ms,
        "kernel_ms": kernel_ms,
        "gaps_ms": replay_ms - kernel_ms,
        "kernels": slowest(kernels),
        "modules": slowest(modules),
    }


def follow(stack: ExitStack, name: str, module: nn.Module) -> None:
    """Mark the module's calls for the profiler."""
    scopes: list[Any] = []

    def enter(*_: Any) -> None:
        scopes.append(record_function(SCOPE + name))
        scopes[-1].__enter__()

    def leave(*_: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def sums_of(
    events: list[FunctionEvent], is_cuda: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Microseconds and launches per call, by kernel and by innermost module.

    On a CPU operations stand for kernels.
    """
    kernels: dict[str, dict[str, Any]] = defaultdict(lambda: {"us": 0.0, "count": 0.0})
    modules: dict[str, dict[str, Any]] = defaultdict(lambda: {"us": 0.0, "count": 0.0})
    for event in events:
        launched = (
            [(kernel.name, kernel.duration) for kernel in event.kernels]
            if is_cuda
            else [(event.name, event.self_cpu_time_total)]
        )
        if not is_cuda and event.name.startswith(SCOPE):
            continue
        for name, duration in launched:
            for sums in (kernels[name], modules[module_of(event)]):
                sums["us"] += duration / PROFILED_CALLS
                sums["count"] += 1 / PROFILED_CALLS
    return kernels, modules


def module_of(event: FunctionEvent | None) -> str:
    """The innermost module in whose call an operation was made."""
    while event is not None and not event.name.startswith(SCOPE):
        event = event.cpu_parent
    return event.name.removeprefix(SCOPE) if event is not None else "?"


def slowest(sums: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that take longest."""
    ranked = sorted(sums.items(), key=lambda item: -item[1]["us"])
    return dict(ranked[:LISTED])

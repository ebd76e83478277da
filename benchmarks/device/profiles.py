"""Phase 1: where a step's time goes, by kernel and by module, beside what the model expects."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch._C._profiler import _RecordFunctionFast
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

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

UNLINKED_SHARE = 0.01
"""Of the device's time may be missing before a profile is called incomplete."""


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
    bench.attempt("a pair of texts", lambda: texts(bench))


def texts(bench: Bench) -> dict[str, Any]:
    """A prompt and a negative one, never as a graph: so does production."""
    is_tiny = bench.scale.steps[0][0] == "tiny"
    encoder = subjects.placed(bench, lambda: subjects.make_text_encoder(is_tiny))
    ids = torch.ones(2, 77, dtype=torch.long, device=bench.device)
    return profiled(bench, encoder, lambda: encoder(ids), is_graphed=False)


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


def profiled(
    bench: Bench, model: nn.Module, call: Callable[[], object], is_graphed: bool = True
) -> dict[str, Any]:
    """replay_ms: as a graph; eager_ms: started one by one; the rest from torch's profiler.

    kernel_ms: all that the device did. linked_ms: the part of it that modules are known for; the
    profile is whole where both are alike. gaps_ms: of the graph, or of the eager call without one.
    """
    replay_ms = bench.ms_of(replayed(bench, call), 3 * bench.scale.replays) if is_graphed else None
    eager_ms = bench.ms_of(call)
    events = profile_of(bench, model, call)
    kernels, modules = sums_of(events, bench.is_cuda)
    linked_ms = sum(each["us"] for each in modules.values()) / 1e3
    kernel_ms = device_us(events) / 1e3 if bench.is_cuda else linked_ms
    return {
        "replay_ms": replay_ms,
        "eager_ms": eager_ms,
        "kernel_ms": kernel_ms,
        "linked_ms": linked_ms,
        "is_whole": abs(kernel_ms - linked_ms) <= UNLINKED_SHARE * kernel_ms,
        "gaps_ms": (eager_ms if replay_ms is None else replay_ms) - kernel_ms,
        "kernels": slowest(kernels),
        "modules": slowest(modules),
    }


def profile_of(bench: Bench, model: nn.Module, call: Callable[[], object]) -> list[FunctionEvent]:
    """Of `PROFILED_CALLS` calls, with the modules marked."""
    activities = [ProfilerActivity.CPU]
    if bench.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found, ExitStack() as stack:
        for name, module in model.named_modules():
            follow(stack, name, module)
        for _ in range(PROFILED_CALLS):
            call()
        bench.wait()
    return [*(found.events() or [])]


def follow(stack: ExitStack, name: str, module: nn.Module) -> None:
    """Mark the module's calls for the profiler, as an operator's are.

    A kernel of Triton is started by no operator. The profiler links it to the innermost operator
    around it, for which `record_function` does not count, as a note of a user's.
    """
    scopes: list[Any] = []

    def enter(*_: Any) -> None:
        scopes.append(_RecordFunctionFast(SCOPE + name))
        scopes[-1].__enter__()

    def leave(*_: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def device_us(events: list[FunctionEvent]) -> float:
    """Microseconds per call of all kernels and copies, whoever has started them."""
    total: float = sum(
        (event.time_range.end - event.time_range.start) / PROFILED_CALLS
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return total


def sums_of(
    events: list[FunctionEvent], is_cuda: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Microseconds and launches per call, by kernel and by innermost module.

    On a CPU operations stand for kernels.
    """
    kernels: dict[str, dict[str, Any]] = defaultdict(lambda: {"us": 0.0, "count": 0.0})
    modules: dict[str, dict[str, Any]] = defaultdict(lambda: {"us": 0.0, "count": 0.0})
    for event in events:
        for name, duration in launched_by(event, is_cuda):
            for sums in (kernels[name], modules[module_of(event)]):
                sums["us"] += duration / PROFILED_CALLS
                sums["count"] += 1 / PROFILED_CALLS
    return kernels, modules


def launched_by(event: FunctionEvent, is_cuda: bool) -> list[tuple[str, float]]:
    """Kernels by name, with their microseconds."""
    if is_cuda:
        return [(kernel.name, kernel.duration) for kernel in event.kernels]
    return [] if event.name.startswith(SCOPE) else [(event.name, event.self_cpu_time_total)]


def module_of(event: FunctionEvent | None) -> str:
    """The innermost module in whose call an operation was made."""
    while event is not None and not event.name.startswith(SCOPE):
        event = event.cpu_parent
    return event.name.removeprefix(SCOPE) if event is not None else "?"


def slowest(sums: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those that take longest."""
    ranked = sorted(sums.items(), key=lambda item: -item[1]["us"])
    return dict(ranked[:LISTED])

"""Phase 3: every switch of `Acceleration` by itself, all of them, and all but one."""

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.device import subjects
from benchmarks.device.bench import Bench, exact_arithmetic, relative_error, replayed
from models.acceleration.attention import MeasuredAttention, cuda_timer
from models.acceleration.fusion import Fusions, fuse, fuse_modules
from models.acceleration.unet import EagerUNet, UNetCall, UNetInputs

BLOCKS = 5
OF_VAES = ("wide_attention",)
"""Fusions that no UNet has; `stages` compares decoders with and without."""
PREPARED = tuple(field.name for field in fields(Fusions) if not field.default)
"""Fusions that are off until a card has shown that they gain."""

SizedCall: TypeAlias = tuple[str, int, int]
"""Family, side in pixels, rows."""

NO_FUSIONS = Fusions(*(False for _ in fields(Fusions)))


@dataclass(frozen=True, slots=True)
class Switches:
    """One way to make the call."""

    fusions: Fusions
    measures_attention: bool

    @classmethod
    def names(cls) -> list[str]:
        """Of all switches that a UNet's call knows."""
        fusions = [field.name for field in fields(Fusions) if field.name not in OF_VAES]
        return [*fusions, "measures_attention"]

    def turned(self, name: str, value: bool) -> "Switches":
        """The same but for one switch."""
        if name in {field.name for field in fields(Fusions)}:
            return replace(self, fusions=replace(self.fusions, **{name: value}))
        changed: dict[str, Any] = {name: value}
        return replace(self, **changed)


Variant: TypeAlias = tuple[str, Switches]

NONE = Switches(NO_FUSIONS, measures_attention=False)
ALL = Switches(Fusions(), measures_attention=True)
EXTREMES = {"none": NONE, "none again": NONE, "all": ALL}
"""By name; the first two are the same, so that their difference is the noise."""


def variants() -> Iterator[tuple[str, Switches]]:
    """The extremes, and what one switch changes of them."""
    yield from EXTREMES.items()
    for name in Switches.names():
        if name in PREPARED:
            yield f"all and {name}", ALL.turned(name, True)
            continue
        yield f"only {name}", NONE.turned(name, True)
        yield f"all but {name}", ALL.turned(name, False)


@torch.inference_mode()
def run(bench: Bench) -> None:
    """SD 1.5 with each switch; SDXL with none and all."""
    for family, side_px, rows in bench.scale.compared:
        name = f"{family} {side_px}², {rows} rows"
        call = (family, side_px, rows)
        bench.attempt(name, lambda: compared(bench, name, call, variants()))  # noqa: B023
    if bench.is_cuda:
        for rows in (2, 4):
            name = f"sdxl 1024², {rows} rows"
            call = ("sdxl", 1024, rows)
            bench.attempt(name, lambda: compared(bench, name, call, EXTREMES.items()))  # noqa: B023


def compared(bench: Bench, name: str, call: SizedCall, tried: Iterable[Variant]) -> dict[str, Any]:
    """ms per replay of each variant in interleaved blocks; errors against float32.

    Noted under the name after each block, so that a phase that is killed keeps what it measured.
    """
    runs, errors, faults = prepared(bench, call, tried)
    times: dict[str, list[float]] = {each: [] for each in runs}
    found: dict[str, Any] = {"variants": {}, "faults": faults, "blocks": 0}
    for block in range(BLOCKS):
        for variant in measure.rotated([*runs], block):
            times[variant].append(bench.ms_in_queue(runs[variant]))
        found["variants"] = {each: summary(times[each], errors[each]) for each in runs}
        found["blocks"] = block + 1
        bench.note(name, found)
    return found


def prepared(
    bench: Bench, call: SizedCall, tried: Iterable[Variant]
) -> tuple[dict[str, Callable[[], object]], dict[str, float], dict[str, str]]:
    """By variant: what is timed, its error, and why there is none."""
    family, side_px, rows = call
    unet = subjects.placed(bench, subjects.UNETS[family])
    inputs = subjects.inputs_of(bench, unet, side_px, rows)
    exact = exact_call(unet, inputs)
    runs: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    faults: dict[str, str] = {}
    for name, switches in tried:
        try:
            made_call = made(bench, unet, switches)
            errors[name] = relative_error(made_call(inputs), exact)
            runs[name] = replayed(bench, lambda call=made_call: call(inputs))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - Triton's are of no common kind
            faults[name] = f"{type(error).__name__}: {error}"[:300]
    return runs, errors, faults


def summary(times: list[float], error: float) -> dict[str, float]:
    """Of one variant."""
    return {"ms": statistics.median(times), "spread_ms": max(times) - min(times), "error": error}


def made(bench: Bench, unet: Any, switches: Switches) -> Callable[[UNetInputs], Tensor]:
    """A call by a UNet of its own, which shares the weights."""
    own = copy.deepcopy(unet, {id(each): each for each in unet.parameters()})
    if bench.is_cuda:
        fuse(own, switches.fusions)
    elif subjects.kernels_are_interpreted():
        fuse_modules(own, switches.fusions)
    plain = EagerUNet(own)
    call: UNetCall = plain
    if switches.measures_attention and bench.is_cuda:
        call = MeasuredAttention(plain, plain, cuda_timer(bench.device))
    return call


def exact_call(unet: Any, inputs: UNetInputs) -> Tensor:
    """In float32."""
    exact = copy.deepcopy(unet).float()
    moved = dataclasses.replace(
        inputs,
        latents=inputs.latents.float(),
        conditioning=inputs.conditioning.float(),
        added={name: each.float() for name, each in inputs.added.items()},
    )
    with exact_arithmetic():
        return EagerUNet(exact)(moved)

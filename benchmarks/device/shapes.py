"""Phase 2: the distinct convolutions, products and attention calls of a step, each way there is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.device import subjects
from benchmarks.device.bench import Bench, exact_arithmetic, relative_error, replayed
from models.acceleration.attention import KERNELS, AttentionCalls, AttentionShape, random_arguments
from models.acceleration.fusion import ALIGNED_CHANNELS
from models.acceleration.unet import EagerUNet


@dataclass(slots=True)
class LayerShapes:
    """convolutions: `(input, output channels, side, stride)`; products: `(m, k, n)`."""

    convolutions: set[tuple[tuple[int, ...], int, int, int]] = field(default_factory=set)
    products: set[tuple[int, int, int]] = field(default_factory=set)

    def note(self, module: Any, arguments: tuple[Any, ...], _result: Any) -> None:
        """A forward hook."""
        shape = tuple(arguments[0].shape)
        if isinstance(module, nn.Linear):
            rows = arguments[0].numel() // shape[-1]
            self.products.add((rows, shape[-1], module.out_features))
        elif module.kernel_size[0] > 1:
            self.convolutions.add(
                (shape, module.out_channels, module.kernel_size[0], module.stride[0])
            )


@torch.inference_mode()
def run(bench: Bench) -> None:
    """For each of the compared calls."""
    for family, side_px, rows in bench.scale.compared:
        layers, attention = shapes_of(bench, family, side_px, rows)
        for shape in sorted(layers.convolutions):
            bench.attempt(f"convolution {shape}", lambda: convolution(bench, *shape))  # noqa: B023
        for each in sorted(layers.products):
            bench.attempt(f"product {each}", lambda: product(bench, *each))  # noqa: B023
        for call in sorted(attention, key=str):
            name = f"attention {call[:5]}"
            bench.attempt(name, lambda: attention_ways(bench, call))  # noqa: B023


def shapes_of(
    bench: Bench, family: str, side_px: int, rows: int
) -> tuple[LayerShapes, set[AttentionShape]]:
    """By making the call once."""
    unet = subjects.placed(bench, subjects.UNETS[family])
    layers = LayerShapes()
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(layers.note)
    with AttentionCalls() as calls:
        EagerUNet(unet)(subjects.inputs_of(bench, unet, side_px, rows))
    return layers, calls.shapes


def convolution(
    bench: Bench, shape: tuple[int, ...], channels: int, side: int, stride: int
) -> dict[str, Any]:
    """By the kernel that cuDNN chooses, and as a product of unfolded pixels."""
    images, weight, exact = convolved(bench, shape, channels, side, stride)
    flops = 2 * exact.numel() * weight[0].numel()

    def unfolded() -> Tensor:
        columns = nn.functional.unfold(images, side, padding=side // 2, stride=stride)
        product: Tensor = columns.transpose(1, 2) @ weight.flatten(1).T
        return product

    found = {"cuDNN's": by_cudnn(bench, images, weight, stride, exact)}
    found["unfold"] = timed(bench, unfolded, flops, exact.flatten(2).transpose(1, 2))
    if shape[1] % ALIGNED_CHANNELS or channels % ALIGNED_CHANNELS:
        widened = padded_convolution(images, weight, stride)
        found["padded"] = timed(bench, widened, flops, exact)
    return found


def convolved(
    bench: Bench, shape: tuple[int, ...], channels: int, side: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, weight, and the result in double precision."""
    images = bench.random(*shape).to(memory_format=torch.channels_last)
    weight = bench.random(channels, shape[1], side, side).to(memory_format=torch.channels_last)
    weight = weight / (shape[1] * side * side) ** 0.5
    with exact_arithmetic():
        exact = nn.functional.conv2d(images.double(), weight.double(), None, stride, side // 2)
    return images, weight, exact


def by_cudnn(
    bench: Bench, images: Tensor, weight: Tensor, stride: int, exact: Tensor
) -> dict[str, float]:
    """Chosen by a heuristic, or by a search where `torch.backends.cudnn.benchmark` is on."""
    flops = 2 * exact.numel() * weight[0].numel()
    padding = weight.shape[-1] // 2
    return timed(
        bench, lambda: nn.functional.conv2d(images, weight, None, stride, padding), flops, exact
    )


def padded_convolution(images: Tensor, weight: Tensor, stride: int) -> Callable[[], Tensor]:
    """With zeros for the channels that tensor cores want besides; the picture's are added anew."""
    channels, inputs = weight.shape[:2]
    missing = -inputs % ALIGNED_CHANNELS
    grown = nn.functional.pad(weight, (0, 0, 0, 0, 0, missing, 0, -channels % ALIGNED_CHANNELS))
    grown = grown.contiguous(memory_format=torch.channels_last)
    padding = weight.shape[-1] // 2

    def convolved() -> Tensor:
        wide = nn.functional.pad(images, (0, 0, 0, 0, 0, missing))
        return nn.functional.conv2d(wide, grown, None, stride, padding)[:, :channels]

    return convolved


def product(bench: Bench, m: int, k: int, n: int) -> dict[str, Any]:
    """Followed by a sum with the residual, and with that sum inside."""
    hidden, weight = bench.random(m, k), bench.random(n, k) / k**0.5
    residual, bias = bench.random(m, n), bench.random(n)
    flops = 2 * m * n * k
    exact = hidden.double() @ weight.double().T

    def linear() -> Tensor:
        return nn.functional.linear(hidden, weight)

    found = {"linear": timed(bench, linear, flops, exact)}
    summed = exact + residual.double() + bias.double()
    found["linear, then sum"] = timed(
        bench, lambda: nn.functional.linear(hidden, weight, bias) + residual, flops, summed
    )
    into = residual.clone()
    found["sum inside"] = {"ms": bench.ms_in_queue(lambda: into.addmm_(hidden, weight.T, beta=0.5))}
    return found


def attention_ways(bench: Bench, shape: AttentionShape) -> dict[str, Any]:
    """By our kernel and by each of torch's, on memory as the UNet has it."""
    query, key, value = random_arguments(shape, bench.device)
    flops = 4 * shape.rows * shape.heads * shape.tokens * shape.keys * shape.width
    one = slice(0, 1)
    scores = query[one].double() @ key[one].double().transpose(-1, -2) / shape.width**0.5
    exact = scores.softmax(-1) @ value[one].double()

    def attend() -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)

    found: dict[str, Any] = {}
    if bench.is_cuda or subjects.kernels_are_interpreted():
        found["narrow_attention"] = narrowed(bench, (query, key, value), flops, exact)
    for kernel in KERNELS:
        with torch.nn.attention.sdpa_kernel([kernel]):
            try:
                found[kernel.name] = timed(bench, attend, flops, exact, one)
            except Exception as error:  # noqa: BLE001 - one kernel's fault is its own
                found[kernel.name] = {"error": str(error)[:120]}
    return found


def narrowed(
    bench: Bench, arguments: tuple[Tensor, Tensor, Tensor], flops: int, exact: Tensor
) -> dict[str, Any]:
    """By our kernel; why not, where it does not take the heads' width."""
    heads, width = arguments[0].shape[1], arguments[0].shape[3]
    try:
        from models.acceleration.narrow_attention import can_attend, narrow_attention

        if not can_attend(width, arguments[0].itemsize):
            return {"error": f"not for heads of {width}"}
        query, key, value, aligned = (
            each.transpose(1, 2).flatten(2) for each in (*arguments, exact)
        )
        one = slice(0, 1)
        return timed(bench, lambda: narrow_attention(query, key, value, heads), flops, aligned, one)
    except Exception as error:  # noqa: BLE001 - one kernel's fault is its own
        return {"error": f"{type(error).__name__}: {error}"[:120]}


def timed(
    bench: Bench,
    work: Callable[[], Tensor],
    flops: int,
    exact: Tensor,
    compared: slice = slice(None),
) -> dict[str, float]:
    """ms of one in a queue; TFLOP/s of the useful arithmetic; error of the compared rows."""
    error = relative_error(work()[compared], exact)
    ms = bench.ms_in_queue(replayed(bench, work))
    return {"ms": ms, "tflop_per_s": flops / ms / 1e9, "error": error}

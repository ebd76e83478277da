"""The kernels of a call, counted on the meta device, and how long the model says they take."""

import pytest
import torch
from torch import nn

from benchmarks.checkpoints import COSTS
from benchmarks.kernel_list import META, Kernel, kernels_of
from benchmarks.roofline import H100, decode_of, findings_of, seconds_of, step_of, to_text
from tests.support.programs import needs_triton


class Block(nn.Module):
    """A part of every kind that is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.inner = nn.Linear(16, 32, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(images).flatten(2).transpose(1, 2)  # (n, pixels, 16)
        heads = self.inner(hidden).unflatten(2, (2, 16)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads) * 2


@needs_triton
def test_each_kernel_is_counted_with_its_work_and_place() -> None:
    block = Block().to(META, torch.float16)
    block.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.empty(3, 8, 4, 4, device=META, dtype=torch.float16)

    results: list[object] = []
    kernels = kernels_of(block, lambda: results.append(block(images)))

    assert isinstance(results[0], torch.Tensor), "a hook that returns something replaces the result"
    assert kernels == [
        Kernel("convolution", "conv", 2 * 48 * 16 * 72, 2 * (384 + 1152 + 768), (48, 16, 72)),
        Kernel("convolution's bias", "conv", 0, 2 * (768 + 16 + 768), (3, 16, 4, 4)),
        Kernel("product", "inner", 2 * 48 * 32 * 16, 2 * (768 + 512 + 1536), (48, 32, 16)),
        Kernel("attention", "", 4 * 3 * 2 * 16 * 16 * 16, 2 * 4 * 1536, (3, 2, 16, 16, 16)),
        Kernel("mul", "", 0, 2 * 2 * 1536, (3, 2, 16, 16)),
    ]
    assert not block.conv._forward_hooks


@needs_triton
def test_step_has_the_operations_of_the_published_count() -> None:
    step = step_of("sd15", 512, 2)

    assert step.tflop == pytest.approx(2 * COSTS["sd15", 512].unet_row, rel=0.001)
    assert {"norm_tile", "norm_small_group", "gated_gelu", "add_bias"} <= {
        kernel.kind for kernel in step.kernels
    }
    assert len(step.kernels) <= 490
    copies = [kernel for kernel in step.kernels if kernel.kind in ("clone", "copy_")]
    assert copies == [], "channels last are kept throughout"


@needs_triton
def test_model_gives_the_measured_times_of_the_card_it_was_fitted_to() -> None:
    """Of the code that was measured then, so a step may only have become quicker since."""
    assert step_of("sd15", 512, 2).modelled_ms <= 7.3


def test_kernel_takes_the_longer_of_arithmetic_and_memory() -> None:
    wide = Kernel("product", "", 2 * 8192**3, 3 * 2 * 8192**2, (8192, 8192, 8192))
    thin = Kernel("add", "", 0, 3 * 10**9, (1,))
    empty = Kernel("add", "", 0, 0, (1,))

    assert seconds_of(wide) == pytest.approx(2 * 8192**3 / H100.flops_per_s, rel=0.1)
    assert seconds_of(thin) == pytest.approx(1e-3 + H100.launch_s)
    assert seconds_of(empty) == H100.launch_s


def test_heads_of_40_are_charged_as_64() -> None:
    def attention(width: int) -> float:
        shape = (2, 8, 4096, 4096, width)
        return seconds_of(Kernel("attention", "", 4 * 16 * 4096**2 * width, 0, shape))

    assert attention(40) == pytest.approx(attention(64))


@needs_triton
def test_report_has_a_table_for_each_call() -> None:
    text = to_text(findings_of([decode_of(64)], {"all": decode_of(64)}))

    assert "| VAE 64², decode |" in text
    assert "## VAE 64², decode" in text
    assert "| convolution |" in text
    assert "| all |" in text

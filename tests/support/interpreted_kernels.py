"""A program: kernels and fused modules against torch on the CPU, with TRITON_INTERPRET=1.

Errors are relative, against float64 for kernels and against the plain modules for models. Results
begin as NaN, so that a number which no kernel wrote is seen.
"""

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.nn.functional import gelu, silu

from models.acceleration.fusion import (
    FusedResnetBlock,
    FusedTransformer,
    Fusions,
    LineNorm,
    PixelwiseConv,
    fuse_modules,
)
from models.acceleration.joining import narrow_heads, simplify_attention
from models.acceleration.kernels import add_bias, gated_gelu, group_norm, layer_norm
from models.acceleration.narrow_attention import narrow_attention
from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import load_components

GROUPS = 32
EPS = 1e-5
EXACT, HALF = 1e-6, 1e-3

NORMS = [
    # rows, pixels, channels, rows of the shift, activated, dtype
    (2, 64, 64, 0, False, torch.float32),  # one program per group
    (2, 100, 96, 2, True, torch.float32),  # padded in both directions
    (3, 257, 32, 1, False, torch.float16),
    (1, 1024, 320, 1, True, torch.float32),  # in tiles, and channels that fill no tile
    (2, 1500, 320, 2, True, torch.float16),  # tiles that pixels do not fill
    (1, 8300, 64, 0, True, torch.float32),  # more tiles than are combined at a time
]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of norms."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(what: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Raises: AssertionError."""
    error = relative_error(found, expected)
    assert found.shape == expected.shape, what
    assert error <= bound, f"{what}: {error:.2e} apart"  # NaN is not below it


def poison_results() -> None:
    """Have torch fill new memory with NaN, as it does where it is to be deterministic."""
    torch.use_deterministic_algorithms(True)
    like = torch.zeros(2, dtype=torch.float16)
    assert torch.empty_like(like).isnan().all()
    assert like.new_empty((2, 3), dtype=torch.float32).isnan().all()


def check_norms(generator: torch.Generator) -> None:
    """Far from zero too, where sums of squares would lose all digits."""
    for rows, pixels, channels, shift_rows, is_activated, dtype in NORMS:
        hidden = (torch.randn(rows, pixels, channels, generator=generator) + 50).to(dtype)
        weight, bias = torch.randn(2, channels, generator=generator).to(dtype)
        shift = torch.randn(shift_rows, channels, generator=generator).to(dtype)
        # As a block has it whose shift is cut out of a product for all.
        shift = torch.cat([shift, shift], dim=1)[:, :channels]
        found = group_norm(
            hidden,
            GROUPS,
            weight,
            bias,
            EPS,
            shift=shift if shift_rows else None,
            is_activated=is_activated,
        )
        shifted = hidden.double() + (shift.double()[:, None] if shift_rows else 0)
        expected = torch.nn.functional.group_norm(
            shifted.transpose(1, 2), GROUPS, weight.double(), bias.double(), EPS
        ).transpose(1, 2)
        expected = silu(expected) if is_activated else expected
        bound = HALF if dtype == torch.float16 else 1e-4
        check(f"norm of {rows, pixels, channels, dtype}", found, expected, bound)


def check_line_norms(generator: torch.Generator) -> None:
    """Several lines to a program, and one; channels that fill none of their power of two."""
    for lines, channels in ((37, 320), (5, 640), (3, 1280), (2, 6_000), (70, 32)):
        for dtype, bound in ((torch.float32, 1e-4), (torch.float16, HALF)):
            hidden = (torch.randn(2, lines, channels, generator=generator) + 50).to(dtype)
            weight, bias = torch.randn(2, channels, generator=generator).to(dtype)
            expected = torch.nn.functional.layer_norm(
                hidden.double(), (channels,), weight.double(), bias.double(), EPS
            )
            found = layer_norm(hidden, weight, bias, EPS)
            check(f"norm of lines {lines, channels, dtype}", found, expected, bound)
            alone = layer_norm(hidden[1:, -1:].contiguous(), weight, bias, EPS)
            assert torch.equal(alone, found[1:, -1:]), "a line depends on itself alone"
            shift = torch.randn(channels, generator=generator)
            expected = torch.nn.functional.layer_norm(
                hidden.double() + shift.double(), (channels,), weight.double(), bias.double(), EPS
            )
            found = layer_norm(hidden, weight, bias, EPS, shift=shift)
            check(f"norm of shifted lines {lines, channels, dtype}", found, expected, bound)


def check_sums(generator: torch.Generator) -> None:
    """Of the residual, and of the gate."""
    left, right = torch.randn(2, 2, 100, 96, generator=generator)
    bias = torch.randn(96, generator=generator)
    check("sum", add_bias(left, right, bias), left + right + bias, EXACT)
    hidden = torch.randn(3, 50, 2 * 200, generator=generator)
    value, gate = hidden.chunk(2, dim=-1)
    check("gate", gated_gelu(hidden), value * gelu(gate), EXACT)


def check_attention(generator: torch.Generator) -> None:
    """Heads as they lie in joined products; tokens and keys that fill no block."""
    for tokens, keys, heads, width, dtype in (
        (256, 256, 2, 40, torch.float16),
        (200, 77, 2, 80, torch.float16),
        (130, 150, 1, 40, torch.float32),
    ):
        channels = heads * width
        query = torch.randn(2, tokens, 3 * channels, generator=generator).to(dtype)[..., :channels]
        pair = torch.randn(2, keys, 2 * channels, generator=generator).to(dtype)
        key, value = pair.chunk(2, dim=-1)
        found = narrow_attention(query, key, value, heads)
        query, key, value = (
            torch.unflatten(each.double(), -1, (heads, -1)).transpose(1, 2)
            for each in (query, key, value)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        bound = HALF if dtype == torch.float16 else EXACT
        expected = expected.transpose(1, 2).flatten(2)
        check(f"attention {tokens, keys, heads, width}", found, expected, bound)


@torch.inference_mode()
def check_narrow_heads(generator: torch.Generator) -> None:
    """In a transformer block as Stable Diffusion 1.5 has it."""
    block = BasicTransformerBlock(80, 2, 40, cross_attention_dim=32)
    arguments = {
        "hidden_states": torch.randn(2, 140, 80, generator=generator),
        "encoder_hidden_states": torch.randn(2, 77, 32, generator=generator),
    }
    expected = block(**arguments)
    model = torch.nn.Sequential(block)
    simplify_attention(model)
    narrow_heads(model)
    assert block.attn1.is_narrow
    assert block.attn2.is_narrow
    check("narrow heads", block(**arguments), expected, 1e-5)


@torch.inference_mode()
def check_models(generator: torch.Generator) -> None:
    """The built-in UNet and VAE."""
    components = load_components(
        ModelSpec("builtin", "builtin"), torch.device("cpu"), torch.float32
    )
    unet, vae = components.unet, components.vae
    check_switches(unet, generator)
    fused_unet, fused_vae = copy.deepcopy(unet), copy.deepcopy(vae)
    for model in (fused_unet, fused_vae):
        fuse_modules(model.to(memory_format=torch.channels_last))
        kinds = {type(module) for module in model.modules()}
        assert {FusedResnetBlock, PixelwiseConv} <= kinds
        assert model is fused_vae or {FusedTransformer, LineNorm} <= kinds
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 9, 16, 16, generator=generator),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(
            2, 77, unet.config.cross_attention_dim, generator=generator
        ),
    }
    check("UNet", fused_unet(**inputs).sample, unet(**inputs).sample, 1e-5)
    picture = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    latents = vae.encode(picture).latent_dist.parameters
    check("encoder", fused_vae.encode(picture).latent_dist.parameters, latents, 1e-5)
    pictures = vae.decode(latents[:, :4]).sample
    check("decoder", fused_vae.decode(latents[:, :4]).sample, pictures, 1e-5)
    # `LatentCodec` decodes with such a copy what half precision could not.
    check("copy", copy.deepcopy(fused_vae).decode(latents[:, :4]).sample, pictures, 1e-5)


def check_switches(unet: Any, generator: torch.Generator) -> None:
    """Each fusion alone, and all but those on which others depend.

    On few pixels, because the interpreter is slow.
    """
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 9, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(
            2, 7, unet.config.cross_attention_dim, generator=generator
        ),
    }
    expected = unet(**inputs).sample
    nothing = Fusions(*(False for _ in fields(Fusions)))
    alone = [replace(nothing, **{field.name: True}) for field in fields(Fusions)]
    for fusions in (*alone, Fusions(norms=False), Fusions(times=False)):
        fused = copy.deepcopy(unet).to(memory_format=torch.channels_last)
        fuse_modules(fused, fusions)
        check(f"UNet, {fusions}", fused(**inputs).sample, expected, 1e-5)


def main() -> None:
    """Raises: AssertionError."""
    poison_results()
    generator = torch.Generator().manual_seed(0)
    check_norms(generator)
    check_line_norms(generator)
    check_sums(generator)
    check_attention(generator)
    check_narrow_heads(generator)
    check_models(generator)


if __name__ == "__main__":
    main()

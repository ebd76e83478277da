"""Residual sums of transformer blocks, made by the products whose results they add.

A product can be added to what its memory holds, so that no pass over memory follows for the sum.
It adds no bias then. A bias is a constant of its channel: the sum goes without it, and what reads
the sum, the layer norms and the transformer's last projection, is told what is missing. That leaves
fewer results to be rounded than a sum behind each product.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from models.acceleration.joining import PlainAttention


class SummingBlock(BasicTransformerBlock):  # type: ignore[misc]
    """A transformer block whose three sums are made in place.

    missing: `(3, d)` float32: what its sum lacks when each of the norms reads it.
    """

    missing: Tensor

    @staticmethod
    def can_be(block: Any) -> bool:
        """False for kinds of block that no Stable Diffusion has, or whose attention is not ours."""
        return (
            type(block) is BasicTransformerBlock
            and block.norm_type == "layer_norm"
            and block.pos_embed is None
            and not block.only_cross_attention
            and isinstance(block.attn1, PlainAttention)
            and isinstance(block.attn2, PlainAttention)
            and all(type(linear) is nn.Linear for linear in last_linears(block))
        )

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_others: Any
    ) -> Tensor:
        """hidden_states: `(n, tokens, d)`, overwritten with the result where it is contiguous.

        encoder_hidden_states: as `attn2` has it.
        """
        first, second, third = self.missing
        total = hidden_states.contiguous()
        attended = self.attn1.mixed(normed(total, self.norm1, first), None)
        add_product(total, attended, self.attn1.to_out[0])
        attended = self.attn2.mixed(normed(total, self.norm2, second), encoder_hidden_states)
        add_product(total, attended, self.attn2.to_out[0])
        inner = self.ff.net[0](normed(total, self.norm3, third))
        return add_product(total, inner, self.ff.net[2])


def last_linears(block: Any) -> list[Any]:
    """Those whose results are added to the block's input, in order."""
    return [block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]]


def normed(hidden: Tensor, norm: Any, missing: Tensor) -> Tensor:
    """The norm of `hidden + missing`. missing: `(d,)` float32."""
    with_shift = getattr(norm, "shifted", None)
    if with_shift is None:
        answer: Tensor = norm(hidden + missing.to(hidden.dtype))
        return answer
    shifted: Tensor = with_shift(hidden, missing)
    return shifted


def add_product(total: Tensor, factor: Tensor, linear: Any) -> Tensor:
    """`total + linear(factor)` without the bias, written to `total`.

    factor, total: `(n, tokens, …)`; total: contiguous.
    """
    total.view(-1, total.shape[-1]).addmm_(factor.flatten(0, 1), linear.weight.T)
    return total


def sum_in_products(transformers: Sequence[Any]) -> None:
    """Let the blocks of these transformers sum in place, where all of a transformer's can."""
    for transformer in transformers:
        blocks = [*transformer.transformer_blocks]
        if all(map(SummingBlock.can_be, blocks)):
            missing = settle(blocks)
            transformer.set_missing(missing)


def settle(blocks: Sequence[Any]) -> Tensor:
    """Give blocks that follow one another their class. Returns what the last one's sum lacks."""
    missing = torch.zeros_like(blocks[0].norm1.weight, dtype=torch.float32)  # (d,)
    for block in blocks:
        before = []
        for linear in last_linears(block):
            before.append(missing)
            if linear.bias is not None:
                missing = missing + linear.bias.detach().float()
        block.register_buffer("missing", torch.stack(before), persistent=False)
        block.__class__ = SummingBlock
    return missing

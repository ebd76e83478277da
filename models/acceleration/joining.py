"""Products of a UNet that have one factor in common, made as one.

A step of Stable Diffusion 1.5 projects the same text 32 times, the same time embedding 22 times,
and each picture three times before each self-attention. Together they are fewer and larger
products, on which a GPU loses less time. The weights are laid side by side, and the modules' own
become views.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn


class PlainAttention(Attention):  # type: ignore[misc]
    """Attention without the division by 1 that diffusers ends with, and without a mask.

    is_narrow: by our own kernel.
    """

    is_narrow = False

    @staticmethod
    def can_be(attention: Any) -> bool:
        """False for kinds of attention that no Stable Diffusion's UNet has."""
        parts = "spatial_norm group_norm norm_cross norm_q norm_k added_kv_proj_dim".split()
        return (
            type(attention) in (Attention, PlainAttention)
            and type(attention.to_q) is nn.Linear
            and all(getattr(attention, name) is None for name in parts)
            and attention.rescale_output_factor == 1
            and not attention.residual_connection
            and not attention.only_cross_attention
        )

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_masks: Any
    ) -> Tensor:
        """hidden_states, result: `(n, tokens, d)`; encoder_hidden_states: see `projected`."""
        result: Tensor = self.to_out[0](self.mixed(hidden_states, encoder_hidden_states))
        return result

    def mixed(self, hidden_states: Tensor, text: Tensor | None) -> Tensor:
        """The values as each token sees them, `(n, tokens, heads * width)`."""
        query, key, value = self.projected(hidden_states, text)
        if self.is_narrow:
            from models.acceleration.narrow_attention import narrow_attention

            return narrow_attention(query, key, value, self.heads)
        query, key, value = (
            torch.unflatten(each, -1, (self.heads, -1)).transpose(1, 2)
            for each in (query, key, value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2)

    def projected(self, hidden_states: Tensor, text: Tensor | None) -> Sequence[Tensor]:
        """Query, key and value, `(n, tokens, heads * width)` each.

        text: `(n, 77, d)`; None in self-attention.
        """
        seen = hidden_states if text is None else text
        return self.to_q(hidden_states), self.to_k(seen), self.to_v(seen)


class JoinedSelfAttention(PlainAttention):
    """Query, key and value are one product. joined: their weights, `(3 * heads * width, d)`."""

    joined: Tensor

    def projected(self, hidden_states: Tensor, text: Tensor | None) -> Sequence[Tensor]:
        """As `PlainAttention.projected`."""
        return nn.functional.linear(hidden_states, self.joined).chunk(3, dim=-1)


class JoinedTextAttention(PlainAttention):
    """Its keys and values are part of the UNet's product. offset: where they begin there."""

    offset: int

    def projected(self, hidden_states: Tensor, text: Tensor | None) -> Sequence[Tensor]:
        """text: `(n, 77, all keys and values)`."""
        if text is None:
            raise ValueError("text attention needs the projected text")
        own = text.narrow(-1, self.offset, 2 * self.inner_kv_dim)
        return self.to_q(hidden_states), *own.chunk(2, dim=-1)


class JoinedUNet(UNet2DConditionModel):  # type: ignore[misc]
    """Hands its blocks the text's keys and values in place of the text.

    joined_text: weights of all text attention, `(all keys and values, d)`.
    """

    joined_text: Tensor

    def process_encoder_hidden_states(
        self, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Any]
    ) -> Tensor:
        """encoder_hidden_states: `(n, 77, d)`; result `(n, 77, all keys and values)`."""
        text = super().process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)
        return nn.functional.linear(text, self.joined_text)


class KnownFrequencies(Timesteps):  # type: ignore[misc]
    """The sines of timesteps, with frequencies that are not computed anew at each call.

    frequencies: `(d / 2,)` float32.
    """

    frequencies: Tensor

    @classmethod
    def settle(cls, timesteps: Any, device: torch.device) -> None:
        """Give a module this class."""
        half = timesteps.num_channels // 2
        exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=device)
        frequencies = torch.exp(exponent / (half - timesteps.downscale_freq_shift))
        timesteps.register_buffer("frequencies", timesteps.scale * frequencies, persistent=False)
        timesteps.__class__ = cls

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps: `(n,)`; result `(n, d)` float32."""
        angles = timesteps[:, None].float() * self.frequencies
        sines = torch.sin(angles), torch.cos(angles)
        return torch.cat(sines[::-1] if self.flip_sin_to_cos else sines, dim=-1)


class JoinedTimes(nn.Module):
    """What all residual blocks add of the time embedding. In place of a UNet's `time_embed_act`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding: `(n, d)`; result `(n, channels of all blocks)`."""
        return nn.functional.linear(nn.functional.silu(embedding), self.weight, self.bias)


def simplify_attention(unet: nn.Module) -> None:
    """Give attention in transformer blocks its own forward pass."""
    for block in transformer_blocks(unet):
        for attention in (block.attn1, block.attn2):
            if PlainAttention.can_be(attention):
                attention.__class__ = PlainAttention


def narrow_heads(unet: nn.Module) -> None:
    """Have our own kernel attend where it takes the heads' width in the weights' dtype."""
    from models.acceleration.narrow_attention import can_attend

    for module in unet.modules():
        if isinstance(module, PlainAttention):
            width, itemsize = module.inner_dim // module.heads, module.to_q.weight.itemsize
            module.is_narrow = can_attend(width, itemsize)


def join_self_attention(unet: nn.Module) -> None:
    """Make query, key and value of each self-attention one product."""
    for block in transformer_blocks(unet):
        attention = block.attn1
        if attention.is_cross_attention or not PlainAttention.can_be(attention):
            continue
        linears = [attention.to_q, attention.to_k, attention.to_v]
        if all(linear.bias is None for linear in linears):
            attention.register_buffer("joined", side_by_side(linears), persistent=False)
            attention.__class__ = JoinedSelfAttention


def join_text_attention(unet: Any) -> None:
    """Make the keys and values of all text attention one product.

    All blocks or none take part, because the text is replaced for all of them.
    """
    blocks = [*transformer_blocks(unet)]
    attentions = [block.attn2 for block in blocks]
    if type(unet) is not UNet2DConditionModel or not all(map(is_text_attention, attentions)):
        return
    linears = [linear for each in attentions for linear in (each.to_k, each.to_v)]
    unet.register_buffer("joined_text", side_by_side(linears), persistent=False)
    unet.__class__ = JoinedUNet
    offset = 0
    for attention in attentions:
        attention.offset = offset
        attention.__class__ = JoinedTextAttention
        offset += 2 * attention.inner_kv_dim


def is_text_attention(attention: Any) -> bool:
    """Whether it can take its keys and values from a product for all."""
    return (
        PlainAttention.can_be(attention)
        and attention.is_cross_attention
        and attention.to_k.bias is attention.to_v.bias is None
    )


def join_times(unet: Any, blocks: Sequence[Any]) -> None:
    """blocks: the fused residual blocks, which must be all that are given the embedding."""
    if type(unet) not in (UNet2DConditionModel, JoinedUNet) or unet.time_embed_act is not None:
        return
    for module in [*unet.modules()]:
        if type(module) is Timesteps and module.num_channels % 2 == 0:
            KnownFrequencies.settle(module, unet.device)
    weight = side_by_side([block.time_emb_proj for block in blocks])
    bias = torch.cat([block.inner_bias for block in blocks])
    offset = 0
    for block in blocks:
        block.time_offset = offset
        offset += block.time_emb_proj.out_features
    unet.time_embed_act = JoinedTimes(weight, bias)


def transformer_blocks(model: nn.Module) -> Iterable[Any]:
    """All that a Stable Diffusion has: self-attention, text attention, feed-forward."""
    for module in model.modules():
        if type(module) is BasicTransformerBlock and module.attn2 is not None:
            yield module


def side_by_side(linears: Sequence[nn.Linear]) -> Tensor:
    """Their weights as one, `(all outputs, d)`, of which their own become views."""
    joined = torch.cat([linear.weight.detach() for linear in linears])
    parts = torch.split(joined, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return joined

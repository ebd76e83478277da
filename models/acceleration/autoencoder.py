"""What is done to a VAE alone: its wide attention, and SDXL's range in half precision."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from models.acceleration.joining import side_by_side

QUERIES = 2_048
"""Attended to at a time: their scores, in float32, take 134 MB a picture at 1024×1024."""

STREAM_EXPONENT = 6
"""Binary digits by which a residual stream is made smaller. In SDXL's decoder 3.1e5 was seen, and
float16 ends at 65,504: this leaves a factor of 13. A weight of 0.005 is still a normal number.
A calibration picture would tell of that picture only."""


class WideAttention(Attention):  # type: ignore[misc]
    """Attention of one head, by a product before the softmax and one behind it.

    The kernels that do it in one go keep a head in registers, and are slow where it has 512 numbers
    or do not take it at all.
    joined: the weights of query, key and value, `(3 d, d)`; joined_bias: `(3 d,)`.
    """

    joined: Tensor
    joined_bias: Tensor

    @staticmethod
    def can_be(attention: Any) -> bool:
        """False for kinds of attention that are in no VAE of a Stable Diffusion."""
        linears = (attention.to_q, attention.to_k, attention.to_v)
        parts = "spatial_norm norm_cross norm_q norm_k added_kv_proj_dim".split()
        return (
            type(attention) is Attention
            and attention.heads == 1
            and attention.group_norm is not None
            and all(getattr(attention, name) is None for name in parts)
            and attention.residual_connection
            and attention.rescale_output_factor == 1
            and not attention.is_cross_attention
            and all(type(each) is nn.Linear and each.bias is not None for each in linears)
        )

    @classmethod
    def settle(cls, attention: Any) -> None:
        """Give a module this class."""
        linears = [attention.to_q, attention.to_k, attention.to_v]
        bias = torch.cat([linear.bias.detach() for linear in linears])
        attention.register_buffer("joined", side_by_side(linears), persistent=False)
        attention.register_buffer("joined_bias", bias, persistent=False)
        attention.__class__ = cls

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """hidden_states, result: `(n, d, h, w)`."""
        sides = hidden_states.shape[-2:]
        pixels = hidden_states.permute(0, 2, 3, 1).flatten(1, 2)  # (n, h * w, d)
        normed = self.group_norm(pixels.transpose(1, 2)).transpose(1, 2)
        projected = nn.functional.linear(normed, self.joined, self.joined_bias)
        query, key, value = projected.chunk(3, dim=-1)
        mixed = attended(query * self.scale, key, value)
        total: Tensor = self.to_out[0](mixed) + pixels
        return torch.unflatten(total, 1, sides).permute(0, 3, 1, 2)


def widen_attention(vae: nn.Module) -> None:
    """Give attention of one head its own forward pass."""
    for module in [*vae.modules()]:
        if isinstance(module, Attention) and WideAttention.can_be(module):
            WideAttention.settle(module)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query: `(n, tokens, d)`, scaled; key, value: `(n, keys, d)`; result as the query."""
    parts = [
        torch.bmm(scores_of(part, key).softmax(-1).to(value.dtype), value)
        for part in torch.split(query, QUERIES, dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """`(n, tokens, keys)` float32: in half precision the softmax would lose digits."""
    if query.device.type == "cpu" or query.dtype == torch.float32:
        return torch.bmm(query.float(), key.float().transpose(1, 2))
    return torch.bmm(query, key.transpose(1, 2), out_dtype=torch.float32)


def fits_by_scaling(vae: Any) -> bool:
    """Whether all that writes to a VAE's residual streams is known to `scale_stream`."""
    return (
        type(vae) is AutoencoderKL
        and {*vae.config.down_block_types} == {"DownEncoderBlock2D"}
        and {*vae.config.up_block_types} == {"UpDecoderBlock2D"}
    )


def halve(vae: Any) -> Any:
    """A float32 VAE in float16, whose values would leave its range; changed in place.

    What reads a residual stream is a group norm, for which only proportions matter, or a part that
    hands it on. So the stream may be smaller by a power of two, which changes no digit of it.
    """
    for coder in (vae.encoder, vae.decoder):
        scale_stream(coder, STREAM_EXPONENT)
    return vae.half()


@torch.no_grad()
def scale_stream(coder: Any, exponent: int) -> None:
    """Make the residual stream of an encoder or decoder smaller by `2**exponent`."""
    factor = 2.0**-exponent
    scale(factor, coder.conv_in)
    coder.conv_norm_out.eps *= factor**2
    for module in coder.modules():
        if isinstance(module, ResnetBlock2D):
            scale(factor, module.conv2)
            module.norm1.eps *= factor**2
            if module.conv_shortcut is not None:
                module.conv_shortcut.bias *= factor
        elif isinstance(module, Attention):
            scale(factor, module.to_out[0])
            module.group_norm.eps *= factor**2
        elif isinstance(module, Upsample2D | Downsample2D):
            module.conv.bias *= factor


def scale(factor: float, layer: Any) -> None:
    """Scale what a layer answers."""
    layer.weight *= factor
    layer.bias *= factor

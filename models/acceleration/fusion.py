"""Parts of a UNet or VAE that are made faster in place, where `kernels` can run.

The modules keep their weights and their place in the tree and get another class, so that moving,
casting and copying them works as before. What is computed is the same up to rounding: fewer results
in between are rounded to half precision.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from models.acceleration.autoencoder import widen_attention
from models.acceleration.joining import (
    join_self_attention,
    join_text_attention,
    join_times,
    narrow_heads,
    simplify_attention,
)
from models.acceleration.residuals import sum_in_products

logger = logging.getLogger(__name__)

ALIGNED_CHANNELS = 8
"""Matrix products on tensor cores want rows of 16 bytes."""


@dataclass(frozen=True, slots=True)
class Fusions:
    """Which parts are made faster. Each can be left out, so that what it gains can be measured.

    norms: group norm with channels last, and residual blocks with their sums in it. lines: layer
    norm. transformers: the result's memory order. gates: of the feed-forward layers. pixelwise:
    convolutions of 1×1. attention: no division by 1. self_attention, text, times: products that
    are made as one, see `joining`; the last one needs `norms`. residuals: sums inside products;
    needs `transformers`, and `attention` or both of the joined ones. wide_attention: a VAE's, by
    two products. narrow_attention: by our own kernel where heads have 40 or 80 numbers and
    `attention` or the joined ones are on; off until a card has shown that it is quicker.
    """

    norms: bool = True
    lines: bool = True
    transformers: bool = True
    gates: bool = True
    pixelwise: bool = True
    attention: bool = True
    self_attention: bool = True
    text: bool = True
    times: bool = True
    residuals: bool = True
    wide_attention: bool = True
    narrow_attention: bool = False


ALL_FUSIONS = Fusions()


def fuse(model: Any, fusions: Fusions = ALL_FUSIONS) -> None:
    """Make the parts of a UNet or VAE faster; on a CPU, or without Triton, nothing is changed."""
    if model.device.type == "cuda" and not why_no_kernels(model.device):
        fuse_modules(model, fusions)


@functools.cache
def why_no_kernels(device: torch.device) -> str:
    """Why kernels of ours cannot be built for a device, or run there; "" if they can.

    Triton may lack, or the C compiler that it calls.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from models.acceleration.kernels import gated_gelu

        gated_gelu(torch.zeros(1, 2, device=device)).cpu()
    except Exception as error:  # compilers fail in many ways
        logger.warning("no kernels of ours can be made, torch's are used", exc_info=True)
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
    return ""


def fuse_modules(model: nn.Module, fusions: Fusions = ALL_FUSIONS) -> None:
    """The same, wherever the weights are."""
    modules: list[Any] = [*model.modules()]
    for module in modules:
        if type(module) is nn.LayerNorm and module.bias is not None and fusions.lines:
            module.__class__ = LineNorm
        elif is_transformer(module) and fusions.transformers:
            module.__class__ = FusedTransformer
        elif type(module) is GEGLU and fusions.gates:
            module.__class__ = FusedGEGLU
        elif isinstance(module, nn.Conv2d) and is_matrix_product(module) and fusions.pixelwise:
            module.__class__ = PixelwiseConv
        elif fusions.norms:
            fuse_norms(module)
    join_modules(model, fusions)


def join_modules(model: Any, fusions: Fusions) -> None:
    """What concerns several modules, once these have their classes."""
    if fusions.attention:
        simplify_attention(model)
    if fusions.wide_attention:
        widen_attention(model)
    if fusions.self_attention:
        join_self_attention(model)
    if fusions.text:
        join_text_attention(model)
    if fusions.narrow_attention:
        narrow_heads(model)
    blocks = [each for each in model.modules() if isinstance(each, ResnetBlock2D)]
    if fusions.times and all(isinstance(each, FusedResnetBlock) for each in blocks):
        join_times(model, blocks)
    if fusions.residuals:
        sum_in_products([each for each in model.modules() if isinstance(each, FusedTransformer)])


def fuse_norms(module: Any) -> None:
    """Give a group norm, or what contains one, its quick form."""
    if isinstance(module, nn.GroupNorm):
        module.__class__ = LastChannelNorm
    elif type(module) is ResnetBlock2D and FusedResnetBlock.can_be(module):
        FusedResnetBlock.settle(module)
    elif is_silu(getattr(module, "conv_act", None)) and module.conv_norm_out is not None:
        module.conv_norm_out.is_activated = True
        module.conv_act = nn.Identity()


def is_transformer(module: Any) -> bool:
    """Whether a module is attention over an image."""
    return type(module) is Transformer2DModel and bool(module.is_input_continuous)


def is_matrix_product(conv: nn.Conv2d) -> bool:
    """True for a convolution that treats every pixel by itself, with channels as products like."""
    is_pixelwise = conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), 0)
    return (
        is_pixelwise
        and conv.groups == 1
        and conv.in_channels % ALIGNED_CHANNELS == conv.out_channels % ALIGNED_CHANNELS == 0
    )


def is_silu(module: object) -> bool:
    """Whether a module is that activation and nothing else."""
    return isinstance(module, nn.SiLU)


def pixels_of(images: Tensor) -> Tensor:
    """`(n, c, h, w)` as `(n, h * w, c)`, contiguous; without a copy where channels lie last."""
    return images.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def images_of(pixels: Tensor, like: Tensor) -> Tensor:
    """The reverse, with the height and width of another tensor; channels lie last."""
    count, _, channels = pixels.shape
    return pixels.view(count, *like.shape[-2:], channels).permute(0, 3, 1, 2)


class LastChannelNorm(nn.GroupNorm):
    """Group norm without a change of memory order. is_activated: SiLU is part of it."""

    is_activated = False

    def forward(self, input: Tensor) -> Tensor:
        """input, result: `(n, c, h, w)` or, as an attention layer has it, `(n, c, tokens)`."""
        if input.ndim == 3:
            return self.normed(input.transpose(1, 2).contiguous()).transpose(1, 2)
        return images_of(self.normed(pixels_of(input)), input)

    def normed(
        self, pixels: Tensor, shift: Tensor | None = None, is_activated: bool | None = None
    ) -> Tensor:
        """pixels: `(n, pixels, c)`; shift: added before, `(n, c)` or `(1, c)`."""
        from models.acceleration.kernels import group_norm

        return group_norm(
            pixels,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            shift=shift,
            is_activated=self.is_activated if is_activated is None else is_activated,
        )


class LineNorm(nn.LayerNorm):
    """Layer norm of the last dimension; torch's takes twice the time that memory does."""

    def forward(self, input: Tensor) -> Tensor:
        """input: `(…, d)`."""
        return self.shifted(input, None)

    def shifted(self, input: Tensor, shift: Tensor | None) -> Tensor:
        """shift: added before, `(d,)`."""
        from models.acceleration.kernels import layer_norm

        return layer_norm(input.contiguous(), self.weight, self.bias, self.eps, shift=shift)


class FusedTransformer(Transformer2DModel):  # type: ignore[misc]
    """Attention layers over an image, whose result stays in the order of memory it has.

    The plain one brings channels to the front, for the convolution behind that brings them back.
    outer_bias: of the last projection, with what its input lacks; only where `is_summing`.
    """

    outer_bias: Tensor
    is_summing = False

    def set_missing(self, missing: Tensor) -> None:
        """missing: `(d,)` float32, what the blocks' result is to be increased by."""
        weight = self.proj_out.weight.detach().flatten(1)
        bias = self.proj_out.bias.detach().float() + weight.float() @ missing
        self.register_buffer("outer_bias", bias.to(weight.dtype), persistent=False)
        self.is_summing = True

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, **_sizes: int
    ) -> Tensor:
        """hidden_states: `(n, h * w, d)`; residual, result: `(n, c, h, w)`."""
        weight = self.proj_out.weight.flatten(1)  # of a linear layer, or of a convolution of 1×1
        bias = self.outer_bias if self.is_summing else self.proj_out.bias
        pixels = nn.functional.linear(hidden_states, weight, bias)
        return images_of(pixels + pixels_of(residual), residual)


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """A gated linear unit whose gate is applied in one go."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """hidden_states: `(n, tokens, d)`."""
        from models.acceleration.kernels import gated_gelu

        return gated_gelu(self.proj(hidden_states))


class PixelwiseConv(nn.Conv2d):
    """A convolution of 1×1 as the matrix product it is: its bias costs nothing there."""

    def forward(self, input: Tensor) -> Tensor:
        """input: `(n, c, h, w)`."""
        product = nn.functional.linear(pixels_of(input), self.weight.flatten(1), self.bias)
        return images_of(product, input)


class FusedResnetBlock(ResnetBlock2D):  # type: ignore[misc]
    """A residual block whose sums are made where their numbers are read anyway.

    inner_bias: of the first convolution, and of the time embedding where there is one.
    time_offset: where this block's channels begin in a product for all; None for one of its own.
    outer_bias: of the second convolution, and of the shortcut's where there is one; in float32,
        because a copy of a VAE that is made to be exact must not inherit a rounded sum.
    """

    inner_bias: Tensor
    outer_bias: Tensor
    time_offset: int | None = None

    @staticmethod
    def can_be(block: Any) -> bool:
        """False for kinds of block that no Stable Diffusion has."""
        is_plain = block.time_embedding_norm == "default" or block.time_emb_proj is None
        return (
            is_plain
            and isinstance(block.norm2, nn.GroupNorm)
            and block.output_scale_factor == 1
            and not block.skip_time_act
            and block.upsample is block.downsample is None
            and (block.conv_shortcut is None or is_matrix_product(block.conv_shortcut))
            and is_silu(block.nonlinearity)
        )

    @classmethod
    def settle(cls, block: Any) -> None:
        """Give a block this class."""
        inner, outer = block.conv1.bias, block.conv2.bias
        if block.time_emb_proj is not None:
            inner = inner + block.time_emb_proj.bias
        if block.conv_shortcut is not None:
            outer = outer.float() + block.conv_shortcut.bias
        block.register_buffer("inner_bias", inner.detach().clone(), persistent=False)
        block.register_buffer("outer_bias", outer.detach().float().clone(), persistent=False)
        block.__class__ = cls

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *_args: Any, **_kwargs: Any
    ) -> Tensor:
        """input_tensor: `(n, c, h, w)`; temb: `(n, d)`, None in a VAE, or see `JoinedTimes`."""
        from models.acceleration.kernels import add_bias

        pixels = pixels_of(input_tensor)
        hidden = images_of(self.norm1.normed(pixels, is_activated=True), input_tensor)
        hidden = convolved(hidden, self.conv1)
        hidden_pixels = self.norm2.normed(pixels_of(hidden), self.shift(temb), is_activated=True)
        hidden = convolved(images_of(hidden_pixels, hidden), self.conv2)
        if self.conv_shortcut is not None:
            pixels = nn.functional.linear(pixels, self.conv_shortcut.weight.flatten(1))
        return images_of(add_bias(pixels_of(hidden), pixels, self.outer_bias), hidden)

    def shift(self, temb: Tensor | None) -> Tensor:
        """What is added before the second norm, `(n, c)` or `(1, c)`."""
        if self.time_emb_proj is None or temb is None:
            return self.inner_bias[None]
        if self.time_offset is not None:
            return temb.narrow(1, self.time_offset, self.time_emb_proj.out_features)
        activated = self.nonlinearity(temb)
        return nn.functional.linear(activated, self.time_emb_proj.weight, self.inner_bias)


def convolved(images: Tensor, conv: Any) -> Tensor:
    """A convolution without its bias."""
    return nn.functional.conv2d(images, conv.weight, None, conv.stride, conv.padding)

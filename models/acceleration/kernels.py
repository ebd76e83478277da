"""Triton kernels for activations whose channels lie last, in memory `(rows, pixels, channels)`.

torch has no group norm for that order: it copies its input to the other one, and the convolution
behind copies back. On an H100 these copies, the norm and what is done number by number around it
were half of a step of Stable Diffusion 1.5 and three quarters of its decoder. Numbers are float32
inside whatever the tensors are, and a row's result depends on that row alone, to the last bit.

Importing needs `triton`, which comes with torch's CUDA builds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Callable[[Callable[..., Any]], Any] = triton.jit

TILE_PIXELS, TILE_CHANNELS = 128, 64
TILE_WARPS = 8
COMBINED_TILES = 64
LINE_NUMBERS = 4_096
"""That one program of a layer norm holds, channels padded to powers of two. How many lines that is
depends on the channels alone: a line's last bit must not depend on how many others there are."""
SMALL_GROUP = 128 * 128
"""Numbers of a group, padded to powers of two, that one program can hold in its registers."""


def group_norm(
    hidden: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    is_activated: bool = False,
) -> Tensor:
    """`silu(group_norm(hidden + shift))`, or without the activation or the shift.

    hidden: `(rows, pixels, channels)`, contiguous; the result is another of its kind.
    weight, bias: `(channels,)`. shift: `(rows, channels)` or `(1, channels)`, perhaps cut out of
        wider rows.
    """
    call = _GroupNorm(hidden, groups, weight, bias, eps, shift, is_activated)
    group_pixels = triton.next_power_of_2(hidden.shape[1])
    if group_pixels * call.padded_group_channels <= SMALL_GROUP:
        return _norm_small_groups(call, group_pixels)
    return _norm_tiles(call)


@dataclass(frozen=True, slots=True)
class _GroupNorm:
    """A call of `group_norm`."""

    hidden: Tensor
    groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    shift: Tensor | None
    is_activated: bool

    @property
    def group_channels(self) -> int:
        return self.hidden.shape[2] // self.groups

    @property
    def padded_group_channels(self) -> int:
        return int(triton.next_power_of_2(self.group_channels))

    @property
    def shift_argument(self) -> Tensor:
        """A kernel needs some tensor; without a shift it does not read it."""
        return self.hidden if self.shift is None else self.shift

    @property
    def shift_stride(self) -> int:
        """0 where all rows have the same shift."""
        return 0 if self.shift is None or self.shift.shape[0] == 1 else self.shift.stride(0)


def _norm_small_groups(call: _GroupNorm, padded_pixels: int) -> Tensor:
    """One kernel, whose programs each hold a whole group."""
    rows, pixels, channels = call.hidden.shape
    normed = torch.empty_like(call.hidden)
    _norm_small_group[(call.groups, rows)](
        call.hidden,
        call.shift_argument,
        call.weight,
        call.bias,
        normed,
        pixels,
        channels,
        call.shift_stride,
        call.eps,
        GROUP_CHANNELS=call.group_channels,
        HAS_SHIFT=call.shift is not None,
        IS_ACTIVATED=call.is_activated,
        PIXELS=padded_pixels,
        CHANNELS=call.padded_group_channels,
        num_warps=TILE_WARPS,
    )
    return normed


def _norm_tiles(call: _GroupNorm) -> Tensor:
    """Three kernels: moments of tiles, statistics of groups from these, and the norm by tiles."""
    rows, pixels, channels = call.hidden.shape
    normed = torch.empty_like(call.hidden)
    tiles = triton.cdiv(pixels, TILE_PIXELS)
    grid = (tiles, triton.cdiv(channels, TILE_CHANNELS), rows)
    statistics = _group_statistics(call, grid)
    _norm_tile[grid](
        call.hidden,
        call.shift_argument,
        statistics[0],
        statistics[1],
        call.weight,
        call.bias,
        normed,
        pixels,
        channels,
        call.group_channels,
        call.groups,
        call.shift_stride,
        HAS_SHIFT=call.shift is not None,
        IS_ACTIVATED=call.is_activated,
        PIXELS=TILE_PIXELS,
        CHANNELS=TILE_CHANNELS,
        num_warps=TILE_WARPS,
    )
    return normed


def _group_statistics(call: _GroupNorm, grid: tuple[int, int, int]) -> Tensor:
    """What `_combine_moments` writes for each group: `(2, rows, groups)`, float32."""
    rows, pixels, channels = call.hidden.shape
    tiles = grid[0]
    moments = call.hidden.new_empty((2, rows, tiles, channels), dtype=torch.float32)
    statistics = call.hidden.new_empty((2, rows, call.groups), dtype=torch.float32)
    _tile_moments[grid](
        call.hidden,
        call.shift_argument,
        moments[0],
        moments[1],
        pixels,
        channels,
        call.shift_stride,
        HAS_SHIFT=call.shift is not None,
        PIXELS=TILE_PIXELS,
        CHANNELS=TILE_CHANNELS,
        num_warps=TILE_WARPS,
    )
    _combine_moments[(call.groups, rows)](
        moments[0],
        moments[1],
        statistics[0],
        statistics[1],
        pixels,
        channels,
        tiles,
        call.group_channels,
        call.groups,
        call.eps,
        PIXELS=TILE_PIXELS,
        ROUNDS=triton.cdiv(tiles, COMBINED_TILES),
        TILES=COMBINED_TILES,
        CHANNELS=call.padded_group_channels,
    )
    return statistics


def layer_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, *, shift: Tensor | None = None
) -> Tensor:
    """Over the last dimension of `hidden + shift`, or without the shift.

    hidden: `(…, channels)`, contiguous; the result is another of its kind.
    weight, bias, shift: `(channels,)`.
    """
    normed = torch.empty_like(hidden)
    channels = hidden.shape[-1]
    lines = hidden.numel() // channels
    padded = triton.next_power_of_2(channels)
    at_once = max(1, LINE_NUMBERS // padded)
    _norm_lines[(triton.cdiv(lines, at_once),)](
        hidden,
        hidden if shift is None else shift,
        weight,
        bias,
        normed,
        lines,
        channels,
        eps,
        HAS_SHIFT=shift is not None,
        LINES=at_once,
        CHANNELS=padded,
        num_warps=4,
    )
    return normed


def add_bias(left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
    """`left + right + bias`. left, right: `(rows, pixels, channels)`; bias: `(channels,)`."""
    total = torch.empty_like(left)
    channels = left.shape[-1]
    lines = left.numel() // channels
    grid = (triton.cdiv(lines, TILE_PIXELS), triton.cdiv(channels, TILE_CHANNELS))
    _add_bias[grid](
        left,
        right,
        bias,
        total,
        lines,
        channels,
        LINES=TILE_PIXELS,
        CHANNELS=TILE_CHANNELS,
        num_warps=TILE_WARPS,
    )
    return total


def gated_gelu(hidden: Tensor) -> Tensor:
    """The first half of the last dimension times the exact GELU of the second one.

    hidden: `(…, 2 d)`, contiguous; result `(…, d)`.
    """
    width = hidden.shape[-1] // 2
    gated = hidden.new_empty((*hidden.shape[:-1], width))
    lines = gated.numel() // width
    grid = (triton.cdiv(lines, 32), triton.cdiv(width, 128))
    _gated_gelu[grid](hidden, gated, lines, width, LINES=32, CHANNELS=128, num_warps=4)
    return gated


@jit
def _shifted_tile(
    hidden: tl.tensor,
    shift: tl.tensor,
    row: tl.tensor,
    pixel: tl.tensor,
    channel: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    channels_end: tl.tensor,
    shift_stride: tl.tensor,
    HAS_SHIFT: tl.constexpr,
) -> tl.tensor:
    """A tile `(pixels, channels)` of a row in float32; 0 outside."""
    is_inside = (pixel[:, None] < pixels) & (channel[None, :] < channels_end)
    begin = hidden + row.to(tl.int64) * pixels * channels
    tile = tl.load(begin + pixel[:, None] * channels + channel[None, :], is_inside, 0.0)
    tile = tile.to(tl.float32)
    if HAS_SHIFT:
        moved = tl.load(shift + row * shift_stride + channel, channel < channels_end, 0.0)
        tile = tl.where(is_inside, tile + moved.to(tl.float32)[None, :], 0.0)
    return tile


@jit
def _norm_small_group(
    hidden: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    normed: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    GROUP_CHANNELS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    IS_ACTIVATED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """A group of a row in one go.

    Its width is known at compile time: only then does the compiler see that the channels of a group
    begin at a multiple of 16 bytes, and reads eight numbers at a time where it had read one.
    """
    group, row = tl.program_id(0), tl.program_id(1)
    pixel = tl.arange(0, PIXELS)
    channel = group * GROUP_CHANNELS + tl.arange(0, CHANNELS)
    end = (group + 1) * GROUP_CHANNELS
    tile = _shifted_tile(
        hidden, shift, row, pixel, channel, pixels, channels, end, shift_stride, HAS_SHIFT
    )
    is_inside = (pixel[:, None] < pixels) & (channel[None, :] < end)
    count = (pixels * GROUP_CHANNELS).to(tl.float32)
    apart = tl.where(is_inside, tile - tl.sum(tile) / count, 0.0)
    rstd = tl.rsqrt(tl.sum(apart * apart) / count + eps)
    _store_normed(
        apart * rstd,
        weight,
        bias,
        normed,
        row,
        pixel,
        channel,
        pixels,
        channels,
        end,
        IS_ACTIVATED,
    )


@jit
def _tile_moments(
    hidden: tl.tensor,
    shift: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    shift_stride: tl.tensor,
    HAS_SHIFT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """For each channel of a tile its mean and the sum of squared distances from it."""
    row = tl.program_id(2)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tile = _shifted_tile(
        hidden, shift, row, pixel, channel, pixels, channels, channels, shift_stride, HAS_SHIFT
    )
    count = tl.minimum(PIXELS, pixels - tl.program_id(0) * PIXELS)
    mean = tl.sum(tile, 0) / count
    apart = tl.where(pixel[:, None] < pixels, tile - mean[None, :], 0.0)
    place = (row * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(means + place, mean, channel < channels)
    tl.store(squares + place, tl.sum(apart * apart, 0), channel < channels)


@jit
def _combine_moments(
    means: tl.tensor,
    squares: tl.tensor,
    group_means: tl.tensor,
    group_rstds: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    group_channels: tl.tensor,
    groups: tl.tensor,
    eps: tl.tensor,
    PIXELS: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """A group's mean and 1 / standard deviation from its tiles' (Chan et al. 1979), in order."""
    group, row = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    begin = row * tiles * channels + group * group_channels
    total = (pixels * group_channels).to(tl.float32)
    weighted = tl.zeros((TILES, CHANNELS), tl.float32)
    for number in range(ROUNDS):
        tile = number * TILES + tl.arange(0, TILES)
        is_inside = (tile[:, None] < tiles) & (channel[None, :] < group_channels)
        count = tl.minimum(PIXELS, pixels - tile * PIXELS).to(tl.float32)
        place = begin + tile[:, None] * channels + channel[None, :]
        weighted += tl.load(means + place, is_inside, 0.0) * count[:, None]
    mean = tl.sum(weighted) / total
    spread = tl.zeros((TILES, CHANNELS), tl.float32)
    for number in range(ROUNDS):
        tile = number * TILES + tl.arange(0, TILES)
        is_inside = (tile[:, None] < tiles) & (channel[None, :] < group_channels)
        count = tl.minimum(PIXELS, pixels - tile * PIXELS).to(tl.float32)
        place = begin + tile[:, None] * channels + channel[None, :]
        apart = tl.load(means + place, is_inside, 0.0) - mean
        inner = tl.load(squares + place, is_inside, 0.0)
        spread += tl.where(is_inside, inner + apart * apart * count[:, None], 0.0)
    place = row * groups + group
    tl.store(group_means + place, mean)
    tl.store(group_rstds + place, tl.rsqrt(tl.sum(spread) / total + eps))


@jit
def _norm_tile(
    hidden: tl.tensor,
    shift: tl.tensor,
    group_means: tl.tensor,
    group_rstds: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    normed: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    group_channels: tl.tensor,
    groups: tl.tensor,
    shift_stride: tl.tensor,
    HAS_SHIFT: tl.constexpr,
    IS_ACTIVATED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """A tile with the statistics of its groups."""
    row = tl.program_id(2)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tile = _shifted_tile(
        hidden, shift, row, pixel, channel, pixels, channels, channels, shift_stride, HAS_SHIFT
    )
    group = row * groups + channel // group_channels
    mean = tl.load(group_means + group, channel < channels, 0.0)
    rstd = tl.load(group_rstds + group, channel < channels, 0.0)
    _store_normed(
        (tile - mean[None, :]) * rstd[None, :],
        weight,
        bias,
        normed,
        row,
        pixel,
        channel,
        pixels,
        channels,
        channels,
        IS_ACTIVATED,
    )


@jit
def _store_normed(
    tile: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    normed: tl.tensor,
    row: tl.tensor,
    pixel: tl.tensor,
    channel: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    channels_end: tl.tensor,
    IS_ACTIVATED: tl.constexpr,
) -> None:
    is_inside = (pixel[:, None] < pixels) & (channel[None, :] < channels_end)
    scale = tl.load(weight + channel, channel < channels_end, 0.0).to(tl.float32)
    offset = tl.load(bias + channel, channel < channels_end, 0.0).to(tl.float32)
    tile = tile * scale[None, :] + offset[None, :]
    if IS_ACTIVATED:
        tile = tile * tl.sigmoid(tile)
    begin = normed + row.to(tl.int64) * pixels * channels
    place = begin + pixel[:, None] * channels + channel[None, :]
    tl.store(place, tile.to(normed.dtype.element_ty), is_inside)


@jit
def _norm_lines(
    hidden: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    normed: tl.tensor,
    lines: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    HAS_SHIFT: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < channels
    is_inside = (line[:, None] < lines) & is_channel[None, :]
    place = line[:, None] * channels + channel[None, :]
    tile = tl.load(hidden + place, is_inside, 0.0).to(tl.float32)
    if HAS_SHIFT:
        tile += tl.load(shift + channel, is_channel, 0.0).to(tl.float32)[None, :]
    mean = tl.sum(tile, 1) / channels
    apart = tl.where(is_inside, tile - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(apart * apart, 1) / channels + eps)
    scale = tl.load(weight + channel, is_channel, 0.0).to(tl.float32)
    offset = tl.load(bias + channel, is_channel, 0.0).to(tl.float32)
    tile = apart * rstd[:, None] * scale[None, :] + offset[None, :]
    tl.store(normed + place, tile.to(normed.dtype.element_ty), is_inside)


@jit
def _add_bias(
    left: tl.tensor,
    right: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    lines: tl.tensor,
    channels: tl.tensor,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_inside = (line[:, None] < lines) & (channel[None, :] < channels)
    place = line[:, None] * channels + channel[None, :]
    tile = tl.load(left + place, is_inside, 0.0).to(tl.float32)
    tile += tl.load(right + place, is_inside, 0.0).to(tl.float32)
    tile += tl.load(bias + channel, channel < channels, 0.0).to(tl.float32)[None, :]
    tl.store(total + place, tile.to(total.dtype.element_ty), is_inside)


@jit
def _gated_gelu(
    hidden: tl.tensor,
    gated: tl.tensor,
    lines: tl.tensor,
    width: tl.tensor,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_inside = (line[:, None] < lines) & (channel[None, :] < width)
    place = line[:, None] * 2 * width + channel[None, :]
    value = tl.load(hidden + place, is_inside, 0.0).to(tl.float32)
    gate = tl.load(hidden + place + width, is_inside, 0.0).to(tl.float32)
    gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    place = line[:, None] * width + channel[None, :]
    tl.store(gated + place, (value * gate).to(gated.dtype.element_ty), is_inside)

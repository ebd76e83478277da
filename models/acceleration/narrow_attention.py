"""Attention for head widths that are no power of two: 40 and 80 in Stable Diffusion 1.5.

Kernels that come with torch fill a head of 40 numbers up to 64. Here it is cut into 32 numbers and
a rest of 8, filled up to 16, so that tensor cores work on 48. It has run on no card yet.

Importing needs `triton`.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Callable[[Callable[..., Any]], Any] = triton.jit

QUERIES, KEYS = 128, 128
LOG2_E = 1.4426950408889634
LEAST_REST = 16
"""A product on tensor cores has at least so many numbers along each side."""


LARGEST_HEAD = 160
"""In bytes: 80 numbers of half precision, for which a program keeps 143,360 bytes of queries, keys
and values in shared memory. A head of 160 would need 286,720, and an H100 has 232,448."""


def can_attend(width: int, itemsize: int) -> bool:
    """Whether a head of so many numbers of so many bytes is cut into two here."""
    is_between = 32 < width and width * itemsize <= LARGEST_HEAD
    return is_between and width % 8 == 0 and width != triton.next_power_of_2(width)


def narrow_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """query: `(rows, tokens, heads * width)`; key, value: `(rows, keys, heads * width)`.

    Result as the query, contiguous. The last dimension is without gaps; the others may have some.
    """
    rows, tokens, channels = query.shape
    width = channels // heads
    wide = triton.next_power_of_2(width) // 2
    mixed = torch.empty((rows, tokens, channels), dtype=query.dtype, device=query.device)
    _narrow_attention[(triton.cdiv(tokens, QUERIES), rows * heads)](
        query,
        key,
        value,
        mixed,
        *(stride for each in (query, key, value) for stride in each.stride()[:2]),
        tokens,
        key.shape[1],
        heads,
        LOG2_E / width**0.5,
        WIDTH=width,
        WIDE=wide,
        REST=max(LEAST_REST, triton.next_power_of_2(width - wide)),
        IS_EVEN=key.shape[1] % KEYS == 0,
        QUERIES=QUERIES,
        KEYS=KEYS,
        num_warps=8,
        num_stages=3,
    )
    return mixed


@jit
def _lines(
    begin: tl.tensor,
    place: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Numbers `first` to `first + COUNT` of a head, of tokens `place`; 0 outside."""
    channel = first + tl.arange(0, COUNT)
    is_inside = (place[:, None] < end) & (channel[None, :] < WIDTH)
    return tl.load(begin + place[:, None] * stride + channel[None, :], is_inside, 0.0)


@jit
def _store_lines(
    total: tl.tensor,
    begin: tl.tensor,
    place: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    channel = first + tl.arange(0, COUNT)
    is_inside = (place[:, None] < end) & (channel[None, :] < WIDTH)
    numbers = total.to(begin.dtype.element_ty)
    tl.store(begin + place[:, None] * stride + channel[None, :], numbers, is_inside)


@jit
def _narrow_attention(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    mixed: tl.tensor,
    query_row: tl.tensor,
    query_token: tl.tensor,
    key_row: tl.tensor,
    key_token: tl.tensor,
    value_row: tl.tensor,
    value_token: tl.tensor,
    tokens: tl.tensor,
    keys: tl.tensor,
    heads: tl.tensor,
    scale: tl.tensor,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    IS_EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One head of a row, for a block of tokens. scale: of scores in powers of two."""
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    query += row.to(tl.int64) * query_row + head * WIDTH
    key += row.to(tl.int64) * key_row + head * WIDTH
    value += row.to(tl.int64) * value_row + head * WIDTH
    query_wide = _lines(query, place, tokens, query_token, 0, WIDTH, WIDE)
    query_rest = _lines(query, place, tokens, query_token, WIDE, WIDTH, REST)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    total_wide = tl.zeros((QUERIES, WIDE), tl.float32)
    total_rest = tl.zeros((QUERIES, REST), tl.float32)
    for begin in range(0, keys, KEYS):
        at = begin + tl.arange(0, KEYS)
        key_wide = _lines(key, at, keys, key_token, 0, WIDTH, WIDE)
        key_rest = _lines(key, at, keys, key_token, WIDE, WIDTH, REST)
        scores = tl.dot(query_wide, tl.trans(key_wide))
        scores = tl.dot(query_rest, tl.trans(key_rest), scores) * scale
        if not IS_EVEN:
            scores = tl.where(at[None, :] < keys, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        weight = weight * shrunk + tl.sum(shares, 1)
        shares = shares.to(value.dtype.element_ty)
        value_wide = _lines(value, at, keys, value_token, 0, WIDTH, WIDE)
        value_rest = _lines(value, at, keys, value_token, WIDE, WIDTH, REST)
        total_wide = tl.dot(shares, value_wide, total_wide * shrunk[:, None])
        total_rest = tl.dot(shares, value_rest, total_rest * shrunk[:, None])
        highest = higher
    stride = heads * WIDTH
    mixed += row.to(tl.int64) * tokens * stride + head * WIDTH
    total_wide = total_wide / weight[:, None]
    total_rest = total_rest / weight[:, None]
    _store_lines(total_wide, mixed, place, tokens, stride, 0, WIDTH, WIDE)
    _store_lines(total_rest, mixed, place, tokens, stride, WIDE, WIDTH, REST)

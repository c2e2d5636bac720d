"""Heads in two tiles: the helpers that the attention kernels and their launchers share.

``tl.arange`` takes powers of two alone, so a head of width D is not padded to the next one but split in two parts of at
least 16: 40 = 32 + 16 (8 of them masked), 80 = 64 + 16, 160 = 128 + 32. A tile of a head is a pair of tiles, [rows, D1]
and [rows, D2], and each product with a head takes one ``tl.dot`` per part. Where D2 is 0 the second of a pair is there
for the sake of the signature alone; every use of it stands behind ``D2 > 0``, and costs nothing.

All scores count in base 2 (``scale`` is multiplied by log2(e)), for a GPU has an instruction for exp2, not for exp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import device_of

LOG2_E = math.log2(math.e)
LARGEST_HEAD = 256


@triton.jit
def head_start(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where head h of sample b starts; both offsets are multiples of ALIGN elements."""
    # The promise of alignment lets the compiler load 16 bytes at a time.
    return ptr + tl.multiple_of(b.to(tl.int64) * stride_b + h * stride_h, ALIGN)


@triton.jit
def load_head(ptr, rows, stride, count, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr):
    """Rows of a head [count, D] as parts [rows, D1] and [rows, D2], zero outside; FULL: no row is outside.

    Where D2 is 0 the second part is the first one again and is not used.
    """
    # First part, without a mask where nothing lies outside.
    column = tl.arange(0, D1)
    start = ptr + rows[:, None] * stride + column[None, :]
    if FULL and D1 <= D:
        first = tl.load(start)
    else:
        first = tl.load(start, mask=(rows < count)[:, None] & (column < D)[None, :], other=0.0)

    # Second part.
    second = first
    if D2 > 0:
        column = D1 + tl.arange(0, D2)
        start = ptr + rows[:, None] * stride + column[None, :]
        if FULL and D1 + D2 <= D:
            second = tl.load(start)
        else:
            second = tl.load(start, mask=(rows < count)[:, None] & (column < D)[None, :], other=0.0)

    return first, second


@triton.jit
def store_head(ptr, first, second, rows, stride, count, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The reverse of load_head, in the dtype of ptr."""
    # First part.
    column = tl.arange(0, D1)
    inside = (rows < count)[:, None] & (column < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + column[None, :], first, mask=inside)

    # Second part.
    if D2 > 0:
        column = D1 + tl.arange(0, D2)
        inside = (rows < count)[:, None] & (column < D)[None, :]
        tl.store(ptr + rows[:, None] * stride + column[None, :], second, mask=inside)


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Float32 zeros [ROWS, D] in parts, to sum into."""
    # Without a second part the first stands in for it, as in load_head.
    first = tl.zeros([ROWS, D1], tl.float32)
    second = first
    if D2 > 0:
        second = tl.zeros([ROWS, D2], tl.float32)

    return first, second


@triton.jit
def dot_heads(a1, a2, b1, b2, D2: tl.constexpr):
    """a b^T over the whole head: [rows of a, rows of b] in float32."""
    # One sum for both parts. "ieee" keeps float32 from being rounded to tf32.
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def add_product(sum1, sum2, x, y1, y2, D2: tl.constexpr):
    """sum + x y with x [I, J], y [J, D] and the sum [I, D], in both parts of the head."""
    # Tensor cores take two operands of one dtype: float32 probabilities are rounded to the values'.
    x = x.to(y1.dtype)
    sum1 = tl.dot(x, y1, sum1, input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(x, y2, sum2, input_precision="ieee")
    return sum1, sum2


@triton.jit
def masked_scores(q1, q2, k1, k2, count, D2: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr):
    """q k^T [queries, ROWS], -inf beyond the first ``count`` keys; FULL: there are none beyond."""
    # A score of -inf has a probability of 0, and is never the row's maximum.
    scores = dot_heads(q1, q2, k1, k2, D2)
    if not FULL:
        scores = tl.where((tl.arange(0, ROWS) < count)[None, :], scores, float("-inf"))
    return scores


def padded(width: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def split_width(width: int) -> tuple[int, int]:
    """``width`` in two parts, powers of two of at least 16, the second may be 0: 40 -> (32, 16), 64 -> (64, 0)."""
    first = max(16, 1 << width.bit_length() - 1)
    return first, padded(width - first) if width > first else 0


def strided(x: Tensor) -> Tensor:
    """x [B, N, H, D] itself where a kernel can walk it: D without gaps, offsets inside a tile within int32."""
    return x if x.stride(3) == 1 and abs(x.stride(1)) < 2**23 else x.contiguous()


def head_constants(*tensors: Tensor) -> dict[str, int]:
    """D, D1 and D2 of tensors [B, N, H, D], and ALIGN: 8 where all heads start at multiples of 8 elements, else 1."""
    d1, d2 = split_width(tensors[0].shape[3])
    aligned = all(stride % 8 == 0 for x in tensors for stride in (x.stride(0), x.stride(2)))
    return {"D": tensors[0].shape[3], "D1": d1, "D2": d2, "ALIGN": 8 if aligned else 1}


def strides_of(*tensors: Tensor) -> list[int]:
    """The strides of sample, token and head of each tensor [B, N, H, D], as the kernels take them."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def attention_results(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Room for a forward pass's results: o [B, N, H, D], log-sum-exp [B, H, N] float32, which is empty if unwanted."""
    b, n, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, n) if with_lse else 0, dtype=torch.float32)


def choice_sizes(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """The sizes by which tiles are chosen: device, dtype, heads of all samples, queries, keys, parts of the head."""
    return device_of(q), q.dtype, q.shape[0] * q.shape[2], q.shape[1], k.shape[1], *split_width(q.shape[3])


def why_not_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """The reason why the kernels do not take these, if there is one."""
    shapes = f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        return f"q must be [B, N, H, D], k and v [B, M, H, D], {shapes}"
    if q.shape[3] > LARGEST_HEAD:
        return f"its kernel takes head dims up to {LARGEST_HEAD}, {shapes}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, found {q.dtype}, {k.dtype}, {v.dtype}"
    return None if scale > 0 else f"its kernel takes a positive scale, found {scale}"

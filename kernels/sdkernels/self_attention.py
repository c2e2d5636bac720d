"""Flash attention without a mask, forward and backward, at head dims that are not padded to a power of two.

After FlashAttention-2 (Dao, arXiv 2307.08691). ``tl.arange`` takes powers of two alone, so a head of width D is split
in two parts of at least 16: 40 = 32 + 16 (8 of them masked), 80 = 64 + 16, 160 = 128 + 32, and each product with a head
takes one ``tl.dot`` per part. Scores count in base 2 (``scale`` is multiplied by log2(e)), and so does the saved
log-sum-exp.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import Device, current, device_of, opaque, use_kernel
from .tuned import Options, tunable

LARGEST_HEAD = 256
LOG2_E = math.log2(math.e)
FASTER: dict[str, Any] = json.loads(Path(__file__).with_name("self_attention.json").read_text())
"""What "auto" takes. Read on import: torch.compile cannot trace the opening of a file."""


@triton.jit
def head_start(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where head h of sample b starts; both offsets are multiples of ALIGN elements."""
    return ptr + tl.multiple_of(b.to(tl.int64) * stride_b + h * stride_h, ALIGN)


@triton.jit
def load_head(ptr, rows, stride, count, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FULL: tl.constexpr):
    """Rows of a head [count, D] as parts [rows, D1] and [rows, D2], zero outside; FULL: no row is outside.

    Where D2 is 0 the second part is the first one again and is not used.
    """
    column = tl.arange(0, D1)
    start = ptr + rows[:, None] * stride + column[None, :]
    if FULL and D1 <= D:
        first = tl.load(start)
    else:
        first = tl.load(start, mask=(rows < count)[:, None] & (column < D)[None, :], other=0.0)
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
    column = tl.arange(0, D1)
    inside = (rows < count)[:, None] & (column < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + column[None, :], first, mask=inside)
    if D2 > 0:
        column = D1 + tl.arange(0, D2)
        inside = (rows < count)[:, None] & (column < D)[None, :]
        tl.store(ptr + rows[:, None] * stride + column[None, :], second, mask=inside)


@triton.jit
def dot_heads(a1, a2, b1, b2, D2: tl.constexpr):
    """a b^T over the whole head: [rows of a, rows of b] in float32."""
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def add_product(sum1, sum2, x, y1, y2, D2: tl.constexpr):
    """sum + x y with x [I, J], y [J, D] and the sum [I, D], in both parts of the head."""
    x = x.to(y1.dtype)
    sum1 = tl.dot(x, y1, sum1, input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(x, y2, sum2, input_precision="ieee")
    return sum1, sum2


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """A float32 sum [ROWS, D] in parts."""
    first = tl.zeros([ROWS, D1], tl.float32)
    second = first
    if D2 > 0:
        second = tl.zeros([ROWS, D2], tl.float32)
    return first, second


@triton.jit
def self_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, N, M, H,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """q [B, N, H, D], k and v [B, M, H, D] by strides, o [B, N, H, D], lse [B, H, N] in base 2.

    A program: BQ queries of one head. ``scale`` counts in base 2 and is positive. EVEN: M is a multiple of BK.
    """
    blocks = tl.cdiv(N, BQ)
    start, head = tl.program_id(0) % blocks * BQ, tl.program_id(0) // blocks
    b, h = head // H, head % H
    row, key = tl.arange(0, BQ), tl.arange(0, BK)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN) + start.to(tl.int64) * q_n
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN)
    q1, q2 = load_head(q_ptr, row, q_n, N - start, D, D1, D2, False)
    o1, o2 = zeros(BQ, D1, D2)
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    for first in range(0, M, BK):
        k1, k2 = load_head(k_ptr, key, k_n, M - first, D, D1, D2, EVEN)
        scores = dot_heads(q1, q2, k1, k2, D2)
        if not EVEN:
            scores = tl.where((key < M - first)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        top, total = higher, total * shrink + tl.sum(p, 1)
        o1 = o1 * shrink[:, None]
        if D2 > 0:
            o2 = o2 * shrink[:, None]
        v1, v2 = load_head(v_ptr, key, v_n, M - first, D, D1, D2, EVEN)
        o1, o2 = add_product(o1, o2, p, v1, v2, D2)
        k_ptr += tl.cast(BK, tl.int64) * k_n
        v_ptr += tl.cast(BK, tl.int64) * v_n
    o_ptr += ((b.to(tl.int64) * N + start) * H + h) * D
    store_head(o_ptr, o1 / total[:, None], o2 / total[:, None], row, H * D, N - start, D, D1, D2)
    tl.store(lse_ptr + head.to(tl.int64) * N + start + row, top + tl.log2(total), mask=row < N - start)


@triton.jit
def attention_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, N, M, H,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, scale2, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """As the forward kernel, and do by strides, dq [B, N, H, D]; writes delta = sum(do o) [B, H, N] too.

    A program: BQ queries of one head, a loop over the keys. ``scale2`` is ``scale`` times log2(e).
    """
    blocks = tl.cdiv(N, BQ)
    start, head = tl.program_id(0) % blocks * BQ, tl.program_id(0) // blocks
    b, h = head // H, head % H
    row, key = tl.arange(0, BQ), tl.arange(0, BK)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN) + start.to(tl.int64) * q_n
    do_ptr = head_start(do_ptr, b, h, do_b, do_h, ALIGN) + start.to(tl.int64) * do_n
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN)
    result = ((b.to(tl.int64) * N + start) * H + h) * D
    do1, do2 = load_head(do_ptr, row, do_n, N - start, D, D1, D2, False)
    o1, o2 = load_head(o_ptr + result, row, H * D, N - start, D, D1, D2, False)
    delta = tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(do2.to(tl.float32) * o2.to(tl.float32), 1)
    statistic = head.to(tl.int64) * N + start + row
    tl.store(delta_ptr + statistic, delta, mask=row < N - start)
    lse = tl.load(lse_ptr + statistic, mask=row < N - start, other=float("inf"))
    q1, q2 = load_head(q_ptr, row, q_n, N - start, D, D1, D2, False)
    dq1, dq2 = zeros(BQ, D1, D2)
    for first in range(0, M, BK):
        k1, k2 = load_head(k_ptr, key, k_n, M - first, D, D1, D2, EVEN)
        v1, v2 = load_head(v_ptr, key, v_n, M - first, D, D1, D2, EVEN)
        p = tl.exp2(dot_heads(q1, q2, k1, k2, D2) * scale2 - lse[:, None])
        if not EVEN:
            p = tl.where((key < M - first)[None, :], p, 0.0)
        ds = p * (dot_heads(do1, do2, v1, v2, D2) - delta[:, None])
        dq1, dq2 = add_product(dq1, dq2, ds, k1, k2, D2)
        k_ptr += tl.cast(BK, tl.int64) * k_n
        v_ptr += tl.cast(BK, tl.int64) * v_n
    store_head(dq_ptr + result, dq1 * scale, dq2 * scale, row, H * D, N - start, D, D1, D2)


@triton.jit
def attention_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, N, M, H,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, scale2, scale, queries,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dk and dv [splits, B, M, H, D], each split from ``queries`` queries, a multiple of BQ; the rest as above.

    A program: BK keys of one head, a loop over the split's queries. EVEN: N is a multiple of BQ.
    """
    blocks, splits = tl.cdiv(M, BK), tl.cdiv(N, queries)
    start, rest = tl.program_id(0) % blocks * BK, tl.program_id(0) // blocks
    split, head = rest % splits, rest // splits
    b, h = head // H, head % H
    first_query, last_query = split * queries, min(N, (split + 1) * queries)
    row, key = tl.arange(0, BQ), tl.arange(0, BK)
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN) + start.to(tl.int64) * k_n
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN) + start.to(tl.int64) * v_n
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN) + first_query.to(tl.int64) * q_n
    do_ptr = head_start(do_ptr, b, h, do_b, do_h, ALIGN) + first_query.to(tl.int64) * do_n
    lse_ptr += head.to(tl.int64) * N
    delta_ptr += head.to(tl.int64) * N
    k1, k2 = load_head(k_ptr, key, k_n, M - start, D, D1, D2, False)
    v1, v2 = load_head(v_ptr, key, v_n, M - start, D, D1, D2, False)
    dk1, dk2 = zeros(BK, D1, D2)
    dv1, dv2 = zeros(BK, D1, D2)
    for first in range(first_query, last_query, BQ):
        q1, q2 = load_head(q_ptr, row, q_n, N - first, D, D1, D2, EVEN)
        lse = tl.load(lse_ptr + first + row, mask=row < N - first, other=float("inf"))  # p is 0 there
        p = tl.exp2(dot_heads(k1, k2, q1, q2, D2) * scale2 - lse[None, :])  # [BK, BQ]
        do1, do2 = load_head(do_ptr, row, do_n, N - first, D, D1, D2, EVEN)
        dv1, dv2 = add_product(dv1, dv2, p, do1, do2, D2)
        delta = tl.load(delta_ptr + first + row, mask=row < N - first, other=0.0)
        ds = p * (dot_heads(v1, v2, do1, do2, D2) - delta[None, :])
        dk1, dk2 = add_product(dk1, dk2, ds, q1, q2, D2)
        q_ptr += tl.cast(BQ, tl.int64) * q_n
        do_ptr += tl.cast(BQ, tl.int64) * do_n
    batch = tl.num_programs(0) // (blocks * splits * H)
    result = (((split.to(tl.int64) * batch + b) * M + start) * H + h) * D
    store_head(dk_ptr + result, dk1 * scale, dk2 * scale, key, H * D, M - start, D, D1, D2)
    store_head(dv_ptr + result, dv1, dv2, key, H * D, M - start, D, D1, D2)


@triton.jit
def attention_backward_sum_kernel(parts_ptr, dk_ptr, dv_ptr, splits, size, BLOCK: tl.constexpr):
    """parts [2, splits, size] float32, dk and dv [size]; a program: BLOCK elements of dk or dv."""
    which = tl.program_id(1)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        start = (which * splits + split).to(tl.int64) * size
        total += tl.load(parts_ptr + start + element, mask=element < size, other=0.0)
    tl.store((dk_ptr if which == 0 else dv_ptr) + element, total, mask=element < size)


def split_width(width: int) -> tuple[int, int]:
    """``width`` in two parts, powers of two of at least 16, the second may be 0: 40 -> (32, 16), 64 -> (64, 0)."""
    first = max(16, 1 << width.bit_length() - 1)
    return first, padded(width - first) if width > first else 0


def padded(width: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def strided(x: Tensor) -> Tensor:
    """x [B, N, H, D] itself where a kernel can walk it: D without gaps, offsets inside a tile within int32."""
    return x if x.stride(3) == 1 and abs(x.stride(1)) < 2**23 else x.contiguous()


def head_options(*tensors: Tensor) -> dict[str, int]:
    """Constants of the head dim, and whether all offsets of heads are multiples of 8 elements (16-byte loads)."""
    d1, d2 = split_width(tensors[0].shape[3])
    aligned = all(stride % 8 == 0 for x in tensors for stride in (x.stride(0), x.stride(2)))
    return {"D": tensors[0].shape[3], "D1": d1, "D2": d2, "ALIGN": 8 if aligned else 1}


def _choices(*tiles: tuple[int, int, int]) -> tuple[Options, ...]:
    return tuple(
        {"BQ": bq, "BK": bk, "num_warps": warps, "num_stages": stages} for bq, bk, warps in tiles for stages in (2, 3)
    )


@tunable("self_attention_forward", _choices((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)))
def _forward_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Options:
    """64 queries for 4 warps; 128 for 8, sharing the loads, where heads are narrow and programs plenty.

    A thread holds (BK + D) / 2 float32 values; 32 keys at a time for wide heads, 16 on sm_120, where 32 spill. float32
    has no tensor cores to feed, and a thread holds all of its operands: smaller tiles. ``heads`` counts those of all
    samples.
    """
    wide = d1 + d2 > 128
    if dtype == torch.float32:
        return {"BQ": 16 if wide else 32, "BK": 16 if wide else 32, "num_warps": 4, "num_stages": 1}
    keys = 64 if not wide else 16 if device.capability >= 120 else 32
    if d1 + d2 <= 64 and triton.cdiv(n, 128) * heads >= 2 * device.multiprocessors:
        return {"BQ": 128, "BK": keys, "num_warps": 8, "num_stages": 2}
    return {"BQ": 64, "BK": keys, "num_warps": 4, "num_stages": 2}


@tunable("attention_backward_q", _choices((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)))
def _backward_q_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Options:
    """64 x 64 scores and a narrow head fill the registers of 4 warps; wide heads take 8, and then 32 keys at a time.

    sm_120 spills unless it takes half as many keys.
    """
    if dtype == torch.float32:
        return {"BQ": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
    keys, warps = 64 if d1 + d2 <= 128 else 32, 4 if d1 + d2 <= 64 else 8
    return {"BQ": 64, "BK": keys if device.capability < 120 else keys // 2, "num_warps": warps, "num_stages": 2}


@tunable("attention_backward_kv", _choices((32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8)))
def _backward_kv_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Options:
    """As for the queries' gradient, with queries and keys exchanged and two sums over the head instead of one.

    A wide head leaves room for 16 queries at a time where tensor cores read keys and values from registers.
    """
    if dtype == torch.float32:
        return {"BQ": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
    if d1 + d2 > 128:
        return {"BQ": 32 if device.capability in (90, 100) else 16, "BK": 64, "num_warps": 8, "num_stages": 2}
    queries, warps = 64 if device.capability < 120 else 32, 4 if d1 + d2 <= 64 else 8
    return {"BQ": queries, "BK": 64, "num_warps": warps, "num_stages": 2}


def choice_sizes(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """What a choice of tiles depends on: device, dtype, heads of all samples, queries, keys, parts of the head dim."""
    return device_of(q), q.dtype, q.shape[0] * q.shape[2], q.shape[1], k.shape[1], *split_width(q.shape[3])


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@opaque(_fake_forward)
def self_attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, N, H, D], k and v [B, M, H, D], ``strided`` -> o [B, N, H, D], log-sum-exp in base 2 [B, H, N] float32."""
    o, lse = _fake_forward(q, k, v, scale)
    (b, n, h, _), m, tiles = q.shape, k.shape[1], _forward_tiles(*choice_sizes(q, k))
    self_attention_forward_kernel[(triton.cdiv(n, tiles["BQ"]) * b * h,)](
        q, k, v, o, lse, n, m, h, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale * LOG2_E,
        EVEN=m % tiles["BK"] == 0, **head_options(q, k, v), **tiles,
    )  # fmt: skip
    return o, lse


def _query_split(q: Tensor, m: int, tiles: Options) -> int:
    """Queries per program of the keys' gradient: all, or as many as give each multiprocessor two programs."""
    b, n, h, _ = q.shape
    programs, multiprocessors = triton.cdiv(m, tiles["BK"]) * b * h, device_of(q).multiprocessors
    splits = 1 if programs >= multiprocessors else triton.cdiv(2 * multiprocessors, programs)
    return max(2, triton.cdiv(triton.cdiv(n, tiles["BQ"]), splits)) * tiles["BQ"]


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def sum_parts(parts: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Sum parts [2, splits, *shape] float32 over the splits, in order, into dk and dv."""
    grid = (triton.cdiv(dk.numel(), 256), 2)
    attention_backward_sum_kernel[grid](parts, dk, dv, parts.shape[1], dk.numel(), BLOCK=256, num_warps=2)


@opaque(_fake_backward)
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward pass took and gave, and do [B, N, H, D], ``strided`` -> dq, dk, dv."""
    dq, dk, dv = _fake_backward(q, k, v, o, lse, do, scale)
    (b, n, h, _), m, delta = q.shape, k.shape[1], torch.empty_like(lse)
    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:3]]
    options, tiles = head_options(q, k, v, do), _backward_q_tiles(*choice_sizes(q, k))
    attention_backward_q_kernel[(triton.cdiv(n, tiles["BQ"]) * b * h,)](
        q, k, v, o, do, lse, delta, dq, n, m, h, *strides, scale * LOG2_E, scale,
        EVEN=m % tiles["BK"] == 0, **options, **tiles,
    )  # fmt: skip
    tiles = _backward_kv_tiles(*choice_sizes(q, k))
    queries = _query_split(q, m, tiles)
    splits = -(-n // queries)
    parts = dk.new_empty((2, splits, *dk.shape), dtype=torch.float32) if splits > 1 else (dk, dv)
    attention_backward_kv_kernel[(triton.cdiv(m, tiles["BK"]) * splits * b * h,)](
        q, k, v, do, lse, delta, parts[0], parts[1], n, m, h, *strides, scale * LOG2_E, scale, queries,
        EVEN=n % tiles["BQ"] == 0, **options, **tiles,
    )  # fmt: skip
    if isinstance(parts, Tensor):
        sum_parts(parts, dk, dv)
    return dq, dk, dv


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = strided(q), strided(k), strided(v)
        o, lse = self_attention_forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        q, k, v, o, lse = ctx.saved_tensors
        return *attention_backward(q, k, v, o, lse, strided(do), ctx.scale), None


def why_not_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Why the kernels do not take these, if so."""
    shapes = f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        return f"q must be [B, N, H, D], k and v [B, M, H, D], {shapes}"
    if q.shape[3] > LARGEST_HEAD:
        return f"its kernel takes head dims up to {LARGEST_HEAD}, {shapes}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, found {q.dtype}, {k.dtype}, {v.dtype}"
    return None if scale > 0 else f"its kernel takes a positive scale, found {scale}"


def _prefers_sdpa(q: Tensor, keys: int) -> bool:
    """Whether the table says that PyTorch's kernel is the faster one for q [B, N, H, D].

    It is before sm_80, where Triton compiles products without tensor cores.
    """
    if device_of(q).capability < 80:
        return True
    dim = q.shape[3]
    choice = FASTER["default"]["power of two" if dim & (dim - 1) == 0 else "other"]
    classes = FASTER["measured"].get(str(device_of(q).capability), {}).get(str(dim), {})
    for longest in ("256", "1024", "4096", "longest"):
        if longest == "longest" or keys <= int(longest):
            return classes.get(longest, choice) == "sdpa"
    return False


def self_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v without a mask; q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D], in q's dtype.

    ``scale`` is D ** -0.5 by default. Products take the inputs' dtype and add up in float32, where the softmax is too.
    The kernel takes float32, float16 and bfloat16, D up to 256 and a positive scale; any strides, without a copy if the
    last is 1. Under "auto" PyTorch's kernel runs where ``self_attention.json`` says that it is faster. Differentiable.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    why_not = why_not_attention(q, k, v, factor)
    if why_not is None and current() == "auto" and q.is_cuda and _prefers_sdpa(q, k.shape[1]):
        why_not = "PyTorch's kernel is faster"
    if use_kernel("self_attention", why_not, q, k, v):
        return _SelfAttention.apply(q, k, v, factor)  # type: ignore[no-any-return]
    return reference.self_attention(q, k, v, scale)

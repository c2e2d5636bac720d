"""The gradients of attention at any number of keys, for ``self_attention`` and for ``cross_attention``'s larger heads.

After FlashAttention-2 (Dao, arXiv 2307.08691): the probabilities are computed again from the saved log-sum-exp, once
for the gradient of the queries, whose programs loop over the keys, and once for those of keys and values, whose
programs loop over the queries. With p the probabilities and do the gradient of the output:

    dv = p^T do        dp = do v^T        ds = p (dp - delta), delta = sum(do o)        dq = ds k        dk = ds^T q
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import device_of, opaque
from .head_tiles import (
    LOG2_E,
    add_product,
    choice_sizes,
    dot_heads,
    head_constants,
    head_start,
    load_head,
    store_head,
    strides_of,
    zeros,
)
from .in_force import Device
from .tuned import Tiles, tunable


@triton.jit
def attention_backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    N,
    M,
    H,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    do_b,
    do_n,
    do_h,
    scale2,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """q and do [B, N, H, D], k and v [B, M, H, D] by strides; o and dq [B, N, H, D]; lse and delta [B, H, N].

    Writes delta = sum(do o) too. A program: BQ queries of one head, a loop over the keys. ``scale2`` is ``scale`` times
    log2(e). EVEN: M is a multiple of BK.
    """
    # Which queries of which head. Neighbouring programs share a head, and find its keys in the cache.
    blocks = tl.cdiv(N, BQ)
    start, head = tl.program_id(0) % blocks * BQ, tl.program_id(0) // blocks
    b, h = head // H, head % H

    # Offsets between heads and to the first row are int64, those within a tile int32.
    row, key = tl.arange(0, BQ), tl.arange(0, BK)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN) + start.to(tl.int64) * q_n
    do_ptr = head_start(do_ptr, b, h, do_b, do_h, ALIGN) + start.to(tl.int64) * do_n
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN)
    result = ((b.to(tl.int64) * N + start) * H + h) * D

    # delta, which the kernel for keys and values reads as well.
    do1, do2 = load_head(do_ptr, row, do_n, N - start, D, D1, D2, False)
    o1, o2 = load_head(o_ptr + result, row, H * D, N - start, D, D1, D2, False)
    delta = tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(do2.to(tl.float32) * o2.to(tl.float32), 1)
    statistic = head.to(tl.int64) * N + start + row
    tl.store(delta_ptr + statistic, delta, mask=row < N - start)

    # Load queries. With an lse of inf the probabilities of rows beyond the last are 0.
    lse = tl.load(lse_ptr + statistic, mask=row < N - start, other=float("inf"))
    q1, q2 = load_head(q_ptr, row, q_n, N - start, D, D1, D2, False)
    dq1, dq2 = zeros(BQ, D1, D2)

    for first in range(0, M, BK):
        # Load keys and values.
        k1, k2 = load_head(k_ptr, key, k_n, M - first, D, D1, D2, EVEN)
        v1, v2 = load_head(v_ptr, key, v_n, M - first, D, D1, D2, EVEN)

        # Probabilities. A padded key has a score of 0, not -inf, so its probability is set to 0 here.
        p = tl.exp2(dot_heads(q1, q2, k1, k2, D2) * scale2 - lse[:, None])
        if not EVEN:
            p = tl.where((key < M - first)[None, :], p, 0.0)

        # Gradient of the scores, and what it adds to that of the queries.
        ds = p * (dot_heads(do1, do2, v1, v2, D2) - delta[:, None])
        dq1, dq2 = add_product(dq1, dq2, ds, k1, k2, D2)

        # The pointers advance, so that no offset inside a tile outgrows int32.
        k_ptr += tl.cast(BK, tl.int64) * k_n
        v_ptr += tl.cast(BK, tl.int64) * v_n

    # Store. The scores' scale, left out of the loop, is a factor of the whole sum.
    store_head(dq_ptr + result, dq1 * scale, dq2 * scale, row, H * D, N - start, D, D1, D2)


@triton.jit
def attention_backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    N,
    M,
    H,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    do_b,
    do_n,
    do_h,
    scale2,
    scale,
    queries,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dk and dv [splits, B, M, H, D], each split from ``queries`` queries, a multiple of BQ; the rest as above.

    A program: BK keys of one head, a loop over the split's queries. EVEN: N is a multiple of BQ.
    """
    # Which keys of which head, and which of the splits of its queries.
    blocks, splits = tl.cdiv(M, BK), tl.cdiv(N, queries)
    start, rest = tl.program_id(0) % blocks * BK, tl.program_id(0) // blocks
    split, head = rest % splits, rest // splits
    b, h = head // H, head % H
    first_query, last_query = split * queries, min(N, (split + 1) * queries)

    # Offsets between heads and to the first row are int64, those within a tile int32.
    row, key = tl.arange(0, BQ), tl.arange(0, BK)
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN) + start.to(tl.int64) * k_n
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN) + start.to(tl.int64) * v_n
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN) + first_query.to(tl.int64) * q_n
    do_ptr = head_start(do_ptr, b, h, do_b, do_h, ALIGN) + first_query.to(tl.int64) * do_n
    lse_ptr += head.to(tl.int64) * N
    delta_ptr += head.to(tl.int64) * N

    # Load keys and values. Padded ones get gradients too, of no meaning, which are not stored.
    k1, k2 = load_head(k_ptr, key, k_n, M - start, D, D1, D2, False)
    v1, v2 = load_head(v_ptr, key, v_n, M - start, D, D1, D2, False)
    dk1, dk2 = zeros(BK, D1, D2)
    dv1, dv2 = zeros(BK, D1, D2)

    for first in range(first_query, last_query, BQ):
        # Load queries; probabilities, transposed [BK, BQ], which saves transposing them for the products below.
        q1, q2 = load_head(q_ptr, row, q_n, N - first, D, D1, D2, EVEN)
        lse = tl.load(lse_ptr + first + row, mask=row < N - first, other=float("inf"))  # p is 0 there
        p = tl.exp2(dot_heads(k1, k2, q1, q2, D2) * scale2 - lse[None, :])  # [BK, BQ]

        # Values' gradient.
        do1, do2 = load_head(do_ptr, row, do_n, N - first, D, D1, D2, EVEN)
        dv1, dv2 = add_product(dv1, dv2, p, do1, do2, D2)

        # Gradient of the scores, and what it adds to that of the keys.
        delta = tl.load(delta_ptr + first + row, mask=row < N - first, other=0.0)
        ds = p * (dot_heads(v1, v2, do1, do2, D2) - delta[None, :])
        dk1, dk2 = add_product(dk1, dk2, ds, q1, q2, D2)

        q_ptr += tl.cast(BQ, tl.int64) * q_n
        do_ptr += tl.cast(BQ, tl.int64) * do_n

    # Store, each split in a place of its own: no atomic additions, so the order of the sum is always the same.
    batch = tl.num_programs(0) // (blocks * splits * H)
    result = (((split.to(tl.int64) * batch + b) * M + start) * H + h) * D
    store_head(dk_ptr + result, dk1 * scale, dk2 * scale, key, H * D, M - start, D, D1, D2)
    store_head(dv_ptr + result, dv1, dv2, key, H * D, M - start, D, D1, D2)


@triton.jit
def attention_backward_sum_kernel(parts_ptr, dk_ptr, dv_ptr, splits, size, BLOCK: tl.constexpr):
    """parts [2, splits, size] float32, dk and dv [size]; a program: BLOCK elements of dk or dv."""
    which = tl.program_id(1)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)

    # Sum over the splits, in their order.
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        start = (which * splits + split).to(tl.int64) * size
        total += tl.load(parts_ptr + start + element, mask=element < size, other=0.0)

    # Store, in the gradient's dtype.
    tl.store((dk_ptr if which == 0 else dv_ptr) + element, total, mask=element < size)


def _candidates(*sizes: tuple[int, int, int]) -> tuple[Tiles, ...]:
    return tuple(
        {"BQ": bq, "BK": bk, "num_warps": warps, "num_stages": stages} for bq, bk, warps in sizes for stages in (2, 3)
    )


@tunable("attention_backward_q", _candidates((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)))
def _q_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Tiles:
    """64 x 64 scores and a narrow head fill the registers of 4 warps; wide heads take 8, and then 32 keys at a time.

    sm_120 spills unless it takes half as many keys.
    """
    if dtype == torch.float32:
        return {"BQ": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
    keys, warps = 64 if d1 + d2 <= 128 else 32, 4 if d1 + d2 <= 64 else 8
    return {"BQ": 64, "BK": keys if device.capability < 120 else keys // 2, "num_warps": warps, "num_stages": 2}


@tunable("attention_backward_kv", _candidates((32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8)))
def _kv_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Tiles:
    """As for the queries' gradient, with queries and keys exchanged and two sums over the head instead of one.

    A wide head leaves room for 16 queries at a time where tensor cores read keys and values from registers.
    """
    if dtype == torch.float32:
        return {"BQ": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
    if d1 + d2 > 128:
        return {"BQ": 32 if device.capability in (90, 100) else 16, "BK": 64, "num_warps": 8, "num_stages": 2}
    queries, warps = 64 if device.capability < 120 else 32, 4 if d1 + d2 <= 64 else 8
    return {"BQ": queries, "BK": 64, "num_warps": warps, "num_stages": 2}


def _query_split(q: Tensor, m: int, tiles: Tiles) -> int:
    """Queries per program of the keys' gradient: all, or as many as give each multiprocessor two programs."""
    b, n, h, _ = q.shape
    programs, multiprocessors = triton.cdiv(m, tiles["BK"]) * b * h, device_of(q).multiprocessors
    splits = 1 if programs >= multiprocessors else triton.cdiv(2 * multiprocessors, programs)
    return max(2, triton.cdiv(triton.cdiv(n, tiles["BQ"]), splits)) * tiles["BQ"]


def sum_parts(parts: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Sum parts [2, splits, *shape] float32 over the splits, in order, into dk and dv."""
    grid = (triton.cdiv(dk.numel(), 256), 2)
    attention_backward_sum_kernel[grid](parts, dk, dv, parts.shape[1], dk.numel(), BLOCK=256, num_warps=2)


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@opaque(_fake_backward)
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass's inputs, its o and lse, and do [B, N, H, D], ``strided`` -> dq, dk, dv."""
    dq, dk, dv = _fake_backward(q, k, v, o, lse, do, scale)
    (b, n, h, _), m, delta = q.shape, k.shape[1], torch.empty_like(lse)
    strides, constants = strides_of(q, k, v, do), head_constants(q, k, v, do)

    # The queries' gradient goes first: it leaves delta for the other kernel.
    tiles = _q_tiles(*choice_sizes(q, k))
    attention_backward_q_kernel[(triton.cdiv(n, tiles["BQ"]) * b * h,)](
        q,
        k,
        v,
        o,
        do,
        lse,
        delta,
        dq,
        n,
        m,
        h,
        *strides,
        scale * LOG2_E,
        scale,
        EVEN=m % tiles["BK"] == 0,
        **constants,
        **tiles,
    )

    # Few keys make few programs: then the queries are split, and each split leaves sums of its own.
    tiles = _kv_tiles(*choice_sizes(q, k))
    queries = _query_split(q, m, tiles)
    splits = -(-n // queries)
    parts = dk.new_empty((2, splits, *dk.shape), dtype=torch.float32) if splits > 1 else (dk, dv)
    attention_backward_kv_kernel[(triton.cdiv(m, tiles["BK"]) * splits * b * h,)](
        q,
        k,
        v,
        do,
        lse,
        delta,
        parts[0],
        parts[1],
        n,
        m,
        h,
        *strides,
        scale * LOG2_E,
        scale,
        queries,
        EVEN=n % tiles["BQ"] == 0,
        **constants,
        **tiles,
    )

    if isinstance(parts, Tensor):
        sum_parts(parts, dk, dv)
    return dq, dk, dv

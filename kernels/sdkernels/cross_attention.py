"""Attention over a short context (up to 256 keys) that stays on chip: one pass, no online softmax.

The keys are split like the head dims (``self_attention.py``): 77 = 64 + 16, 154 = 128 + 32, 231 = 128 + 128. Where many
keys meet a wide head the registers do not hold them, and ``self_attention.py``'s loops over the keys run instead.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import Device, current, device_of, opaque, use_kernel
from .self_attention import (
    LOG2_E,
    add_product,
    attention_backward,
    choice_sizes,
    dot_heads,
    head_options,
    head_start,
    load_head,
    padded,
    self_attention_forward,
    split_width,
    store_head,
    strided,
    sum_parts,
    why_not_attention,
    zeros,
)
from .tuned import Options, tunable

MOST_KEYS = 256
MOST_HELD = 12288  # keys x head dim of the forward kernel: 231 x 40 does not spill, 77 x 160 does on sm_90
MOST_HELD_SM_120 = 8192  # the same there: 154 x 40 does not spill, 231 x 40 does
MOST_SUMS = 8192  # the same of the backward kernel: 128 x 64


@triton.jit
def masked_scores(q1, q2, k1, k2, count, D2: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr):
    """q k^T [queries, ROWS], -inf beyond the first ``count`` keys; FULL: there are none beyond."""
    scores = dot_heads(q1, q2, k1, k2, D2)
    if not FULL:
        scores = tl.where((tl.arange(0, ROWS) < count)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def cross_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, N, M, H,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, scale, queries,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, BQ: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """q [B, N, H, D], k and v [B, M, H, D] by strides, o [B, N, H, D], lse [B, H, N] in base 2.

    A program: ``queries`` queries of one head, BQ at a time. ``scale`` counts in base 2 and is positive. The keys are
    parts of M1 and M2 rows; the first is full if there is a second.
    """
    chunks = tl.cdiv(N, queries)
    first_query, head = tl.program_id(0) % chunks * queries, tl.program_id(0) // chunks
    b, h = head // H, head % H
    row, key = tl.arange(0, BQ), tl.arange(0, M1)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN)
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN)
    k1, k2 = load_head(k_ptr, key, k_n, M, D, D1, D2, M2 > 0)
    v1, v2 = load_head(v_ptr, key, v_n, M, D, D1, D2, M2 > 0)
    if M2 > 0:
        key = M1 + tl.arange(0, M2)
        k3, k4 = load_head(k_ptr, key, k_n, M, D, D1, D2, False)
        v3, v4 = load_head(v_ptr, key, v_n, M, D, D1, D2, False)
    for start in range(first_query, min(N, first_query + queries), BQ):
        q1, q2 = load_head(q_ptr + tl.cast(start, tl.int64) * q_n, row, q_n, N - start, D, D1, D2, False)
        p1 = masked_scores(q1, q2, k1, k2, M, D2, M1, M2 > 0)
        top = tl.max(p1, 1)
        if M2 > 0:
            p2 = masked_scores(q1, q2, k3, k4, M - M1, D2, M2, False)
            top = tl.maximum(top, tl.max(p2, 1))
        top *= scale
        p1 = tl.exp2(p1 * scale - top[:, None])
        total = tl.sum(p1, 1)
        o1, o2 = zeros(BQ, D1, D2)
        o1, o2 = add_product(o1, o2, p1, v1, v2, D2)
        if M2 > 0:
            p2 = tl.exp2(p2 * scale - top[:, None])
            total += tl.sum(p2, 1)
            o1, o2 = add_product(o1, o2, p2, v3, v4, D2)
        result = ((b.to(tl.int64) * N + start) * H + h) * D
        store_head(o_ptr + result, o1 / total[:, None], o2 / total[:, None], row, H * D, N - start, D, D1, D2)
        tl.store(lse_ptr + head.to(tl.int64) * N + start + row, top + tl.log2(total), mask=row < N - start)


@triton.jit
def cross_attention_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, N, M, H,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, scale2, scale, queries,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr, BQ: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """As the forward kernel, and do by strides, dq [B, N, H, D], dk and dv [chunks, B, M, H, D], one chunk a program.

    KEYS is M padded to a power of two, EVEN says that nothing is padded; ``scale2`` is ``scale`` times log2(e). Keys,
    values and the sums of their gradients stay on chip. delta = sum(p dp) is taken over the keys and divided by sum(p),
    so that the rounding of lse does not keep ds from adding up to 0.
    """
    chunks = tl.cdiv(N, queries)
    chunk, head = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, h = head // H, head % H
    row, key = tl.arange(0, BQ), tl.arange(0, KEYS)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN)
    do_ptr = head_start(do_ptr, b, h, do_b, do_h, ALIGN)
    k1, k2 = load_head(head_start(k_ptr, b, h, k_b, k_h, ALIGN), key, k_n, M, D, D1, D2, EVEN)
    v1, v2 = load_head(head_start(v_ptr, b, h, v_b, v_h, ALIGN), key, v_n, M, D, D1, D2, EVEN)
    dk1, dk2 = zeros(KEYS, D1, D2)
    dv1, dv2 = zeros(KEYS, D1, D2)
    for start in range(chunk * queries, min(N, (chunk + 1) * queries), BQ):
        q1, q2 = load_head(q_ptr + tl.cast(start, tl.int64) * q_n, row, q_n, N - start, D, D1, D2, False)
        do1, do2 = load_head(do_ptr + tl.cast(start, tl.int64) * do_n, row, do_n, N - start, D, D1, D2, False)
        lse = tl.load(lse_ptr + head.to(tl.int64) * N + start + row, mask=row < N - start, other=0.0)
        p = tl.exp2(masked_scores(q1, q2, k1, k2, M, D2, KEYS, EVEN) * scale2 - lse[:, None])
        dp = dot_heads(do1, do2, v1, v2, D2)
        delta = tl.sum(p * dp, 1) / tl.sum(p, 1)
        ds = (p * (dp - delta[:, None])).to(q1.dtype)
        dv1, dv2 = add_product(dv1, dv2, tl.trans(p.to(q1.dtype)), do1, do2, D2)
        dk1, dk2 = add_product(dk1, dk2, tl.trans(ds), q1, q2, D2)
        dq1, dq2 = zeros(BQ, D1, D2)
        dq1, dq2 = add_product(dq1, dq2, ds, k1, k2, D2)
        result = ((b.to(tl.int64) * N + start) * H + h) * D
        store_head(dq_ptr + result, dq1 * scale, dq2 * scale, row, H * D, N - start, D, D1, D2)
    batch = tl.num_programs(0) // (chunks * H)
    result = ((chunk.to(tl.int64) * batch + b) * M * H + h) * D
    store_head(dk_ptr + result, dk1 * scale, dk2 * scale, key, H * D, M, D, D1, D2)
    store_head(dv_ptr + result, dv1, dv2, key, H * D, M, D, D1, D2)


@triton.jit
def store_columns(ptr, values, rows, columns, N, M):
    """values [rows, columns] into a matrix [N, M]."""
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    tl.store(ptr + rows[:, None].to(tl.int64) * M + columns[None, :], values, mask=inside)


@triton.jit
def cross_attention_probabilities_forward_kernel(
    q_ptr, k_ptr, probs_ptr, N, M, H, q_b, q_n, q_h, k_b, k_n, k_h, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, BQ: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """As above, and probs [B, N, M] float32, the mean over heads. A program: BQ queries of all heads."""
    blocks = tl.cdiv(N, BQ)
    start, b = tl.program_id(0) % blocks * BQ, tl.program_id(0) // blocks
    row, key = start + tl.arange(0, BQ), tl.arange(0, M1)
    mean1 = tl.zeros([BQ, M1], tl.float32)
    if M2 > 0:
        key2 = M1 + tl.arange(0, M2)
        mean2 = tl.zeros([BQ, M2], tl.float32)
    for h in range(H):
        q1, q2 = load_head(head_start(q_ptr, b, h, q_b, q_h, ALIGN), row.to(tl.int64), q_n, N, D, D1, D2, False)
        start_k = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
        k1, k2 = load_head(start_k, key, k_n, M, D, D1, D2, M2 > 0)
        p1 = masked_scores(q1, q2, k1, k2, M, D2, M1, M2 > 0)
        top = tl.max(p1, 1)
        if M2 > 0:
            k3, k4 = load_head(start_k, key2, k_n, M, D, D1, D2, False)
            p2 = masked_scores(q1, q2, k3, k4, M - M1, D2, M2, False)
            top = tl.maximum(top, tl.max(p2, 1))
            p2 = tl.exp2((p2 - top[:, None]) * scale)
        p1 = tl.exp2((p1 - top[:, None]) * scale)
        total = tl.sum(p1, 1)
        if M2 > 0:
            total += tl.sum(p2, 1)
            mean2 += p2 / (total * H)[:, None]
        mean1 += p1 / (total * H)[:, None]
    probs_ptr += b.to(tl.int64) * N * M
    store_columns(probs_ptr, mean1, row, key, N, M)
    if M2 > 0:
        store_columns(probs_ptr, mean2, row, key2, N, M)


def _choices(*tiles: tuple[int, int]) -> tuple[Options, ...]:
    return tuple({"BQ": bq, "num_warps": warps, "programs": count} for bq, warps in tiles for count in (1, 2, 4))


@tunable("cross_attention_forward", _choices((64, 4), (64, 8), (128, 4), (128, 8)))
def _forward_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Options:
    """64 queries, for 8 warps where the scores and sums of a row, m + D float32 values, are too many for 4.

    They are sooner on sm_100, where all of them come from tensor memory at once. float32 has no tensor cores to feed.
    ``programs``: how many a multiprocessor should get at least.
    """
    if dtype == torch.float32:
        return {"BQ": 16, "num_warps": 4, "num_stages": 1, "programs": 4}
    few = sum(split_width(m)) + d1 + d2 <= (128 if device.capability == 100 else 192)
    return {"BQ": 64, "num_warps": 4 if few else 8, "num_stages": 2, "programs": 4}


@tunable("cross_attention_backward", _choices((64, 4), (64, 8)))
def _backward_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Options:
    """64 queries for 8 warps: the sums of the keys' gradients, 2 m D float32 values, are for the whole program."""
    if dtype == torch.float32:
        return {"BQ": 16, "num_warps": 8, "num_stages": 1, "programs": 2}
    return {"BQ": 64, "num_warps": 8, "num_stages": 2, "programs": 2}


def _work(q: Tensor, tiles: Options) -> tuple[int, Options]:
    """Queries per program, one block or as many as leave ``programs`` for each multiprocessor; the kernel's options."""
    b, n, h, _ = q.shape
    blocks = triton.cdiv(n, tiles["BQ"]) * b * h // (tiles["programs"] * device_of(q).multiprocessors)
    return max(1, blocks) * tiles["BQ"], {name: value for name, value in tiles.items() if name != "programs"}


def _parts(m: int) -> dict[str, int]:
    return dict(zip(("M1", "M2"), split_width(m), strict=True))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@opaque(_fake_forward)
def cross_attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, N, H, D], k and v [B, M, H, D], ``strided`` -> o [B, N, H, D], log-sum-exp in base 2 [B, H, N] float32."""
    o, lse = _fake_forward(q, k, v, scale)
    (b, n, h, _), m = q.shape, k.shape[1]
    queries, tiles = _work(q, _forward_tiles(*choice_sizes(q, k)))
    cross_attention_forward_kernel[(triton.cdiv(n, queries) * b * h,)](
        q, k, v, o, lse, n, m, h, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale * LOG2_E, queries,
        **head_options(q, k, v), **_parts(m), **tiles,
    )  # fmt: skip
    return o, lse


def _fake_probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:2], k.shape[1]), dtype=torch.float32)


@opaque(_fake_probabilities)
def cross_attention_probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [B, N, H, D] and k [B, M, H, D], ``strided`` -> mean over heads of the probabilities, [B, N, M] float32."""
    probs = _fake_probabilities(q, k, scale)
    (b, n, h, _), m = q.shape, k.shape[1]
    _, tiles = _work(q, _forward_tiles(*choice_sizes(q, k)))
    cross_attention_probabilities_forward_kernel[(triton.cdiv(n, tiles["BQ"]) * b,)](
        q, k, probs, n, m, h, *q.stride()[:3], *k.stride()[:3], scale * LOG2_E,
        **head_options(q, k), **_parts(m), **tiles,
    )  # fmt: skip
    return probs


def _one_pass(q: Tensor, m: int) -> bool:
    """Whether the keys and values of a head are held on chip forward, else ``self_attention_forward`` loops."""
    most = MOST_HELD if device_of(q).capability < 120 else MOST_HELD_SM_120
    return sum(split_width(m)) * sum(split_width(q.shape[3])) <= most


def _one_pass_backward(q: Tensor, m: int) -> bool:
    """Whether one kernel makes all three gradients, else ``attention_backward``'s two do.

    Where tensor cores read keys and values from shared memory (sm_90) and the sums fit in the registers of 8 warps:
    elsewhere the operands take registers too, and spill.
    """
    return device_of(q).capability == 90 and padded(m) * sum(split_width(q.shape[3])) <= MOST_SUMS


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@opaque(_fake_backward)
def cross_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward pass took and gave, and do [B, N, H, D], ``strided`` -> dq, dk, dv."""
    dq, dk, dv = _fake_backward(q, k, v, lse, do, scale)
    (b, n, h, _), m = q.shape, k.shape[1]
    queries, tiles = _work(q, _backward_tiles(*choice_sizes(q, k)))
    chunks = -(-n // queries)
    parts = dk.new_empty((2, chunks, *dk.shape), dtype=torch.float32) if chunks > 1 else (dk, dv)
    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:3]]
    cross_attention_backward_kernel[(chunks * b * h,)](
        q, k, v, do, lse, dq, parts[0], parts[1], n, m, h, *strides, scale * LOG2_E, scale, queries,
        KEYS=padded(m), EVEN=padded(m) == m, **head_options(q, k, v, do), **tiles,
    )  # fmt: skip
    if isinstance(parts, Tensor):
        sum_parts(parts, dk, dv)
    return dq, dk, dv


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = strided(q), strided(k), strided(v)
        forward = cross_attention_forward if _one_pass(q, k.shape[1]) else self_attention_forward
        o, lse = forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, None if _one_pass_backward(q, k.shape[1]) else o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        q, k, v, o, lse = ctx.saved_tensors
        if o is None:
            return *cross_attention_backward(q, k, v, lse, strided(do), ctx.scale), None
        return *attention_backward(q, k, v, o, lse, strided(do), ctx.scale), None


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, probabilities: Literal[False] = False
) -> Tensor: ...
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, probabilities: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, probabilities: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v; q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D], in q's dtype.

    With ``probabilities``: (that, the softmax averaged over heads [B, N, M] in float32), through which no gradient
    flows. ``scale`` is D ** -0.5 by default. Products take the inputs' dtype and add up in float32, where the softmax
    is too. The kernel takes float32, float16 and bfloat16, D and M up to 256 and a positive scale; any strides, without
    a copy if the last is 1. Differentiable.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    why_not = why_not_attention(q, k, v, factor)
    if why_not is None and k.shape[1] > MOST_KEYS:
        why_not = f"its kernel takes up to {MOST_KEYS} keys, found {k.shape[1]}"
    if why_not is None and current() == "auto" and q.is_cuda and device_of(q).capability < 80:
        why_not = "Triton compiles it without tensor cores before sm_80"
    if not use_kernel("cross_attention", why_not, q, k, v):
        return reference.cross_attention(q, k, v, scale, probabilities=probabilities)
    out: Tensor = _CrossAttention.apply(q, k, v, factor)  # type: ignore[assignment]
    if not probabilities:
        return out
    return out, cross_attention_probabilities(strided(q.detach()), strided(k.detach()), factor)

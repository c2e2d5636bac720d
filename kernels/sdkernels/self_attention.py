"""Flash attention without a mask, forward and backward, at head dims that are not padded to a power of two.

After FlashAttention-2 (Dao, arXiv 2307.08691), with heads split in two parts (``head_tiles.py``). Scores count in base
2, and so does the saved log-sum-exp. The backward pass is ``attention_backward.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .attention_backward import attention_backward
from .backend import apply, current, device_of, opaque, use_kernel
from .head_tiles import (
    LOG2_E,
    add_product,
    attention_results,
    choice_sizes,
    dot_heads,
    head_constants,
    head_start,
    load_head,
    store_head,
    strided,
    strides_of,
    why_not_attention,
    zeros,
)
from .in_force import Device
from .tuned import Tiles, tunable

FASTER: dict[str, Any] = json.loads(Path(__file__).with_name("self_attention.json").read_text())
"""The faster kernel by head dim, which "auto" takes. Read on import: torch.compile cannot trace opening a file."""


@triton.jit
def self_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
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
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    PRODUCT_SUMS: tl.constexpr,
):
    """q [B, N, H, D], k and v [B, M, H, D] by strides, o [B, N, H, D], lse [B, H, N] in base 2 or None.

    A program: BQ queries of one head. ``scale`` counts in base 2 and is positive. EVEN: M is a multiple of BK.
    PRODUCT_SUMS: tensor cores add up the probabilities, as one more product.
    """
    # Which queries of which head. Neighbouring programs share a head, and find its keys in the cache.
    blocks = tl.cdiv(N, BQ)
    start, head = tl.program_id(0) % blocks * BQ, tl.program_id(0) // blocks
    b, h = head // H, head % H

    # Offsets between heads and to the first row are int64, those within a tile int32.
    row, key = tl.arange(0, BQ), tl.arange(0, BK)
    q_ptr = head_start(q_ptr, b, h, q_b, q_h, ALIGN) + start.to(tl.int64) * q_n
    k_ptr = head_start(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = head_start(v_ptr, b, h, v_b, v_h, ALIGN)

    # Load queries, which stay on chip. The online softmax starts without a maximum, and with empty sums.
    q1, q2 = load_head(q_ptr, row, q_n, N - start, D, D1, D2, False)
    o1, o2 = zeros(BQ, D1, D2)
    top = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    if PRODUCT_SUMS:
        ones = tl.full([BK, 16], 1.0, v_ptr.dtype.element_ty)
        total = tl.zeros([BQ, 16], tl.float32)  # 16 times the same: no product is narrower

    for first in range(0, M, BK):
        # Scores of the next keys; -inf beyond the last, so that they neither are the maximum nor count.
        k1, k2 = load_head(k_ptr, key, k_n, M - first, D, D1, D2, EVEN)
        scores = dot_heads(q1, q2, k1, k2, D2)
        if not EVEN:
            scores = tl.where((key < M - first)[None, :], scores, float("-inf"))

        # Softmax so far. As scale is positive, the maximum may be scaled in place of all scores, and the scaling and
        # the difference below are one multiply-add.
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])

        # Earlier sums were of powers relative to a lower maximum: they shrink.
        shrink = tl.exp2(top - higher)
        top = higher
        if PRODUCT_SUMS:
            total = tl.dot(p.to(ones.dtype), ones, total * shrink[:, None])
        else:
            total = total * shrink + tl.sum(p, 1)
        o1 = o1 * shrink[:, None]
        if D2 > 0:
            o2 = o2 * shrink[:, None]

        # Values.
        v1, v2 = load_head(v_ptr, key, v_n, M - first, D, D1, D2, EVEN)
        o1, o2 = add_product(o1, o2, p, v1, v2, D2)

        # The pointers advance, so that no offset inside a tile outgrows int32.
        k_ptr += tl.cast(BK, tl.int64) * k_n
        v_ptr += tl.cast(BK, tl.int64) * v_n

    if PRODUCT_SUMS:
        total = tl.max(total, 1)

    # Store, divided by the sum only now; and, if wanted, the log-sum-exp, from which the backward pass has p again.
    o_ptr += ((b.to(tl.int64) * N + start) * H + h) * D
    share = (1.0 / total)[:, None]
    store_head(o_ptr, o1 * share, o2 * share, row, H * D, N - start, D, D1, D2)
    if lse_ptr is not None:
        tl.store(lse_ptr + head.to(tl.int64) * N + start + row, top + tl.log2(total), mask=row < N - start)


CANDIDATES: tuple[Tiles, ...] = tuple(
    {"BQ": bq, "BK": bk, "num_warps": warps, "num_stages": stages}
    for bq, bk, warps in ((64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))
    for stages in (2, 3)
)


@tunable("self_attention_forward", CANDIDATES)
def _forward_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Tiles:
    """64 queries for 4 warps; 128 for 8, sharing the loads, where heads are narrow and programs plenty.

    A thread holds (BK + D) / 2 float32 values; 32 keys at a time for wide heads, 16 on sm_120, where 32 spill. There 8
    warps would leave no registers for a second program. 3 stages: two blocks of keys are under way while one is used,
    where shared memory and registers suffice: masks and the widest heads take too many where products read registers.
    float32 has no tensor cores to feed, and a thread holds all of its operands: smaller tiles. ``heads`` counts those
    of all samples.
    """
    wide = d1 + d2 > 128
    if dtype == torch.float32:
        return {"BQ": 16 if wide else 32, "BK": 16 if wide else 32, "num_warps": 4, "num_stages": 1}

    keys = 64 if not wide else 16 if device.capability >= 120 else 32
    narrow = d1 + d2 <= 160 and m % keys == 0 and device.capability in (80, 86, 89, 120)
    stages = 3 if narrow or device.capability == 90 else 2
    plenty = triton.cdiv(n, 128) * heads >= 2 * device.multiprocessors
    if d1 + d2 <= 64 and plenty and device.capability < 120:
        return {"BQ": 128, "BK": keys, "num_warps": 8, "num_stages": stages}
    return {"BQ": 64, "BK": keys, "num_warps": 4, "num_stages": stages}


def _sums_by_product(q: Tensor) -> bool:
    """Whether tensor cores have time to spare for the sums: in half precision on sm_90, by the static model."""
    return q.dtype != torch.float32 and device_of(q).capability == 90


@opaque(attention_results)
def self_attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Tensor]:
    """q [B, N, H, D], k and v [B, M, H, D], ``strided`` -> o [B, N, H, D], log-sum-exp in base 2 [B, H, N] float32.

    The log-sum-exp, which only a backward pass needs, is empty without ``with_lse``.
    """
    o, lse = attention_results(q, k, v, scale, with_lse)
    (b, n, h, _), m, tiles = q.shape, k.shape[1], _forward_tiles(*choice_sizes(q, k))

    self_attention_forward_kernel[(triton.cdiv(n, tiles["BQ"]) * b * h,)](
        q,
        k,
        v,
        o,
        lse if with_lse else None,
        n,
        m,
        h,
        *strides_of(q, k, v),
        scale * LOG2_E,
        EVEN=m % tiles["BK"] == 0,
        PRODUCT_SUMS=_sums_by_product(q),
        **head_constants(q, k, v),
        **tiles,
    )
    return o, lse


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = strided(q), strided(k), strided(v)
        o, lse = self_attention_forward(q, k, v, scale, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        q, k, v, o, lse = ctx.saved_tensors
        return *attention_backward(q, k, v, o, lse, strided(do), ctx.scale), None


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
        return apply(_SelfAttention, q, k, v, factor)
    return reference.self_attention(q, k, v, scale)

"""Cross-attention with its query projection in front and its output projection behind, in one kernel.

A program keeps the sums of its queries' results on chip and goes through all heads: neither the queries nor the outputs
of the heads are written to memory. Channels, head dims and keys are split in two powers of two as in ``head_tiles.py``:
320 = 256 + 64, 40 = 32 + 16, 77 = 64 + 16. The rows of x are read again for each head, from the cache: to hold them as
well as the sums takes more registers than there are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .attention_backward import attention_backward
from .backend import apply, current, device_of, opaque, use_kernel
from .cross_attention import cross_attention, cross_attention_backward, cross_attention_forward
from .head_tiles import (
    LOG2_E,
    add_product,
    load_head,
    masked_scores,
    padded,
    split_width,
    store_head,
    strided,
    zeros,
)
from .in_force import Device
from .tuned import Tiles, tunable

MOST_CHANNELS = {torch.float32: 96, torch.float16: 320, torch.bfloat16: 320}  # whose sums fit in registers
LARGEST_HEAD = 64
MOST_KEYS = 128
FASTER: dict[str, Any] = json.loads(Path(__file__).with_name("cross_attention_block.json").read_text())
"""The shapes for which "auto" takes the kernel. Read on import: torch.compile cannot trace opening a file."""


@triton.jit
def add_heads(total, a1, a2, b1, b2, D2: tl.constexpr):
    """total + a b^T over the whole head; total [rows of a, rows of b]."""
    # As dot_heads, but onto a sum: a product of its own would take as many registers again.
    total = tl.dot(a1, tl.trans(b1), total, input_precision="ieee")
    if D2 > 0:
        total = tl.dot(a2, tl.trans(b2), total, input_precision="ieee")
    return total


@triton.jit
def attend(
    q1,
    q2,
    k_ptr,
    v_ptr,
    M,
    scale,
    W: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    BQ: tl.constexpr,
):
    """softmax(q k^T scale) v of one head as parts [BQ, D1] and [BQ, D2] in q's dtype; k_ptr and v_ptr: the head's."""
    # Load the first part of keys and values.
    key = tl.arange(0, M1)
    k1, k2 = load_head(k_ptr, key, W, M, D, D1, D2, M2 > 0)
    v1, v2 = load_head(v_ptr, key, W, M, D, D1, D2, M2 > 0)

    # Scores and their maximum; the second part of the keys takes the place of the first.
    p1 = masked_scores(q1, q2, k1, k2, M, D2, M1, M2 > 0)
    top = tl.max(p1, 1)
    if M2 > 0:
        key = M1 + tl.arange(0, M2)
        k1, k2 = load_head(k_ptr, key, W, M, D, D1, D2, False)
        p2 = masked_scores(q1, q2, k1, k2, M - M1, D2, M2, False)
        top = tl.maximum(top, tl.max(p2, 1))
    top *= scale

    # Softmax and values, part by part of the keys.
    p1 = tl.exp2(p1 * scale - top[:, None])
    total = tl.sum(p1, 1)
    o1, o2 = zeros(BQ, D1, D2)
    o1, o2 = add_product(o1, o2, p1, v1, v2, D2)
    if M2 > 0:
        p2 = tl.exp2(p2 * scale - top[:, None])
        total += tl.sum(p2, 1)
        v1, v2 = load_head(v_ptr, key, W, M, D, D1, D2, False)
        o1, o2 = add_product(o1, o2, p2, v1, v2, D2)

    # Divide by the sum, and round: the output projection is a product of tensor cores as well.
    share = (1.0 / total)[:, None]
    return (o1 * share).to(q1.dtype), (o2 * share).to(q1.dtype)


@triton.jit
def load_tile(ptr, rows, stride, count, first, width, COLUMNS: tl.constexpr, FULL: tl.constexpr):
    """[rows, COLUMNS] of a matrix [count, width] from column ``first`` on, zero outside; FULL: no column is outside."""
    # Rows may always run out, columns only in a last block that is not whole.
    column = first + tl.arange(0, COLUMNS)
    inside = (rows < count)[:, None]
    if not FULL:
        inside = inside & (column < width)[None, :]
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def project_head(
    x_ptr,
    w_ptr,
    row,
    count,
    C: tl.constexpr,
    BC: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BQ: tl.constexpr,
):
    """x w^T with x [count, C] and w [D, C]: a head's queries as parts [BQ, D1] and [BQ, D2], in x's dtype."""
    # Sums for both parts of the head.
    q1, q2 = zeros(BQ, D1, D2)

    # A block of channels of x, times the same channels of the weights of each part.
    for first in range(0, C, BC):
        x = load_tile(x_ptr, row, C, count, first, C, BC, C % BC == 0)
        w1 = load_tile(w_ptr, tl.arange(0, D1), C, D, first, C, BC, C % BC == 0)
        q1 = tl.dot(x, tl.trans(w1), q1, input_precision="ieee")
        if D2 > 0:
            w2 = load_tile(w_ptr, D1 + tl.arange(0, D2), C, D, first, C, BC, C % BC == 0)
            q2 = tl.dot(x, tl.trans(w2), q2, input_precision="ieee")

    # Round as the separate projection would.
    return q1.to(x_ptr.dtype.element_ty), q2.to(x_ptr.dtype.element_ty)


@triton.jit
def cross_attention_block_forward_kernel(
    x_ptr,
    to_q_ptr,
    k_ptr,
    v_ptr,
    to_out_ptr,
    bias_ptr,
    y_ptr,
    N,
    M,
    scale,
    C: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    BC: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    BQ: tl.constexpr,
):
    """x and y [B, N, C], to_q [W, C], k and v [B, M, W], to_out [C, W], bias [C] or None, contiguous; W = H D.

    A program: BQ queries of one sample, a loop over the heads; x is taken BC channels at a time. ``scale`` counts in
    base 2 and is positive.
    """
    # Which queries of which sample.
    blocks = tl.cdiv(N, BQ)
    start, b = tl.program_id(0) % blocks * BQ, tl.program_id(0) // blocks
    row, channel = tl.arange(0, BQ), tl.arange(0, C1)
    rows = (b.to(tl.int64) * N + start) * C
    keys = b.to(tl.int64) * M * W
    y1, y2 = zeros(BQ, C1, C2)

    # disable_licm: the compiler would move the loads of x out of the loop, and there are no registers to hold it.
    for head in tl.range(0, W, D, disable_licm=True):
        # The head's queries and its attention.
        q1, q2 = project_head(x_ptr + rows, to_q_ptr + head * C, row, N - start, C, BC, D, D1, D2, BQ)
        o1, o2 = attend(q1, q2, k_ptr + keys + head, v_ptr + keys + head, M, scale, W, D, D1, D2, M1, M2, BQ)

        # Its share of the output projection, in both parts of the channels.
        w1, w2 = load_head(to_out_ptr + head, channel, W, C, D, D1, D2, C1 <= C)
        y1 = add_heads(y1, o1, o2, w1, w2, D2)
        if C2 > 0:
            w1, w2 = load_head(to_out_ptr + head, C1 + tl.arange(0, C2), W, C, D, D1, D2, C1 + C2 <= C)
            y2 = add_heads(y2, o1, o2, w1, w2, D2)

    # Bias.
    if bias_ptr is not None:
        y1 += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        if C2 > 0:
            channel = C1 + tl.arange(0, C2)
            y2 += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]

    # Store.
    store_head(y_ptr + rows, y1, y2, row, C, N - start, C, C1, C2)


@tunable(
    "cross_attention_block",
    tuple(
        {"BQ": bq, "BC": bc, "num_warps": warps, "num_stages": stages}
        for bq, warps in ((32, 4), (32, 8), (64, 4), (64, 8))
        for bc in (32, 64)
        for stages in (2, 3)
    ),
)
def _tiles(device: Device, dtype: torch.dtype, queries: int, channels: int, keys: int, width: int) -> Tiles:
    """64 queries, the rows of a product on sm_90 and sm_100, else 32: 8 warps hold their sums beside the operands.

    float32 has no tensor cores to feed. ``queries`` counts those of all samples.
    """
    if dtype == torch.float32:
        return {"BQ": 16, "BC": 32, "num_warps": 4, "num_stages": 1}
    return {"BQ": 64 if _is_wide(device) else 32, "BC": 64, "num_warps": 8, "num_stages": 2}


def _is_wide(device: Device) -> bool:
    """Whether a matrix instruction of this GPU makes 64 rows or more, from operands in shared memory."""
    return device.capability in (90, 100)


def _constants(x: Tensor, k: Tensor) -> dict[str, int]:
    """The kernel's sizes, and the parts of channels, head and keys.

    A wide product of 16 columns costs more than padding the head.
    """
    (c1, c2), (m1, m2) = split_width(x.shape[2]), split_width(k.shape[1])
    whole = _is_wide(device_of(x)) and x.dtype != torch.float32
    d1, d2 = (padded(k.shape[3]), 0) if whole else split_width(k.shape[3])
    sizes = {"C": x.shape[2], "W": k.shape[2] * k.shape[3], "D": k.shape[3]}
    return sizes | {"C1": c1, "C2": c2, "D1": d1, "D2": d2, "M1": m1, "M2": m2}


def _fake_forward(
    x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    return x.new_empty(x.shape)


@opaque(_fake_forward)
def cross_attention_block_forward(
    x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Contiguous x [B, N, C], to_q [H D, C], k and v [B, M, H, D], to_out [C, H D], bias [C] -> [B, N, C]."""
    y = x.new_empty(x.shape)
    (b, n, c), (m, _, d) = x.shape, k.shape[1:]

    tiles = _tiles(device_of(x), x.dtype, b * n, c, m, d)
    cross_attention_block_forward_kernel[(triton.cdiv(n, tiles["BQ"]) * b,)](
        x, to_q, k, v, to_out, bias, y, n, m, scale * LOG2_E, **_constants(x, k), **tiles
    )
    return y


class _CrossAttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        x, to_q, k, v, to_out = (t.contiguous() for t in (x, to_q, k, v, to_out))
        ctx.save_for_backward(x, to_q, k, v, to_out)
        ctx.scale = scale
        return cross_attention_block_forward(x, to_q, k, v, to_out, None if bias is None else bias.contiguous(), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        """Compute the queries and the outputs of the heads again; the projections are PyTorch's."""
        x, to_q, k, v, to_out = ctx.saved_tensors
        want_x, want_to_q, _, _, want_to_out, want_bias, _ = ctx.needs_input_grad

        # Forward again, unfused.
        q = F.linear(x, to_q).unflatten(-1, k.shape[2:])
        o, lse = cross_attention_forward(q, k, v, ctx.scale, True)

        # Attention, by the kernel that cross_attention would choose: within our limits one holds the sums on sm_90.
        do = (dy @ to_out).unflatten(-1, k.shape[2:])
        if device_of(x).capability == 90:
            dq, dk, dv = cross_attention_backward(q, k, v, lse, strided(do), ctx.scale)
        else:
            dq, dk, dv = attention_backward(q, k, v, o, lse, strided(do), ctx.scale)

        # Both projections.
        dq, rows = dq.flatten(2), dy.flatten(0, 1)
        dx = dq @ to_q if want_x else None
        dto_q = dq.flatten(0, 1).t() @ x.flatten(0, 1) if want_to_q else None
        dto_out = rows.t() @ o.flatten(2).flatten(0, 1) if want_to_out else None
        return dx, dto_q, dk, dv, dto_out, rows.sum(0) if want_bias else None, None


def _takes(x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, bias: Tensor | None, scale: float) -> bool:
    """Whether the kernel takes these: one dtype, shapes that belong together, and tiles that fit in registers."""
    if x.dim() != 3 or k.dim() != 4 or k.shape != v.shape or len(x) != len(k):
        return False

    inner, channels = k.shape[2] * k.shape[3], x.shape[2]
    if to_q.shape != (inner, channels) or to_out.shape != (channels, inner):
        return False
    if bias is not None and bias.shape != (channels,):
        return False
    if any(t is not None and t.dtype != x.dtype for t in (to_q, k, v, to_out, bias)):
        return False

    fits = sum(split_width(channels)) <= MOST_CHANNELS.get(x.dtype, MOST_CHANNELS[torch.float32])
    fits = fits and k.shape[3] <= LARGEST_HEAD and k.shape[1] <= MOST_KEYS
    return fits and scale > 0 and device_of(x).capability >= 80


def _is_faster(x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, bias: Tensor | None) -> bool:
    """Whether the table says so: by architecture, then by "C HxD M", the range of B N in which the kernel is faster.

    Never where something needs a gradient: the composition keeps the queries for the backward pass, and computes
    nothing twice.
    """
    tensors = (x, to_q, k, v, to_out, bias)
    if not x.is_cuda or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return False

    shapes = FASTER["measured"].get(str(device_of(x).capability), {})
    fewest, most = shapes.get(f"{x.shape[2]} {k.shape[2]}x{k.shape[3]} {k.shape[1]}", (1, 0))
    return fewest <= x.shape[0] * x.shape[1] <= most


def cross_attention_block(
    x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, bias: Tensor | None, scale: float | None = None
) -> Tensor:
    """linear(cross_attention(linear(x, to_q) by heads, k, v, scale), to_out, bias), in x's dtype.

    x [B, N, C], to_q [H D, C], k and v [B, M, H, D], to_out [C, H D], bias [C] or None -> [B, N, C]; ``scale`` is
    D ** -0.5 by default. The composition is of kernels too, so it is what runs, under "triton" as well, where one
    kernel for all does not take the input: float16 and bfloat16 up to 320 channels (float32: 96), heads of 64, 128
    keys, and a positive scale; x, weights, k and v of one dtype; compute capability 8.0. Under "auto" that kernel runs
    only where ``cross_attention_block.json`` says that it is faster, and where nothing needs a gradient. It reads
    contiguous tensors, and copies others. Differentiable in all tensors.
    """
    if current() == "eager":
        return reference.cross_attention_block(x, to_q, k, v, to_out, bias, scale)

    factor = k.shape[-1] ** -0.5 if scale is None else scale
    wanted = current() == "triton" or _is_faster(x, to_q, k, v, to_out, bias)
    taken = wanted and _takes(x, to_q, k, v, to_out, bias, factor)
    if taken and use_kernel("cross_attention_block", None, x, to_q, k, v, to_out, bias):
        return apply(_CrossAttentionBlock, x, to_q, k, v, to_out, bias, factor)

    q = F.linear(x, to_q).unflatten(-1, k.shape[2:])
    return F.linear(cross_attention(q, k, v, scale).flatten(2), to_out, bias)

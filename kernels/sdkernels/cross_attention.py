"""Attention over a short context (up to 256 keys) that stays on chip: one pass, no online softmax.

The keys are split like the head dims (``head_tiles.py``): 77 = 64 + 16, 154 = 128 + 32, 231 = 128 + 128. Where many
keys meet a wide head the registers do not hold them, and the loops over the keys of ``self_attention.py`` and
``attention_backward.py`` run instead. The kernels are in ``cross_attention_kernels.py``.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .attention_backward import attention_backward, sum_parts
from .backend import apply, current, device_of, opaque, use_kernel
from .cross_attention_kernels import (
    cross_attention_backward_kernel,
    cross_attention_forward_kernel,
    cross_attention_probabilities_forward_kernel,
)
from .head_tiles import (
    LOG2_E,
    attention_results,
    choice_sizes,
    head_constants,
    padded,
    split_width,
    strided,
    strides_of,
    why_not_attention,
)
from .in_force import Device
from .self_attention import self_attention_forward
from .tuned import Tiles, tunable

MOST_KEYS = 256
MOST_HELD = 12288  # keys x head dim of the forward kernel: 231 x 40 does not spill, 77 x 160 does on sm_90
MOST_HELD_SM_120 = 8192  # the same there: 154 x 40 does not spill, 231 x 40 does
MOST_SUMS = 8192  # the same of the backward kernel: 128 x 64


def _candidates(*sizes: tuple[int, int]) -> tuple[Tiles, ...]:
    return tuple({"BQ": bq, "num_warps": warps, "programs": count} for bq, warps in sizes for count in (1, 2, 4))


@tunable("cross_attention_forward", _candidates((64, 4), (64, 8), (128, 4), (128, 8)))
def _forward_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Tiles:
    """64 queries, for 8 warps where the scores and sums of a row, m + D float32 values, are too many for 4.

    They are sooner on sm_100, where all of them come from tensor memory at once. float32 has no tensor cores to feed.
    ``programs``: how many a multiprocessor gets at most. Where keys and values lie in shared memory (sm_90, sm_100)
    there is room for more; elsewhere fewer prepare more, and load the queries of two blocks ahead.
    """
    if dtype == torch.float32:
        return {"BQ": 16, "num_warps": 4, "num_stages": 1, "programs": 4}
    few = sum(split_width(m)) + d1 + d2 <= {90: 208, 100: 128}.get(device.capability, 192)
    shared = device.capability in (90, 100)
    return {"BQ": 64, "num_warps": 4 if few else 8, "num_stages": 2 if shared else 3, "programs": 4 if shared else 2}


@tunable("cross_attention_backward", _candidates((64, 4), (64, 8)))
def _backward_tiles(device: Device, dtype: torch.dtype, heads: int, n: int, m: int, d1: int, d2: int) -> Tiles:
    """64 queries for 8 warps: the sums of the keys' gradients, 2 m D float32 values, are for the whole program.

    Of which a multiprocessor has room for one, so ``programs`` is 1 too.
    """
    if dtype == torch.float32:
        return {"BQ": 16, "num_warps": 8, "num_stages": 1, "programs": 2}
    return {"BQ": 64, "num_warps": 8, "num_stages": 2, "programs": 1}


def _work(q: Tensor, tiles: Tiles) -> tuple[int, Tiles]:
    """Queries per program, as whole blocks that make at most ``programs`` a multiprocessor; the kernel's tiles."""
    b, n, h, _ = q.shape
    blocks = triton.cdiv(triton.cdiv(n, tiles["BQ"]) * b * h, tiles["programs"] * device_of(q).multiprocessors)
    return blocks * tiles["BQ"], {name: value for name, value in tiles.items() if name != "programs"}


def _parts(m: int) -> dict[str, int]:
    return dict(zip(("M1", "M2"), split_width(m), strict=True))


@opaque(attention_results)
def cross_attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool) -> tuple[Tensor, Tensor]:
    """As ``self_attention_forward``, for keys and values that stay on chip."""
    o, lse = attention_results(q, k, v, scale, with_lse)
    (b, n, h, _), m = q.shape, k.shape[1]
    queries, tiles = _work(q, _forward_tiles(*choice_sizes(q, k)))

    cross_attention_forward_kernel[(triton.cdiv(n, queries) * b * h,)](
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
        queries,
        EVEN=n % tiles["BQ"] == 0,
        **head_constants(q, k, v),
        **_parts(m),
        **tiles,
    )
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
        q,
        k,
        probs,
        n,
        m,
        h,
        *strides_of(q, k),
        scale * LOG2_E,
        **head_constants(q, k),
        **_parts(m),
        **tiles,
    )
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
    """The forward pass's inputs, its lse, and do [B, N, H, D], ``strided`` -> dq, dk, dv."""
    dq, dk, dv = _fake_backward(q, k, v, lse, do, scale)
    (b, n, h, _), m = q.shape, k.shape[1]

    # Where a head takes several programs, each leaves sums of its own for keys and values.
    queries, tiles = _work(q, _backward_tiles(*choice_sizes(q, k)))
    chunks = -(-n // queries)
    parts = dk.new_empty((2, chunks, *dk.shape), dtype=torch.float32) if chunks > 1 else (dk, dv)

    cross_attention_backward_kernel[(chunks * b * h,)](
        q,
        k,
        v,
        do,
        lse,
        dq,
        parts[0],
        parts[1],
        n,
        m,
        h,
        *strides_of(q, k, v, do),
        scale * LOG2_E,
        scale,
        queries,
        KEYS=padded(m),
        EVEN=padded(m) == m,
        **head_constants(q, k, v, do),
        **tiles,
    )

    if isinstance(parts, Tensor):
        sum_parts(parts, dk, dv)
    return dq, dk, dv


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = strided(q), strided(k), strided(v)
        forward = cross_attention_forward if _one_pass(q, k.shape[1]) else self_attention_forward
        o, lse = forward(q, k, v, scale, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, None if _one_pass_backward(q, k.shape[1]) else o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
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

    out: Tensor = apply(_CrossAttention, q, k, v, factor)
    if not probabilities:
        return out
    return out, cross_attention_probabilities(strided(q.detach()), strided(k.detach()), factor)

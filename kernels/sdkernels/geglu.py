"""GEGLU: ``value * gelu(gate)``, forward and backward in one pass each (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .backend import apply, device_of, opaque, use_kernel
from .in_force import Device
from .tuned import Tiles, tunable


@triton.jit
def normal_tail(g, EXACT: tl.constexpr):
    """Phi(-|g|) of the normal distribution, and exp(-g^2 / 2), in float32.

    EXACT: by ``tl.erf``, else by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, for |g| / sqrt(2)
    and halved: off by 4e-7 at most, with so many instructions fewer that reading and writing take longer.
    """
    # With -log2(e) / 2, for a GPU has an instruction for exp2, and below one for 1 / sqrt, but none for 1 / x.
    bell = tl.exp2(-0.7213475204444817 * g * g)

    if EXACT:
        tail = 0.5 - 0.5 * tl.erf(tl.abs(g) * 0.7071067811865476)
    else:
        root = tl.rsqrt(1.0 + 0.2316418882 * tl.abs(g))
        t = root * root
        series = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        tail = bell * series
    return tail, bell


@triton.jit
def gelu(g, EXACT: tl.constexpr):
    """g Phi(g) with the normal distribution in float32; EXACT as in ``normal_tail``: for results in float32."""
    tail, _ = normal_tail(g, EXACT)
    return tl.maximum(g, 0.0) - tl.abs(g) * tail


@triton.jit
def geglu_forward_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """x [rows, 2 width] = (value, gate), y [rows, width]; a program: BLOCK columns of one row."""
    # Which columns of which row; the offset of a row is int64.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width

    # Load the value and the gate behind it.
    start = x_ptr + row * 2 * width + column
    value = tl.load(start, mask=inside).to(tl.float32)
    gate = tl.load(start + width, mask=inside).to(tl.float32)

    # Store.
    tl.store(y_ptr + row * width + column, value * gelu(gate, y_ptr.dtype.element_ty == tl.float32), mask=inside)


@triton.jit
def geglu_backward_kernel(x_ptr, dy_ptr, dx_ptr, width, BLOCK: tl.constexpr):
    """x and dx [rows, 2 width], dy [rows, width]; a program: BLOCK columns of one row."""
    # Which columns of which row; the offset of a row is int64.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width

    # Load the value, the gate and the gradient.
    start = row * 2 * width + column
    value = tl.load(x_ptr + start, mask=inside).to(tl.float32)
    gate = tl.load(x_ptr + start + width, mask=inside).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + column, mask=inside).to(tl.float32)

    # The slope of gelu is Phi(g) + g phi(g), and phi(g) = exp(-g^2 / 2) / sqrt(2 pi).
    tail, bell = normal_tail(gate, dx_ptr.dtype.element_ty == tl.float32)
    cdf = tl.where(gate < 0.0, tail, 1.0 - tail)
    slope = cdf + 0.3989422804014327 * gate * bell

    # Store both gradients.
    tl.store(dx_ptr + start, dy * gate * cdf, mask=inside)
    tl.store(dx_ptr + start + width, dy * value * slope, mask=inside)


@tunable("geglu", tuple({"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048) for warps in (2, 4, 8)))
def _tiles(device: Device, dtype: torch.dtype, width: int) -> Tiles:
    """512 columns, 8 a thread: 16 bytes in half precision. Of wider blocks more would lie beyond a row of 1280."""
    block = min(512, max(32, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def _launch(x: Tensor, width: int) -> tuple[tuple[int, int], Tiles]:
    """The grid and the tiles for rows of ``width`` results."""
    tiles = _tiles(device_of(x), x.dtype, width)
    return (x.numel() // x.shape[-1], int(triton.cdiv(width, tiles["BLOCK"]))), tiles


def _like_half(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@opaque(_like_half)
def geglu_forward(x: Tensor) -> Tensor:
    """x [..., 2 D], contiguous -> [..., D]."""
    y = _like_half(x)
    grid, tiles = _launch(x, y.shape[-1])
    geglu_forward_kernel[grid](x, y, y.shape[-1], **tiles)
    return y


@opaque(lambda x, dy: torch.empty_like(x))
def geglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """x [..., 2 D] and dy [..., D], contiguous -> dx [..., 2 D]."""
    dx = torch.empty_like(x)
    grid, tiles = _launch(x, dy.shape[-1])
    geglu_backward_kernel[grid](x, dy, dx, dy.shape[-1], **tiles)
    return dx


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return geglu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        (x,) = ctx.saved_tensors
        return geglu_backward(x, dy.contiguous())


def geglu(x: Tensor) -> Tensor:
    """``value * gelu(gate)`` with the exact gelu; x [..., 2 D] = (value, gate) -> [..., D], in x's dtype.

    The kernel takes float32, float16 and bfloat16 and computes in float32. Differentiable.
    """
    why_not = None if x.dim() and x.shape[-1] % 2 == 0 else f"the last dimension must be even, found {tuple(x.shape)}"
    return apply(_GEGLU, x) if use_kernel("geglu", why_not, x) else reference.geglu(x)

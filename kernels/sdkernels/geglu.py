"""GEGLU: ``value * gelu(gate)``, forward and backward in one pass each (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import device_of, opaque, use_kernel
from .in_force import Device
from .tuned import Tiles, tunable


@triton.jit
def _gelu_and_slope(g):
    """gelu(g) = g Phi(g) with the exact normal distribution, and its derivative Phi(g) + g phi(g)."""
    # 1 / sqrt(2) and 1 / sqrt(2 pi)
    cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)


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
    gelu, _ = _gelu_and_slope(gate)
    tl.store(y_ptr + row * width + column, value * gelu, mask=inside)


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

    # Store both gradients.
    gelu, slope = _gelu_and_slope(gate)
    tl.store(dx_ptr + start, dy * gelu, mask=inside)
    tl.store(dx_ptr + start + width, dy * value * slope, mask=inside)


@tunable("geglu", tuple({"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048) for warps in (2, 4, 8)))
def _tiles(device: Device, dtype: torch.dtype, width: int) -> Tiles:
    """1024 columns, 8 a thread: 16 bytes in half precision."""
    block = min(1024, max(32, triton.next_power_of_2(width)))
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
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        (x,) = ctx.saved_tensors
        return geglu_backward(x, dy.contiguous())


def geglu(x: Tensor) -> Tensor:
    """``value * gelu(gate)`` with the exact gelu; x [..., 2 D] = (value, gate) -> [..., D], in x's dtype.

    The kernel takes float32, float16 and bfloat16 and computes in float32. Differentiable.
    """
    why_not = None if x.dim() and x.shape[-1] % 2 == 0 else f"the last dimension must be even, found {tuple(x.shape)}"
    return _GEGLU.apply(x) if use_kernel("geglu", why_not, x) else reference.geglu(x)  # type: ignore[no-any-return]

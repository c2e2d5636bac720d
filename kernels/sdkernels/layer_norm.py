"""LayerNorm over the last dimension, with an optional residual added first (Ba et al., arXiv 1607.06450)."""

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

LARGEST = 16384  # a row is held on chip


@triton.jit
def centre(x, mean, inside, width):
    """x - mean [ROWS, BLOCK], 0 outside; also less the small mean that is left where a large one was rounded."""
    # Zeros outside, so that the sum is of the row alone.
    x = tl.where(inside, x - mean[:, None], 0.0)
    return tl.where(inside, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    later_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, residual, y and total [rows, width]; later, weight and bias [width]; mean and rstd [rows].

    A program: ROWS rows.
    """
    # Which rows. Each is held whole, padded to a power of two.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    offset = row[:, None] * width + column[None, :]

    # Load x and add the residual. The sum is rounded before it is normed, as it would be between two operations; what
    # is added to it later is stored with it, and not normed.
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total = x + tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        x = total.to(total_ptr.dtype.element_ty).to(tl.float32)
        if later_ptr is not None:
            total += tl.load(later_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        tl.store(total_ptr + offset, total, mask=inside)

    # Statistics, in two steps: E[x^2] - E[x]^2 would lose the digits of a large mean.
    mean = tl.sum(x, axis=1) / width
    centred = centre(x, mean, inside, width)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)

    # Norm, weight and bias.
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]

    # Store the norm, and the statistics for the backward pass.
    tl.store(y_ptr + offset, y, mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def layer_norm_backward_kernel(
    x_ptr,
    dy_ptr,
    dtotal_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x (what was normed), dy, dtotal and dx [rows, width]; mean and rstd [rows]; dweight and dbias [programs, width].

    A program takes every so many tiles of ROWS rows and leaves its own sums for weight and bias, where they are given.
    """
    # Load the weight, and start the sums for weight and bias, which stay on chip over all tiles of this program.
    column = tl.arange(0, BLOCK)
    weight = tl.full([BLOCK], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)

    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        # Load the rows, their statistics and gradients.
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        offset = row[:, None] * width + column[None, :]
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)

        # Norm again, and sum over the rows.
        normed = centre(x, mean, inside, width) * rstd[:, None]
        if dweight_ptr is not None:
            dweight += tl.sum(dy * normed, axis=0)
            dbias += tl.sum(dy, axis=0)

        # Gradient of what was normed: without its projections on 1 and on the normed row, which the norm takes off.
        slope = dy * weight[None, :]
        along_one = tl.sum(slope, axis=1) / width
        along_x = tl.sum(slope * normed, axis=1) / width
        dx = rstd[:, None] * (slope - along_one[:, None] - normed * along_x[:, None])

        # The sum x + residual is a result too: its own gradient is added. Store.
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, dx, mask=inside)

    # Store this program's sums; the launcher adds those of all, so the order is always the same.
    if dweight_ptr is not None:
        here = tl.program_id(0).to(tl.int64) * width + column
        tl.store(dweight_ptr + here, dweight, mask=column < width)
        tl.store(dbias_ptr + here, dbias, mask=column < width)


CANDIDATES: tuple[Tiles, ...] = tuple(
    {"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4, 8) for warps in (2, 4, 8)
)


@tunable("layer_norm_forward", CANDIDATES)
def _forward_tiles(device: Device, dtype: torch.dtype, width: int) -> Tiles:
    """Whole rows, in tiles of about 2048 elements, 16 a thread."""
    rows = max(1, 2048 // _block(width))
    return {"ROWS": rows, "num_warps": min(16, max(1, rows * _block(width) // 512))}


@tunable("layer_norm_backward", CANDIDATES)
def _backward_tiles(device: Device, dtype: torch.dtype, width: int) -> Tiles:
    """The forward heuristic."""
    return _forward_tiles.heuristic(device, dtype, width)


def _block(width: int) -> int:
    return max(32, int(triton.next_power_of_2(width)))


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(2, rows, dtype=torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), total, statistics[0].clone(), statistics[1].clone()


@opaque(_fake_forward)
def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous x and residual [..., C] -> norm, x + residual + later (empty without residual), each row's mean and
    1 / deviation."""
    width = x.shape[-1]
    rows = x.numel() // width
    y, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))

    tiles = _forward_tiles(device_of(x), x.dtype, width)
    layer_norm_forward_kernel[(triton.cdiv(rows, tiles["ROWS"]),)](
        x, residual, later, weight, bias, y, total, mean, rstd, rows, width, eps, BLOCK=_block(width), **tiles
    )
    return y, total, mean, rstd


def _fake_backward(
    x: Tensor, dy: Tensor, dtotal: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (x.new_empty(x.shape[-1] if affine else 0, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), dweight, dbias


@opaque(_fake_backward)
def layer_norm_backward(
    x: Tensor, dy: Tensor, dtotal: Tensor | None, weight: Tensor | None, mean: Tensor, rstd: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x + residual (x's dtype), weight and bias (float32; empty unless ``affine``); dy is the norm's,
    dtotal the sum's or None."""
    width = x.shape[-1]
    rows = x.numel() // width
    tiles = _backward_tiles(device_of(x), x.dtype, width)
    programs = min(int(triton.cdiv(rows, tiles["ROWS"])), 4 * device_of(x).multiprocessors)
    dx = torch.empty_like(x)
    parts = [x.new_empty(programs, width, dtype=torch.float32) if affine else None for _ in range(2)]

    layer_norm_backward_kernel[(programs,)](
        x, dy, dtotal, weight, mean, rstd, dx, *parts, rows, width, BLOCK=_block(width), **tiles
    )
    dweight, dbias = (x.new_empty(0, dtype=torch.float32) if part is None else part.sum(0) for part in parts)
    return dx, dweight, dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        later: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x = x.contiguous()
        residual, later, weight, bias = (None if t is None else t.contiguous() for t in (residual, later, weight, bias))
        y, total, mean, rstd = layer_norm_forward(x, weight, bias, eps, residual, later)
        ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        x, weight, bias, mean, rstd = ctx.saved_tensors
        _, want_weight, want_bias, _, want_residual, _ = ctx.needs_input_grad
        more = None if dtotal is None else dtotal.contiguous()
        affine = want_weight or want_bias
        dx, dweight, dbias = layer_norm_backward(x, dy.contiguous(), more, weight, mean, rstd, affine)
        return (
            dx,
            dweight.to(weight.dtype) if want_weight else None,
            dbias.to(bias.dtype) if want_bias else None,
            None,
            dx if want_residual else None,
            None,
        )


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    later: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension. With ``residual``: (norm(x + residual), x + residual + later).

    x and residual [..., C]; weight and bias [C] of any float dtype; results in x's dtype. later [C], which needs
    ``residual``, is the bias of a product that is to be accumulated onto the sum: it is there already, and not normed.
    The kernel takes float32, float16 and bfloat16, C up to 16384, statistics in float32. Differentiable in all tensors.
    """
    if later is not None and residual is None:
        raise ValueError("layer_norm: later is added to the sum with a residual, and there is no residual")
    if later is not None and torch.is_grad_enabled():  # the backward pass norms the stored sum again
        y, total = layer_norm(x, weight, bias, eps, residual)
        return y, total + later

    why_not = None
    if x.shape[-1] > LARGEST:
        why_not = f"its kernel takes rows of up to {LARGEST} elements, found {x.shape[-1]}"
    elif residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        why_not = f"residual must be like x, found {tuple(residual.shape)} {residual.dtype}"
    elif later is not None and later.shape != x.shape[-1:]:
        why_not = f"later must be [{x.shape[-1]}], found {tuple(later.shape)}"

    if not use_kernel("layer_norm", why_not, x, weight, bias, residual, later):
        return reference.layer_norm(x, weight, bias, eps, residual, later)
    return apply(_LayerNorm, x, weight, bias, eps, residual, later)

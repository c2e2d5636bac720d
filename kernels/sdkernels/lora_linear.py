"""A linear layer with a low-rank branch, ``x W^T + bias + scale (x A^T) B^T``, in one kernel (arXiv 2106.09685).

The tile of x that multiplies W is multiplied by A too while it is on chip, and the branch joins the accumulator before
the output is written: the branch touches neither x nor the output a second time. Its work is small: each tile repeats
x A^T for its rows, rank / (columns of the tile) of the layer's own products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .backend import apply, current, device_of, opaque, use_kernel
from .in_force import Device
from .tuned import Tiles, tunable

LARGEST_RANK = 128


@triton.jit
def lora_linear_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    scale_ptr,
    scale,
    y_ptr,
    low_ptr,
    M,
    N,
    K,
    rank,
    weight_n,
    weight_k,
    a_r,
    a_k,
    b_n,
    b_r,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x [M, K] and y [M, N] contiguous; weight [N, K], a [rank, K], b [N, rank] by strides; bias [N] or None.

    low [M, rank] gets x A^T if it is not None. ``scale_ptr`` points to the scale if it is not None. A program: a tile
    [BM, BN] of y; GROUP row tiles share the columns of W while these are in the cache. RANK is rank padded to a power
    of two of at least 16.
    """
    # Which tile: down GROUP row tiles, then on to the next columns.
    program, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = program // (GROUP * tiles_n)
    in_group = min(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (program % (GROUP * tiles_n)) % in_group
    tile_n = (program % (GROUP * tiles_n)) // in_group

    # Rows are int64, for M K elements may be more than int32 counts.
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = tile_n * BN + tl.arange(0, BN)
    r, k = tl.arange(0, RANK), tl.arange(0, BK)
    full = tl.zeros([BM, BN], tl.float32)
    low = tl.zeros([BM, RANK], tl.float32)

    for first in range(0, K, BK):
        # Load a tile of x, for both products.
        column = first + k
        x = tl.load(x_ptr + m[:, None] * K + column[None, :], mask=(m < M)[:, None] & (column < K)[None, :], other=0.0)

        # The layer's own product.
        inside = (column < K)[:, None] & (n < N)[None, :]
        weight = tl.load(weight_ptr + n[None, :] * weight_n + column[:, None] * weight_k, mask=inside, other=0.0)
        full = tl.dot(x, weight, full, input_precision=PRECISION)

        # x A^T.
        inside = (column < K)[:, None] & (r < rank)[None, :]
        a = tl.load(a_ptr + r[None, :] * a_r + column[:, None] * a_k, mask=inside, other=0.0)
        low = tl.dot(x, a.to(x.dtype), low, input_precision=PRECISION)

    # The gradient of B needs x A^T: the programs of the first columns store it.
    narrow = low.to(x_ptr.dtype.element_ty)
    if low_ptr is not None:
        tl.store(
            low_ptr + m[:, None] * rank + r[None, :],
            narrow,
            mask=(m < M)[:, None] & (r < rank)[None, :] & (tile_n == 0),
        )

    # The branch joins: (x A^T) rounded to x's dtype for the tensor cores, times B^T and the scale.
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    b = tl.load(b_ptr + n[None, :] * b_n + r[:, None] * b_r, mask=(r < rank)[:, None] & (n < N)[None, :], other=0.0)
    full += scale * tl.dot(narrow, b.to(narrow.dtype), input_precision=PRECISION)

    # Bias and store.
    if bias_ptr is not None:
        full += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], full, mask=(m < M)[:, None] & (n < N)[None, :])


CANDIDATES: tuple[Tiles, ...] = tuple(
    {"BM": bm, "BN": bn, "BK": 64, "num_warps": warps, "num_stages": stages}
    for bm, bn, warps in ((128, 128, 8), (128, 128, 4), (128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 256, 8))
    for stages in (3, 4)
)


@tunable("lora_linear", CANDIDATES)
def _tiles(device: Device, dtype: torch.dtype, rows: int, columns: int, width: int, rank: int) -> Tiles:
    """128 x 128 tiles where they fill the GPU, else smaller ones; float32 has no tensor cores to feed.

    Where operands lie in registers (not on sm_90 and sm_100), 96 sums a thread do not fit beside them; there are
    BM (BN + rank) / (32 warps). So from rank 33 on a tile has half the rows there, but all columns: each repeats x A^T.
    On sm_120 even that spills where x A^T is stored: half the columns, too.
    """
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 16, "GROUP": 8, "num_warps": 4, "num_stages": 2}

    stages = 3 if device.capability in (80, 90, 100) else 2  # shared memory: 164 to 228 KB, else 64 to 100
    large = ((128, 128, 64, 8, stages), (128, 64, 64, 4, stages))
    if rank > 32 and device.capability not in (90, 100):
        large = ((64, 128, 32, 4, 3),) if device.capability != 120 else ()

    # The first that gives every multiprocessor a tile.
    small = (64, 64, 64, 4, stages)
    full = (c for c in large if triton.cdiv(rows, c[0]) * triton.cdiv(columns, c[1]) >= device.multiprocessors)
    bm, bn, bk, warps, stages = next(full, small)
    return {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "num_warps": warps, "num_stages": stages}


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0] if keep else 0, len(a))


@opaque(_fake_forward)
def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Contiguous x [M, K], weight [N, K], a [R, K], b [N, R] with any strides -> [M, N], and x A^T [M, R], which is
    empty unless ``keep``."""
    (rows, width), columns, rank = x.shape, weight.shape[0], a.shape[0]
    y, low = _fake_forward(x, weight, bias, a, b, scale_tensor, scale, keep)

    tiles = _tiles(device_of(x), x.dtype, rows, columns, width, rank)
    grid = (triton.cdiv(rows, tiles["BM"]) * triton.cdiv(columns, tiles["BN"]),)

    lora_linear_forward_kernel[grid](
        x,
        weight,
        bias,
        a,
        b,
        scale_tensor,
        scale,
        y,
        low if keep else None,
        rows,
        columns,
        width,
        rank,
        *weight.stride(),
        *a.stride(),
        *b.stride(),
        RANK=max(16, triton.next_power_of_2(rank)),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **tiles,
    )
    return y, low


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale_tensor: Tensor | None,
        scale: float,
    ) -> Tensor:
        rows, bias = x.reshape(-1, x.shape[-1]).contiguous(), None if bias is None else bias.contiguous()
        keep = any(ctx.needs_input_grad[4:6])  # B and the scale

        y, low = lora_linear_forward(rows, weight, bias, a, b, scale_tensor, scale, keep)
        ctx.save_for_backward(rows, weight, bias, a, b, scale_tensor, low)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        """The gradient of x is the same operation, transposed, and dy B comes with it as x A^T did."""
        x, weight, bias, a, b, scale_tensor, low = ctx.saved_tensors
        want_x, want_weight, want_bias, want_a, want_b, want_scale, _ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()

        # x: the kernel, which reads the transposed weights by their strides.
        dx, dlow = None, None
        if want_x:
            dx, dlow = lora_linear_forward(dy, weight.t(), None, b.t(), a.t(), scale_tensor, ctx.scale, keep=want_a)
            dx = dx.view(ctx.shape)
        elif want_a:
            dlow = dy @ b.to(dy.dtype)

        # The branch.
        da = db = dscale = None
        if want_a and dlow is not None:
            da = _scaled_product(dlow.t(), x, scale_tensor, ctx.scale, a.dtype)
        if want_b:
            db = _scaled_product(dy.t(), low, scale_tensor, ctx.scale, b.dtype)
        if want_scale:  # a sum over everything: in more digits
            wide = torch.float64 if x.dtype == torch.float32 else torch.float32
            dscale = ((dy.to(wide) @ b.to(wide)) * (x.to(wide) @ a.to(wide).t())).sum().to(scale_tensor)

        # The layer itself.
        dweight = dy.t() @ x if want_weight else None
        dbias = dy.sum(0).to(bias.dtype) if want_bias else None
        return dx, dweight, dbias, da, db, dscale, None


def _scaled_product(a: Tensor, b: Tensor, scale_tensor: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """scale a b in this dtype, where the scale is a number in the product's own launch, and on a GPU the dtype too."""
    wider = dtype if dtype != a.dtype and a.device.type != "cpu" else None
    if scale_tensor is not None:
        product = a @ b if wider is None else torch.mm(a, b, out_dtype=wider)
        return scale_tensor * product.to(dtype)

    nothing = a.new_empty((), dtype=dtype if wider else a.dtype)  # beta 0: what is added is not read
    if wider is None:
        return torch.addmm(nothing, a, b, beta=0, alpha=scale).to(dtype)
    return torch.addmm(nothing.expand(len(a), b.shape[1]), a, b, beta=0, alpha=scale, out_dtype=wider)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """``x W^T + bias + scale (x A^T) B^T`` (arXiv 2106.09685).

    x [..., I], weight [O, I], bias [O], a [R, I], b [O, R] -> [..., O], of one dtype, but a and b may be float32, as
    they are trained: they are rounded to x's on their way, and their gradients are float32. ``scale`` is a number or a
    0-d tensor, so that it can change without a new compilation or graph capture. The kernel takes float32, float16 and
    bfloat16 and ranks up to 128; "auto" leaves float32 to the definition. Differentiable in all tensors.
    """
    scale_tensor = scale if isinstance(scale, Tensor) else None
    why_not = None
    if len(a) > LARGEST_RANK:
        why_not = f"its kernel takes ranks up to {LARGEST_RANK}, found {len(a)}"
    elif any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        why_not = "x, weight and bias must have one dtype"
    elif a.dtype != b.dtype or a.dtype not in (x.dtype, torch.float32):
        why_not = f"a and b must be {x.dtype} or float32, found {a.dtype} and {b.dtype}"
    elif scale_tensor is not None and (scale_tensor.numel() != 1 or scale_tensor.device != x.device):
        why_not = "scale must be a number or a 0-d tensor on x's device"

    if current() == "auto" and x.dtype == torch.float32:
        why_not = "cuBLAS is faster in float32"
    if not use_kernel("lora_linear", why_not, x, weight, bias, a, b):
        return reference.lora_linear(x, weight, bias, a, b, scale)

    number = 0.0 if isinstance(scale, Tensor) else float(scale)
    return apply(_LoraLinear, x, weight, bias, a, b, scale_tensor, number)

"""A linear layer to a value and a gate, and ``value * gelu(gate)``, in one kernel (arXiv 2002.05202).

The layer's result, twice as wide as what is left of it, is never written to memory: of all tensors of a UNet it is the
largest. Value and gate are rows ``out`` apart of the same weights; a program makes both for the same columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import device_of, opaque, use_kernel
from .geglu import geglu, gelu
from .in_force import Device
from .tuned import Tiles, tunable

BANDS = 8
"""Blocks of rows that are worked on side by side, so that the weights that they share are in the cache."""


@triton.jit
def linear_geglu_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    width,
    out,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    BANDS: tl.constexpr,
):
    """x [rows, width], weight [2 out, width] and bias [2 out] or None: of the values, then of the gates; y [rows, out].

    A program: BM rows, BN columns of y; WHOLE: the width is a multiple of BK.
    """
    # Which block: BANDS blocks of rows by all columns, then the next BANDS.
    down, across = tl.cdiv(rows, BM), tl.cdiv(out, BN)
    band = tl.program_id(0) // (BANDS * across)
    tall = min(down - band * BANDS, BANDS)
    place = tl.program_id(0) % (BANDS * across)
    row = (band * BANDS + place % tall) * BM + tl.arange(0, BM)
    column = place // tall * BN + tl.arange(0, BN)

    # Where to read. Beyond the end the first ones are read again, and never stored.
    k = tl.arange(0, BK)
    x_ptr += (row % rows).to(tl.int64)[:, None] * width + k[None, :]
    weight_ptr += (column % out)[:, None] * width + k[None, :]
    gates = tl.cast(out, tl.int64) * width

    # Products, BK channels at a time.
    value = tl.zeros([BM, BN], tl.float32)
    gate = tl.zeros([BM, BN], tl.float32)
    for start in range(0, width, BK):
        if WHOLE:
            x = tl.load(x_ptr)
            of_value, of_gate = tl.load(weight_ptr), tl.load(weight_ptr + gates)
        else:
            inside = (k < width - start)[None, :]
            x = tl.load(x_ptr, mask=inside, other=0.0)
            of_value = tl.load(weight_ptr, mask=inside, other=0.0)
            of_gate = tl.load(weight_ptr + gates, mask=inside, other=0.0)
        value = tl.dot(x, tl.trans(of_value), value, input_precision="ieee")
        gate = tl.dot(x, tl.trans(of_gate), gate, input_precision="ieee")
        x_ptr += BK
        weight_ptr += BK

    # Biases.
    if bias_ptr is not None:
        value += tl.load(bias_ptr + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + out + column, mask=column < out, other=0.0).to(tl.float32)[None, :]

    # value * gelu(gate). Store.
    y = value * gelu(gate, y_ptr.dtype.element_ty == tl.float32)
    inside = (row < rows)[:, None] & (column < out)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * out + column[None, :], y, mask=inside)


@tunable(
    "linear_geglu",
    tuple(
        {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps, "num_stages": stages}
        for bm, bn, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 8), (64, 64, 4))
        for bk in (32, 64)
        for stages in (2, 3, 4)
        if (bm + 2 * bn) * bk * stages <= 49152  # elements of half precision in shared memory
    ),
)
def _tiles(device: Device, dtype: torch.dtype, rows: int, width: int, out: int) -> Tiles:
    """The largest tile that gives every multiprocessor two: it reads the fewest bytes for its products, and these come
    from the L2 cache, whose bandwidth is the limit. An instruction of sm_90 and sm_100 takes its operands from shared
    memory; elsewhere they pass through registers, and 4 warps load them less often than 8.

    float32 has no tensor cores to feed.
    """
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2}

    wide = device.capability in (90, 100)
    sizes = ((128, 128, 8), (128, 64, 4)) if wide else ((128, 64, 4),)
    enough = (
        (m, n, w) for m, n, w in sizes if triton.cdiv(rows, m) * triton.cdiv(out, n) >= 2 * device.multiprocessors
    )
    bm, bn, warps = next(enough, (64, 64, 4))
    return {"BM": bm, "BN": bn, "BK": 32, "num_warps": warps, "num_stages": 3}


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


@opaque(_fake_forward)
def linear_geglu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Contiguous x [..., I], weight [2 D, I], bias [2 D] -> [..., D]."""
    y = _fake_forward(x, weight, bias)
    width, out = x.shape[-1], y.shape[-1]
    rows = x.numel() // width

    tiles = _tiles(device_of(x), x.dtype, rows, width, out)
    programs = triton.cdiv(rows, tiles["BM"]) * triton.cdiv(out, tiles["BN"])
    linear_geglu_forward_kernel[(programs,)](
        x, weight, bias, y, rows, width, out, WHOLE=width % tiles["BK"] == 0, BANDS=BANDS, **tiles
    )
    return y


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``geglu(linear(x, weight, bias))``: value * gelu(gate) of x W^T + b = (value, gate), with the exact gelu.

    x [..., I], weight [2 D, I], bias [2 D] or None, all of one dtype -> [..., D]. The kernel takes float32, float16 and
    bfloat16, and rounds neither value nor gate. Where a gradient is wanted, the composition runs, on the kernels of
    ``geglu``: the backward pass needs value and gate. Differentiable in all tensors.
    """
    given = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return geglu(F.linear(x, weight, bias))

    why_not = None
    if weight.dim() != 2 or len(weight) % 2 or weight.shape[1] != x.shape[-1]:
        why_not = f"weight must be [2 D, {x.shape[-1]}], found {tuple(weight.shape)}"
    elif bias is not None and bias.shape != weight.shape[:1]:
        why_not = f"bias must be [{len(weight)}], found {tuple(bias.shape)}"
    elif any(t.dtype != x.dtype for t in given):
        why_not = f"its tensors must have one dtype, found {', '.join(str(t.dtype) for t in given)}"

    if not use_kernel("linear_geglu", why_not, *given):
        return reference.linear_geglu(x, weight, bias)
    return linear_geglu_forward(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())

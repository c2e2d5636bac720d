"""GroupNorm with an optional vector added before and SiLU behind (Wu and He, arXiv 1803.08494), forward and backward.

A group that fits on chip takes one launch. A larger one takes two: partial statistics of chunks of pixels, then the
norm, whose programs merge what they need of them and go over x in reverse, for its end is still in the cache. The
backward likewise, with a small launch in between. Channels-last and contiguous x differ in strides alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import opaque, use_kernel
from .group_norm_backward_kernels import (
    group_norm_backward_apply_kernel,
    group_norm_backward_kernel,
    group_norm_combine_kernel,
    group_norm_sums_kernel,
)
from .group_norm_forward_kernels import (
    group_norm_apply_kernel,
    group_norm_forward_kernel,
    group_norm_statistics_kernel,
)
from .group_norm_plan import (
    BACKWARD_ON_CHIP,
    FORWARD_ON_CHIP,
    MOST_CHUNKS,
    backward_tiles,
    ceil,
    forward_tiles,
    is_channels_last,
    plan,
    power,
)

MOST_CHANNELS, LARGEST_GROUP = 65535, 4096  # the latter in channels


def _arranged(x: Tensor, channels_last: bool) -> Tensor:
    """x in this memory format, without a copy where it is in it."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _fake_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(3, x.shape[0], groups, dtype=torch.float32)


@opaque(_fake_forward)
def group_norm_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [B, C, ...] channels-last or contiguous, the others contiguous -> norm like x, statistics [3, B, groups]."""
    call = plan(x, groups, forward_tiles, FORWARD_ON_CHIP)
    y, statistics = _fake_forward(x, groups, weight, bias, eps, silu, add)

    # A group that fits on chip: all of it in one launch.
    if call.one_pass:
        group_norm_forward_kernel[(call.batch * groups,)](
            x,
            add,
            weight,
            bias,
            y,
            statistics,
            *call.geometry(add),
            eps,
            GROUP=call.group,
            SILU=silu,
            **call.on_chip(),
        )
        return y, statistics

    # First pass: the statistics of chunks of pixels.
    together = call.groups_together()
    first = call.split(together * call.group, waves=4, most=MOST_CHUNKS)
    parts = x.new_empty(3, call.batch, first.chunks, groups, dtype=torch.float32)
    group_norm_statistics_kernel[(first.programs,)](
        x,
        add,
        parts,
        *call.geometry(add),
        parts.stride(0),
        first.chunk,
        first.chunks,
        GROUP=call.group,
        GROUPS=together,
        **first.tiles,
    )

    # Second pass: merge them and apply the norm.
    second = call.split(call.block(), waves=8, most=call.pixels)
    touched = ceil(call.block(), call.group) + (call.block() % call.group != 0)  # groups of a block, at most
    group_norm_apply_kernel[(second.programs,)](
        x,
        add,
        weight,
        bias,
        parts,
        y,
        statistics,
        *call.geometry(add),
        eps,
        parts.stride(0),
        first.chunk,
        first.chunks,
        statistics.stride(0),
        second.chunk,
        second.chunks,
        GROUP=call.group,
        SILU=silu,
        GROUPS=power(touched),
        CHUNKS=power(first.chunks),
        **second.tiles,
    )
    return y, statistics


def _fake_backward(
    x: Tensor,
    dy: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    add: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    sums, dadd = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, *x.shape[:2]), x.shape[:2]))
    return torch.empty_like(x), sums, dadd


@opaque(_fake_backward)
def group_norm_backward(
    x: Tensor,
    dy: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    add: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x and dy in one format -> dx like x; in float32 each sample's (dbias, dweight) [2, B, C], and dadd [B, C], unset
    without add."""
    call = plan(x, groups, backward_tiles, BACKWARD_ON_CHIP)
    dx, sums, dadd = _fake_backward(x, dy, groups, weight, bias, silu, add, statistics)

    # A group that fits on chip: all of it in one launch.
    if call.one_pass:
        group_norm_backward_kernel[(call.batch * groups,)](
            x,
            dy,
            add,
            weight,
            bias,
            statistics,
            dx,
            sums,
            dadd,
            *call.geometry(add),
            GROUP=call.group,
            SILU=silu,
            **call.on_chip(),
        )
        return dx, sums, dadd

    # First pass: the sums of chunks of pixels.
    first = call.split(call.block(), waves=4, most=MOST_CHUNKS)
    parts = x.new_empty(3, call.batch, first.chunks, call.channels, dtype=torch.float32)
    group_norm_sums_kernel[(first.programs,)](
        x,
        dy,
        add,
        weight,
        bias,
        statistics,
        parts,
        *call.geometry(add),
        parts.stride(0),
        statistics.stride(0),
        first.chunk,
        first.chunks,
        GROUP=call.group,
        SILU=silu,
        **first.tiles,
    )

    # Between the passes: add the chunks up. Small, one program a group.
    means, columns = torch.empty_like(statistics[:2]), power(call.group)
    group_norm_combine_kernel[(call.batch * groups,)](
        parts,
        weight,
        statistics,
        sums,
        means,
        dadd,
        call.pixels,
        call.channels,
        parts.stride(0),
        first.chunks,
        GROUP=call.group,
        ADD=add is not None,
        ROWS=max(1, min(power(first.chunks), 2048 // columns)),
        COLUMNS=columns,
    )

    # Second pass: the gradient of x.
    second = call.split(call.block(), waves=8, most=call.pixels)
    group_norm_backward_apply_kernel[(second.programs,)](
        x,
        dy,
        add,
        weight,
        bias,
        statistics,
        means,
        dx,
        *call.geometry(add),
        statistics.stride(0),
        second.chunk,
        second.chunks,
        GROUP=call.group,
        SILU=silu,
        **second.tiles,
    )
    return dx, sums, dadd


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        silu: bool,
        add: Tensor | None,
    ) -> Tensor:
        x = _arranged(x, is_channels_last(x))
        weight, bias, add = (None if t is None else t.contiguous() for t in (weight, bias, add))

        y, statistics = group_norm_forward(x, groups, weight, bias, eps, silu, add)
        ctx.save_for_backward(x, weight, bias, add, statistics)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        x, weight, bias, add, statistics = ctx.saved_tensors
        dy = _arranged(dy, is_channels_last(x))
        dx, sums, dadd = group_norm_backward(x, dy, statistics.shape[2], weight, bias, ctx.silu, add, statistics)

        # Only what is asked for. One add for all samples has the sum of their gradients.
        _, _, want_weight, want_bias, _, _, want_add = ctx.needs_input_grad
        if want_add and len(add) < len(dadd):
            dadd = dadd.sum(0, keepdim=True)
        dweight = sums[1].sum(0).to(weight.dtype) if want_weight else None
        dbias = sums[0].sum(0).to(bias.dtype) if want_bias else None
        return dx, None, dweight, dbias, None, None, dadd.to(add.dtype) if want_add else None


def _why_not(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, add: Tensor | None) -> str | None:
    """The reason why the kernels do not take these, if there is one."""
    if x.dim() < 2:
        return f"x must be [B, C, ...], found {tuple(x.shape)}"

    # x and its groups.
    batch, channels = x.shape[:2]
    if channels > MOST_CHANNELS:
        return f"its kernels take up to {MOST_CHANNELS} channels, found {channels}"
    if groups < 1 or channels % groups or channels // groups > LARGEST_GROUP:
        return f"{channels} channels must be whole groups of at most {LARGEST_GROUP}, found {groups} groups"
    if x.numel() == groups:
        return "PyTorch refuses a single value a group"
    if math.prod(x.shape[2:]) * max(8, power(channels // groups)) >= 2**31:  # a tile's offsets are int32
        return "a group must have fewer than 2^31 elements, and 8 channels as well"

    # The other tensors.
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != (channels,):
            return f"{name} must be [{channels}], found {tuple(t.shape)}"
    if add is not None and (add.shape not in ((batch, channels), (1, channels)) or add.dtype != x.dtype):
        return f"add must be [{batch} or 1, {channels}] of {x.dtype}, found {tuple(add.shape)} of {add.dtype}"
    return None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """GroupNorm of ``x + add``, then SiLU if ``activation`` is "silu" (Wu and He, arXiv 1803.08494).

    x [B, C, ...], channels-last or contiguous, else it is copied; weight and bias [C] of any float dtype; add [B or 1,
    C] in x's dtype, one value per sample and channel. The result has x's dtype and memory format. The kernels take
    float32, float16 and bfloat16, groups of up to 4096 channels; statistics in float32. Differentiable in all tensors.
    Raises ValueError for an unknown activation.
    """
    if activation in (None, "silu"):
        why_not = _why_not(x, num_groups, weight, bias, add)
        if use_kernel("group_norm", why_not, x, weight, bias, add):
            return _GroupNorm.apply(x, num_groups, weight, bias, eps, activation == "silu", add)  # type: ignore[no-any-return]

    return reference.group_norm(x, num_groups, weight, bias, eps, activation, add)

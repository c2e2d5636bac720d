"""GroupNorm with an optional vector added before and SiLU behind (Wu and He, arXiv 1803.08494), forward and backward.

A group that fits on chip takes one launch. A larger one takes two: partial statistics of chunks of pixels, then the
norm, whose programs merge what they need of them and go over x in reverse, for its end is still in the cache. The
backward likewise, with a small launch in between. Channels-last and contiguous x differ in strides alone.

What is normed may be a sum of parts (`group_norm_of_sum`), which the launch that reads x first adds up and stores.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .backend import apply, opaque, use_kernel
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


def arranged(x: Tensor, channels_last: bool) -> Tensor:
    """x in this memory format, without a copy where it is in it."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


class Parts(NamedTuple):
    """What is normed beside x, see `group_norm_of_sum`."""

    residual: Tensor | None = None
    shift: Tensor | None = None
    skip: Tensor | None = None
    later: Tensor | None = None


def _fake_forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    add: Tensor | None,
    residual: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    later: Tensor | None,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(x), x.shape[1] + (0 if skip is None else skip.shape[1]), *x.shape[2:])
    y, total = _empty(x, shape), _empty(x, shape) if store else x.new_empty(0)
    return y, x.new_empty(3, x.shape[0], groups, dtype=torch.float32), total


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new tensor in the memory format of ``like``."""
    if shape == like.shape:
        return torch.empty_like(like)
    if not is_channels_last(like):
        return like.new_empty(shape)
    return like.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@opaque(_fake_forward)
def group_norm_forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    add: Tensor | None,
    residual: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    later: Tensor | None,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, C, ...], residual and skip all channels-last or all contiguous, the others contiguous -> norm like the sum,
    statistics [3, B, groups], and the sum, which is empty unless ``store``. Without that there is no part but shift."""
    y, statistics, total = _fake_forward(x, groups, weight, bias, eps, silu, add, residual, shift, skip, later, store)
    parts = (residual, shift, skip, later, total if store else None)
    call, split = plan(y, groups, forward_tiles, FORWARD_ON_CHIP), x.shape[1]

    # A group that fits on chip: all of it in one launch.
    if call.one_pass:
        group_norm_forward_kernel[(call.batch * groups,)](
            x,
            *parts,
            add,
            weight,
            bias,
            y,
            statistics,
            *call.geometry(add),
            split,
            eps,
            GROUP=call.group,
            SILU=silu,
            **call.on_chip(),
        )
        return y, statistics, total

    # First pass: the statistics of chunks of pixels.
    together = call.groups_together()
    first = call.split(together * call.group, waves=2, most=MOST_CHUNKS)
    moments = x.new_empty(3, call.batch, first.chunks, groups, dtype=torch.float32)
    group_norm_statistics_kernel[(first.programs,)](
        x,
        *parts,
        add,
        moments,
        *call.geometry(add),
        split,
        moments.stride(0),
        first.chunk,
        first.chunks,
        GROUP=call.group,
        GROUPS=together,
        **first.tiles,
    )

    # Second pass: merge them and apply the norm. A sum that was stored holds its shift.
    second = call.split(call.block(), waves=4, most=call.pixels)
    touched = ceil(call.block(), call.group) + (call.block() % call.group != 0)  # groups of a block, at most
    group_norm_apply_kernel[(second.programs,)](
        total if store else x,
        None if store else shift,
        later,
        add,
        weight,
        bias,
        moments,
        y,
        statistics,
        *call.geometry(add),
        eps,
        moments.stride(0),
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
    return y, statistics, total


def _fake_backward(
    x: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    shift: Tensor | None,
    add: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    sums, dadd = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, *x.shape[:2]), x.shape[:2]))
    return torch.empty_like(x), sums, dadd


@opaque(_fake_backward)
def group_norm_backward(
    x: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    shift: Tensor | None,
    add: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, dy and dtotal in one format -> dx like x, with dtotal on top; in float32 each sample's (dbias, dweight)
    [2, B, C], and dadd [B, C], of add and of shift, unset without both."""
    call = plan(x, groups, backward_tiles, BACKWARD_ON_CHIP)
    dx, sums, dadd = _fake_backward(x, dy, dtotal, groups, weight, bias, silu, shift, add, statistics)

    # A group that fits on chip: all of it in one launch.
    if call.one_pass:
        group_norm_backward_kernel[(call.batch * groups,)](
            x,
            dy,
            dtotal,
            shift,
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
    first = call.split(call.block(), waves=2, most=MOST_CHUNKS)
    parts = x.new_empty(3, call.batch, first.chunks, call.channels, dtype=torch.float32)
    group_norm_sums_kernel[(first.programs,)](
        x,
        dy,
        shift,
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
        ADD=add is not None or shift is not None,
        ROWS=max(1, min(power(first.chunks), 2048 // columns)),
        COLUMNS=columns,
    )

    # Second pass: the gradient of x.
    second = call.split(call.block(), waves=4, most=call.pixels)
    group_norm_backward_apply_kernel[(second.programs,)](
        x,
        dy,
        dtotal,
        shift,
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


class GroupNorm(torch.autograd.Function):
    """The norm; with ``store`` also what was normed."""

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
        residual: Tensor | None,
        shift: Tensor | None,
        skip: Tensor | None,
        later: Tensor | None,
        store: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        last = is_channels_last(x)
        x, residual, skip = arranged(x, last), *(None if t is None else arranged(t, last) for t in (residual, skip))
        weight, bias, add, shift, later = (
            None if t is None else t.contiguous() for t in (weight, bias, add, shift, later)
        )

        y, statistics, total = group_norm_forward(
            x, groups, weight, bias, eps, silu, add, residual, shift, skip, later, store
        )
        ctx.save_for_backward(total if store else x, weight, bias, add, shift, statistics)
        ctx.silu, ctx.split = silu, x.shape[1]
        return (y, total) if store else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        x, weight, bias, add, shift, statistics = ctx.saved_tensors
        last, stored = is_channels_last(x), dtotal is not None
        dx, sums, dadd = group_norm_backward(
            x,
            arranged(dy, last),
            arranged(dtotal, last) if stored else None,
            statistics.shape[2],
            weight,
            bias,
            ctx.silu,
            None if stored else shift,
            add,
            statistics,
        )

        # Only what is asked for. One add for all samples has the sum of their gradients.
        _, _, want_weight, want_bias, _, _, want_add, want_residual, want_shift, want_skip, _, _ = ctx.needs_input_grad
        dweight = sums[1].sum(0).to(weight.dtype) if want_weight else None
        dbias = sums[0].sum(0).to(bias.dtype) if want_bias else None
        of_add = None
        if want_add:
            of_add = (dadd.sum(0, keepdim=True) if len(add) < len(dadd) else dadd).to(add.dtype)

        # The parts share the gradient of their sum.
        first, rest = dx[:, : ctx.split], dx[:, ctx.split :] if want_skip else None
        dshift = None
        if want_shift:
            pixels = [d for d in range(dx.dim()) if d != 1]
            dshift = (first.sum(pixels, dtype=torch.float32) if stored else dadd.sum(0)).to(shift.dtype)
        residual = first if want_residual else None
        return first, None, dweight, dbias, None, None, of_add, residual, dshift, rest, None, None


def why_not(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None = None,
    shift: Tensor | None = None,
) -> str | None:
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
    for name, t in (("weight", weight), ("bias", bias), ("shift", shift)):
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
    shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm of ``x + shift + add``, then SiLU if ``activation`` is "silu" (Wu and He, arXiv 1803.08494).

    x [B, C, ...], channels-last or contiguous, else it is copied; weight, bias and shift [C] of any float dtype; add [B
    or 1, C] in x's dtype, one value per sample and channel. The result has x's dtype and memory format. The kernels
    take float32, float16 and bfloat16, groups of up to 4096 channels; statistics in float32. Differentiable in all
    tensors. Raises ValueError for an unknown activation.
    """
    reason = why_not(x, num_groups, weight, bias, add, shift)
    if activation in (None, "silu") and use_kernel("group_norm", reason, x, weight, bias, add, shift):
        parts = Parts(shift=shift)
        return apply(GroupNorm, x, num_groups, weight, bias, eps, activation == "silu", add, *parts, False)

    return reference.group_norm(x, num_groups, weight, bias, eps, activation, add, shift)

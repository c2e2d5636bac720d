"""GroupNorm with an optional vector added before and SiLU behind (Wu and He, arXiv 1803.08494), forward and backward.

A group that fits on chip takes one launch. A larger one takes two: partial statistics of chunks of pixels, then the
norm, whose programs merge what they need of them and go over x in reverse, for its end is still in the cache. The
backward likewise, with a small launch in between. Channels-last and contiguous x differ in strides alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import Device, device_of, opaque, use_kernel
from .group_norm_kernels import (
    group_norm_apply_kernel,
    group_norm_backward_apply_kernel,
    group_norm_backward_kernel,
    group_norm_combine_kernel,
    group_norm_forward_kernel,
    group_norm_statistics_kernel,
    group_norm_sums_kernel,
)
from .tuned import Choice, Options, tunable

MOST_CHANNELS, LARGEST_GROUP = 65535, 4096  # the latter in channels
FORWARD_ON_CHIP, BACKWARD_ON_CHIP = 32768, 16384  # elements that 16 warps hold without spilling
MOST_CHUNKS = 128


def _power(n: int) -> int:
    """The power of two from n up."""
    return 1 << (n - 1).bit_length()


def _ceil(n: int, step: int) -> int:
    return -(-n // step)


def _elements(pixels: int, group: int) -> int:
    """Of the tile that holds a group."""
    return _power(pixels) * _power(group)


CANDIDATES: tuple[Options, ...] = (
    *({"passes": 1, "num_warps": warps} for warps in (4, 8, 16)),
    *({"passes": 2, "tile": tile, "num_warps": warps} for tile in (2048, 4096) for warps in (4, 8)),
)


@tunable("group_norm_forward", CANDIDATES)
def _forward_options(device: Device, dtype: torch.dtype, batch: int, pixels: int, channels: int, group: int) -> Options:
    """One pass where a group fits on chip, 32 to 64 elements a thread; else tiles of 16 elements a thread."""
    elements = _elements(pixels, group)
    if elements <= FORWARD_ON_CHIP:
        return {"passes": 1, "tile": 4096, "num_warps": min(16, max(1, elements // 1024))}
    return {"passes": 2, "tile": 4096, "num_warps": 8}


@tunable("group_norm_backward", CANDIDATES)
def _backward_options(
    device: Device, dtype: torch.dtype, batch: int, pixels: int, channels: int, group: int
) -> Options:
    """As forward with half the elements, for x and the gradient are both held, and a quarter in float32."""
    elements = _elements(pixels, group)
    if elements * dtype.itemsize <= BACKWARD_ON_CHIP * 2:
        return {"passes": 1, "tile": 2048, "num_warps": min(16, max(1, elements // 1024))}
    return {"passes": 2, "tile": 2048, "num_warps": 8}


class _Call(NamedTuple):
    """The sizes of a call, and how it is done."""

    batch: int
    pixels: int
    channels: int
    group: int  # channels of a group
    last: bool  # the channels of a pixel lie side by side
    one_pass: bool
    tile: int  # elements
    warps: int
    processors: int

    def geometry(self, add: Tensor | None) -> tuple[int, int, int, int, int]:
        """pixels, channels, pixel_stride, channel_stride and add_stride of a kernel."""
        pixel, channel = (self.channels, 1) if self.last else (1, self.pixels)
        return self.pixels, self.channels, pixel, channel, 0 if add is None or len(add) == 1 else self.channels

    def on_chip(self) -> Options:
        """The tile that holds a group."""
        return {"ROWS": _power(self.pixels), "COLUMNS": _power(self.group), "num_warps": self.warps}

    def groups_together(self) -> int:
        """Whole groups of a tile of statistics: 64 channels or more where they lie side by side, else one group."""
        together = 1
        while self.last and together * self.group < 64 and self.channels // self.group % (2 * together) == 0:
            together *= 2
        return together

    def block(self) -> int:
        """Channels of a tile that need not be whole groups: 64 divides every channel count of Stable Diffusion."""
        width = 64 if self.last else max(8, self.tile // _power(self.pixels))
        return min(width, _power(self.channels))

    def split(self, width: int, waves: int, most: int) -> tuple[int, int, int, Options]:
        """Programs (about ``waves`` a multiprocessor), pixels of a chunk, chunks, the tile over ``width`` channels."""
        columns = _power(width)
        rows = max(1, min(_power(self.pixels), self.tile // columns))
        across = self.batch * _ceil(self.channels, width)
        chunk = _ceil(self.pixels, min(most, _ceil(waves * self.processors, across)))
        chunk = _ceil(chunk, rows) * rows
        chunks = _ceil(self.pixels, chunk)
        return across * chunks, chunk, chunks, {"ROWS": rows, "COLUMNS": columns, "num_warps": self.warps}


def _call(x: Tensor, groups: int, choose: Choice, on_chip: int) -> _Call:
    (batch, channels), pixels, device = x.shape[:2], math.prod(x.shape[2:]), device_of(x)
    options = choose(device, x.dtype, batch, pixels, channels, channels // groups)
    one_pass = options["passes"] == 1 and _elements(pixels, channels // groups) <= on_chip
    return _Call(
        batch, pixels, channels, channels // groups, _is_channels_last(x), one_pass, options["tile"],
        options["num_warps"], device.multiprocessors,
    )  # fmt: skip


def _is_channels_last(x: Tensor) -> bool:
    return math.prod(x.shape[2:]) == 1 or (x.stride(1) == 1 and not x.is_contiguous())


def _arranged(x: Tensor, channels_last: bool) -> Tensor:
    """x in this memory format: itself if it is."""
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
    c = _call(x, groups, _forward_options, FORWARD_ON_CHIP)
    y, statistics = _fake_forward(x, groups, weight, bias, eps, silu, add)
    flags: Options = {"GROUP": c.group, "SILU": silu}
    if c.one_pass:
        group_norm_forward_kernel[(c.batch * groups,)](
            x, add, weight, bias, y, statistics, *c.geometry(add), eps, **flags, **c.on_chip(),
        )  # fmt: skip
        return y, statistics
    groups_of_tile: Options = {"GROUP": c.group, "GROUPS": c.groups_together()}
    programs, part_chunk, part_chunks, tile = c.split(c.groups_together() * c.group, 4, MOST_CHUNKS)
    parts = x.new_empty(3, c.batch, part_chunks, groups, dtype=torch.float32)
    group_norm_statistics_kernel[(programs,)](
        x, add, parts, *c.geometry(add), parts.stride(0), part_chunk, part_chunks, **groups_of_tile, **tile,
    )  # fmt: skip
    programs, chunk, chunks, tile = c.split(c.block(), 8, c.pixels)
    touched = _ceil(c.block(), c.group) + (c.block() % c.group != 0)  # groups of a block, at most
    merging: Options = {"GROUPS": _power(touched), "CHUNKS": _power(part_chunks)}
    group_norm_apply_kernel[(programs,)](
        x, add, weight, bias, parts, y, statistics, *c.geometry(add), eps,
        parts.stride(0), part_chunk, part_chunks, statistics.stride(0), chunk, chunks, **flags, **merging, **tile,
    )  # fmt: skip
    return y, statistics


def _fake_backward(
    x: Tensor, dy: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, silu: bool, add: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sums, dadd = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, x.shape[1]), x.shape[:2]))
    return torch.empty_like(x), sums, dadd


@opaque(_fake_backward)
def group_norm_backward(
    x: Tensor, dy: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, silu: bool, add: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x and dy in one format -> dx like x; in float32 (dbias, dweight) [2, C] and dadd [B, C], unset without add."""
    c = _call(x, groups, _backward_options, BACKWARD_ON_CHIP)
    dx, _, dadd = _fake_backward(x, dy, groups, weight, bias, silu, add, statistics)
    sums = x.new_empty(2, c.batch, c.channels, dtype=torch.float32)
    flags: Options = {"GROUP": c.group, "SILU": silu}
    if c.one_pass:
        group_norm_backward_kernel[(c.batch * groups,)](
            x, dy, add, weight, bias, statistics, dx, sums, dadd, *c.geometry(add), **flags, **c.on_chip(),
        )  # fmt: skip
        return dx, sums.sum(1), dadd
    programs, chunk, chunks, tile = c.split(c.block(), 4, MOST_CHUNKS)
    parts = x.new_empty(3, c.batch, chunks, c.channels, dtype=torch.float32)
    group_norm_sums_kernel[(programs,)](
        x, dy, add, weight, bias, statistics, parts, *c.geometry(add),
        parts.stride(0), statistics.stride(0), chunk, chunks, **flags, **tile,
    )  # fmt: skip
    means, columns = torch.empty_like(statistics[:2]), _power(c.group)
    rows = max(1, min(_power(chunks), 2048 // columns))
    whole: Options = {"GROUP": c.group, "ADD": add is not None, "ROWS": rows, "COLUMNS": columns}
    group_norm_combine_kernel[(c.batch * groups,)](
        parts, weight, statistics, sums, means, dadd, c.pixels, c.channels, parts.stride(0), chunks,
        **whole,
    )  # fmt: skip
    programs, chunk, chunks, tile = c.split(c.block(), 8, c.pixels)
    group_norm_backward_apply_kernel[(programs,)](
        x, dy, add, weight, bias, statistics, means, dx, *c.geometry(add), statistics.stride(0), chunk, chunks,
        **flags, **tile,
    )  # fmt: skip
    return dx, sums.sum(1), dadd


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
        add: Tensor | None,
    ) -> Tensor:  # fmt: skip
        x = _arranged(x, _is_channels_last(x))
        weight, bias, add = (None if t is None else t.contiguous() for t in (weight, bias, add))
        y, statistics = group_norm_forward(x, groups, weight, bias, eps, silu, add)
        ctx.save_for_backward(x, weight, bias, add, statistics)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's is loose
        x, weight, bias, add, statistics = ctx.saved_tensors
        dy = _arranged(dy, _is_channels_last(x))
        dx, sums, dadd = group_norm_backward(x, dy, statistics.shape[2], weight, bias, ctx.silu, add, statistics)
        if add is not None and len(add) < len(dadd):
            dadd = dadd.sum(0, keepdim=True)
        dweight = None if weight is None else sums[1].to(weight.dtype)
        dbias = None if bias is None else sums[0].to(bias.dtype)
        return dx, None, dweight, dbias, None, None, None if add is None else dadd.to(add.dtype)


def _why_not(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, add: Tensor | None) -> str | None:
    if x.dim() < 2:
        return f"x must be [B, C, ...], found {tuple(x.shape)}"
    batch, channels = x.shape[:2]
    if channels > MOST_CHANNELS:
        return f"its kernels take up to {MOST_CHANNELS} channels, found {channels}"
    if groups < 1 or channels % groups or channels // groups > LARGEST_GROUP:
        return f"{channels} channels must be whole groups of at most {LARGEST_GROUP}, found {groups} groups"
    if x.numel() == groups:
        return "PyTorch refuses a single value a group"
    if math.prod(x.shape[2:]) * max(8, _power(channels // groups)) >= 2**31:  # a tile's offsets are int32
        return "a group must have fewer than 2^31 elements, and 8 channels as well"
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

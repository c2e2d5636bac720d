"""GroupNorm with an optional vector added before and SiLU behind (Wu and He, arXiv 1803.08494), forward and backward.

x [B, C, ...] lies channels-last in memory ([B, P, C], P pixels) or contiguous ([B, C, P]); to a kernel both are tiles of
pixels x channels. Statistics are a mean and a sum of squared deviations from it (M2) in float32, merged as by Chan,
Golub and LeVeque (1979).

A group that fits on chip takes one launch. A larger one takes two: partial statistics of chunks of pixels, then the
norm, whose programs merge what they need of them and go over x in reverse, for its end is still in the cache. The
backward likewise, with a small launch in between.

The kernels call few functions, because each call takes milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import Device, device_of, opaque, use_kernel
from .tuned import Choice, Options, tunable

LARGEST_GROUP = 4096  # channels
FORWARD_ON_CHIP, BACKWARD_ON_CHIP = 32768, 16384  # elements that 16 warps hold without spilling
MOST_CHUNKS = 128


@triton.jit
def group_norm_forward_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, y_ptr, statistics_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride, eps,
    GROUP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x and y [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [2, B, groups]: mean, 1 / deviation.

    A program: one group of one sample.
    """
    groups = channels // GROUP
    sample, first = tl.program_id(0) // groups, tl.program_id(0) % groups * GROUP
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_group = column < GROUP
    inside = (row < pixels)[:, None] & in_group[None, :]
    start = tl.cast(sample, tl.int64) * pixels * channels + first * channel_stride
    offset = row[:, None] * pixel_stride + column[None, :] * channel_stride
    column += first
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    if add_ptr is not None:
        added = tl.load(add_ptr + sample * add_stride + column, mask=in_group, other=0.0).to(tl.float32)
        x = tl.where(inside, x + added[None, :], 0.0)
    mean = tl.sum(x) / (pixels * GROUP)
    y = tl.where(inside, x - mean, 0.0)
    rest = tl.sum(y) / (pixels * GROUP)  # what rounding left of the mean
    rstd = 1.0 / tl.sqrt(tl.sum(y * y) / (pixels * GROUP) - rest * rest + eps)
    y = (y - rest) * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + start + offset, y, mask=inside)
    tl.store(statistics_ptr + tl.program_id(0), mean + rest)
    tl.store(statistics_ptr + tl.num_programs(0) + tl.program_id(0), rstd)


@triton.jit
def group_norm_statistics_kernel(
    x_ptr, add_ptr, parts_ptr, pixels, channels, pixel_stride, channel_stride, add_stride, parts_stride, chunk, chunks,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [B, P, C] by strides; add [B or 1, C]; parts [2, B, chunks, groups], ``parts_stride`` apart: mean and M2.

    A program: ``chunk`` pixels of GROUPS whole groups, ROWS at a time. Each element of the tile keeps its own mean and
    M2 over the steps (Welford); these are merged into channels, then into groups.
    """
    tiles = channels // (GROUPS * GROUP)
    first = tl.program_id(0) % tiles * (GROUPS * GROUP)
    begin = tl.program_id(0) // tiles % chunks * chunk
    sample = tl.program_id(0) // tiles // chunks
    count = min(chunk, pixels - begin)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_tile = column < GROUPS * GROUP
    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + column[None, :] * channel_stride
    mean = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    m2 = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    steps = 0.0
    for done in range(0, count, ROWS):
        inside = (row < count - done)[:, None] & in_tile[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        steps += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / steps)
        m2 += delta * (x - mean)
        start += ROWS * pixel_stride
    seen = ((tl.maximum(count - row, 0) + ROWS - 1) // ROWS).to(tl.float32)[:, None]  # pixels of each row
    channel_mean = tl.sum(mean * seen, axis=0) / count
    delta = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + seen * delta * delta, axis=0)
    channel_mean += tl.sum(seen * delta, axis=0) / count  # what rounding left of it
    if add_ptr is not None:
        channel_mean += tl.load(add_ptr + sample * add_stride + first + column, mask=in_tile, other=0.0).to(tl.float32)
    group = tl.arange(0, GROUPS)
    member = group[:, None] == (column // GROUP)[None, :]
    group_mean = tl.sum(tl.where(member, channel_mean[None, :], 0.0), axis=1) / GROUP
    delta = tl.where(member, channel_mean[None, :] - group_mean[:, None], 0.0)
    group_m2 = tl.sum(tl.where(member, channel_m2[None, :], 0.0) + count * delta * delta, axis=1)
    group_mean += tl.sum(delta, axis=1) / GROUP
    here = tl.program_id(0) // tiles * (channels // GROUP) + first // GROUP + group
    tl.store(parts_ptr + here, group_mean)
    tl.store(parts_ptr + parts_stride + here, group_m2)


@triton.jit
def group_norm_apply_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, parts_ptr, y_ptr, statistics_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride, eps,
    parts_stride, part_chunk, part_chunks, statistics_stride, chunk, chunks,
    GROUP: tl.constexpr, SILU: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """As group_norm_forward_kernel, from parts [2, B, part_chunks, groups] of ``part_chunk`` pixels each.

    A program: ``chunk`` pixels of COLUMNS channels, which lie in up to GROUPS groups; CHUNKS is at least part_chunks.
    """
    blocks, groups = (channels + COLUMNS - 1) // COLUMNS, channels // GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first, begin = program % blocks * COLUMNS, program // blocks % chunks * chunk
    sample = program // blocks // chunks
    group, part = first // GROUP + tl.arange(0, GROUPS), tl.arange(0, CHUNKS)
    there = (part < part_chunks)[:, None] & (group < groups)[None, :]
    reference_ptr = parts_ptr + sample * part_chunks * groups
    parts_ptr = reference_ptr + part[:, None] * groups + group[None, :]
    means = tl.load(parts_ptr, mask=there, other=0.0)
    m2s = tl.load(parts_ptr + parts_stride, mask=there, other=0.0)
    mean = tl.load(reference_ptr + group, mask=group < groups, other=0.0)  # of the first chunk; differences are exact
    size = tl.minimum(tl.maximum(pixels - part * part_chunk, 0), part_chunk).to(tl.float32)[:, None]
    mean += tl.sum(size * (means - mean[None, :]), axis=0) / pixels
    delta = means - mean[None, :]
    rstd = 1.0 / tl.sqrt(tl.sum(m2s / GROUP + size * delta * delta, axis=0) / pixels + eps)
    mine = (begin == 0) & (group < groups) & (group * GROUP >= first) & (group * GROUP < first + COLUMNS)
    tl.store(statistics_ptr + sample * groups + group, mean, mask=mine)
    tl.store(statistics_ptr + statistics_stride + sample * groups + group, rstd, mask=mine)

    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels
    member = group[:, None] == (column // GROUP)[None, :]
    centre = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)
    scale = tl.sum(tl.where(member, rstd[:, None], 0.0), axis=0)
    shift = tl.full([COLUMNS], 0.0, tl.float32)
    added = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        added = tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + (column - first)[None, :] * channel_stride
    for pixel in range(begin, min(begin + chunk, pixels), ROWS):
        inside = (row < pixels - pixel)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        y = x - centre[None, :]
        if add_ptr is not None:
            y += added[None, :]
        y = y * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + start + offset, y, mask=inside)
        start += ROWS * pixel_stride


@triton.jit
def group_norm_backward_kernel(
    x_ptr, dy_ptr, add_ptr, weight_ptr, bias_ptr, statistics_ptr, dx_ptr, sums_ptr, dadd_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride,
    GROUP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x, dy and dx [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [2, B, groups]; dadd [B, C].

    sums [2, B, C]: of the gradient before the activation, dz, and of dz times the normed x. A program: one group of one
    sample.
    """
    groups = channels // GROUP
    sample, first = tl.program_id(0) // groups, tl.program_id(0) % groups * GROUP
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_group = column < GROUP
    inside = (row < pixels)[:, None] & in_group[None, :]
    start = tl.cast(sample, tl.int64) * pixels * channels + first * channel_stride
    offset = row[:, None] * pixel_stride + column[None, :] * channel_stride
    column += first
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(dy_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    x -= tl.load(statistics_ptr + tl.program_id(0))
    rstd = tl.load(statistics_ptr + tl.num_programs(0) + tl.program_id(0))
    weight = tl.where(in_group, 1.0, 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)
    if add_ptr is not None:
        x += tl.load(add_ptr + sample * add_stride + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    x = tl.where(inside, x * rstd, 0.0)
    if SILU:
        z = x * weight[None, :]
        if bias_ptr is not None:
            z += tl.load(bias_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    sum_dz, sum_dz_x = tl.sum(dz, axis=0), tl.sum(dz * x, axis=0)
    here = sample * channels + column
    tl.store(sums_ptr + here, sum_dz, mask=in_group)
    tl.store(sums_ptr + tl.num_programs(0) * GROUP + here, sum_dz_x, mask=in_group)
    mean_dz = tl.sum(weight * sum_dz) / (pixels * GROUP)
    mean_dz_x = tl.sum(weight * sum_dz_x) / (pixels * GROUP)
    dx = rstd * (dz * weight[None, :] - mean_dz - x * mean_dz_x)
    tl.store(dx_ptr + start + offset, dx, mask=inside)
    if add_ptr is not None:
        dadd = rstd * (weight * sum_dz - pixels * mean_dz - tl.sum(x, axis=0) * mean_dz_x)
        tl.store(dadd_ptr + here, dadd, mask=in_group)


@triton.jit
def group_norm_sums_kernel(
    x_ptr, dy_ptr, add_ptr, weight_ptr, bias_ptr, statistics_ptr, parts_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride, parts_stride, statistics_stride, chunk, chunks,
    GROUP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x and dy [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [2, B, groups].

    parts [3, B, chunks, C], ``parts_stride`` apart: sums over each chunk of dz, of dz times the normed x and, if there
    is add, of the normed x. A program: ``chunk`` pixels of COLUMNS channels, ROWS at a time.
    """
    blocks, groups = (channels + COLUMNS - 1) // COLUMNS, channels // GROUP
    first, begin = tl.program_id(0) % blocks * COLUMNS, tl.program_id(0) // blocks % chunks * chunk
    sample = tl.program_id(0) // blocks // chunks
    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels
    statistics_ptr += sample * groups + column // GROUP
    mean = tl.load(statistics_ptr, mask=in_channels, other=0.0)
    rstd = tl.load(statistics_ptr + statistics_stride, mask=in_channels, other=0.0)
    weight = tl.full([COLUMNS], 1.0, tl.float32)
    bias = tl.full([COLUMNS], 0.0, tl.float32)
    added = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        added = tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    sum_dz = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    sum_dz_x = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    sum_x = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + (column - first)[None, :] * channel_stride
    for pixel in range(begin, min(begin + chunk, pixels), ROWS):
        inside = (row < pixels - pixel)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        x -= mean[None, :]
        if add_ptr is not None:
            x += added[None, :]
        x = tl.where(inside, x * rstd[None, :], 0.0)
        if SILU:
            z = x * weight[None, :] + bias[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
        sum_dz += dz
        sum_dz_x += dz * x
        if add_ptr is not None:
            sum_x += x
        start += ROWS * pixel_stride
    parts_ptr += tl.program_id(0) // blocks * channels + column
    tl.store(parts_ptr, tl.sum(sum_dz, axis=0), mask=in_channels)
    tl.store(parts_ptr + parts_stride, tl.sum(sum_dz_x, axis=0), mask=in_channels)
    if add_ptr is not None:
        tl.store(parts_ptr + 2 * parts_stride, tl.sum(sum_x, axis=0), mask=in_channels)


@triton.jit
def group_norm_combine_kernel(
    parts_ptr, weight_ptr, statistics_ptr, sums_ptr, means_ptr, dadd_ptr, pixels, channels, parts_stride, chunks,
    GROUP: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts [3, B, chunks, C] -> sums [2, B, C] over all chunks, means [2, B, groups] of w dz and w dz x, dadd [B, C].

    A program: one group of one sample, ROWS chunks at a time.
    """
    groups = channels // GROUP
    sample = tl.program_id(0) // groups
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_group = column < GROUP
    column += tl.program_id(0) % groups * GROUP
    sum_dz = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    sum_dz_x = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    sum_x = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for done in range(0, chunks, ROWS):
        inside = (row < chunks - done)[:, None] & in_group[None, :]
        here = parts_ptr + (sample * chunks + done + row)[:, None] * channels + column[None, :]
        sum_dz += tl.load(here, mask=inside, other=0.0)
        sum_dz_x += tl.load(here + parts_stride, mask=inside, other=0.0)
        if ADD:
            sum_x += tl.load(here + 2 * parts_stride, mask=inside, other=0.0)
    total_dz, total_dz_x = tl.sum(sum_dz, axis=0), tl.sum(sum_dz_x, axis=0)
    here = sample * channels + column
    tl.store(sums_ptr + here, total_dz, mask=in_group)
    tl.store(sums_ptr + tl.num_programs(0) * GROUP + here, total_dz_x, mask=in_group)
    weight = tl.full([COLUMNS], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)
    mean_dz = tl.sum(weight * total_dz) / (pixels * GROUP)
    mean_dz_x = tl.sum(weight * total_dz_x) / (pixels * GROUP)
    tl.store(means_ptr + tl.program_id(0), mean_dz)
    tl.store(means_ptr + tl.num_programs(0) + tl.program_id(0), mean_dz_x)
    if ADD:
        rstd = tl.load(statistics_ptr + tl.num_programs(0) + tl.program_id(0))
        dadd = rstd * (weight * total_dz - pixels * mean_dz - tl.sum(sum_x, axis=0) * mean_dz_x)
        tl.store(dadd_ptr + here, dadd, mask=in_group)


@triton.jit
def group_norm_backward_apply_kernel(
    x_ptr, dy_ptr, add_ptr, weight_ptr, bias_ptr, statistics_ptr, means_ptr, dx_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride, statistics_stride, chunk, chunks,
    GROUP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x, dy and dx [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics and means [2, B, groups].

    A program: ``chunk`` pixels of COLUMNS channels, ROWS at a time.
    """
    blocks, groups = (channels + COLUMNS - 1) // COLUMNS, channels // GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first, begin = program % blocks * COLUMNS, program // blocks % chunks * chunk
    sample = program // blocks // chunks
    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels
    at_group = sample * groups + column // GROUP
    mean = tl.load(statistics_ptr + at_group, mask=in_channels, other=0.0)
    rstd = tl.load(statistics_ptr + statistics_stride + at_group, mask=in_channels, other=0.0)
    mean_dz = tl.load(means_ptr + at_group, mask=in_channels, other=0.0)
    mean_dz_x = tl.load(means_ptr + statistics_stride + at_group, mask=in_channels, other=0.0)
    weight = tl.full([COLUMNS], 1.0, tl.float32)
    bias = tl.full([COLUMNS], 0.0, tl.float32)
    added = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        added = tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + (column - first)[None, :] * channel_stride
    for pixel in range(begin, min(begin + chunk, pixels), ROWS):
        inside = (row < pixels - pixel)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        x -= mean[None, :]
        if add_ptr is not None:
            x += added[None, :]
        x *= rstd[None, :]
        if SILU:
            z = x * weight[None, :] + bias[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
        dx = rstd[None, :] * (dz * weight[None, :] - mean_dz[None, :] - x * mean_dz_x[None, :])
        tl.store(dx_ptr + start + offset, dx, mask=inside)
        start += ROWS * pixel_stride


CANDIDATES: tuple[Options, ...] = (
    *({"passes": 1, "num_warps": warps} for warps in (4, 8, 16)),
    *({"passes": 2, "tile": tile, "num_warps": warps} for tile in (2048, 4096) for warps in (4, 8)),
)


@tunable("group_norm_forward", CANDIDATES)
def _forward_options(device: Device, dtype: torch.dtype, batch: int, pixels: int, channels: int, group: int) -> Options:
    """One pass where a group fits on chip, 32 to 64 elements a thread; else tiles of 16 elements a thread."""
    elements = math.prod(_on_chip(pixels, group).values())
    if elements <= FORWARD_ON_CHIP:
        return {"passes": 1, "tile": 4096, "num_warps": min(16, max(1, elements // 1024))}
    return {"passes": 2, "tile": 4096, "num_warps": 8}


@tunable("group_norm_backward", CANDIDATES)
def _backward_options(
    device: Device, dtype: torch.dtype, batch: int, pixels: int, channels: int, group: int
) -> Options:
    """As forward with half the elements, for x and the gradient are both held."""
    elements = math.prod(_on_chip(pixels, group).values())
    if elements <= BACKWARD_ON_CHIP:
        return {"passes": 1, "tile": 2048, "num_warps": min(16, max(1, elements // 1024))}
    return {"passes": 2, "tile": 2048, "num_warps": 8}


def _on_chip(pixels: int, group: int) -> dict[str, int]:
    """The tile that holds a group."""
    return {"ROWS": triton.next_power_of_2(pixels), "COLUMNS": triton.next_power_of_2(group)}


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
        strides = (self.channels, 1) if self.last else (1, self.pixels)
        return self.pixels, self.channels, *strides, 0 if add is None or len(add) == 1 else self.channels

    def groups_together(self) -> int:
        """Whole groups of a tile of statistics: 64 channels or more where they lie side by side, else one group."""
        together = 1
        while self.last and together * self.group < 64 and self.channels // self.group % (2 * together) == 0:
            together *= 2
        return together

    def block(self) -> int:
        """Channels of a tile that need not be whole groups: 64 divides every channel count of Stable Diffusion."""
        width = 64 if self.last else max(8, self.tile // triton.next_power_of_2(self.pixels))
        return min(width, triton.next_power_of_2(self.channels))

    def split(self, width: int, waves: int, most: int) -> tuple[int, int, int, dict[str, int]]:
        """Programs (about ``waves`` a multiprocessor), pixels of a chunk, chunks, and the tile over ``width`` channels."""
        columns = triton.next_power_of_2(width)
        rows = max(1, min(triton.next_power_of_2(self.pixels), self.tile // columns))
        across = self.batch * triton.cdiv(self.channels, width)
        chunk = triton.cdiv(self.pixels, min(most, triton.cdiv(waves * self.processors, across)))
        chunk = triton.cdiv(chunk, rows) * rows
        chunks = triton.cdiv(self.pixels, chunk)
        return across * chunks, chunk, chunks, {"ROWS": rows, "COLUMNS": columns, "num_warps": self.warps}


def _call(x: Tensor, groups: int, choose: Choice, on_chip: int) -> _Call:
    (batch, channels), pixels, device = x.shape[:2], math.prod(x.shape[2:]), device_of(x)
    options = choose(device, x.dtype, batch, pixels, channels, channels // groups)
    one_pass = options["passes"] == 1 and math.prod(_on_chip(pixels, channels // groups).values()) <= on_chip
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
    return torch.empty_like(x), x.new_empty(2, x.shape[0], groups, dtype=torch.float32)


@opaque(_fake_forward)
def group_norm_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [B, C, ...] channels-last or contiguous, the others contiguous -> norm like x, statistics [2, B, groups]."""
    c = _call(x, groups, _forward_options, FORWARD_ON_CHIP)
    y, statistics = _fake_forward(x, groups, weight, bias, eps, silu, add)
    if c.one_pass:
        group_norm_forward_kernel[(c.batch * groups,)](
            x, add, weight, bias, y, statistics, *c.geometry(add), eps,
            GROUP=c.group, SILU=silu, num_warps=c.warps, **_on_chip(c.pixels, c.group),
        )  # fmt: skip
        return y, statistics
    together = c.groups_together()
    programs, part_chunk, part_chunks, tile = c.split(together * c.group, 4, MOST_CHUNKS)
    parts = x.new_empty(2, c.batch, part_chunks, groups, dtype=torch.float32)
    group_norm_statistics_kernel[(programs,)](
        x, add, parts, *c.geometry(add), parts.stride(0), part_chunk, part_chunks,
        GROUP=c.group, GROUPS=together, **tile,
    )  # fmt: skip
    programs, chunk, chunks, tile = c.split(c.block(), 8, c.pixels)
    touched = triton.cdiv(c.block(), c.group) + (c.block() % c.group != 0)  # groups of a block, at most
    group_norm_apply_kernel[(programs,)](
        x, add, weight, bias, parts, y, statistics, *c.geometry(add), eps,
        parts.stride(0), part_chunk, part_chunks, statistics.stride(0), chunk, chunks, GROUP=c.group, SILU=silu,
        GROUPS=triton.next_power_of_2(touched), CHUNKS=triton.next_power_of_2(part_chunks), **tile,
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
    """x and dy in one format -> dx like x, and in float32 (dbias, dweight) [2, C] and dadd [B, C] (unset without add)."""
    c = _call(x, groups, _backward_options, BACKWARD_ON_CHIP)
    dx, _, dadd = _fake_backward(x, dy, groups, weight, bias, silu, add, statistics)
    sums = x.new_empty(2, c.batch, c.channels, dtype=torch.float32)
    if c.one_pass:
        group_norm_backward_kernel[(c.batch * groups,)](
            x, dy, add, weight, bias, statistics, dx, sums, dadd, *c.geometry(add),
            GROUP=c.group, SILU=silu, num_warps=c.warps, **_on_chip(c.pixels, c.group),
        )  # fmt: skip
        return dx, sums.sum(1), dadd
    programs, chunk, chunks, tile = c.split(c.block(), 4, MOST_CHUNKS)
    parts = x.new_empty(3, c.batch, chunks, c.channels, dtype=torch.float32)
    group_norm_sums_kernel[(programs,)](
        x, dy, add, weight, bias, statistics, parts, *c.geometry(add),
        parts.stride(0), statistics.stride(0), chunk, chunks, GROUP=c.group, SILU=silu, **tile,
    )  # fmt: skip
    means, columns = torch.empty_like(statistics), triton.next_power_of_2(c.group)
    group_norm_combine_kernel[(c.batch * groups,)](
        parts, weight, statistics, sums, means, dadd, c.pixels, c.channels, parts.stride(0), chunks, GROUP=c.group,
        ADD=add is not None, ROWS=max(1, min(triton.next_power_of_2(chunks), 2048 // columns)), COLUMNS=columns,
    )  # fmt: skip
    programs, chunk, chunks, tile = c.split(c.block(), 8, c.pixels)
    group_norm_backward_apply_kernel[(programs,)](
        x, dy, add, weight, bias, statistics, means, dx, *c.geometry(add), statistics.stride(0), chunk, chunks,
        GROUP=c.group, SILU=silu, **tile,
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
        dweight, dbias = (
            None if weight is None else sums[1].to(weight.dtype),
            None if bias is None else sums[0].to(bias.dtype),
        )
        return dx, None, dweight, dbias, None, None, None if add is None else dadd.to(add.dtype)


def _why_not(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, add: Tensor | None) -> str | None:
    if x.dim() < 2:
        return f"x must be [B, C, ...], found {tuple(x.shape)}"
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups or channels // groups > LARGEST_GROUP:
        return f"{channels} channels must be whole groups of at most {LARGEST_GROUP}, found {groups} groups"
    if math.prod(x.shape[2:]) * triton.next_power_of_2(channels // groups) >= 2**31:
        return "a group must have fewer than 2^31 elements"
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

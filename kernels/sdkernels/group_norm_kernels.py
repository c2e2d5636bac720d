"""The kernels of GroupNorm, forward and backward; ``group_norm.py`` launches them.

P pixels and C channels; x [B, P, C] by strides is channels-last where ``channel_stride`` is 1 and contiguous where
``pixel_stride`` is 1. Statistics are a mean and a sum of squared deviations from it (M2) in float32, merged as by Chan,
Golub and LeVeque (1979). The kernels call few functions, for a call takes milliseconds in Triton's interpreter.
"""

# What a kernel gets is typed by Triton at its launch:
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_norm_forward_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, y_ptr, statistics_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride, eps,
    GROUP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x and y [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups].

    The statistics are a mean, what rounding left of it, and 1 / deviation. A program: one group of one sample.
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
    mean = tl.sum(x) / (pixels * GROUP)
    if add_ptr is not None:
        added = tl.load(add_ptr + sample * add_stride + column, mask=in_group, other=0.0).to(tl.float32)
        mean += tl.sum(added) / GROUP
        x = x - mean + added[None, :]
    else:
        x -= mean
    y = tl.where(inside, x, 0.0)
    rest = tl.sum(y) / (pixels * GROUP)
    rstd = 1.0 / tl.sqrt(tl.sum(y * y) / (pixels * GROUP) - rest * rest + eps)
    y = (y - rest) * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + start + offset, y, mask=inside)
    statistics_ptr += tl.program_id(0)
    tl.store(statistics_ptr, mean)
    tl.store(statistics_ptr + tl.num_programs(0), rest)
    tl.store(statistics_ptr + 2 * tl.num_programs(0), rstd)


@triton.jit
def group_norm_statistics_kernel(
    x_ptr, add_ptr, parts_ptr, pixels, channels, pixel_stride, channel_stride, add_stride, parts_stride, chunk, chunks,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [B, P, C] by strides; add [B or 1, C]; parts [3, B, chunks, groups], ``parts_stride`` apart.

    The parts are a mean, what rounding left of it, and M2. A program: ``chunk`` pixels of GROUPS whole groups, ROWS at
    a time. Each element of the tile keeps its own mean and M2 over the steps (Welford), of differences to the channel's
    value at the first pixel, so that a large mean costs no digits; these are merged into channels, then into groups.
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
    pivot = tl.load(x_ptr + start + column * channel_stride, mask=in_tile, other=0.0).to(tl.float32)
    mean = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    m2 = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    steps = 0.0
    for done in range(0, count, ROWS):
        inside = (row < count - done)[:, None] & in_tile[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32) - pivot[None, :]
        steps += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / steps)
        m2 += delta * (x - mean)
        start += ROWS * pixel_stride
    seen = ((tl.maximum(count - row, 0) + ROWS - 1) // ROWS).to(tl.float32)[:, None]  # pixels of each row
    channel_mean = tl.sum(mean * seen, axis=0) / count
    delta = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + seen * delta * delta, axis=0)
    if add_ptr is not None:
        channel_mean += tl.load(add_ptr + sample * add_stride + first + column, mask=in_tile, other=0.0).to(tl.float32)
    group = tl.arange(0, GROUPS)
    member = group[:, None] == (column // GROUP)[None, :]
    group_mean = tl.sum(tl.where(member, (pivot + channel_mean)[None, :], 0.0), axis=1) / GROUP
    delta = tl.where(member, pivot[None, :] - group_mean[:, None] + channel_mean[None, :], 0.0)
    rest = tl.sum(delta, axis=1) / GROUP
    group_m2 = tl.sum(tl.where(member, channel_m2[None, :], 0.0) + count * delta * delta, axis=1)
    here = tl.program_id(0) // tiles * (channels // GROUP) + first // GROUP + group
    tl.store(parts_ptr + here, group_mean)
    tl.store(parts_ptr + parts_stride + here, rest)
    tl.store(parts_ptr + 2 * parts_stride + here, group_m2)


@triton.jit
def group_norm_apply_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, parts_ptr, y_ptr, statistics_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride, eps,
    parts_stride, part_chunk, part_chunks, statistics_stride, chunk, chunks,
    GROUP: tl.constexpr, SILU: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """As group_norm_forward_kernel, from parts [3, B, part_chunks, groups] of ``part_chunk`` pixels each.

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
    rests = tl.load(parts_ptr + parts_stride, mask=there, other=0.0)
    m2s = tl.load(parts_ptr + 2 * parts_stride, mask=there, other=0.0)
    mean = tl.load(reference_ptr + group, mask=group < groups, other=0.0)  # of the first chunk
    size = tl.minimum(tl.maximum(pixels - part * part_chunk, 0), part_chunk).to(tl.float32)[:, None]
    delta = means - mean[None, :] + rests
    rest = tl.sum(size * delta, axis=0) / pixels
    delta -= rest[None, :]
    rstd = 1.0 / tl.sqrt(tl.sum(m2s / GROUP + size * delta * delta, axis=0) / pixels + eps)
    mine = (begin == 0) & (group < groups) & (group * GROUP >= first) & (group * GROUP < first + COLUMNS)
    statistics_ptr += sample * groups + group
    tl.store(statistics_ptr, mean, mask=mine)
    tl.store(statistics_ptr + statistics_stride, rest, mask=mine)
    tl.store(statistics_ptr + 2 * statistics_stride, rstd, mask=mine)

    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels
    member = group[:, None] == (column // GROUP)[None, :]
    centre = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)
    before = -tl.sum(tl.where(member, rest[:, None], 0.0), axis=0)
    scale = tl.sum(tl.where(member, rstd[:, None], 0.0), axis=0)
    shift = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        before += tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
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
        y = (x - centre[None, :] + before[None, :]) * scale[None, :] + shift[None, :]
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
    """x, dy and dx [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups]; dadd [B, C].

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
    statistics_ptr += tl.program_id(0)
    x = x - tl.load(statistics_ptr) - tl.load(statistics_ptr + tl.num_programs(0))
    rstd = tl.load(statistics_ptr + 2 * tl.num_programs(0))
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
    """x and dy [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups].

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
    before = -tl.load(statistics_ptr + statistics_stride, mask=in_channels, other=0.0)
    rstd = tl.load(statistics_ptr + 2 * statistics_stride, mask=in_channels, other=0.0)
    weight = tl.full([COLUMNS], 1.0, tl.float32)
    bias = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        before += tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
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
        x = tl.where(inside, (x - mean[None, :] + before[None, :]) * rstd[None, :], 0.0)
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
        rstd = tl.load(statistics_ptr + 2 * tl.num_programs(0) + tl.program_id(0))
        dadd = rstd * (weight * total_dz - pixels * mean_dz - tl.sum(sum_x, axis=0) * mean_dz_x)
        tl.store(dadd_ptr + here, dadd, mask=in_group)


@triton.jit
def group_norm_backward_apply_kernel(
    x_ptr, dy_ptr, add_ptr, weight_ptr, bias_ptr, statistics_ptr, means_ptr, dx_ptr,
    pixels, channels, pixel_stride, channel_stride, add_stride, statistics_stride, chunk, chunks,
    GROUP: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x, dy and dx [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups].

    means [2, B, groups]: of w dz and of w dz x. A program: ``chunk`` pixels of COLUMNS channels, ROWS at a time.
    """
    blocks, groups = (channels + COLUMNS - 1) // COLUMNS, channels // GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first, begin = program % blocks * COLUMNS, program // blocks % chunks * chunk
    sample = program // blocks // chunks
    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels
    statistics_ptr += sample * groups + column // GROUP
    mean = tl.load(statistics_ptr, mask=in_channels, other=0.0)
    before = -tl.load(statistics_ptr + statistics_stride, mask=in_channels, other=0.0)
    rstd = tl.load(statistics_ptr + 2 * statistics_stride, mask=in_channels, other=0.0)
    means_ptr += sample * groups + column // GROUP
    mean_dz = tl.load(means_ptr, mask=in_channels, other=0.0)
    mean_dz_x = tl.load(means_ptr + statistics_stride, mask=in_channels, other=0.0)
    weight = tl.full([COLUMNS], 1.0, tl.float32)
    bias = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        before += tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
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
        x = (x - mean[None, :] + before[None, :]) * rstd[None, :]
        if SILU:
            z = x * weight[None, :] + bias[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
        dx = rstd[None, :] * (dz * weight[None, :] - mean_dz[None, :] - x * mean_dz_x[None, :])
        tl.store(dx_ptr + start + offset, dx, mask=inside)
        start += ROWS * pixel_stride

"""The backward kernels of GroupNorm; ``group_norm.py`` launches them.

P pixels and C channels; x [B, P, C] by strides is channels-last where ``channel_stride`` is 1 and contiguous where
``pixel_stride`` is 1. With z = weight x' + bias, x' the normed x, and dz the gradient of z:

    dx = rstd (w dz - mean(w dz) - x' mean(w dz x'))        over a group

The kernels call few functions, for a call takes milliseconds in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_norm_backward_kernel(
    x_ptr,
    dy_ptr,
    dtotal_ptr,
    shift_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    dx_ptr,
    sums_ptr,
    dadd_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    add_stride,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x, dy, dtotal and dx [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups]; dadd
    [B, C].

    sums [2, B, C]: of the gradient before the activation, dz, and of dz times the normed x. A program: one group of one
    sample.
    """
    # Which group of which sample. One tile holds it whole, padded to powers of two.
    groups = channels // GROUP
    sample, first = tl.program_id(0) // groups, tl.program_id(0) % groups * GROUP
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_group = column < GROUP
    inside = (row < pixels)[:, None] & in_group[None, :]
    start = tl.cast(sample, tl.int64) * pixels * channels + first * channel_stride
    offset = row[:, None] * pixel_stride + column[None, :] * channel_stride
    column += first

    # Load x and the gradient, and norm x again.
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    dz = tl.load(dy_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    statistics_ptr += tl.program_id(0)
    mean, rest = tl.load(statistics_ptr), tl.load(statistics_ptr + tl.num_programs(0))
    rstd = tl.load(statistics_ptr + 2 * tl.num_programs(0))
    weight = tl.where(in_group, 1.0, 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)
    x -= mean
    if add_ptr is not None:
        x += tl.load(add_ptr + sample * add_stride + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        x += tl.load(shift_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    x = tl.where(inside, (x - rest) * rstd, 0.0)

    # Back through SiLU: from the gradient dy to dz. Padding has a dy of 0.
    if SILU:
        z = x * weight[None, :]
        if bias_ptr is not None:
            z += tl.load(bias_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))

    # Sums for the gradients of bias and weight.
    sum_dz, sum_dz_x = tl.sum(dz, axis=0), tl.sum(dz * x, axis=0)
    here = sample * channels + column
    tl.store(sums_ptr + here, sum_dz, mask=in_group)
    tl.store(sums_ptr + tl.num_programs(0) * GROUP + here, sum_dz_x, mask=in_group)

    # Gradient of x: w dz without its projections on 1 and on the normed x, which the norm takes off.
    mean_dz = tl.sum(weight * sum_dz) / (pixels * GROUP)
    mean_dz_x = tl.sum(weight * sum_dz_x) / (pixels * GROUP)
    # What was normed may be a result too, with a gradient of its own, which is added.
    dx = rstd * (dz * weight[None, :] - mean_dz - x * mean_dz_x)
    if dtotal_ptr is not None:
        dx += tl.load(dtotal_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + start + offset, dx, mask=inside)

    # Gradient of add and shift: the sum of dx over the pixels, from the sums that are there.
    if add_ptr is not None or shift_ptr is not None:
        dadd = rstd * (weight * sum_dz - pixels * mean_dz - tl.sum(x, axis=0) * mean_dz_x)
        tl.store(dadd_ptr + here, dadd, mask=in_group)


@triton.jit
def group_norm_sums_kernel(
    x_ptr,
    dy_ptr,
    shift_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    parts_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    add_stride,
    parts_stride,
    statistics_stride,
    chunk,
    chunks,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x and dy [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups].

    parts [3, B, chunks, C], ``parts_stride`` apart: sums over each chunk of dz, of dz times the normed x and, if there
    is add or shift, of the normed x. A program: ``chunk`` pixels of COLUMNS channels, ROWS at a time.
    """
    # Which chunk of pixels, and which channels of which sample.
    blocks, groups = (channels + COLUMNS - 1) // COLUMNS, channels // GROUP
    first, begin = tl.program_id(0) % blocks * COLUMNS, tl.program_id(0) // blocks % chunks * chunk
    sample = tl.program_id(0) // blocks // chunks
    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels

    # Load the statistics of each channel's group, and what else is the same for all pixels.
    statistics_ptr += sample * groups + column // GROUP
    mean = tl.load(statistics_ptr, mask=in_channels, other=0.0)
    before = -tl.load(statistics_ptr + statistics_stride, mask=in_channels, other=0.0)
    rstd = tl.load(statistics_ptr + 2 * statistics_stride, mask=in_channels, other=0.0)
    weight = tl.full([COLUMNS], 1.0, tl.float32)
    bias = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        before += tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        before += tl.load(shift_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)

    # Each element of the tile keeps sums of its own; they are added up once, behind the loop.
    sum_dz = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    sum_dz_x = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    sum_x = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + (column - first)[None, :] * channel_stride
    for pixel in range(begin, min(begin + chunk, pixels), ROWS):
        # Load x and the gradient, and norm x again.
        inside = (row < pixels - pixel)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, (x - mean[None, :] + before[None, :]) * rstd[None, :], 0.0)

        # Back through SiLU.
        if SILU:
            z = x * weight[None, :] + bias[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))
            dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))

        # Sum.
        sum_dz += dz
        sum_dz_x += dz * x
        if add_ptr is not None or shift_ptr is not None:
            sum_x += x
        start += ROWS * pixel_stride

    # Store the sums of this chunk.
    parts_ptr += tl.program_id(0) // blocks * channels + column
    tl.store(parts_ptr, tl.sum(sum_dz, axis=0), mask=in_channels)
    tl.store(parts_ptr + parts_stride, tl.sum(sum_dz_x, axis=0), mask=in_channels)
    if add_ptr is not None or shift_ptr is not None:
        tl.store(parts_ptr + 2 * parts_stride, tl.sum(sum_x, axis=0), mask=in_channels)


@triton.jit
def group_norm_combine_kernel(
    parts_ptr,
    weight_ptr,
    statistics_ptr,
    sums_ptr,
    means_ptr,
    dadd_ptr,
    pixels,
    channels,
    parts_stride,
    chunks,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """parts [3, B, chunks, C] -> sums [2, B, C] over all chunks, means [2, B, groups] of w dz and w dz x, dadd [B, C].

    A program: one group of one sample, ROWS chunks at a time.
    """
    # Which group of which sample.
    groups = channels // GROUP
    sample = tl.program_id(0) // groups
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_group = column < GROUP
    column += tl.program_id(0) % groups * GROUP

    # Sum over the chunks.
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

    # Store the channels' sums, for the gradients of bias and weight.
    total_dz, total_dz_x = tl.sum(sum_dz, axis=0), tl.sum(sum_dz_x, axis=0)
    here = sample * channels + column
    tl.store(sums_ptr + here, total_dz, mask=in_group)
    tl.store(sums_ptr + tl.num_programs(0) * GROUP + here, total_dz_x, mask=in_group)

    # Store the group's means of w dz and of w dz x, the projections that dx is without.
    weight = tl.full([COLUMNS], 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)
    mean_dz = tl.sum(weight * total_dz) / (pixels * GROUP)
    mean_dz_x = tl.sum(weight * total_dz_x) / (pixels * GROUP)
    tl.store(means_ptr + tl.program_id(0), mean_dz)
    tl.store(means_ptr + tl.num_programs(0) + tl.program_id(0), mean_dz_x)

    # Gradient of add and shift: the sum of dx over the pixels.
    if ADD:
        rstd = tl.load(statistics_ptr + 2 * tl.num_programs(0) + tl.program_id(0))
        dadd = rstd * (weight * total_dz - pixels * mean_dz - tl.sum(sum_x, axis=0) * mean_dz_x)
        tl.store(dadd_ptr + here, dadd, mask=in_group)


@triton.jit
def group_norm_backward_apply_kernel(
    x_ptr,
    dy_ptr,
    dtotal_ptr,
    shift_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    means_ptr,
    dx_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    add_stride,
    statistics_stride,
    chunk,
    chunks,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x, dy, dtotal and dx [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups].

    means [2, B, groups]: of w dz and of w dz x. A program: ``chunk`` pixels of COLUMNS channels, ROWS at a time.
    """
    # Which chunk of pixels, and which channels of which sample: in reverse, for the end of x is still in the cache.
    blocks, groups = (channels + COLUMNS - 1) // COLUMNS, channels // GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first, begin = program % blocks * COLUMNS, program // blocks % chunks * chunk
    sample = program // blocks // chunks
    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels

    # Load the statistics of each channel's group, and what else is the same for all pixels.
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
    if shift_ptr is not None:
        before += tl.load(shift_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)

    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + (column - first)[None, :] * channel_stride
    for pixel in range(begin, min(begin + chunk, pixels), ROWS):
        # Load x and the gradient, and norm x again.
        inside = (row < pixels - pixel)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        x = (x - mean[None, :] + before[None, :]) * rstd[None, :]

        # Back through SiLU.
        if SILU:
            z = x * weight[None, :] + bias[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))
            dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))

        # Gradient of x: w dz without its projections on 1 and on the normed x. As above, x may have one of its own.
        dx = rstd[None, :] * (dz * weight[None, :] - mean_dz[None, :] - x * mean_dz_x[None, :])
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + start + offset, dx, mask=inside)
        start += ROWS * pixel_stride

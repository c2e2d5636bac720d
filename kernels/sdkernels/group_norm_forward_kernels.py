"""The forward kernels of GroupNorm; ``group_norm.py`` launches them.

P pixels and C channels; x [B, P, C] by strides is channels-last where ``channel_stride`` is 1 and contiguous where
``pixel_stride`` is 1. Statistics are a mean and a sum of squared deviations from it (M2) in float32, merged as by Chan,
Golub and LeVeque (1979). The kernels call few functions, for a call takes milliseconds in Triton's interpreter. exp(y)
is exp2(y log2(e)), which takes fewer instructions.

shift [C] and add [B or 1, C] are added to x before the norm. Where ``total_ptr`` is given, the kernel that sees x first
adds up more, and stores the sum there: x + residual + shift in the first ``split`` channels, skip in the others, and
later in all of them, which is not normed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_sum(
    x_ptr,
    residual_ptr,
    shift_ptr,
    skip_ptr,
    later_ptr,
    sample,
    pixel,
    column,
    inside,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    split,
):
    """[pixels, columns] of x + residual + shift, then skip, plus later, in float32 and 0 outside; later [columns]."""
    # x and residual [B, P, split], shift [split].
    first = inside & (column < split)[None, :]
    start = tl.cast(sample, tl.int64) * pixels * split
    stride = tl.where(channel_stride == 1, split, pixel_stride)
    place = pixel[:, None] * stride + column[None, :] * channel_stride
    total = tl.load(x_ptr + start + place, mask=first, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + start + place, mask=first, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        total += tl.load(shift_ptr + column, mask=column < split, other=0.0).to(tl.float32)[None, :]
        total = tl.where(first, total, 0.0)

    # skip [B, P, channels - split].
    if skip_ptr is not None:
        width, column_there = channels - split, column - split
        start = tl.cast(sample, tl.int64) * pixels * width
        stride = tl.where(channel_stride == 1, width, pixel_stride)
        place = pixel[:, None] * stride + column_there[None, :] * channel_stride
        total += tl.load(skip_ptr + start + place, mask=inside & (column >= split)[None, :], other=0.0).to(tl.float32)

    # later [C]: part of the sum that is stored, and taken off again before the norm.
    later = tl.zeros_like(column).to(tl.float32)
    if later_ptr is not None:
        later = tl.load(later_ptr + column, mask=column < channels, other=0.0).to(tl.float32)
        total = tl.where(inside, total + later[None, :], 0.0)
    return total, later


@triton.jit
def group_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    shift_ptr,
    skip_ptr,
    later_ptr,
    total_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    statistics_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    add_stride,
    split,
    eps,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x, y and total [B, P, C] by strides; add [B or 1, C]; weight and bias [C]; statistics [3, B, groups].

    The statistics are a mean, what rounding left of it, and 1 / deviation. A program: one group of one sample.
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

    # Load x, or add it up and store the sum. It stays on chip until its norm is stored.
    if total_ptr is None:
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        x, later = load_sum(
            x_ptr, residual_ptr, shift_ptr, skip_ptr, later_ptr,
            sample, row, column, inside, pixels, channels, pixel_stride, channel_stride, split,
        )  # fmt: skip
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + start + offset, total, mask=inside)
        x = tl.where(inside, total.to(tl.float32) - later[None, :], 0.0)

    # Mean of x + add + shift. It comes off x before they go on, so that a large mean costs no digits of any.
    mean = tl.sum(x) / (pixels * GROUP)
    added = tl.full([COLUMNS], 0.0, tl.float32)
    moved = tl.full([COLUMNS], 0.0, tl.float32)
    if add_ptr is not None:
        added = tl.load(add_ptr + sample * add_stride + column, mask=in_group, other=0.0).to(tl.float32)
    if shift_ptr is not None and total_ptr is None:
        moved = tl.load(shift_ptr + column, mask=in_group, other=0.0).to(tl.float32)
    mean += tl.sum(added + moved) / GROUP
    x -= mean
    if add_ptr is not None:
        x += added[None, :]
    if shift_ptr is not None and total_ptr is None:
        x += moved[None, :]
    y = tl.where(inside, x, 0.0)

    # Variance. The mean was rounded to float32; the rest that this left in x has a mean of its own, taken off as well.
    rest = tl.sum(y) / (pixels * GROUP)
    rstd = 1.0 / tl.sqrt(tl.sum(y * y) / (pixels * GROUP) - rest * rest + eps)

    # Norm, weight and bias, SiLU.
    y = (y - rest) * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_group, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1.0 + tl.exp2(y * -1.4426950408889634))

    # Store the norm, and the statistics for the backward pass.
    tl.store(y_ptr + start + offset, y, mask=inside)
    statistics_ptr += tl.program_id(0)
    tl.store(statistics_ptr, mean)
    tl.store(statistics_ptr + tl.num_programs(0), rest)
    tl.store(statistics_ptr + 2 * tl.num_programs(0), rstd)


@triton.jit
def group_norm_statistics_kernel(
    x_ptr,
    residual_ptr,
    shift_ptr,
    skip_ptr,
    later_ptr,
    total_ptr,
    add_ptr,
    parts_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    add_stride,
    split,
    parts_stride,
    chunk,
    chunks,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x and total [B, P, C] by strides; add [B or 1, C]; parts [3, B, chunks, groups], ``parts_stride`` apart.

    The parts are a mean, what rounding left of it, and M2. A program: ``chunk`` pixels of GROUPS whole groups, ROWS at
    a time. Each element of the tile keeps its own mean and M2 over the steps (Welford), of differences to the channel's
    value at the first pixel, so that a large mean costs no digits; these are merged into channels, then into groups.
    """
    # Which chunk of pixels, and which groups of which sample.
    tiles = channels // (GROUPS * GROUP)
    first = tl.program_id(0) % tiles * (GROUPS * GROUP)
    begin = tl.program_id(0) // tiles % chunks * chunk
    sample = tl.program_id(0) // tiles // chunks
    count = min(chunk, pixels - begin)

    # Offsets within a tile are int32, its start is int64.
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_tile = column < GROUPS * GROUP
    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + column[None, :] * channel_stride

    # The channel's value at the first pixel: all below are differences to it.
    if total_ptr is None:
        pivot = tl.load(x_ptr + start + column * channel_stride, mask=in_tile, other=0.0).to(tl.float32)
    else:
        edge, later = load_sum(
            x_ptr, residual_ptr, shift_ptr, skip_ptr, later_ptr,
            sample, begin + tl.arange(0, 1), first + column, in_tile[None, :],
            pixels, channels, pixel_stride, channel_stride, split,
        )  # fmt: skip
        pivot = tl.sum(edge, axis=0).to(total_ptr.dtype.element_ty).to(tl.float32) - later
    mean = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    m2 = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    steps = 0.0

    # Welford's update, each element of the tile for itself. In a last step that is not whole delta is 0 for the rows
    # beyond the end, so these keep their mean and M2.
    for done in range(0, count, ROWS):
        inside = (row < count - done)[:, None] & in_tile[None, :]
        if total_ptr is None:
            x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        else:
            x, later = load_sum(
                x_ptr, residual_ptr, shift_ptr, skip_ptr, later_ptr,
                sample, begin + done + row, first + column, inside,
                pixels, channels, pixel_stride, channel_stride, split,
            )  # fmt: skip
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + start + offset, total, mask=inside)
            x = total.to(tl.float32) - later[None, :]
        x -= pivot[None, :]
        steps += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / steps)
        m2 += delta * (x - mean)
        start += ROWS * pixel_stride

    # Merge the rows into channels (Chan et al.), each by the number of pixels that it saw.
    seen = ((tl.maximum(count - row, 0) + ROWS - 1) // ROWS).to(tl.float32)[:, None]  # pixels of each row
    channel_mean = tl.sum(mean * seen, axis=0) / count
    delta = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + seen * delta * delta, axis=0)

    # add and shift move a channel's mean and nothing else.
    if add_ptr is not None:
        channel_mean += tl.load(add_ptr + sample * add_stride + first + column, mask=in_tile, other=0.0).to(tl.float32)
    if shift_ptr is not None and total_ptr is None:
        channel_mean += tl.load(shift_ptr + first + column, mask=in_tile, other=0.0).to(tl.float32)

    # Merge the channels into groups. The sum over the members of a group is one over all channels of the tile, masked:
    # a reshape would need a power of two.
    group = tl.arange(0, GROUPS)
    member = group[:, None] == (column // GROUP)[None, :]
    group_mean = tl.sum(tl.where(member, (pivot + channel_mean)[None, :], 0.0), axis=1) / GROUP
    delta = tl.where(member, pivot[None, :] - group_mean[:, None] + channel_mean[None, :], 0.0)
    rest = tl.sum(delta, axis=1) / GROUP
    group_m2 = tl.sum(tl.where(member, channel_m2[None, :], 0.0) + count * delta * delta, axis=1)

    # Store the parts of this chunk.
    here = tl.program_id(0) // tiles * (channels // GROUP) + first // GROUP + group
    tl.store(parts_ptr + here, group_mean)
    tl.store(parts_ptr + parts_stride + here, rest)
    tl.store(parts_ptr + 2 * parts_stride + here, group_m2)


@triton.jit
def group_norm_apply_kernel(
    x_ptr,
    shift_ptr,
    later_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    y_ptr,
    statistics_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    add_stride,
    eps,
    parts_stride,
    part_chunk,
    part_chunks,
    statistics_stride,
    chunk,
    chunks,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """As group_norm_forward_kernel, from parts [3, B, part_chunks, groups] of ``part_chunk`` pixels each; x is the sum.

    A program: ``chunk`` pixels of COLUMNS channels, which lie in up to GROUPS groups; CHUNKS is at least part_chunks.
    """
    # Which chunk of pixels, and which channels of which sample: in reverse, for the end of x is still in the cache.
    blocks, groups = (channels + COLUMNS - 1) // COLUMNS, channels // GROUP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first, begin = program % blocks * COLUMNS, program // blocks % chunks * chunk
    sample = program // blocks // chunks

    # Load the parts of all chunks [CHUNKS, GROUPS], of the groups in which these channels lie.
    group, part = first // GROUP + tl.arange(0, GROUPS), tl.arange(0, CHUNKS)
    there = (part < part_chunks)[:, None] & (group < groups)[None, :]
    reference_ptr = parts_ptr + sample * part_chunks * groups
    parts_ptr = reference_ptr + part[:, None] * groups + group[None, :]
    means = tl.load(parts_ptr, mask=there, other=0.0)
    rests = tl.load(parts_ptr + parts_stride, mask=there, other=0.0)
    m2s = tl.load(parts_ptr + 2 * parts_stride, mask=there, other=0.0)

    # Merge the chunks (Chan et al.). Means are taken relative to that of the first chunk, and the difference between it
    # and the mean of all is kept apart as the rest: their sum in float32 would be rounded.
    mean = tl.load(reference_ptr + group, mask=group < groups, other=0.0)  # of the first chunk
    size = tl.minimum(tl.maximum(pixels - part * part_chunk, 0), part_chunk).to(tl.float32)[:, None]
    delta = means - mean[None, :] + rests
    rest = tl.sum(size * delta, axis=0) / pixels
    delta -= rest[None, :]
    rstd = 1.0 / tl.sqrt(tl.sum(m2s / GROUP + size * delta * delta, axis=0) / pixels + eps)

    # Store the statistics, of each group once: by the program of the first chunk that has the group's first channel.
    mine = (begin == 0) & (group < groups) & (group * GROUP >= first) & (group * GROUP < first + COLUMNS)
    statistics_ptr += sample * groups + group
    tl.store(statistics_ptr, mean, mask=mine)
    tl.store(statistics_ptr + statistics_stride, rest, mask=mine)
    tl.store(statistics_ptr + 2 * statistics_stride, rstd, mask=mine)

    # From groups to channels, again as masked sums: what is taken off x, what it is multiplied by, and what is added.
    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    in_channels = column < channels
    member = group[:, None] == (column // GROUP)[None, :]
    centre = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)
    before = -tl.sum(tl.where(member, rest[:, None], 0.0), axis=0)
    scale = tl.sum(tl.where(member, rstd[:, None], 0.0), axis=0)
    shift = tl.full([COLUMNS], 0.0, tl.float32)
    if later_ptr is not None:
        before -= tl.load(later_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        before += tl.load(shift_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if add_ptr is not None:
        before += tl.load(add_ptr + sample * add_stride + column, mask=in_channels, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)

    # Norm, SiLU and store, ROWS pixels at a time.
    start = tl.cast(sample, tl.int64) * pixels * channels
    start += tl.cast(begin, tl.int64) * pixel_stride + tl.cast(first, tl.int64) * channel_stride
    offset = row[:, None] * pixel_stride + (column - first)[None, :] * channel_stride
    for pixel in range(begin, min(begin + chunk, pixels), ROWS):
        inside = (row < pixels - pixel)[:, None] & in_channels[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
        y = (x - centre[None, :] + before[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp2(y * -1.4426950408889634))
        tl.store(y_ptr + start + offset, y, mask=inside)
        start += ROWS * pixel_stride

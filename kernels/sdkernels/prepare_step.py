"""What a network is called with at one step of a sampling plan, in one launch: its input, and the step's time row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import opaque, use_kernel

BLOCK = 1024


@triton.jit(do_not_specialize=["step"])
def prepare_step_forward_kernel(
    latents_ptr,
    extra_ptr,
    owners_ptr,
    scale_ptr,
    times_ptr,
    step_ptr,
    step,
    x_ptr,
    time_ptr,
    pixels,
    width,
    steps,
    channels,
    extras,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """latents [B, channels, pixels], extra [B, extras, pixels] or None, owners [N] int64, scale [steps], times
    [steps, width] -> x [N, channels + extras, pixels], [N, pixels, channels + extras] where LAST, and time [width].

    The row is ``step``, or the one that ``step_ptr`` points to. A program: BLOCK elements of one row of x, or of time
    where its first number is that of no block of x. A step outside the tables gives NaN.
    """
    # The step; a negative one counts from the end.
    if step_ptr is not None:
        step = tl.load(step_ptr)
    step = tl.where(step < 0, step + steps, step).to(tl.int64)
    known = (step >= 0) & (step < steps)

    # Which elements of x.
    all_channels = channels + extras
    size = all_channels * pixels
    blocks = tl.cdiv(size, BLOCK)
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = (place < size) & (block < blocks)
    if LAST:
        channel, pixel = place % all_channels, place // all_channels
    else:
        channel, pixel = place // pixels, place % pixels

    # Latents, scaled, and the channels beside them. Store.
    owner = tl.load(owners_ptr + row)
    is_latent = channel < channels
    scale = tl.load(scale_ptr + step, mask=known, other=float("nan")).to(tl.float32)
    source = latents_ptr + (owner * channels + channel) * pixels + pixel
    value = tl.load(source, mask=inside & is_latent, other=0.0).to(tl.float32) * scale
    if extra_ptr is not None:
        source = extra_ptr + (owner * extras + channel - channels) * pixels + pixel
        beside = tl.load(source, mask=inside & ~is_latent, other=0.0).to(tl.float32)
        value = tl.where(is_latent, value, beside)
    tl.store(x_ptr + row * size + place, value, mask=inside)

    # The time row, by the programs behind those of the first row of x.
    place = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (place >= 0) & (place < width) & (row == 0)
    time = tl.load(times_ptr + step * width + place, mask=inside & known, other=float("nan"))
    tl.store(time_ptr + place, time, mask=inside)


def _fake(
    latents: Tensor,
    extra: Tensor | None,
    owners: Tensor,
    input_scale: Tensor,
    times: Tensor,
    step: Tensor | None,
    step_number: int,
    x: Tensor | None,
    time: Tensor | None,
) -> tuple[Tensor, Tensor]:
    channels = latents.shape[1] + (0 if extra is None else extra.shape[1])
    return times.new_empty(len(owners), channels, *latents.shape[2:]), times.new_empty(1, times.shape[1])


@opaque(_fake)
def prepare_step_forward(
    latents: Tensor,
    extra: Tensor | None,
    owners: Tensor,
    input_scale: Tensor,
    times: Tensor,
    step: Tensor | None,
    step_number: int,
    x: Tensor | None,
    time: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Contiguous tensors; ``step`` where it lies on the device, else its number. Returns x, contiguous unless the one
    that is given is channels-last, and the time row."""
    if x is None or time is None:
        x, time = _fake(latents, extra, owners, input_scale, times, step, step_number, None, None)
    channels, width = latents.shape[1], times.shape[1]
    blocks = triton.cdiv(x[0].numel(), BLOCK) + triton.cdiv(width, BLOCK)

    prepare_step_forward_kernel[(blocks, len(owners))](
        latents,
        extra,
        owners,
        input_scale,
        times,
        step,
        step_number,
        x,
        time,
        latents[0, 0].numel(),
        width,
        len(times),
        channels,
        x.shape[1] - channels,
        LAST=not x.is_contiguous(),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return x, time


def prepare_step(
    latents: Tensor,
    extra: Tensor | None,
    owners: Tensor,
    input_scale: Tensor,
    times: Tensor,
    step: int | Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What a network is called with at one step of a plan, in one launch: its input, and the row of what depends on
    time alone.

    latents [B, C, ...] float32 or float64; extra [B, E, ...] or None, channels that the network sees beside them;
    owners [N] int64: the sample that each row of the input is made of, 0 to B - 1, which nothing checks; input_scale
    [K]; times [K, W] in the network's dtype; ``step`` an int or a 0-d integer tensor, on the device if a CUDA graph is
    to advance it. Returns (input_scale[step] latents and extra, by rows, [N, C + E, ...]; times[step] [1, W]) in the
    network's dtype, written into ``out`` if that is given, whose input may be channels-last. The kernel computes in
    float32 and has no gradient. On a GPU a step outside the tables gives NaN.
    """
    tensors = [t for t in (latents, extra, times) if t is not None]
    why_not = None
    if extra is not None and (len(extra), *extra.shape[2:]) != (len(latents), *latents.shape[2:]):
        why_not = f"latents {tuple(latents.shape)} and extra {tuple(extra.shape)} do not fit together"
    elif any(t.requires_grad for t in tensors):
        why_not = "its kernel has no gradient"
    elif any(t.device != latents.device for t in (owners, input_scale)) or owners.dtype != torch.int64:
        why_not = f"owners, int64, and input_scale must lie on {latents.device}, as the latents do"
    elif out is not None and (not _is_dense(out[0]) or not out[1].is_contiguous() or out[0].dtype != times.dtype):
        why_not = f"out must be dense, and of the dtype {times.dtype} of times"

    if not use_kernel("prepare_step", why_not, *tensors):
        return reference.prepare_step(latents, extra, owners, input_scale, times, step, out)

    # A step on the device stays there: reading it would wait for the GPU.
    on_device = isinstance(step, Tensor) and step.device == latents.device
    x, time = (None, None) if out is None or torch.compiler.is_compiling() else out
    results = prepare_step_forward(
        latents.contiguous(),
        None if extra is None else extra.contiguous(),
        owners.contiguous(),
        input_scale.contiguous(),
        times.contiguous(),
        step if isinstance(step, Tensor) and on_device else None,
        0 if on_device else int(step),
        x,
        time,
    )
    return results if out is None or x is not None else (out[0].copy_(results[0]), out[1].copy_(results[1]))


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))

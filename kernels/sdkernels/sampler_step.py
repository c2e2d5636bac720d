"""One step of any sampler in one launch: guidance, then one row of a sampling plan applied to its registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import opaque, use_kernel

BLOCK = 1024
MOST_REGISTERS = 16


@triton.jit(do_not_specialize=["step"])
def sampler_step_forward_kernel(
    registers_ptr,
    uncond_ptr,
    cond_ptr,
    noise_ptr,
    coefficients_ptr,
    step_ptr,
    step,
    next_ptr,
    guidance_ptr,
    guidance,
    size,
    steps,
    channels,
    pixels,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """registers and next [R, size], which may be one; uncond, cond and noise [size] or None; coefficients
    [steps, R, R + 2]; guidance a number, or a table [steps].

    The row is ``step``, or the one that ``step_ptr`` points to, which a CUDA graph can advance. A program: BLOCK
    elements of all registers. LAST: these are of one sample, and in memory uncond and cond are [samples, pixels,
    channels] where the others are [samples, channels, pixels]. A step outside the table gives NaN.
    """
    # The step; a negative one counts from the end.
    if step_ptr is not None:
        step = tl.load(step_ptr)
    step = tl.where(step < 0, step + steps, step).to(tl.int64)
    known = (step >= 0) & (step < steps)

    # Load all registers, R padded to a power of two. The predictions have their elements ``there``.
    if LAST:
        own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        sample = tl.program_id(1).to(tl.int64) * (channels * pixels)
        inside = own < channels * pixels
        place = sample + own
        there = sample + own % pixels * channels + own // pixels
    else:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        there = place
    j = tl.arange(0, R_BLOCK)
    old = tl.load(
        registers_ptr + j[:, None].to(tl.int64) * size + place[None, :],
        mask=(j < R)[:, None] & inside[None, :],
        other=0.0,
    )

    # Guidance.
    if uncond_ptr is None:
        prediction = tl.load(cond_ptr + there, mask=inside, other=0.0).to(tl.float32)
    elif cond_ptr is None:
        prediction = tl.load(uncond_ptr + there, mask=inside, other=0.0).to(tl.float32)
    else:
        uncond = tl.load(uncond_ptr + there, mask=inside, other=0.0).to(tl.float32)
        cond = tl.load(cond_ptr + there, mask=inside, other=0.0).to(tl.float32)
        if guidance_ptr is not None:
            guidance = tl.load(guidance_ptr + step, mask=known, other=0.0).to(tl.float32)
        prediction = uncond + guidance * (cond - uncond)

    # Noise.
    noise = tl.zeros([BLOCK], tl.float32)
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + place, mask=inside, other=0.0).to(tl.float32)

    # Each new register is a row of the step's matrix times the old ones, the prediction and the noise. Store.
    table = coefficients_ptr + step * (R * (R + 2))
    for i in tl.static_range(R):
        row = table + i * (R + 2)
        weights = tl.load(row + j, mask=known & (j < R), other=0.0).to(tl.float32)
        of_prediction = tl.load(row + R, mask=known, other=float("nan")).to(tl.float32)
        new = tl.sum(weights[:, None] * old, axis=0) + of_prediction * prediction
        if noise_ptr is not None:
            new += tl.load(row + R + 1, mask=known, other=0.0).to(tl.float32) * noise
        tl.store(next_ptr + tl.full([BLOCK], i, tl.int64) * size + place, new, mask=inside)


def _fake(
    registers: Tensor,
    uncond: Tensor | None,
    cond: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None,
    step_number: int,
    guidance: Tensor | None,
    guidance_number: float,
    out: Tensor | None,
) -> Tensor:
    return torch.empty_like(registers)


@opaque(_fake)
def sampler_step_forward(
    registers: Tensor,
    uncond: Tensor | None,
    cond: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    step: Tensor | None,
    step_number: int,
    guidance: Tensor | None,
    guidance_number: float,
    out: Tensor | None,
) -> Tensor:
    """Contiguous tensors, but for predictions that may both be channels-last; ``step`` and ``guidance`` where they lie
    on the device, else their numbers. Returns the next registers, in ``out`` if there is one."""
    result = torch.empty_like(registers) if out is None else out
    count, size = len(registers), registers[0].numel()
    prediction = cond if uncond is None else uncond
    last = prediction is not None and not prediction.is_contiguous()
    samples = registers.shape[1] if last else 1

    sampler_step_forward_kernel[(triton.cdiv(size // samples, BLOCK), samples)](
        registers,
        uncond,
        cond,
        noise,
        coefficients,
        step,
        step_number,
        result,
        guidance,
        guidance_number,
        size,
        len(coefficients),
        registers.shape[2] if last else 1,
        registers[0, 0, 0].numel() if last else 1,
        R=count,
        R_BLOCK=triton.next_power_of_2(count),
        LAST=last,
        BLOCK=BLOCK,
        num_warps=4,
    )

    return result


def sampler_step(
    registers: Tensor,
    uncond: Tensor | None,
    cond: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    step: int | Tensor,
    guidance_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """One row of a sampling plan: guidance, then the linear update of every register, in one launch.

    registers [R, B, ...] float32 or float64, register 0 the latent; uncond, cond and noise [B, ...]; coefficients
    [K, R, R + 2]; ``step`` an int or a 0-d integer tensor, on the device if a CUDA graph is to advance it. The
    prediction is uncond + guidance_scale (cond - uncond), or the one that is given where the other is None; the scale
    is a number, or row ``step`` of a table [K]. noise None counts as zero. Returns the next registers, written into
    ``out`` if that is given: registers like the old ones, or the old ones themselves. The kernel takes float32
    registers, up to 16 of them, and has no gradient. Raises ValueError without a prediction. On a GPU a step outside
    the table gives NaN.
    """
    tensors = [t for t in (uncond, cond, noise) if t is not None]
    tables = [t for t in (coefficients, guidance_scale) if isinstance(t, Tensor)]
    why_not = None
    if registers.dtype != torch.float32 or len(registers) > MOST_REGISTERS:
        why_not = f"its kernel takes up to {MOST_REGISTERS} float32 registers"
        why_not += f", found {len(registers)} of {registers.dtype}"
    elif any(t.shape != registers.shape[1:] for t in tensors):
        why_not = f"predictions and noise must have the shape {tuple(registers.shape[1:])} of a register"
    elif any(t.requires_grad for t in (registers, *tensors)):
        why_not = "its kernel has no gradient"
    elif any(t.device != registers.device for t in tables):
        why_not = f"the tables must lie on {registers.device}, as the registers do"
    elif out is not None and (out.shape != registers.shape or out.dtype != registers.dtype or not out.is_contiguous()):
        why_not = "out must be contiguous, and of the registers' shape and dtype"

    nothing = uncond is None and cond is None
    if nothing or not use_kernel("sampler_step", why_not, registers, *tensors):
        return reference.sampler_step(registers, uncond, cond, noise, coefficients, step, guidance_scale, out)

    # What lies on the device stays there: reading it would wait for the GPU.
    on_device = isinstance(step, Tensor) and step.device == registers.device
    table = guidance_scale.contiguous() if isinstance(guidance_scale, Tensor) else None
    result = sampler_step_forward(
        registers.contiguous(),
        *_in_one_layout(uncond, cond),
        None if noise is None else noise.contiguous(),
        coefficients.contiguous(),
        step if isinstance(step, Tensor) and on_device else None,
        0 if on_device else int(step),
        table,
        1.0 if isinstance(guidance_scale, Tensor) else guidance_scale,
        None if torch.compiler.is_compiling() else out,  # an operator returns new tensors alone
    )
    return result if out is None or result is out else out.copy_(result)


def _in_one_layout(uncond: Tensor | None, cond: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The predictions as they are where they are dense and alike, channels-last too; else contiguous."""
    given = [t for t in (uncond, cond) if t is not None]
    if all(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in given):
        return uncond, cond
    return None if uncond is None else uncond.contiguous(), None if cond is None else cond.contiguous()

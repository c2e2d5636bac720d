"""Forward diffusion: the noisy sample and the training target in one pass over both inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import opaque, use_kernel

BLOCK = 1024


@triton.jit
def add_noise_forward_kernel(
    x_ptr,
    noise_ptr,
    t_ptr,
    table_ptr,
    x_t_ptr,
    velocity_ptr,
    size,
    length,
    BLOCK: tl.constexpr,
):
    """x, noise, x_t and velocity [B, size]; t [B] integers; table [length]. A program: BLOCK elements of one sample.

    A timestep outside the table gives NaN: it must not become a picture.
    """
    # Which elements of which sample.
    blocks = tl.cdiv(size, BLOCK)
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)

    # The sample's timestep; a negative one counts from the end.
    t = tl.load(t_ptr + sample)
    t = tl.where(t < 0, t + length, t)

    # Its amplitudes, rooted in the table's precision.
    acp = tl.load(table_ptr + t, mask=(t >= 0) & (t < length), other=float("nan"))
    signal, sigma = tl.sqrt(acp).to(tl.float32), tl.sqrt(1 - acp).to(tl.float32)

    # Load the sample and the noise.
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    offset = sample * size + place
    x = tl.load(x_ptr + offset, mask=inside).to(tl.float32)
    noise = tl.load(noise_ptr + offset, mask=inside).to(tl.float32)

    # Store the noisy sample, and the target where it is neither of the inputs.
    tl.store(x_t_ptr + offset, signal * x + sigma * noise, mask=inside)
    if velocity_ptr is not None:
        tl.store(velocity_ptr + offset, signal * noise - sigma * x, mask=inside)


def _fake(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, with_velocity: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0), torch.empty_like(x0) if with_velocity else x0.new_empty(0)


@opaque(_fake)
def add_noise_forward(
    x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, with_velocity: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous x0 and noise [B, ...], t [B], table [T] -> x_t and, if asked for, v (else empty)."""
    x_t, velocity = _fake(x0, noise, t, alphas_cumprod, with_velocity)
    size = x0.numel() // len(x0)

    add_noise_forward_kernel[(len(x0) * triton.cdiv(size, BLOCK),)](
        x0,
        noise,
        t,
        alphas_cumprod,
        x_t,
        velocity if with_velocity else None,
        size,
        len(alphas_cumprod),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return x_t, velocity


def add_noise(
    x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Diffuse each sample to its timestep: (x_t, training target), both like x0.

    x0 and noise [B, ...]; t [B] integers that index alphas_cumprod [T], float32 or float64 on x0's device. x_t =
    sqrt(acp[t]) x0 + sqrt(1 - acp[t]) noise; the target is the noise ("epsilon"), sqrt(acp[t]) noise - sqrt(1 - acp[t])
    x0 ("v_prediction", arXiv 2202.00512) or x0 ("sample"). The kernel takes float32, float16 and bfloat16 and computes
    in float32; it has no gradient. Raises ValueError for another ``prediction_type``. On a GPU a timestep outside the
    table gives NaN.
    """
    why_not = None
    if noise.shape != x0.shape or t.shape != x0.shape[:1]:
        why_not = f"x0 {tuple(x0.shape)}, noise {tuple(noise.shape)} and t {tuple(t.shape)} do not fit together"
    elif x0.requires_grad or noise.requires_grad:
        why_not = "its kernel has no gradient"
    elif alphas_cumprod.device != x0.device or alphas_cumprod.dtype not in (torch.float32, torch.float64):
        why_not = "alphas_cumprod must be float32 or float64 and lie on x0's device"

    known = prediction_type in ("epsilon", "v_prediction", "sample")
    if not known or not use_kernel("add_noise", why_not, x0, noise, t):
        return reference.add_noise(x0, noise, t, alphas_cumprod, prediction_type)

    with_velocity = prediction_type == "v_prediction"
    x_t, velocity = add_noise_forward(
        x0.contiguous(), noise.contiguous(), t.contiguous(), alphas_cumprod.contiguous(), with_velocity
    )
    return x_t, velocity if with_velocity else (noise.to(x0.dtype) if prediction_type == "epsilon" else x0)

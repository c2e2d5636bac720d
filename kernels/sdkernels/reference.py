"""Every op in plain PyTorch: the definition that a kernel is compared with.

Shapes: B samples, C channels, H x W pixels; in attention N queries, M keys, H heads of width D.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "add_noise",
    "cross_attention",
    "cross_attention_block",
    "geglu",
    "group_norm",
    "group_norm_of_sum",
    "layer_norm",
    "linear_geglu",
    "lora_linear",
    "prepare_step",
    "sampler_step",
    "self_attention",
]

SMALL_SCORES = 128 * 128
"""Up to this many scores a head, PyTorch's float32 attention beats its bfloat16 one on a CPU."""

FEW_SCORES = 256 * 256
"""Up to this many scores a head, plain products beat both on a CPU where there is a backward, by 1.1 to 4 times."""


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

    x [B, C, ...]; weight, bias and shift [C]; add [B or 1, C], one value per sample and channel. The result has x's
    memory format.
    """
    if activation not in (None, "silu"):
        raise ValueError(f'group_norm: activation must be None or "silu", got {activation!r}')

    pixels = (1,) * (x.dim() - 2)
    if shift is not None:
        x = x + shift.to(x.dtype).reshape(-1, *pixels)
    if add is not None:
        x = x + add.reshape(*add.shape, *pixels)

    y = _normed(x, num_groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


SAFE_RATIO = 10
"""|mean| over deviation up to which E[x^2] - E[x]^2 is as good as bfloat16 can tell. Where float32 has lost the
difference, the ratio that it finds is over 300."""


def _normed(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's GroupNorm, in x's memory format.

    On channels-last input PyTorch's CPU kernel computes the variance as E[x^2] - E[x]^2, which loses digits. So the
    norm is taken of a contiguous copy, but where half precision needs no more digits: the two copies take longer than
    the norm.
    """
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if not channels_last:
        return F.group_norm(x.contiguous(), num_groups, weight, bias, eps)

    half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    if half and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sizes = (x.shape[0], x.shape[1], x.shape[2] * x.shape[3], num_groups)
        y, mean, inverse = torch.native_group_norm(x, weight, bias, *sizes, eps)
        if bool(((mean * inverse).abs() <= SAFE_RATIO).all()):
            return y
    y = F.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    return y.contiguous(memory_format=torch.channels_last)


def group_norm_of_sum(
    x: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str | None = None,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(group_norm(sum), sum + later) of the sum x + residual + shift, with the channels of ``skip`` behind its own.

    x and residual [B, C, ...], skip [B, S, ...]; shift [C]; weight, bias and later [C + S]; each but x may be None.
    """
    total, pixels = x, (1,) * (x.dim() - 2)
    if residual is not None:
        total = total + residual
    if shift is not None:
        total = total + shift.reshape(-1, *pixels)
    if skip is not None:
        total = torch.cat([total, skip], dim=1)

    y = group_norm(total, num_groups, weight, bias, eps, activation)
    return y, total if later is None else total + later.reshape(-1, *pixels)


def self_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v without a mask; q, k, v [B, N, H, D] -> [B, N, H, D]; scale is D ** -0.5 by default."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = q.shape[2] * k.shape[2]
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    graded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)

    if slow and graded and scores <= FEW_SCORES:
        probabilities = ((q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)).softmax(-1)
        out = probabilities @ v
    elif slow and scores <= SMALL_SCORES:
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, probabilities: Literal[False] = False
) -> Tensor: ...
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, probabilities: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, probabilities: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v; q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D].

    With ``probabilities``: (that, the softmax averaged over heads [B, N, M] in float32 at least), through which no
    gradient flows.
    """
    out = self_attention(q, k, v, scale)
    if not probabilities:
        return out

    with torch.no_grad():
        work = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bnhd,bmhd->bhnm", q.to(work), k.to(work))
        return out, (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(dim=-1).mean(dim=1)


def cross_attention_block(
    x: Tensor, to_q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, bias: Tensor | None, scale: float | None = None
) -> Tensor:
    """``cross_attention`` of the queries x to_q^T, by heads, and the projection of its result: (...) to_out^T + bias.

    x [B, N, C], to_q [H D, C], k and v [B, M, H, D], to_out [C, H D], bias [C] -> [B, N, C].
    """
    q = F.linear(x, to_q).unflatten(-1, k.shape[2:])
    return F.linear(cross_attention(q, k, v, scale).flatten(2), to_out, bias)


def geglu(x: Tensor) -> Tensor:
    """``value * gelu(gate)`` with the exact gelu; x [..., 2 D] = (value, gate) -> [..., D] (arXiv 2002.05202)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``geglu`` of x W^T + b = (value, gate); x [..., I], weight [2 D, I], bias [2 D] -> [..., D]."""
    return geglu(F.linear(x, weight, bias))


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    later: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension. With ``residual``: (norm(x + residual), x + residual + later)."""
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total if later is None else total + later


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """``x W^T + bias + scale (x A^T) B^T`` (arXiv 2106.09685).

    x [..., I], weight [O, I], bias [O], a [R, I], b [O, R] -> [..., O]; a and b are rounded to x's dtype.
    """
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def add_noise(
    x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Diffuse each sample to its timestep: (x_t, training target), both like x0.

    x0 and noise [B, ...]; t [B] int64 indexes alphas_cumprod [T]. With a = sqrt(acp[t]), s = sqrt(1 - acp[t]):
    x_t = a x0 + s noise, in float32 at least; the target is the noise ("epsilon"), a noise - s x0 ("v_prediction",
    arXiv 2202.00512) or x0 ("sample").
    """
    work = torch.promote_types(x0.dtype, torch.float32)
    acp = alphas_cumprod.to(x0.device)[t].reshape(-1, *(1,) * (x0.dim() - 1))
    a, s = acp.sqrt().to(work), (1 - acp).sqrt().to(work)
    x, n = x0.to(work), noise.to(work)

    x_t = (a * x + s * n).to(x0.dtype)
    if prediction_type == "epsilon":
        return x_t, noise.to(x0.dtype)
    if prediction_type == "v_prediction":
        return x_t, (a * n - s * x).to(x0.dtype)
    if prediction_type == "sample":
        return x_t, x0
    raise ValueError(
        f'add_noise: prediction_type must be "epsilon", "v_prediction" or "sample", got {prediction_type!r}'
    )


def prepare_step(
    latents: Tensor,
    extra: Tensor | None,
    owners: Tensor,
    input_scale: Tensor,
    times: Tensor,
    step: int | Tensor,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What a network is called with at one step of a plan: its input, and the row of what depends on time alone.

    latents [B, C, ...]; extra [B, E, ...] or None, channels that the network sees beside them; owners [N] int64: the
    sample that each row of the input is made of; input_scale [K]; times [K, W] in the network's dtype; ``step`` an int
    or a 0-d integer tensor. Returns (input_scale[step] latents and extra, by rows, [N, C + E, ...]; times[step] [1, W])
    in the network's dtype, written into ``out`` if that is given.
    """
    x = (latents * _row(input_scale, step).to(latents)).to(times.dtype)
    if extra is not None:
        x = torch.cat([x, extra.to(times.dtype)], dim=1)

    results = x[owners], _row(times, step)
    return results if out is None else (out[0].copy_(results[0]), out[1].copy_(results[1]))


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
    """One row of a sampling plan: guidance, then the linear update of every register.

    registers [R, B, ...] float32 or float64, register 0 the latent; uncond, cond and noise [B, ...]; coefficients
    [K, R, R + 2]; ``step`` an int or a 0-d int64 tensor. The prediction is uncond + guidance_scale (cond - uncond),
    or the one that is given where the other is None; the scale is a number, or row ``step`` of a table [K]. noise None
    counts as zero. Returns the next registers, written into ``out`` if that is given.
    """
    row = _row(coefficients, step)[0].to(registers)
    if uncond is None and cond is None:
        raise ValueError("sampler_step: needs a prediction, uncond or cond")

    # Guidance.
    if uncond is None or cond is None:
        prediction = (cond if uncond is None else uncond).to(registers)  # type: ignore[union-attr]
    else:
        u, c = uncond.to(registers), cond.to(registers)
        scale = _row(guidance_scale, step).to(registers) if isinstance(guidance_scale, Tensor) else guidance_scale
        prediction = u + scale * (c - u)

    # The row, applied to registers, prediction and noise.
    inputs = [*registers, prediction] + ([] if noise is None else [noise.to(registers)])
    weights = row[:, : len(inputs)].reshape(len(registers), len(inputs), *(1,) * prediction.dim())
    result = (weights * torch.stack(inputs)).sum(dim=1)  # no matrix product: autocast and tf32 would round it
    return result if out is None else out.copy_(result)


def _row(table: Tensor, step: int | Tensor) -> Tensor:
    """Row ``step`` of a table [K, ...], [1, ...]; a step that is a tensor is not read by the host."""
    return table[step][None] if isinstance(step, int) else table[step.reshape(1)]

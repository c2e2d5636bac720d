"""The loop: every task and every sampler runs through `denoise`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import sdkernels
from sdkit.errors import ConfigError, NumericalError
from sdkit.grid import Level
from sdkit.guidance import Guidance, combine, guide

if TYPE_CHECKING:
    from sdkit.plan import Plan

Predict = Callable[[Tensor, int], tuple[Tensor | None, Tensor | None]]
OnStep = Callable[[int, float, Tensor, Callable[[], Tensor]], "Tensor | Literal['stop'] | None"]


def denoise(
    plan: Plan,
    predict: Predict,
    latents: Tensor,
    draw_noise: Callable[[], Tensor],
    guidance: Guidance | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run a plan from its first level to its last; returns the latents, float32 (float64 if they came so).

    latents [B, C, H, W]: register 0 at the first level, as `Plan.start` makes it. predict(x_in, k) answers call k's
    scaled input with (unconditional, conditional) predictions, None for the one that ``guidance.along(plan)[k]`` has
    no need of: outside the guidance's interval that is the unconditional one, and the network is called for half.
    draw_noise() gives a normal like the latents; it is called once for each k with ``plan.draws_noise[k]``, in order.
    on_step(k, t, latents, x0) is called after call k with the new latents and a function that gives the estimate of
    the clean latents that call k made; a tensor that it returns replaces the latents, "stop" ends the loop with the
    latents as they are. Raises NumericalError when the latents are no longer finite: at that call on the CPU, at the
    end on a GPU, which is not to wait for the answer each time.
    """
    guidance = guidance or Guidance()
    work = torch.float64 if latents.dtype == torch.float64 else torch.float32
    coefficients = plan.coefficients.to(latents.device, work)
    input_scale, times, draws = plan.input_scale.tolist(), plan.timesteps.tolist(), plan.draws_noise.tolist()
    registers = torch.zeros(plan.num_registers, *latents.shape, dtype=work, device=latents.device)
    registers[0] = latents
    for k, (t, now) in enumerate(zip(times, guidance.along(plan), strict=True)):
        x_in = registers[0] * input_scale[k]
        uncond, cond = predict(x_in, k)
        if not now.is_linear:
            u, c = (None if p is None else p.to(work) for p in (uncond, cond))
            level = Level(*plan.levels[k].tolist())
            uncond, cond = None, guide(now, u, c, x_in, t, level, plan.prediction_type)
        noise = draw_noise() if draws[k] else None
        before = registers[0]
        registers = sdkernels.sampler_step(registers, uncond, cond, noise, coefficients, k, now.scale)
        if registers.device.type == "cpu":
            _check_finite(registers[0], k, len(times), t)
        if on_step is not None:
            estimate = partial(_estimate, plan, k, before, uncond, cond, now.scale)
            answer = on_step(k, t, registers[0], estimate)
            if isinstance(answer, Tensor):
                if answer.shape != registers[0].shape:
                    expected, found = list(registers[0].shape), list(answer.shape)
                    raise ConfigError(f"callback: expected latents {expected}, found {found}")
                registers = torch.cat([answer.to(registers)[None], registers[1:]])
            elif answer == "stop":
                break
            elif answer is not None:
                raise ConfigError(f'callback: expected latents, "stop" or None, found {answer!r}')
    if times:
        _check_finite(registers[0], len(times) - 1, len(times), times[-1])
    return registers[0]


def _estimate(plan: Plan, k: int, latents: Tensor, uncond: Tensor | None, cond: Tensor | None, scale: float) -> Tensor:
    uncond, cond = (None if p is None else p.to(latents) for p in (uncond, cond))
    return plan.denoised(k, latents, combine(uncond, cond, scale))


def _check_finite(latents: Tensor, k: int, calls: int, t: float) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise NumericalError(f"denoising: latents are not finite after call {k + 1} of {calls} (timestep {t:g})")

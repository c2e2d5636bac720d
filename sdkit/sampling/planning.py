"""`make_plan`: from a sampler's name and its settings to the table of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdkit.checks import check_choice, check_kind, check_number, expect, is_count
from sdkit.errors import ConfigError
from sdkit.sampling.levels import Array, Level
from sdkit.sampling.plan import Plan
from sdkit.sampling.samplers import SAMPLERS
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.sampling.spacing import (
    SIGMAS,
    SPACINGS,
    distilled_times,
    sigma_table,
    spaced_sigmas,
    spaced_times,
    times_of,
)
from sdkit.sampling.steps import Call, Sampler, Steps

T = TypeVar("T", int, str)


def make_plan(
    sampler: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    sigmas: str | None = None,
    timestep_spacing: str = "trailing",
    steps_offset: int = 0,
    strength: float = 1.0,
    eta: float = 0.0,
    set_alpha_to_one: bool = False,
    final_sigmas_type: str = "zero",
    solver_order: int | None = None,
    solver_type: str | None = None,
    original_inference_steps: int = 50,
) -> Plan:
    """Make the table of a sampling run.

    sampler: a key of `sdkit.sampling.samplers.SAMPLERS`. sigmas: None (by timestep), "karras", "exponential" or "beta".
    timestep_spacing: "leading" (plus ``steps_offset``, which the others do not take), "linspace" or "trailing".
    strength: the part of the schedule that is run, from its low end: floor(num_inference_steps * strength) steps and
    at least one; 0 runs none, 1 starts from pure noise. eta: the randomness of ddim and tcd, 0 to 1. set_alpha_to_one:
    ddim and pndm end at the clean latent and not at acp[0]. final_sigmas_type: euler, unipc and the multistep dpmpp_*
    end at sigma "zero" or at "sigma_min", the lowest of the table. solver_order: 1 to 3 for the multistep dpmpp_*, deis
    and unipc. solver_type: "midpoint" or "heun" for dpmpp_*, "bh2" or "bh1" for unipc. original_inference_steps: how
    many timesteps the network of lcm or tcd was distilled on; these two space their steps over those. Each step goes to
    the next timestep in the list, always. Raises ConfigError.
    """
    _check_names(sampler, sigmas, timestep_spacing, final_sigmas_type)
    _check_numbers(num_inference_steps, schedule, steps_offset, strength, eta)
    spec = SAMPLERS[sampler]
    _check_taken(spec, sampler, sigmas, eta)
    order = _choice("solver_order", solver_order, spec.orders, sampler)
    solver = _choice("solver_type", solver_type, spec.solver_types, sampler)

    # The points of the whole schedule, and its end.
    if spec.points == "distilled":
        whole = distilled_times(num_inference_steps, schedule.num_train_timesteps, original_inference_steps)
        times, levels = whole.tolist(), _table_levels(whole, schedule)
    else:
        times, levels = _points(spec, schedule, num_inference_steps, sigmas, timestep_spacing, steps_offset)
    ends = {"table": set_alpha_to_one, "sigma": final_sigmas_type == "zero", "clean": True, "lowest": False}
    levels.append(Level(1.0, 0.0) if ends[spec.end] else Level.of(float(schedule.alphas_cumprod[0])))
    if spec.exploding:
        levels = [Level(1.0, level.noise / level.signal) for level in levels]

    # The part of the schedule that is run.
    first = num_inference_steps - steps_to_run(num_inference_steps, strength)
    steps = Steps(
        schedule, (*times[first:], 0.0), tuple(levels[first:]), num_inference_steps, eta, order or 0, solver or ""
    )
    _check_not_dark(steps)

    start = _start(steps, strength, timestep_spacing, spec.exploding)
    return _table(sampler, steps, list(spec.build(steps)), start)


def plan_arguments(own: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """A model's own arguments of `make_plan` with those that are given, where None is not given.

    Another sampler than the model's takes its own solver, and the rest of the model's settings.
    """
    if given.get("sampler") not in (None, own.get("sampler")):
        solver = ("solver_order", "solver_type", "original_inference_steps")
        own = {name: value for name, value in own.items() if name not in solver}
    return {**own, **{name: value for name, value in given.items() if value is not None}}


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """floor(num_inference_steps * strength) on the number as written (0.58 is 58/100), at least 1 above strength 0."""
    return 0 if strength == 0 else max(1, math.floor(num_inference_steps * Decimal(str(float(strength)))))


def _check_names(sampler: str, sigmas: str | None, spacing: str, final: str) -> None:
    check_choice("sampler", sampler, tuple(SAMPLERS))
    check_choice("sigmas", sigmas, (None, *SIGMAS))
    check_choice("timestep_spacing", spacing, SPACINGS)
    check_choice("final_sigmas_type", final, ("zero", "sigma_min"))


def _check_numbers(steps: int, schedule: NoiseSchedule, offset: int, strength: float, eta: float) -> None:
    check_kind("schedule", schedule, NoiseSchedule, "a NoiseSchedule")
    limit = schedule.num_train_timesteps
    expect(is_count(steps, 1) and steps <= limit, "num_inference_steps", f"an integer from 1 to {limit}", steps)
    expect(is_count(offset), "steps_offset", "an integer of at least 0", offset)
    check_number("strength", strength, 0, 1)
    check_number("eta", eta, 0, 1)


def _check_taken(spec: Sampler, sampler: str, sigmas: str | None, eta: float) -> None:
    """Raise ConfigError for an argument that this sampler does not take."""
    if eta > 0 and not spec.takes_eta:
        takers = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
        raise ConfigError(f"eta: {sampler} takes none, found {eta!r}; these do: {takers}")
    if sigmas is not None and spec.points == "distilled":
        raise ConfigError(f"sigmas: {sampler} takes none, found {sigmas!r}: it runs on timesteps it was distilled on")


def _check_not_dark(steps: Steps) -> None:
    """Raise ConfigError for epsilon at a point without signal, where it says nothing about the picture."""
    schedule = steps.schedule
    dark = schedule.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0
    if dark and steps.num_steps and steps.times[0] > schedule.num_train_timesteps - 2:
        raise ConfigError(
            f"prediction_type: epsilon has no meaning at timestep {steps.times[0]:g} of a schedule with zero terminal "
            "SNR; expected v_prediction or sample"
        )


def _start(steps: Steps, strength: float, spacing: str, exploding: bool) -> tuple[float, float]:
    """The weights of noise and of the clean latents in register 0 at the start."""
    first = steps.levels[0]
    if strength == 0:
        return 0.0, 1.0
    if strength < 1:
        return first.noise, first.signal
    if not exploding:
        return 1.0, 0.0

    # Pure noise: as strong as noise and unit-variance data together, where leading starts below the top.
    return (first.scale if spacing == "leading" else first.noise), 0.0


def _choice(name: str, value: T | None, known: tuple[T, ...], sampler: str) -> T | None:
    """``value``, or the first of ``known`` (which is None where there is nothing to choose)."""
    if value is None:
        return known[0] if known else None
    if value not in known or isinstance(value, bool):
        expected = f"one of {', '.join(map(str, sorted(known)))}" if known else f"none ({sampler} takes none)"
        raise ConfigError(f"{name}: expected {expected}, found {value!r}")
    return value


def _table_levels(times: Array, schedule: NoiseSchedule) -> list[Level]:
    return [Level.of(acp) for acp in schedule.alphas_cumprod.numpy()[times.astype(int)].tolist()]


def _points(
    spec: Sampler, schedule: NoiseSchedule, steps: int, sigmas: str | None, spacing: str, offset: int
) -> tuple[list[float], list[Level]]:
    """Timesteps and variance-preserving levels of the whole schedule, from high to low, without the end."""
    multistep = spec.points == "multistep"
    table = sigma_table(schedule)
    times = spaced_times(steps, schedule.num_train_timesteps, spacing, offset, multistep, spec.points != "sigma")
    if sigmas is None and spec.points == "table":
        return times.tolist(), _table_levels(times, schedule)

    ratios = np.interp(times, np.arange(len(table)), table)
    if sigmas is not None:
        high, low = (table[-1], table[0]) if multistep else (ratios[0], ratios[-1])
        ratios = spaced_sigmas(sigmas, steps, float(high), float(low))
        times = times_of(ratios, schedule)
        if sigmas == "karras" and _rounds(spec, schedule):  # what the network is told is rounded, its level is not
            times = np.round(times)
        elif multistep:
            times = np.floor(times)

    scale = np.sqrt(1 + ratios**2)
    return times.tolist(), [Level(float(1 / c), float(r / c)) for r, c in zip(ratios, scale, strict=True)]


def _rounds(spec: Sampler, schedule: NoiseSchedule) -> bool:
    cosine = schedule.beta_schedule == "squaredcos_cap_v2"
    return spec.karras_times == "rounded" or (spec.karras_times == "rounded unless cosine" and not cosine)


def _table(sampler: str, steps: Steps, calls: list[Call], start: tuple[float, float]) -> Plan:
    def tensor(values: list[Any], *empty: int) -> Tensor:
        return torch.tensor(np.array(values), dtype=torch.float64) if values else torch.zeros(0, *empty).double()

    size = len(calls[0].x0) if calls else 3
    return Plan(
        sampler=sampler,
        prediction_type=steps.schedule.prediction_type,
        num_steps=steps.num_steps,
        timesteps=tensor([call.point.time for call in calls]),
        input_scale=tensor([1 / call.point.level.scale for call in calls]),
        coefficients=tensor([call.registers for call in calls], size - 2, size),
        x0=tensor([call.x0[[0, size - 2]] for call in calls], 2),
        draws_noise=torch.tensor([call.draws for call in calls], dtype=torch.bool),
        levels=tensor([*(call.point.level for call in calls), steps.levels[-1]]),
        init_scale=start[0],
        init_image_scale=start[1],
    )

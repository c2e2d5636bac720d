"""Sampling plans: a whole sampling run as one table of float64 numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdkit import grid as grids
from sdkit.denoise import OnStep, denoise
from sdkit.errors import ConfigError
from sdkit.grid import Call, Grid, Level
from sdkit.samplers import SAMPLERS, Sampler
from sdkit.schedule import NoiseSchedule

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T", int, str)


@dataclass(frozen=True, eq=False)
class Plan:
    """What each of K network calls does to R registers, register 0 being the latent. Data only, float64 on the CPU.

    Register 0 is in the scaling of diffusers' scheduler of that name (Karras's for euler, euler_a and heun, variance
    preserving for the rest), so that latents can be compared step by step; the other registers start at 0.
    """

    sampler: str
    prediction_type: str
    num_steps: int  # steps run; a step of heun makes two calls
    timesteps: Tensor  # [K] what the network is told
    input_scale: Tensor  # [K] the network's input is input_scale[k] * registers[0]
    coefficients: Tensor  # [K, R, R + 2] next registers = coefficients[k] @ (registers..., prediction, noise)
    x0: Tensor  # [K, 2] estimate of the clean latent = x0[k, 0] * registers[0] + x0[k, 1] * prediction
    draws_noise: Tensor  # [K] bool: a normal is drawn at call k, also where its weight is 0
    levels: (
        Tensor  # [K + 1, 2] before call k register 0 is levels[k, 0] * clean + levels[k, 1] * noise; last: after all
    )
    init_scale: float  # register 0 starts as init_scale * noise + init_image_scale * image
    init_image_scale: float

    @property
    def num_registers(self) -> int:
        return self.coefficients.shape[1]

    def start(self, noise: Tensor, x0: Tensor | None = None) -> Tensor:
        """Register 0 at the first level, like ``noise`` [B, ...], from a standard normal and the clean latents ``x0``,
        which only strength below 1 needs. Raises ConfigError when they are needed and missing."""
        if self.init_image_scale == 0:
            return self.init_scale * noise
        if x0 is None:
            raise ConfigError("x0: a plan with strength below 1 starts from clean latents, found none")
        return self.init_scale * noise + self.init_image_scale * x0.to(noise)

    def denoised(self, k: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """The estimate of the clean latents from register 0 before call k and the guided prediction."""
        return float(self.x0[k, 0]) * latents + float(self.x0[k, 1]) * prediction.to(latents)

    def run(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        generator: torch.Generator | None = None,
        x0: Tensor | None = None,
        callback: OnStep | None = None,
    ) -> Tensor:
        """Sample with model(x_in, t) -> prediction; the steps are computed in float64, the result is like ``noise``.

        noise [B, ...]: a standard normal, scaled inside. x_in is like it; t is a 0-d tensor, int64 where the plan's
        timesteps are whole and float64 otherwise. ``generator`` draws the normals of stochastic samplers, on its own
        device and in the dtype of ``noise``. x0 as in `start`; callback as on_step in `sdkit.denoise.denoise`.
        """
        whole = bool((self.timesteps == self.timesteps.round()).all())
        times = self.timesteps.to(noise.device, torch.int64 if whole else torch.float64)

        def predict(x_in: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
            return None, model(x_in.to(noise.dtype), times[k])

        def draw_noise() -> Tensor:
            device = noise.device if generator is None else generator.device
            return torch.randn(noise.shape, generator=generator, device=device, dtype=noise.dtype).to(noise.device)

        latents = self.start(noise.double(), x0)
        return denoise(self, predict, latents, draw_noise, on_step=callback).to(noise.dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # tensors inside

    def __str__(self) -> str:
        inputs = [f"r{i}" for i in range(self.num_registers)] + ["prediction", "noise"]
        lines = [
            f"{self.sampler}, {self.prediction_type}: {self.num_steps} steps, {len(self.timesteps)} calls; "
            f"r0 starts as {self.init_scale:.6g} noise + {self.init_image_scale:.6g} image",
            " ".join(["call", *(f"{name:>11}" for name in ("timestep", "signal", "noise", "next", *inputs))]),
        ]
        for k, matrix in enumerate(self.coefficients.tolist()):
            head = [float(self.timesteps[k]), *self.levels[k].tolist()]
            for r, row in enumerate(matrix):
                left = f"{k:4d} " + " ".join(f"{v:11.6g}" for v in head) if r == 0 else " " * (4 + 3 * 12)
                tail = "".join(f" {v:11.6g}" for v in row)
                lines.append(f"{left} {f'r{r}':>11}{tail}" + (" (drawn)" if r == 0 and self.draws_noise[k] else ""))
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str] | None = None) -> Image.Image:
        """Its noise levels against its calls as a picture, also written to ``path`` (.png) if that is given."""
        from sdkit.preview import plot_plan

        return plot_plan(self, path)

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON's types; numbers keep every bit."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises ConfigError when a field is missing or unknown."""
        if set(values) != {f.name for f in fields(cls)}:
            raise ConfigError(
                f"plan: expected the fields {', '.join(f.name for f in fields(cls))}, found {sorted(values)}"
            )
        empty = {"coefficients": (0, 1, 3), "x0": (0, 2)}  # JSON keeps no shape of a plan with no calls
        tensors: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, list):
                tensor = torch.tensor(value, dtype=torch.bool if name == "draws_noise" else torch.float64)
                tensors[name] = tensor if value else tensor.reshape(empty.get(name, (0,)))
        given: dict[str, Any] = values | tensors
        return cls(**given)


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
    """The table of a sampling run.

    sampler: a key of `sdkit.samplers.SAMPLERS`. sigmas: None (by timestep), "karras", "exponential" or "beta".
    timestep_spacing: "leading" (plus ``steps_offset``, which the others do not take), "linspace" or "trailing".
    strength: the part of the schedule that is run, from its low end: floor(num_inference_steps * strength) steps and
    at least one; 0 runs none, 1 starts from pure noise. eta: the randomness of ddim and tcd, 0 to 1. set_alpha_to_one:
    ddim and pndm end at the clean latent and not at acp[0]. final_sigmas_type: euler, unipc and the multistep dpmpp_*
    end at sigma "zero" or at "sigma_min", the lowest of the table. solver_order: 1 to 3 for the multistep dpmpp_*, deis
    and unipc. solver_type: "midpoint" or "heun" for dpmpp_*, "bh2" or "bh1" for unipc. original_inference_steps: how
    many timesteps the network of lcm or tcd was distilled on; these two space their steps over those. Each step goes to
    the next timestep in the list, always. Raises ConfigError.
    """
    spec = _check(sampler, num_inference_steps, schedule, sigmas, timestep_spacing, strength, eta, final_sigmas_type)
    order = _choice("solver_order", solver_order, spec.orders, sampler)
    solver = _choice("solver_type", solver_type, spec.solver_types, sampler)
    if isinstance(steps_offset, bool) or not isinstance(steps_offset, int) or steps_offset < 0:
        raise ConfigError(f"steps_offset: expected an integer of at least 0, found {steps_offset!r}")
    if spec.points == "distilled":
        whole = grids.distilled_times(num_inference_steps, schedule.num_train_timesteps, original_inference_steps)
        times, levels = whole.tolist(), _table_levels(whole, schedule)
    else:
        times, levels = _points(spec, schedule, num_inference_steps, sigmas, timestep_spacing, steps_offset)
    ends = {"table": set_alpha_to_one, "sigma": final_sigmas_type == "zero", "clean": True, "lowest": False}
    levels.append(Level(1.0, 0.0) if ends[spec.end] else Level.of(float(schedule.alphas_cumprod[0])))
    if spec.exploding:
        levels = [Level(1.0, level.noise / level.signal) for level in levels]
    run = steps_to_run(num_inference_steps, strength)
    first = num_inference_steps - run
    grid = Grid(
        schedule, (*times[first:], 0.0), tuple(levels[first:]), num_inference_steps, eta, order or 0, solver or ""
    )
    dark = schedule.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] == 0
    if dark and run and grid.times[0] > schedule.num_train_timesteps - 2:
        raise ConfigError(
            f"prediction_type: epsilon has no meaning at timestep {grid.times[0]:g} of a schedule with zero terminal "
            "SNR; expected v_prediction or sample"
        )
    if strength == 0:
        start = (0.0, 1.0)
    elif strength < 1:
        start = (grid.levels[0].noise, grid.levels[0].signal)
    else:  # pure noise: as strong as noise and unit-variance data together, where leading starts below the top
        start = (grid.levels[0].scale if timestep_spacing == "leading" else grid.levels[0].noise, 0.0)
        start = start if spec.exploding else (1.0, 0.0)
    return _table(sampler, grid, list(spec.build(grid)), start)


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """floor(num_inference_steps * strength) on the number as written (0.58 is 58/100), at least 1 above strength 0."""
    return 0 if strength == 0 else max(1, math.floor(num_inference_steps * Decimal(str(float(strength)))))


def _check(
    sampler: str, steps: int, schedule: NoiseSchedule, sigmas: str | None, spacing: str, strength: float, eta: float,
    final: str,
) -> Sampler:  # fmt: skip
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler: expected one of {', '.join(SAMPLERS)}, found {sampler!r}")
    limit = schedule.num_train_timesteps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= limit:
        raise ConfigError(f"num_inference_steps: expected an integer from 1 to {limit}, found {steps!r}")
    choices = {
        "sigmas": (sigmas, (None, *grids.SIGMAS)),
        "timestep_spacing": (spacing, grids.SPACINGS),
        "final_sigmas_type": (final, ("zero", "sigma_min")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{name}: expected one of {', '.join(map(str, known))}, found {value!r}")
    for name, value in (("strength", strength), ("eta", eta)):
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"{name}: expected a number from 0 to 1, found {value!r}")
    if eta > 0 and not SAMPLERS[sampler].takes_eta:
        takers = ", ".join(name for name, spec in SAMPLERS.items() if spec.takes_eta)
        raise ConfigError(f"eta: {sampler} takes none, found {eta!r}; these do: {takers}")
    if sigmas is not None and SAMPLERS[sampler].points == "distilled":
        raise ConfigError(f"sigmas: {sampler} takes none, found {sigmas!r}: it runs on timesteps it was distilled on")
    return SAMPLERS[sampler]


def _choice(name: str, value: T | None, known: tuple[T, ...], sampler: str) -> T | None:
    """``value``, or the first of ``known`` (which is None where there is nothing to choose)."""
    if value is None:
        return known[0] if known else None
    if value not in known or isinstance(value, bool):
        expected = f"one of {', '.join(map(str, sorted(known)))}" if known else f"none ({sampler} takes none)"
        raise ConfigError(f"{name}: expected {expected}, found {value!r}")
    return value


def _table_levels(times: grids.Array, schedule: NoiseSchedule) -> list[Level]:
    return [Level.of(acp) for acp in schedule.alphas_cumprod.numpy()[times.astype(int)].tolist()]


def _points(
    spec: Sampler, schedule: NoiseSchedule, steps: int, sigmas: str | None, spacing: str, offset: int
) -> tuple[list[float], list[Level]]:
    """Timesteps and variance-preserving levels of the whole schedule, from high to low, without the end."""
    multistep = spec.points == "multistep"
    table = grids.sigma_table(schedule)
    times = grids.spaced_times(steps, schedule.num_train_timesteps, spacing, offset, multistep, spec.points != "sigma")
    if sigmas is None and spec.points == "table":
        return times.tolist(), _table_levels(times, schedule)
    ratios = np.interp(times, np.arange(len(table)), table)
    if sigmas is not None:
        high, low = (table[-1], table[0]) if multistep else (ratios[0], ratios[-1])
        ratios = grids.spaced_sigmas(sigmas, steps, float(high), float(low))
        times = grids.times_of(ratios, schedule)
        if sigmas == "karras" and _rounds(spec, schedule):  # what the network is told is rounded, its level is not
            times = np.round(times)
        elif multistep:
            times = np.floor(times)
    scale = np.sqrt(1 + ratios**2)
    return times.tolist(), [Level(float(1 / c), float(r / c)) for r, c in zip(ratios, scale, strict=True)]


def _rounds(spec: Sampler, schedule: NoiseSchedule) -> bool:
    cosine = schedule.beta_schedule == "squaredcos_cap_v2"
    return spec.karras_times == "rounded" or (spec.karras_times == "rounded unless cosine" and not cosine)


def _table(sampler: str, grid: Grid, calls: list[Call], start: tuple[float, float]) -> Plan:
    def tensor(values: list[Any], *empty: int) -> Tensor:
        return torch.tensor(np.array(values), dtype=torch.float64) if values else torch.zeros(0, *empty).double()

    size = len(calls[0].x0) if calls else 3
    return Plan(
        sampler=sampler,
        prediction_type=grid.schedule.prediction_type,
        num_steps=grid.num_steps,
        timesteps=tensor([call.point.time for call in calls]),
        input_scale=tensor([1 / call.point.level.scale for call in calls]),
        coefficients=tensor([call.registers for call in calls], size - 2, size),
        x0=tensor([call.x0[[0, size - 2]] for call in calls], 2),
        draws_noise=torch.tensor([call.draws for call in calls], dtype=torch.bool),
        levels=tensor([*(call.point.level for call in calls), grid.levels[-1]]),
        init_scale=start[0],
        init_image_scale=start[1],
    )

"""Sampling plans: a whole sampling run as one table of float64 numbers, and the loop that runs any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

import sdkernels
from sdkit.errors import ConfigError, NumericalError, SDKitError
from sdkit.files import replacing
from sdkit.sampling.guidance import Guidance, combine, guide
from sdkit.sampling.levels import Level
from sdkit.sampling.plot import plot_levels

Predict = Callable[[Tensor, int], tuple[Tensor | None, Tensor | None]]
OnStep = Callable[[int, float, Tensor, Callable[[], Tensor]], "Tensor | Literal['stop'] | None"]


@dataclass(frozen=True, eq=False)
class Plan:
    """A table: how each of K network calls changes R registers, register 0 being the latent; float64 on the CPU.

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
    levels: Tensor  # [K + 1, 2] before call k register 0 is levels[k, 0] clean + levels[k, 1] noise; last: after all
    init_scale: float  # register 0 starts as init_scale * noise + init_image_scale * image
    init_image_scale: float

    @property
    def num_registers(self) -> int:
        return self.coefficients.shape[1]

    @property
    def steps(self) -> list[int]:
        """For each call the step that it belongs to, counted from 0. The first steps are those of two calls: all but
        the last of heun and its like, the first alone of pndm."""
        calls = len(self.timesteps)
        doubled = calls - self.num_steps
        return [k // 2 if k < 2 * doubled else k - doubled for k in range(calls)]

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
        device and in the dtype of ``noise``. x0 as in `start`; callback as on_step in `denoise`.
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
        """Draw the noise levels against the calls as a picture, also written to ``path`` (.png) if that is given."""
        picture = plot_levels(self.levels, self.timesteps, self.draws_noise, self.title)
        if path is not None:
            with replacing(path, SDKitError) as temporary:
                picture.save(temporary, format="PNG")
        return picture

    @property
    def title(self) -> str:
        """The plan's name in figures."""
        return f"{self.sampler}, {self.num_steps} steps"

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


# The loop


def denoise(
    plan: Plan,
    predict: Predict,
    latents: Tensor,
    draw_noise: Callable[[], Tensor],
    guidance: Guidance | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run a plan from its first level to its last; returns the latents, float32 (float64 if they came so).

    latents [B, C, H, W]: register 0 at the first level, as `Plan.start` makes it. predict(x_in, k) returns the
    (unconditional, conditional) predictions for call k's scaled input, None for the one that
    ``guidance.at_levels(plan.levels)[k]`` doesn't need: outside the guidance's interval that is the unconditional one,
    and the network is called for half the batch.
    draw_noise() gives a normal like the latents; it is called once for each k with ``plan.draws_noise[k]``, in order.
    on_step as in `make_calls`, which also says what is raised.
    """
    return make_calls(Calls(plan, predict, latents, draw_noise, guidance), on_step)


class Calls:
    """The network calls of a run, to be made one after the other; arguments as in `denoise`.

    registers [R, B, C, H, W]: what the plan's rows work on, the latents first, float32 (float64 if they came so).
    """

    def __init__(
        self,
        plan: Plan,
        predict: Predict,
        latents: Tensor,
        draw_noise: Callable[[], Tensor],
        guidance: Guidance | None = None,
    ) -> None:
        work = torch.float64 if latents.dtype == torch.float64 else torch.float32
        self.plan, self.predict, self.draw_noise = plan, predict, draw_noise
        self.guidance = (guidance or Guidance()).at_levels(plan.levels)
        self.times, self.draws = plan.timesteps.tolist(), plan.draws_noise.tolist()
        self.input_scale, self.coefficients = plan.input_scale.tolist(), plan.coefficients.to(latents.device, work)

        self.registers = torch.zeros(plan.num_registers, *latents.shape, dtype=work, device=latents.device)
        self.registers[0] = latents

    def make(self, k: int) -> Callable[[], Tensor]:
        """Make call k, which moves the registers on. Returns a function that gives the call's estimate of the clean
        latents; ask it before the next call."""
        now, before = self.guidance[k], self.registers[0]
        x_in = before * self.input_scale[k]
        uncond, cond = self.predictions(x_in, k)
        if not now.is_linear:
            u, c = (None if p is None else p.to(before.dtype) for p in (uncond, cond))
            level = Level(*self.plan.levels[k].tolist())
            uncond, cond = None, guide(now, u, c, x_in, self.times[k], level, self.plan.prediction_type)

        noise = self.draw_noise() if self.draws[k] else None
        self.registers = sdkernels.sampler_step(self.registers, uncond, cond, noise, self.coefficients, k, now.scale)
        return partial(self.estimate, k, before, uncond, cond)

    def predictions(self, x_in: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        """The unconditional and the conditional prediction of call k."""
        return self.predict(x_in, k)

    def estimate(self, k: int, before: Tensor, uncond: Tensor | None, cond: Tensor | None) -> Tensor:
        """The clean latents by the predictions of call k for the latents before it."""
        uncond, cond = (None if p is None else p.to(before) for p in (uncond, cond))
        return self.plan.denoised(k, before, combine(uncond, cond, self.guidance[k].scale))

    def replace(self, latents: Tensor) -> None:
        """Go on with other latents."""
        self.registers = torch.cat([latents.to(self.registers)[None], self.registers[1:]])


def make_calls(calls: Calls, on_step: OnStep | None = None) -> Tensor:
    """Make all calls of a run; returns the latents.

    on_step(k, t, latents, x0) is called after call k with the new latents and a function that gives the estimate of
    the clean latents that call k made, both good until it returns; a tensor that it returns replaces the latents,
    "stop" ends the loop with the latents as they are. Raises NumericalError when the latents are no longer finite: at
    that call on the CPU, at the end on a GPU, where looking after each call would hold up the next.
    """
    for k, t in enumerate(calls.times):
        x0 = calls.make(k)
        latents = calls.registers[0]
        if latents.device.type == "cpu":
            _check_finite(latents, calls, k)

        answer = None if on_step is None else on_step(k, t, latents, x0)
        if isinstance(answer, Tensor):
            if answer.shape != latents.shape:
                raise ConfigError(f"callback: expected latents {list(latents.shape)}, found {list(answer.shape)}")
            calls.replace(answer)
        elif answer == "stop":
            break
        elif answer is not None:
            raise ConfigError(f'callback: expected latents, "stop" or None, found {answer!r}')

    latents = calls.registers[0].clone()
    if calls.times:
        _check_finite(latents, calls, len(calls.times) - 1)
    return latents


def _check_finite(latents: Tensor, calls: Calls, k: int) -> None:
    if not bool(torch.isfinite(latents).all()):
        count, t = len(calls.times), calls.times[k]
        raise NumericalError(f"denoising: latents are not finite after call {k + 1} of {count} (timestep {t:g})")

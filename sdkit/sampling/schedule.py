"""The noise schedule in float64: how data is noised, and the training targets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from sdkit.checks import Range, check_choice, check_kind, check_range
from sdkit.errors import ConfigError

MOST_TIMESTEPS = 100_000
BETAS = Range(0, 1, above=True, below=True)
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise a latent holds at each training timestep: x_t = sqrt(acp[t]) x0 + sqrt(1 - acp[t]) noise.

    Names and values are diffusers'. ``scaled_linear`` is linspace(sqrt(start), sqrt(end)) ** 2, Stable Diffusion's;
    ``squaredcos_cap_v2`` is the cosine schedule of arXiv 2102.09672. ``rescale_betas_zero_snr`` stretches the
    table so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1). ``trained_betas`` replaces the
    formula. ``alphas_cumprod`` [T] and ``betas`` [T] are float64 on the CPU. Raises ConfigError.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    trained_betas: tuple[float, ...] | None = None
    betas: Tensor = field(init=False, repr=False, compare=False)
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_kind("rescale_betas_zero_snr", self.rescale_betas_zero_snr, bool, "True or False")
        if self.trained_betas is not None:
            check_kind("trained_betas", self.trained_betas, Iterable, "a list of numbers")
            given = cast("Iterable[Any]", self.trained_betas)
            betas = [beta.item() if hasattr(beta, "item") else beta for beta in given]  # an array's are its own kind
            for beta in betas:
                check_range("trained_betas", beta, BETAS)
            object.__setattr__(self, "trained_betas", tuple(map(float, betas)))

        acp = torch.cumprod(1 - _betas(self), dim=0)
        if self.rescale_betas_zero_snr:
            root = acp.sqrt()
            acp = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

        before = torch.cat([acp.new_ones(1), acp[:-1]])
        object.__setattr__(self, "alphas_cumprod", acp)
        object.__setattr__(self, "betas", 1 - acp / before)

    @property
    def sigmas(self) -> Tensor:
        """Karras's noise level sqrt((1 - acp) / acp) of each timestep, float64 [T], infinite at zero SNR."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def snr(self, t: int | Tensor) -> Tensor:
        """Signal-to-noise ratio acp / (1 - acp) at the timesteps ``t`` (int or int64 [B]), float64."""
        acp = self._at(t)
        return acp / (1 - acp)

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """Diffuse ``x0`` [B, ...] to the timesteps ``t`` (an int, or int64 of shape [] or [B]); x0's dtype."""
        return self._mix(x0, noise, t, velocity=False)

    def velocity(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """v = sqrt(acp) noise - sqrt(1 - acp) x0 (arXiv 2202.00512), arguments as in `add_noise`; x0's dtype."""
        return self._mix(x0, noise, t, velocity=True)

    def target(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """The training target at x_t for a network of this ``prediction_type``, like x0."""
        if self.prediction_type == "epsilon":
            return noise.to(x0)
        return x0 if self.prediction_type == "sample" else self.velocity(x0, noise, t)

    def _at(self, t: int | Tensor) -> Tensor:
        index = torch.as_tensor(t)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise ConfigError(f"timesteps: expected integers, found {index.dtype}")
        last = self.num_train_timesteps - 1
        if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) <= last:
            raise ConfigError(f"timesteps: expected 0 to {last}, found {int(index.min())} to {int(index.max())}")
        return self.alphas_cumprod.to(index.device)[index.long()]

    def _mix(self, x0: Tensor, noise: Tensor, t: int | Tensor, velocity: bool) -> Tensor:
        acp = self._at(t).to(x0.device)
        if acp.dim() > 1 or (acp.dim() == 1 and acp.numel() not in (1, x0.shape[0])):
            raise ConfigError(f"timesteps: expected 1 or {x0.shape[0]}, one for each row, found {list(acp.shape)}")

        work = torch.promote_types(x0.dtype, torch.float32)
        acp = acp.reshape(-1, *(1,) * (x0.dim() - 1)) if x0.dim() else acp.reshape(())
        signal, sigma = acp.sqrt().to(work), (1 - acp).sqrt().to(work)
        x0_, noise_ = x0.to(work), noise.to(x0.device, work)
        return (signal * noise_ - sigma * x0_ if velocity else signal * x0_ + sigma * noise_).to(x0.dtype)


def _betas(schedule: NoiseSchedule) -> Tensor:
    """The table before any rescaling, float64 [T]."""
    steps, start, end = schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end
    check_range("num_train_timesteps", steps, Range(2, MOST_TIMESTEPS), whole=True)
    if schedule.trained_betas is not None:
        betas = torch.tensor(schedule.trained_betas, dtype=torch.float64)
        if betas.shape != (steps,):
            raise ConfigError(f"trained_betas: expected {steps} numbers between 0 and 1, found {betas.numel()} numbers")
        return betas

    check_range("beta_start", start, BETAS)
    check_range("beta_end", end, BETAS)

    if schedule.beta_schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule.beta_schedule == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    assert schedule.beta_schedule == "squaredcos_cap_v2"
    angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
    acp = angle.cos() ** 2
    return (1 - acp[1:] / acp[:-1]).clamp(max=0.999)

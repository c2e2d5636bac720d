"""The noise schedule in float64: forward diffusion, training targets, and diffusers' scheduler_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdkit.config import BOOKKEEPING
from sdkit.errors import ConfigError

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
        if self.prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, found {self.prediction_type!r}"
            )
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(float(beta) for beta in self.trained_betas))
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
        """What a network of this ``prediction_type`` is trained to answer at x_t, like x0."""
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
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ConfigError(f"num_train_timesteps: expected an integer of at least 2, found {steps!r}")
    if schedule.trained_betas is not None:
        betas = torch.tensor(schedule.trained_betas, dtype=torch.float64)
        if betas.shape != (steps,) or not bool(((betas > 0) & (betas < 1)).all()):
            raise ConfigError(f"trained_betas: expected {steps} numbers between 0 and 1, found {betas.numel()} numbers")
        return betas
    if not (0 < start < 1 and 0 < end < 1):
        raise ConfigError(f"beta_start, beta_end: expected numbers between 0 and 1, found {start!r} and {end!r}")
    if schedule.beta_schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule.beta_schedule == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if schedule.beta_schedule == "squaredcos_cap_v2":
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        acp = angle.cos() ** 2
        return (1 - acp[1:] / acp[:-1]).clamp(max=0.999)
    raise ConfigError(f"beta_schedule: expected one of {', '.join(BETA_SCHEDULES)}, found {schedule.beta_schedule!r}")


# PNDM is not built: its files load with "ddim", which takes the same timesteps and ends at the same level.
CLASS_TO_SAMPLER: Mapping[str, str] = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}

_SPACINGS_OF_SIGMA = ("karras", "exponential", "beta")
_SIGMA_SWITCHES: dict[str, Any] = {f"use_{name}_sigmas": False for name in _SPACINGS_OF_SIGMA}

# What every class takes, then what each adds or defaults otherwise: diffusers' own defaults.
_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
}  # fmt: skip
_OF_CLASS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {
        "timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True, "rescale_betas_zero_snr": False,
    },
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True, "rescale_betas_zero_snr": False},
    "EulerDiscreteScheduler": {**_SIGMA_SWITCHES, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False},
    "EulerAncestralDiscreteScheduler": {"rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": {**_SIGMA_SWITCHES, "beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverMultistepScheduler": {
        **_SIGMA_SWITCHES, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False,
    },
}  # fmt: skip

# Keys that may stand in any file as long as they ask for nothing; () means that no value of them asks for anything.
_INERT: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,), "thresholding": (False,), "clip_sample_range": (), "sample_max_value": (),
    "dynamic_thresholding_ratio": (), "skip_prk_steps": (), "set_alpha_to_one": (),
    "variance_type": (None, "fixed_small"),
    "rescale_betas_zero_snr": (False,), "final_sigmas_type": ("zero",), "interpolation_type": ("linear",),
    "timestep_type": ("discrete",), "sigma_min": (None,), "sigma_max": (None,), "solver_order": (2,),
    "algorithm_type": ("dpmsolver++",), "solver_type": ("midpoint",), "lower_order_final": (True,),
    "euler_at_final": (False,), "use_lu_lambdas": (None, False), "use_flow_sigmas": (None, False), "flow_shift": (),
    "lambda_min_clipped": (None, -math.inf, "-Infinity"), "use_dynamic_shifting": (False,), "time_shift_type": (),
    **{key: (None, False) for key in _SIGMA_SWITCHES},
}  # fmt: skip
_SCHEDULE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip


def read_scheduler_config(values: Mapping[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Read diffusers' scheduler_config.json: the schedule, and keyword arguments for `make_plan`.

    The arguments are sampler, sigmas, timestep_spacing, steps_offset, set_alpha_to_one and final_sigmas_type. A key
    that the file lacks has that class's default in diffusers. A PNDM file gives the sampler "ddim" with the file's
    own spacing, offset and end. Raises ConfigError for an unknown class, and for each key that asks for something
    not built, by name (clipping and thresholding of x0 among them).
    """
    name = str(values.get("_class_name"))
    if name not in CLASS_TO_SAMPLER:
        raise ConfigError(f"scheduler config: expected _class_name in {', '.join(CLASS_TO_SAMPLER)}, found {name!r}")
    own = _COMMON | _OF_CLASS[name]
    merged = own | {key: value for key, value in values.items() if key not in BOOKKEEPING}
    unsupported = [
        f"{key}={value!r}" + ("" if key in values else f" (the default of {name})")
        for key, value in merged.items()
        if (key not in own or key == "clip_sample") and not (key in _INERT and _inert(key, value))
    ]
    if unsupported:
        raise ConfigError(f"{name} config: unsupported {', '.join(sorted(unsupported))}")
    spaced = [kind for kind in _SPACINGS_OF_SIGMA if merged.get(f"use_{kind}_sigmas")]
    if len(spaced) > 1:
        raise ConfigError(f"{name} config: at most one spacing of sigmas, found {' and '.join(spaced)}")
    schedule = NoiseSchedule(**{key: merged[key] for key in _SCHEDULE_KEYS if key in merged})
    defaults: dict[str, Any] = {
        "sampler": CLASS_TO_SAMPLER[name],
        "sigmas": spaced[0] if spaced else None,
        "timestep_spacing": merged["timestep_spacing"],
        "steps_offset": merged["steps_offset"],
        "set_alpha_to_one": bool(merged.get("set_alpha_to_one", False)),
        "final_sigmas_type": merged.get("final_sigmas_type", "zero"),
    }
    return schedule, defaults


def _inert(key: str, value: Any) -> bool:
    return not _INERT[key] or value in _INERT[key]


def write_scheduler_config(schedule: NoiseSchedule, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json that diffusers reads to do the same as make_plan(schedule=schedule, **defaults).

    ``defaults`` as `read_scheduler_config` returns them; what is absent has make_plan's default. Raises ConfigError
    when diffusers' class for the sampler cannot express one of them.
    """
    wanted: dict[str, Any] = {"sampler": "ddim", "sigmas": None, "timestep_spacing": "trailing", "steps_offset": 0,
                              "set_alpha_to_one": False, "final_sigmas_type": "zero", **defaults}  # fmt: skip
    names = [name for name, sampler in CLASS_TO_SAMPLER.items() if sampler == wanted["sampler"]]
    if not names:
        raise ConfigError(f"scheduler config: diffusers' class for sampler {wanted['sampler']!r} is not known")
    own = _COMMON | _OF_CLASS[names[0]]
    values: dict[str, Any] = {key: getattr(schedule, key) for key in _SCHEDULE_KEYS}
    values["trained_betas"] = None if schedule.trained_betas is None else list(schedule.trained_betas)
    values |= {key: wanted[key] for key in ("timestep_spacing", "steps_offset", "final_sigmas_type")}
    values |= {"set_alpha_to_one": wanted["set_alpha_to_one"], "clip_sample": False}
    values |= {f"use_{kind}_sigmas": wanted["sigmas"] == kind for kind in _SPACINGS_OF_SIGMA}
    lost = [f"{key}={value!r}" for key, value in values.items() if key not in own and not _inert(key, value)]
    if lost:
        raise ConfigError(f"scheduler config: diffusers' {names[0]} has no {', '.join(lost)}")
    return {"_class_name": names[0]} | {key: value for key, value in values.items() if key in own}

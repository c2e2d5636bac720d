"""diffusers' scheduler_config.json, read as a noise schedule and the arguments of `make_plan`, and written back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdkit.checks import is_count
from sdkit.errors import ConfigError
from sdkit.networks.config import BOOKKEEPING
from sdkit.sampling.samplers import SAMPLERS
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.sampling.spacing import SPACINGS

_ALGORITHMS = {name: sampler.algorithm for name, sampler in SAMPLERS.items() if sampler.algorithm}

_SPACINGS_OF_SIGMA = ("karras", "exponential", "beta")
_SIGMA_SWITCHES: dict[str, Any] = {f"use_{name}_sigmas": False for name in _SPACINGS_OF_SIGMA}
_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED: dict[str, Any] = {
    **_SD_BETAS, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "original_inference_steps": 50,
    "rescale_betas_zero_snr": False, "clip_sample": False,
}  # fmt: skip

# What every class takes, then what each adds or defaults otherwise: diffusers' own defaults.
_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0,
}  # fmt: skip
_OF_CLASS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {
        "timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True, "rescale_betas_zero_snr": False,
    },
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True, "rescale_betas_zero_snr": False},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "LMSDiscreteScheduler": _SIGMA_SWITCHES,
    "EulerDiscreteScheduler": {**_SIGMA_SWITCHES, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False},
    "EulerAncestralDiscreteScheduler": {"rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": {**_SIGMA_SWITCHES, **_SD_BETAS},
    "KDPM2DiscreteScheduler": {**_SIGMA_SWITCHES, **_SD_BETAS},
    "KDPM2AncestralDiscreteScheduler": {**_SIGMA_SWITCHES, **_SD_BETAS},
    "DPMSolverSDEScheduler": {**_SIGMA_SWITCHES, **_SD_BETAS},
    "DPMSolverMultistepScheduler": {
        **_SIGMA_SWITCHES, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False, "solver_order": 2,
        "solver_type": "midpoint", "algorithm_type": "dpmsolver++",
    },
    "UniPCMultistepScheduler": {
        **_SIGMA_SWITCHES, "final_sigmas_type": "zero", "rescale_betas_zero_snr": False, "solver_order": 2,
        "solver_type": "bh2",
    },
    "DPMSolverSinglestepScheduler": {
        **_SIGMA_SWITCHES, "final_sigmas_type": "zero", "solver_order": 2, "solver_type": "midpoint",
        "algorithm_type": "dpmsolver++",
    },
    "DEISMultistepScheduler": {**_SIGMA_SWITCHES, "solver_order": 2},
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
}  # fmt: skip

_SAME = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}
"""Classes of diffusers with the numbers of another one."""

# What a class does not read, whatever the file says: the first has one spacing alone, and where it ends at sigma 0 its
# last steps are of lower order in any case.
_UNREAD: dict[str, tuple[str, ...]] = {
    "DPMSolverSinglestepScheduler": ("timestep_spacing", "steps_offset", "lower_order_final"),
}

# Keys that are no part of a plan: they may stand in any file as long as they ask for nothing; () means that no value
# of them asks for anything.
_INERT: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,), "thresholding": (False,), "clip_sample_range": (), "sample_max_value": (),
    "dynamic_thresholding_ratio": (), "skip_prk_steps": (True,), "set_alpha_to_one": (), "noise_sampler_seed": (),
    "variance_type": (None, "fixed_small"), "timestep_scaling": (10.0,), "predict_x0": (True,),
    "disable_corrector": ([],), "solver_p": (None,), "shift_terminal": (None,),
    "rescale_betas_zero_snr": (False,), "final_sigmas_type": ("zero",), "interpolation_type": ("linear",),
    "timestep_type": ("discrete",), "sigma_min": (None,), "sigma_max": (None,), "solver_order": (2,),
    "algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "logrho"), "lower_order_final": (True,),
    "euler_at_final": (False,), "use_lu_lambdas": (None, False), "use_flow_sigmas": (None, False), "flow_shift": (),
    "lambda_min_clipped": (None, -math.inf, "-Infinity"), "use_dynamic_shifting": (False,), "time_shift_type": (),
    **{key: (None, False) for key in _SIGMA_SWITCHES},
}  # fmt: skip
_SCHEDULE_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
_PLAN_KEYS = (
    "timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type", "solver_order", "solver_type",
    "original_inference_steps",
)  # fmt: skip
_READ = {*_SCHEDULE_KEYS, *_PLAN_KEYS, *_SIGMA_SWITCHES, "algorithm_type"}


def read_scheduler_config(values: Mapping[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Read diffusers' scheduler_config.json: the schedule, and keyword arguments for `make_plan`.

    The arguments are sampler, sigmas, timestep_spacing, steps_offset, set_alpha_to_one and final_sigmas_type; and
    solver_order, solver_type and original_inference_steps where the file's are not the sampler's own. A key that the
    file lacks has that class's default in diffusers. Raises ConfigError for an unknown class, and for each key that
    asks for something else, by name. Clipping and thresholding of x0 are among them: they belong to the call, as
    clip_sample_range and dynamic_threshold of `sdkit.sampling.guidance.Guidance`.
    """
    name = str(values.get("_class_name"))
    name = _SAME.get(name, name)
    if name not in scheduler_classes():
        known = ", ".join((*scheduler_classes(), *_SAME))
        raise ConfigError(f"scheduler config: expected _class_name in {known}, found {name!r}")

    # The file's values over the class's own defaults; those that a plan cannot express are refused by name.
    own = _own(name)
    merged = own | {key: value for key, value in values.items() if key not in BOOKKEEPING}
    if values.get("final_sigmas_type", "zero") == "zero":
        merged = {key: value for key, value in merged.items() if key in own or key not in _UNREAD.get(name, ())}
    sampler = _sampler(name, merged)
    unsupported = [
        f"{key}={value!r}" + ("" if key in values else f" (the default of {name})")
        for key, value in merged.items()
        if not ((key in own and key in _READ) or (key in _INERT and _inert(key, value)))
        or (key == "algorithm_type" and value != _ALGORITHMS.get(sampler, value))
    ]
    if unsupported:
        raise ConfigError(f"{name} config: unsupported {', '.join(sorted(unsupported))}")

    spaced = [kind for kind in _SPACINGS_OF_SIGMA if merged.get(f"use_{kind}_sigmas")]
    if len(spaced) > 1:
        raise ConfigError(f"{name} config: at most one spacing of sigmas, found {' and '.join(spaced)}")

    schedule = NoiseSchedule(**{key: merged[key] for key in _SCHEDULE_KEYS if key in merged})
    defaults: dict[str, Any] = {
        "sampler": sampler,
        "sigmas": spaced[0] if spaced else None,
        "timestep_spacing": merged.get("timestep_spacing", "linspace"),
        "steps_offset": merged.get("steps_offset", 0),
        "set_alpha_to_one": bool(merged.get("set_alpha_to_one", False)),
        "final_sigmas_type": merged.get("final_sigmas_type", "zero"),
    }
    usual = _usual(sampler)
    return schedule, defaults | {key: merged[key] for key in usual if key in own and merged[key] != usual[key]}


def read_noise_schedule(values: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a scheduler_config.json of any class, also of one that no sampler corresponds to.

    Raises ConfigError for a schedule or prediction type that there is not.
    """
    own = _COMMON | _OF_CLASS.get(str(values.get("_class_name")), {})
    if unknown := [key for key in ("beta_start", "beta_end") if key not in own | dict(values)]:
        raise ConfigError(f"scheduler config: expected {', '.join(unknown)}")
    merged = own | dict(values)
    return NoiseSchedule(**{key: merged[key] for key in _SCHEDULE_KEYS if key in merged})


def read_spacing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `make_plan` that place the timesteps, of a scheduler_config.json of any class."""
    own = _COMMON | _OF_CLASS.get(str(values.get("_class_name")), {}) | dict(values)
    known = own["timestep_spacing"] in SPACINGS and is_count(own["steps_offset"])
    return {key: own[key] for key in ("timestep_spacing", "steps_offset")} if known else {}


def with_facts(values: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with other values of the noise schedule: what `sdkit.checkpoints.evidence` found.

    Zero terminal SNR needs a class that knows it and a spacing that starts at the last timestep: DDIM and "trailing",
    as arXiv 2305.08891 has it, where the class of ``values`` does not have the key.
    """
    merged = {**values, **facts}
    name = str(merged.get("_class_name"))
    if "rescale_betas_zero_snr" in _OF_CLASS.get(name, {}):
        return merged
    if not merged.pop("rescale_betas_zero_snr", False):
        return merged

    kept = {key: value for key, value in merged.items() if key in _own("DDIMScheduler")}
    changed = {"clip_sample": False, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    return {"_class_name": "DDIMScheduler"} | kept | changed


def _own(name: str) -> dict[str, Any]:
    """The keys of a class with its defaults."""
    keys = _COMMON | _OF_CLASS.get(name, {})
    return {key: value for key, value in keys.items() if key not in _UNREAD.get(name, ())}


def scheduler_classes() -> list[str]:
    """The scheduler classes of diffusers that a sampler of ours corresponds to."""
    return list(dict.fromkeys(sampler.diffusers for sampler in SAMPLERS.values() if sampler.diffusers))


def _sampler(name: str, values: Mapping[str, Any]) -> str:
    """The sampler of a class; where a class is several, that of its algorithm, and of its order if there is one."""
    samplers = [own for own, sampler in SAMPLERS.items() if sampler.diffusers == name]
    algorithm = values.get("algorithm_type")
    same = [own for own in samplers if SAMPLERS[own].algorithm == algorithm] if len(samplers) > 1 else []
    of_order = [own for own in same if SAMPLERS[own].orders[0] == values["solver_order"]]
    return (of_order or same or samplers)[0]


def _usual(sampler: str) -> dict[str, Any]:
    """The arguments that only some samplers take, with this one's defaults."""
    spec = SAMPLERS[sampler]
    usual: dict[str, Any] = {"solver_order": spec.orders[0]} if spec.orders else {}
    usual |= {"solver_type": spec.solver_types[0]} if spec.solver_types else {}
    return usual | ({"original_inference_steps": 50} if spec.points == "distilled" else {})


def _inert(key: str, value: Any) -> bool:
    return not _INERT[key] or value in _INERT[key]


def write_scheduler_config(schedule: NoiseSchedule, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json that diffusers reads to do the same as make_plan(schedule=schedule, **defaults).

    ``defaults`` as `read_scheduler_config` returns them; what is absent has make_plan's default. Raises ConfigError
    when diffusers' class for the sampler cannot express one of them.
    """
    wanted: dict[str, Any] = {
        "sampler": "ddim",
        "sigmas": None,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "set_alpha_to_one": False,
        "final_sigmas_type": "zero",
        **defaults,
    }
    sampler = wanted["sampler"]
    name = SAMPLERS[sampler].diffusers if sampler in SAMPLERS else ""
    if not name:
        raise ConfigError(f"scheduler config: diffusers' class for sampler {sampler!r} is not known")

    own = _own(name)
    values: dict[str, Any] = {key: getattr(schedule, key) for key in _SCHEDULE_KEYS}
    values["trained_betas"] = None if schedule.trained_betas is None else list(schedule.trained_betas)
    values |= {key: wanted[key] for key in ("timestep_spacing", "steps_offset", "final_sigmas_type")}
    values |= {"set_alpha_to_one": wanted["set_alpha_to_one"], "clip_sample": False, "skip_prk_steps": True}
    values |= {f"use_{kind}_sigmas": wanted["sigmas"] == kind for kind in _SPACINGS_OF_SIGMA}
    usual = _usual(sampler)
    values |= {key: wanted.get(key, value) for key, value in usual.items()}
    values |= {"algorithm_type": _ALGORITHMS[sampler]} if sampler in _ALGORITHMS else {}

    only = usual | {"timestep_spacing": "linspace", "steps_offset": 0}  # of a class that has no key for it
    lost = [
        f"{key}={value!r}"
        for key, value in values.items()
        if key not in own and value != only.get(key, ...) and not (key in _INERT and _inert(key, value))
    ]
    if lost:
        raise ConfigError(f"scheduler config: diffusers' {name} has no {', '.join(lost)}")
    return {"_class_name": name} | {key: value for key, value in values.items() if key in own}

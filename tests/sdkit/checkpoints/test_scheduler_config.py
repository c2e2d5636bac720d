"""scheduler_config.json against diffusers' own reading of it."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch

from sdkit.checkpoints.scheduler_config import (
    read_noise_schedule,
    read_scheduler_config,
    scheduler_classes,
    with_facts,
    write_scheduler_config,
)
from sdkit.errors import ConfigError
from sdkit.sampling.planning import make_plan
from sdkit.sampling.samplers import SAMPLERS
from sdkit.sampling.schedule import NoiseSchedule

SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD2_768: dict[str, Any] = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def test_stable_diffusion_files() -> None:
    schedule, defaults = read_scheduler_config(SD15)
    assert schedule == NoiseSchedule()
    expected = {
        "sampler": "pndm",
        "sigmas": None,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "final_sigmas_type": "zero",
    }
    assert defaults == expected
    assert make_plan(schedule=schedule, num_inference_steps=50, **defaults).timesteps[[0, -1]].tolist() == [981, 1]
    assert read_scheduler_config(SD2_768)[0] == NoiseSchedule(prediction_type="v_prediction")


def class_named(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    sys.modules["torchsde"] = ModuleType("torchsde")  # the class wants it for its noise, which no test here draws
    try:
        return getattr(importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde"), name)
    finally:
        del sys.modules["torchsde"]


OFF: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
}


@pytest.mark.parametrize("name", scheduler_classes())
def test_a_file_of_diffusers_round_trips(name: str) -> None:
    cls, off = class_named(name), OFF.get(name, {})
    offset = {} if name == "DPMSolverSinglestepScheduler" else {"steps_offset": 1}  # it has no such key
    config = json.loads(cls(beta_schedule="scaled_linear", **offset, **off).to_json_string())
    schedule, defaults = read_scheduler_config(config)
    assert SAMPLERS[defaults["sampler"]].diffusers == name
    back = cls.from_config(write_scheduler_config(schedule, defaults))
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {k: v for k, v in config.items() if k[0] != "_"}
    bare, read = read_scheduler_config({"_class_name": name, **off})  # what is absent has diffusers' default
    torch.testing.assert_close(bare.alphas_cumprod.float(), cls(**off).alphas_cumprod, rtol=2e-4, atol=2e-6)
    assert read["timestep_spacing"] == cls(**off).config.get("timestep_spacing", "linspace")


@pytest.mark.parametrize(
    ("name", "settings", "sampler"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "dpmpp_3m_sde"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, "dpmpp_2m"),
        ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}, "unipc"),
        ("DEISMultistepScheduler", {"solver_order": 1, "use_karras_sigmas": True}, "deis"),
        ("LCMScheduler", {"original_inference_steps": 100}, "lcm"),
        ("TCDScheduler", {"original_inference_steps": 20}, "tcd"),
        ("KDPM2DiscreteScheduler", {"use_exponential_sigmas": True}, "dpm2"),
        ("LMSDiscreteScheduler", {"use_beta_sigmas": True}, "lms"),
        ("PNDMScheduler", {"set_alpha_to_one": True}, "pndm"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}, "dpmpp_2s"),
        ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}, "dpmpp_2s"),
    ],
)
def test_settings_become_a_plan(name: str, settings: dict[str, Any], sampler: str) -> None:
    cls = class_named(name)
    theirs = cls(**OFF.get(name, {}), **settings)
    schedule, defaults = read_scheduler_config(json.loads(theirs.to_json_string()))
    assert defaults["sampler"] == sampler
    theirs.set_timesteps(12)
    plan = make_plan(schedule=schedule, num_inference_steps=12, **defaults)
    torch.testing.assert_close(plan.timesteps, theirs.timesteps.double(), rtol=1e-4, atol=1e-4)
    written = cls.from_config(write_scheduler_config(schedule, defaults)).config
    assert {key: written[key] for key in settings} == settings


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_sigma_spacings_are_read_and_written(name: str, kind: str) -> None:
    schedule, defaults = read_scheduler_config({"_class_name": name, f"use_{kind}_sigmas": True})
    assert defaults["sigmas"] == kind
    assert write_scheduler_config(schedule, defaults)[f"use_{kind}_sigmas"] is True


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"skip_prk_steps": False}, "skip_prk_steps"),
        ({"clip_sample": True}, "clip_sample"),
        ({"thresholding": True}, "thresholding"),
        ({"my_key": 3}, "my_key"),
        ({"_class_name": "SomeScheduler"}, "SomeScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type"),
        ({"_class_name": "DPMSolverMultistepScheduler", "euler_at_final": True}, "euler_at_final"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 5.0}, "timestep_scaling"),
        ({"_class_name": "EulerDiscreteScheduler", "solver_order": 3}, "solver_order"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            "karras and beta",
        ),
        ({"beta_schedule": "exp"}, "beta_schedule"),
    ],
)
def test_what_is_not_built_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_scheduler_config(SD15 | change)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_parallel_classes_have_the_numbers_of_the_plain_ones(name: str) -> None:
    config = SD15 | {"clip_sample": False}
    both = [read_scheduler_config(config | {"_class_name": f"{name}{kind}Scheduler"}) for kind in ("", "Parallel")]
    assert both[0] == both[1] and both[0][1]["sampler"] == name.lower()


def test_a_singlestep_config_with_keys_of_another_class_is_read_as_diffusers_reads_it() -> None:
    config = {"_class_name": "DPMSolverSinglestepScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    _, defaults = read_scheduler_config(config | {"lower_order_final": False})
    assert (defaults["timestep_spacing"], defaults["steps_offset"]) == ("linspace", 0)
    with pytest.raises(ConfigError, match="lower_order_final"):
        read_scheduler_config(config | {"lower_order_final": False, "final_sigmas_type": "sigma_min"})


def test_the_noise_schedule_of_a_class_that_is_not_built() -> None:
    config = SD15 | {"_class_name": "SomeScheduler", "my_key": 3, "prediction_type": "v_prediction"}
    assert read_noise_schedule(config) == NoiseSchedule(prediction_type="v_prediction")
    with pytest.raises(ConfigError, match="prediction_type"):
        read_noise_schedule(config | {"prediction_type": "flow_prediction"})


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_zero_snr_gets_a_class_and_a_spacing_that_reach_it(name: str) -> None:
    config = {**SD15, "_class_name": name, "clip_sample": False}
    facts = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule, defaults = read_scheduler_config(with_facts(config, facts))
    assert schedule == NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert schedule.alphas_cumprod[-1] == 0
    plan = make_plan(schedule=schedule, num_inference_steps=10, **defaults | {"timestep_spacing": "trailing"})
    assert plan.timesteps[0] == 999
    if name == "PNDMScheduler":
        assert (defaults["sampler"], defaults["timestep_spacing"]) == ("ddim", "trailing")
    assert with_facts(SD15, {"rescale_betas_zero_snr": False}) == SD15


def test_a_default_that_is_not_built_is_named() -> None:
    with pytest.raises(ConfigError, match=r"clip_sample=True .the default of DDIMScheduler"):
        read_scheduler_config({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize(
    "defaults", [{"sampler": "ddim", "sigmas": "karras"}, {"sampler": "dpmpp_2s_a"}, {"final_sigmas_type": "sigma_min"}]
)
def test_what_diffusers_cannot_express_is_not_written(defaults: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        write_scheduler_config(NoiseSchedule(), defaults)

"""The noise schedule against diffusers, and scheduler_config.json against diffusers' own reading of it."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch

from sdkit.errors import ConfigError
from sdkit.plan import make_plan
from sdkit.schedule import CLASS_TO_SAMPLER, NoiseSchedule, read_scheduler_config, write_scheduler_config

SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SD2_768: dict[str, Any] = SD15 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def rows(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g).double(), torch.randn(shape, generator=g).double()


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_table_is_diffusers(kind: str, zero_snr: bool) -> None:
    ours = NoiseSchedule(beta_schedule=kind, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=kind, rescale_betas_zero_snr=zero_snr
    )
    assert ours.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(torch.cumprod(1 - ours.betas, 0), ours.alphas_cumprod, rtol=1e-9, atol=0)
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr


def test_scaled_linear_is_exact() -> None:
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    product = 1.0
    for i, beta in enumerate(betas):
        product *= 1 - beta
        if i in (0, 500, 999):
            assert NoiseSchedule().alphas_cumprod[i].item() == pytest.approx(product, rel=1e-12)


def test_forward_diffusion_per_row() -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction")
    x0, noise = rows(3, 4, 5, 6)
    t = torch.tensor([0, 500, 999])
    theirs = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs.alphas_cumprod = schedule.alphas_cumprod
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-12, atol=1e-12)
    velocity = theirs.get_velocity(x0, noise, t)
    torch.testing.assert_close(schedule.velocity(x0, noise, t), velocity, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.target(x0, noise, t), velocity, rtol=1e-12, atol=1e-12)
    assert torch.equal(NoiseSchedule().target(x0, noise, t), noise)
    assert torch.equal(NoiseSchedule(prediction_type="sample").target(x0, noise, t), x0)
    assert torch.equal(schedule.add_noise(x0, noise, 500)[1], schedule.add_noise(x0, noise, t)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_result_has_the_dtype_of_x0_and_is_rounded_once(dtype: torch.dtype) -> None:
    schedule, (x0, noise) = NoiseSchedule(), rows(2, 3)
    low = schedule.add_noise(x0.to(dtype), noise.to(dtype), torch.tensor([10, 900]))
    exact = schedule.add_noise(x0.to(dtype).double(), noise.to(dtype).double(), torch.tensor([10, 900]))
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), exact, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


def test_snr_and_sigmas() -> None:
    schedule = NoiseSchedule()
    t = torch.tensor([3, 800])
    torch.testing.assert_close(schedule.snr(t), schedule.sigmas[t] ** -2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([0, 1000]), torch.tensor([0.5]), torch.tensor([1, 2, 3])])
def test_wrong_timesteps(t: int | torch.Tensor) -> None:
    x0, noise = rows(2, 3)
    with pytest.raises(ConfigError, match="timesteps"):
        NoiseSchedule().add_noise(x0, noise, t)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prediction_type": "eps"}, "prediction_type"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"beta_start": float("nan")}, "beta_start"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"trained_betas": (0.1, 0.2)}, "trained_betas"),
    ],
)
def test_bad_schedules(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        NoiseSchedule(**arguments)


def test_trained_betas() -> None:
    betas = tuple(NoiseSchedule(num_train_timesteps=50, beta_schedule="linear").betas.tolist())
    schedule = NoiseSchedule(num_train_timesteps=50, trained_betas=betas)
    torch.testing.assert_close(schedule.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-9, atol=0)


def test_stable_diffusion_files() -> None:
    schedule, defaults = read_scheduler_config(SD15)
    assert schedule == NoiseSchedule()
    expected = {"sampler": "ddim", "sigmas": None, "timestep_spacing": "leading", "steps_offset": 1,
                "set_alpha_to_one": False, "final_sigmas_type": "zero"}  # fmt: skip
    assert defaults == expected
    assert make_plan(schedule=schedule, num_inference_steps=50, **defaults).timesteps[[0, -1]].tolist() == [981, 1]
    assert read_scheduler_config(SD2_768)[0] == NoiseSchedule(prediction_type="v_prediction")


@pytest.mark.parametrize("name", [name for name in CLASS_TO_SAMPLER if name != "PNDMScheduler"])
def test_a_file_of_diffusers_round_trips(name: str) -> None:
    cls: Any = getattr(diffusers, name)
    off = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    config = json.loads(cls(beta_schedule="scaled_linear", steps_offset=1, **off).to_json_string())
    schedule, defaults = read_scheduler_config(config)
    back = cls.from_config(write_scheduler_config(schedule, defaults))
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {k: v for k, v in config.items() if k[0] != "_"}
    bare, _ = read_scheduler_config({"_class_name": name, **off})  # what is absent has diffusers' default
    torch.testing.assert_close(bare.alphas_cumprod.float(), cls(**off).alphas_cumprod, rtol=2e-4, atol=2e-6)
    spacing = read_scheduler_config({"_class_name": name, **off})[1]["timestep_spacing"]
    assert spacing == cls(**off).config.timestep_spacing


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_sigma_spacings_are_read_and_written(name: str, kind: str) -> None:
    schedule, defaults = read_scheduler_config({"_class_name": name, f"use_{kind}_sigmas": True})
    assert defaults["sigmas"] == kind
    assert write_scheduler_config(schedule, defaults)[f"use_{kind}_sigmas"] is True


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clip_sample": True}, "clip_sample"),
        ({"thresholding": True}, "thresholding"),
        ({"my_key": 3}, "my_key"),
        ({"_class_name": "SomeScheduler"}, "SomeScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
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


def test_a_default_that_is_not_built_is_named() -> None:
    with pytest.raises(ConfigError, match=r"clip_sample=True .the default of DDIMScheduler"):
        read_scheduler_config({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize(
    "defaults", [{"sampler": "ddim", "sigmas": "karras"}, {"sampler": "lms"}, {"final_sigmas_type": "sigma_min"}]
)
def test_what_diffusers_cannot_express_is_not_written(defaults: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        write_scheduler_config(NoiseSchedule(), defaults)

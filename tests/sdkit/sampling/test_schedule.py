"""The noise schedule against diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sdkit.errors import ConfigError
from sdkit.sampling.schedule import NoiseSchedule


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

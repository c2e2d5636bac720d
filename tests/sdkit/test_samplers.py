"""Each sampler against diffusers, step by step with the sample carried on, and against closed-form Gaussian results."""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sdkit.denoise import denoise
from sdkit.errors import ConfigError
from sdkit.plan import Plan, make_plan
from sdkit.samplers import SAMPLERS
from sdkit.schedule import NoiseSchedule

CLASSES: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
MODULES = {name: __import__(cls.__module__, fromlist=["x"]) for name, cls in CLASSES.items()}
ODE = ("ddim", "euler", "heun", "dpmpp_2m")
MEAN, STD = 0.3, 0.7


class Doubled:
    """A module whose float32 is float64: diffusers computes its tables and steps in the precision we compare in."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, "float64" if name == "float32" else name)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES.values():
        for name in ("torch", "np"):
            if isinstance(getattr(module, name, None), ModuleType):
                monkeypatch.setattr(module, name, Doubled(getattr(module, name)))


def toy(x: Tensor, t: Tensor) -> Tensor:
    """Deterministic, nonlinear, different at every timestep."""
    return 0.7 * torch.tanh(1.3 * x + torch.cos(t.double() / 200)) + 0.2 * x


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def their_scheduler(name: str, prediction: str, spacing: str, **extra: Any) -> Any:
    extra = ({"clip_sample": False} if name in ("ddim", "ddpm") else {}) | extra
    extra = ({"set_alpha_to_one": False} if name == "ddim" else {}) | extra
    return CLASSES[name](
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        timestep_spacing=spacing, steps_offset=1, **extra,
    )  # fmt: skip


def check_steps(
    name: str, prediction: str, spacing: str, steps: int, ours: dict[str, Any], theirs: dict[str, Any], eta: float = 0.0
) -> None:
    scheduler = their_scheduler(name, prediction, spacing, **theirs)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule(
        prediction_type=prediction, rescale_betas_zero_snr=theirs.get("rescale_betas_zero_snr", False)
    )
    plan = make_plan(name, schedule, steps, timestep_spacing=spacing, steps_offset=1, eta=eta, **ours)
    noise, first = normal(2, 4, 6, 5), len(scheduler.timesteps) - len(plan.timesteps)
    times = scheduler.timesteps[first:]
    torch.testing.assert_close(plan.timesteps, times.double(), rtol=1e-9, atol=1e-9)
    if first == 0:
        x = noise * float(scheduler.init_noise_sigma)
        image = None
    else:
        image = normal(2, 4, 6, 5, seed=1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(image, noise, times[:1])
    seen: list[Tensor] = []
    plan.run(toy, noise, torch.Generator().manual_seed(7), image, lambda k, t, latents, x0: seen.append(latents))
    generator = torch.Generator().manual_seed(7)
    extra = {} if name == "heun" else {"generator": generator}
    extra |= {"eta": eta} if name == "ddim" else {}
    assert len(seen) == len(times) > 0
    for k, t in enumerate(times):
        out = toy(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **extra).prev_sample
        assert x.dtype == torch.float64
        torch.testing.assert_close(seen[k], x, rtol=1e-9, atol=1e-9 * float(x.abs().max()), msg=f"step {k}")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CLASSES)
def test_steps_are_those_of_diffusers(name: str, prediction: str, spacing: str, steps: int) -> None:
    if name == "ddim" and spacing == "linspace":
        pytest.skip("diffusers' DDIM goes to t - 1000 // steps and not to the next timestep: see the Gaussian tests")
    check_steps(name, prediction, spacing, steps, {}, {})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_sigma_spacings_are_those_of_diffusers(name: str, kind: str, steps: int) -> None:
    check_steps(name, "epsilon", "leading", steps, {"sigmas": kind}, {f"use_{kind}_sigmas": True})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", CLASSES)
def test_strength_starts_where_diffusers_does(name: str, strength: float) -> None:
    check_steps(name, "v_prediction", "leading", 10, {"strength": strength}, {})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_with_eta(prediction: str, eta: float) -> None:
    check_steps("ddim", prediction, "leading", 10, {}, {}, eta=eta)
    check_steps("ddim", prediction, "trailing", 10, {"set_alpha_to_one": True}, {"set_alpha_to_one": True}, eta=eta)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["ddpm", "euler", "heun", "dpmpp_2m"])
def test_sample_prediction(name: str) -> None:
    check_steps(name, "sample", "trailing", 10, {}, {})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_end_at_the_lowest_sigma(name: str, steps: int) -> None:
    end = {"final_sigmas_type": "sigma_min"}
    check_steps(name, "epsilon", "leading", steps, end, end)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m"])
def test_zero_terminal_snr_is_that_of_diffusers(name: str) -> None:
    zero = {"rescale_betas_zero_snr": True}
    check_steps(name, "v_prediction", "trailing", 10, {}, zero)


def gaussian(plan: Plan, k: int, x_in: Tensor) -> Tensor:
    """The exact network for data N(MEAN, STD²) at call k's own level, in the plan's prediction type."""
    signal, noise = (plan.levels[k] / plan.levels[k].norm()).tolist()
    x0 = MEAN + signal * STD**2 / ((signal * STD) ** 2 + noise**2) * (x_in - signal * MEAN)
    eps = (x_in - signal * x0) / noise
    return {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}[plan.prediction_type]


def flow(plan: Plan, start: Tensor, to: int) -> Tensor:
    """The exact solution of the probability flow ODE, from register 0 at the first level to levels[to]."""
    (a, s), (b, r) = plan.levels[0].tolist(), plan.levels[to].tolist()
    return b * MEAN + (start - a * MEAN) * math.hypot(b * STD, r) / math.hypot(a * STD, s)


def trace(plan: Plan, start: Tensor, seed: int = 3) -> list[Tensor]:
    """Register 0 before each call and at the end."""
    seen, generator = [start], torch.Generator().manual_seed(seed)
    denoise(
        plan,
        lambda x, k: (None, gaussian(plan, k, x)),
        start,
        lambda: torch.randn(start.shape, generator=generator, dtype=start.dtype),
        on_step=lambda k, t, latents, x0: seen.append(latents),
    )
    return seen


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Down to the lowest sigma, which is the last point of a spacing by sigma; halved steps, error / 2^order."""
    errors: list[float] = []
    for steps in (40, 80, 160):
        plan = make_plan(name, NoiseSchedule(), steps, sigmas="exponential", timestep_spacing="linspace")
        start = plan.start(normal(64))
        errors.append(float((trace(plan, start)[-2] - flow(plan, start, -2)).abs().max()))
    for coarse, fine in pairwise(errors):
        assert order - 0.25 < math.log2(coarse / fine) < order + 0.5, errors


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sigmas", [None, "karras"])
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", ODE)
def test_ode_samplers_converge(name: str, strength: float, sigmas: str | None, spacing: str) -> None:
    """Also where diffusers' DDIM is wrong: linspace, and 300 steps that do not divide 1000."""
    errors: list[float] = []
    for steps in (30, 300):
        plan = make_plan(name, NoiseSchedule(), steps, sigmas, spacing, strength=strength, set_alpha_to_one=True)
        start = plan.start(normal(64), MEAN + STD * normal(64, seed=1))
        errors.append(float((trace(plan, start)[-1] - flow(plan, start, -1)).abs().max()))
    assert errors[1] < 0.025
    assert errors[1] < 0.6 * errors[0] or errors[1] < 4e-3


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sigmas", [None, "beta"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_prediction_types_agree(name: str, sigmas: str | None, strength: float) -> None:
    eta = 0.5 if name == "ddim" else 0.0
    results: list[Tensor] = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        plan = make_plan(name, NoiseSchedule(prediction_type=prediction), 12, sigmas, strength=strength, eta=eta)
        results.append(torch.stack(trace(plan, plan.start(normal(50), normal(50, seed=1)))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("name", "steps", "eta"), [("ddpm", 1000, 0.0), ("euler_a", 500, 0.0), ("ddim", 500, 1.0)])
def test_stochastic_samplers_keep_mean_and_deviation(name: str, steps: int, eta: float, strength: float) -> None:
    n = 4096
    plan = make_plan(name, NoiseSchedule(), steps, strength=strength, eta=eta)
    end = trace(plan, plan.start(normal(n), MEAN + STD * normal(n, seed=1)))[-1]
    assert abs(float(end.mean()) - MEAN) < 3 * STD / math.sqrt(n)
    assert abs(float(end.std()) - STD) < 3 * STD / math.sqrt(2 * n)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sigmas", [None, "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr(name: str, sigmas: str | None, prediction: str) -> None:
    n = 4096
    schedule = NoiseSchedule(prediction_type=prediction, rescale_betas_zero_snr=True)
    plan = make_plan(name, schedule, 400, sigmas)
    end = trace(plan, plan.start(normal(n)))[-1]
    assert abs(float(end.mean()) - MEAN) < 3 * STD / math.sqrt(n)
    assert abs(float(end.std()) - STD) < 0.05


@pytest.mark.parametrize("name", SAMPLERS)
def test_epsilon_has_no_meaning_at_zero_snr(name: str) -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match="epsilon"):
        make_plan(name, schedule, 10, timestep_spacing="trailing")
    make_plan(name, schedule, 10, timestep_spacing="trailing", strength=0.5)
    make_plan(name, schedule, 10, timestep_spacing="leading")


@pytest.mark.parametrize(("name", "draws"), [("ddim", 0), ("euler", 0), ("heun", 0), ("dpmpp_2m", 0), ("euler_a", 10)])
def test_draws(name: str, draws: int) -> None:
    assert int(make_plan(name, NoiseSchedule(), 10).draws_noise.sum()) == draws


def test_draws_that_depend() -> None:
    assert int(make_plan("ddim", NoiseSchedule(), 10, eta=0.1).draws_noise.sum()) == 10
    ends_at_0 = make_plan("ddpm", NoiseSchedule(), 10, timestep_spacing="linspace")
    assert ends_at_0.draws_noise.tolist() == [True] * 9 + [False]
    assert make_plan("ddpm", NoiseSchedule(), 10, timestep_spacing="trailing").draws_noise.all()
    assert make_plan("euler_a", NoiseSchedule(), 10).coefficients[-1, 0, -1] == 0

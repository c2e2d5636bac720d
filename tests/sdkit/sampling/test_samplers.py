"""Each sampler against diffusers, step by step with the sample carried on, and against closed-form Gaussian results."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import sdkernels
from sdkit.errors import ConfigError
from sdkit.sampling.plan import Plan, denoise
from sdkit.sampling.planning import make_plan
from sdkit.sampling.samplers import SAMPLERS
from sdkit.sampling.schedule import NoiseSchedule


def sde_scheduler() -> Any:
    """diffusers' class, which wants torchsde for a Brownian tree that every test replaces."""
    sys.modules["torchsde"] = ModuleType("torchsde")
    try:
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    finally:
        del sys.modules["torchsde"]


def singlestep(timestep_spacing: str, steps_offset: int, **settings: Any) -> Any:
    """diffusers' class, which knows one spacing alone."""
    return diffusers.DPMSolverSinglestepScheduler(**settings, lower_order_final=True)


MULTISTEP: Any = diffusers.DPMSolverMultistepScheduler
CLASSES: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": partial(diffusers.PNDMScheduler, skip_prk_steps=True),
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpm2": diffusers.KDPM2DiscreteScheduler,
    "dpm2_a": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmpp_sde": sde_scheduler(),
    "dpmpp_2m": MULTISTEP,
    "dpmpp_2m_sde": partial(MULTISTEP, algorithm_type="sde-dpmsolver++"),
    "dpmpp_2s": singlestep,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
MODULES = [sys.modules[getattr(cls, "func", cls).__module__] for cls in CLASSES.values() if cls is not singlestep]
MODULES.append(sys.modules[diffusers.DPMSolverSinglestepScheduler.__module__])
ODE = ("ddim", "pndm", "euler", "heun", "lms", "dpm2", "dpmpp_2m", "dpmpp_2s", "deis", "unipc")
STOCHASTIC = ("ddpm", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm")
MEAN, STD = 0.3, 0.7


class Doubled:
    """A module whose float32 is float64: diffusers computes its tables and steps in the precision we compare in."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, "float64" if name == "float32" else name)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
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
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1,
        **extra,
    )


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
    parameters = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in (("generator", generator), ("eta", eta)) if key in parameters}
    if name == "dpmpp_sde":
        scheduler.noise_sampler = brownian_path(generator, noise)
    assert len(seen) == len(times) > 0
    for k, t in enumerate(times):
        out = toy(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **extra).prev_sample
        assert x.dtype == torch.float64
        close = 1e-6 if name == "lcm" else 1e-9  # its boundary condition is computed in float32
        torch.testing.assert_close(seen[k], x, rtol=close, atol=close * float(x.abs().max()), msg=f"step {k}")


def brownian_path(generator: torch.Generator, like: Tensor) -> Any:
    """W(b) - W(a), scaled to unit variance, for the two intervals that each step asks for: its half and its whole."""
    halves: list[tuple[Tensor, Tensor]] = []

    def sample(a: Tensor, b: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype)
        if not halves:
            halves.append((drawn, b))
            return drawn
        first, middle = halves.pop()
        return ((a - middle).sqrt() * first + (middle - b).sqrt() * drawn) / (a - b).sqrt()

    return sample


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CLASSES)
def test_steps_are_those_of_diffusers(name: str, prediction: str, spacing: str, steps: int) -> None:
    if name in ("ddim", "pndm") and spacing == "linspace":
        pytest.skip("diffusers goes to t - 1000 // steps and not to the next timestep: see the Gaussian tests")
    if name == "pndm" and prediction == "v_prediction":
        pytest.skip("diffusers mixes v of different timesteps: see test_prediction_types_agree")
    if name == "dpmpp_2s" and spacing != "linspace":
        pytest.skip("diffusers' class has no other spacing")
    check_steps(name, prediction, spacing, steps, {}, {})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize(
    "name",
    ["euler", "heun", "lms", "dpm2", "dpm2_a", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "deis"],
)
def test_sigma_spacings_are_those_of_diffusers(name: str, kind: str, steps: int) -> None:
    check_steps(name, "epsilon", "leading", steps, {"sigmas": kind}, {f"use_{kind}_sigmas": True})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", CLASSES)
def test_strength_starts_where_diffusers_does(name: str, strength: float) -> None:
    if name in ("pndm", "lms"):
        pytest.skip("diffusers starts as if it had a past: ours starts fresh, see test_ode_samplers_converge")
    spacing = "linspace" if name == "dpmpp_2s" else "leading"
    check_steps(name, "v_prediction", spacing, 10, {"strength": strength}, {})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11, 12])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep_orders_and_solvers_are_those_of_diffusers(order: int, kind: str, end: str, steps: int) -> None:
    both = {"solver_order": order, "solver_type": kind, "final_sigmas_type": end}
    check_steps("dpmpp_2s", "epsilon", "linspace", steps, both, both)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_with_eta(prediction: str, eta: float) -> None:
    check_steps("ddim", prediction, "leading", 10, {}, {}, eta=eta)
    check_steps("ddim", prediction, "trailing", 10, {"set_alpha_to_one": True}, {"set_alpha_to_one": True}, eta=eta)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_tcd_with_eta(eta: float, prediction: str) -> None:
    check_steps("tcd", prediction, "leading", 10, {}, {}, eta=eta)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_timesteps_of_the_distillation(name: str) -> None:
    given = {"original_inference_steps": 100}
    check_steps(name, "epsilon", "leading", 8, given, given)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_of_unipc(order: int, solver_type: str, steps: int) -> None:
    """bh1 down to the lowest sigma: at sigma 0 diffusers multiplies infinity by nothing."""
    given = {"solver_order": order, "solver_type": solver_type}
    end: dict[str, Any] = {"final_sigmas_type": "sigma_min"} if solver_type == "bh1" else {}
    check_steps("unipc", "v_prediction", "trailing", steps, given | end, given | end)


@pytest.mark.parametrize("sigmas", [None, "karras"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_is_finite(order: int, end: str, sigmas: str | None) -> None:
    plan = make_plan("unipc", NoiseSchedule(), 10, sigmas, final_sigmas_type=end, solver_order=order, solver_type="bh1")
    assert plan.coefficients.isfinite().all()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["deis", "dpmpp_2m"])
def test_solver_orders(name: str, order: int, steps: int) -> None:
    check_steps(name, "epsilon", "leading", steps, {"solver_order": order}, {"solver_order": order})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_solver_type_heun(name: str) -> None:
    check_steps(name, "epsilon", "leading", 25, {"solver_type": "heun"}, {"solver_type": "heun"})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "name", ["ddpm", "euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis", "lcm", "tcd"]
)
def test_sample_prediction(name: str) -> None:
    check_steps(name, "sample", "trailing", 10, {}, {})


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_end_at_the_lowest_sigma(name: str, steps: int) -> None:
    end = {"final_sigmas_type": "sigma_min"}
    check_steps(name, "epsilon", "leading", steps, end, end)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "name", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm", "tcd"]
)
def test_zero_terminal_snr_is_that_of_diffusers(name: str) -> None:
    zero = {"rescale_betas_zero_snr": True}
    check_steps(name, "v_prediction", "trailing", 10, {}, zero)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigmas", [None, "karras"])
@pytest.mark.parametrize("name", ["dpmpp_2s_a", "dpmpp_3m_sde"])
def test_steps_are_those_of_k_diffusion(name: str, sigmas: str | None, prediction: str) -> None:
    """diffusers lacks the first and has the second wrong (below). Restated here in k-diffusion's variables."""
    plan = make_plan(
        name, NoiseSchedule(prediction_type=prediction), 16, sigmas, solver_type="heun" if "3m" in name else None
    )
    noise, generator = normal(40), torch.Generator().manual_seed(5)
    calls = iter(range(len(plan.timesteps)))

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        k = next(calls)
        c = math.sqrt(1 + sigma**2)
        assert math.isclose(float(plan.levels[k, 1] / plan.levels[k, 0]), sigma, rel_tol=1e-9)
        out = toy(x / c, plan.timesteps[k])
        return x - sigma * out if prediction == "epsilon" else x / c**2 - sigma / c * out

    def draw() -> Tensor:
        return torch.randn(noise.shape, generator=generator, dtype=noise.dtype)

    ratio = (plan.levels[:, 1] / plan.levels[:, 0]).tolist()
    sigmas_ = ratio if "3m" in name else [*ratio[:-1:2], 0.0]
    x = noise * plan.init_scale / float(plan.levels[0, 0])
    mine = plan.run(toy, noise, torch.Generator().manual_seed(5))
    theirs = _k_2s_a(x, sigmas_, denoiser, draw) if "2s" in name else _k_3m_sde(x, sigmas_, denoiser, draw)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def _k_2s_a(x: Tensor, sigmas: list[float], denoiser: Any, draw: Any) -> Tensor:
    for sigma, after in pairwise(sigmas):
        d = denoiser(x, sigma)
        up = min(after, math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        down = math.sqrt(after**2 - up**2)
        if down == 0:
            return x + (x - d) / sigma * (down - sigma)
        t, t_next = -math.log(sigma), -math.log(down)
        s = t + (t_next - t) / 2
        middle = math.exp(-s) / math.exp(-t) * x - math.expm1(t - s) * d
        d = denoiser(middle, math.exp(-s))
        x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(t - t_next) * d + draw() * up
    return x


def _k_3m_sde(x: Tensor, sigmas: list[float], denoiser: Any, draw: Any) -> Tensor:
    past: list[tuple[Tensor, float]] = []
    for sigma, after in pairwise(sigmas):
        d, noise = denoiser(x, sigma), draw()
        if after == 0:
            return d
        h = math.log(sigma / after)
        x = math.exp(-2 * h) * x - math.expm1(-2 * h) * d
        phi2 = math.expm1(-2 * h) / (2 * h) + 1
        if past:
            first = (d - past[0][0]) / (past[0][1] / h)
            if len(past) == 1:
                x = x + phi2 * first
            else:
                r0, r1 = past[0][1] / h, past[1][1] / h
                second = (past[0][0] - past[1][0]) / r1
                d1, d2 = first + (first - second) * r0 / (r0 + r1), (first - second) / (r0 + r1)
                x = x + phi2 * d1 - (phi2 / (2 * h) - 0.5) * d2
        x = x + noise * after * math.sqrt(-math.expm1(-2 * h))
        past = [(d, h), *past[:1]]
    return x


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


def trace(plan: Plan, start: Tensor, seed: int = 3, network: Any = gaussian) -> list[Tensor]:
    """Register 0 before each call and at the end."""
    seen, generator = [start], torch.Generator().manual_seed(seed)
    denoise(
        plan,
        lambda x, k: (None, network(plan, k, x)),
        start,
        lambda: torch.randn(start.shape, generator=generator, dtype=start.dtype),
        on_step=lambda k, t, latents, x0: seen.append(latents),
    )
    return seen


@pytest.mark.parametrize(
    ("name", "solver_order", "order"),
    [
        ("ddim", None, 1),
        ("euler", None, 1),
        ("pndm", None, 2),
        ("heun", None, 2),
        ("dpm2", None, 2),
        ("lms", 1, 1),
        ("lms", 2, 2),
        ("lms", 4, 3),
        ("dpmpp_2m", 1, 1),
        ("dpmpp_2m", 2, 2),
        ("dpmpp_2m", 3, 2),
        ("deis", 1, 1),
        ("deis", 2, 2),
        ("deis", 3, 2),
        ("unipc", 1, 2),
        ("unipc", 2, 3),
        ("unipc", 3, 3),
    ],
)
def test_order_of_convergence(name: str, solver_order: int | None, order: int) -> None:
    """Down to the lowest sigma, which is the last point of a spacing by sigma; halved steps, error / 2^order.

    A multistep sampler that starts with one step of order 1 is of order 2 in the end, however many it looks back;
    UniPC corrects that step too. dpmpp_2m of order 3 weighs the second difference as its authors do, half.
    """
    errors: list[float] = []
    for steps in (40, 80, 160):
        plan = make_plan(
            name, NoiseSchedule(), steps, sigmas="exponential", timestep_spacing="linspace", solver_order=solver_order
        )
        start = plan.start(normal(64))
        errors.append(float((trace(plan, start)[-2] - flow(plan, start, -2)).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) > order - 0.25, errors
        assert math.log2(coarse / fine) < order + 1 or fine < 1e-4, errors


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
    eta = 0.5 if SAMPLERS[name].takes_eta else 0.0
    if sigmas and SAMPLERS[name].points == "distilled":
        pytest.skip("runs on the timesteps of its distillation")
    results: list[Tensor] = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        plan = make_plan(name, NoiseSchedule(prediction_type=prediction), 12, sigmas, strength=strength, eta=eta)
        results.append(torch.stack(trace(plan, plan.start(normal(50), normal(50, seed=1)))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-9)


def consistent(plan: Plan, k: int, x_in: Tensor, eta: float = 0.5) -> Tensor:
    """The exact network of a consistency model: lcm's leads to where the ODE through x_in ends, tcd's to where it is at
    the lower level that the step asks for."""
    (a, s), (b, r) = plan.levels[k].tolist(), (1.0, 0.0)
    if plan.sampler == "tcd":
        below = int((1 - eta) * float(plan.timesteps[k + 1])) if k + 1 < len(plan.timesteps) else 0
        acp = float(NoiseSchedule().alphas_cumprod[below])
        b, r = math.sqrt(acp), math.sqrt(1 - acp)
    end = b * MEAN + (x_in - a * MEAN) * math.hypot(b * STD, r) / math.hypot(a * STD, s)
    x0 = (s * end - r * x_in) / (s * b - r * a)  # both points lie on one line of x0 and epsilon
    eps = (x_in - a * x0) / s
    return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}[plan.prediction_type]


def network_of(name: str) -> Any:
    return consistent if name in ("lcm", "tcd") else gaussian


RANDOM_RUNS = [
    *((name, 1000 if name == "ddpm" else 500, 0.0) for name in STOCHASTIC),
    ("ddim", 500, 1.0),
    ("tcd", 500, 0.5),
]


@pytest.mark.parametrize(("name", "steps", "eta"), RANDOM_RUNS)
def test_stochastic_samplers_keep_mean_and_deviation(name: str, steps: int, eta: float) -> None:
    n = 4096
    plan = make_plan(name, NoiseSchedule(), steps, strength=0.5, eta=eta, original_inference_steps=500)
    start = plan.start(normal(n), MEAN + STD * normal(n, seed=1))
    end = trace(plan, start, network=network_of(name))[-1]
    assert abs(float(end.mean()) - MEAN) < 3 * STD / math.sqrt(n)
    assert abs(float(end.std()) - STD) < 3 * STD / math.sqrt(2 * n)


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("name", "steps", "eta"), RANDOM_RUNS)
def test_stochastic_samplers_at_every_strength(name: str, steps: int, eta: float, strength: float) -> None:
    """As above, in exact moments: within what 3 standard errors of 4096 samples would allow."""
    plan = make_plan(name, NoiseSchedule(), steps, strength=strength, eta=eta, original_inference_steps=500)
    mean, deviation = moments(plan, network_of(name))
    assert abs(mean) < 3 * STD / math.sqrt(4096)
    assert abs(deviation) < 3 * STD / math.sqrt(2 * 4096)


def moments(plan: Plan, network: Any = gaussian) -> tuple[float, float]:
    """How far the mean and the deviation of register 0 end from exact ones: every step is linear in a Gaussian, so
    that mean and covariance of the registers can be carried on without a single sample."""
    size = plan.num_registers
    (signal, noise), (end_signal, end_noise) = plan.levels[0].tolist(), plan.levels[-1].tolist()
    mean, covariance = np.zeros(size), np.zeros((size, size))
    mean[0], covariance[0, 0] = signal * MEAN, (signal * STD) ** 2 + noise**2
    for k, matrix in enumerate(plan.coefficients.numpy()):
        points = torch.tensor([0.0, 1.0], dtype=torch.float64)
        offset, at_one = network(plan, k, points).tolist()
        step = matrix[:, :size].copy()
        step[:, 0] += matrix[:, size] * (at_one - offset) * float(plan.input_scale[k])
        mean = step @ mean + matrix[:, size] * offset
        covariance = step @ covariance @ step.T + np.outer(matrix[:, size + 1], matrix[:, size + 1])
    return mean[0] - end_signal * MEAN, math.sqrt(covariance[0, 0]) - math.hypot(end_signal * STD, end_noise)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "lcm"])
def test_deviation_converges(name: str) -> None:
    """The error of the deviation, without what the last step to sigma 0 takes, at least halves with the steps."""
    errors = [abs(moments(make_plan(name, NoiseSchedule(), n, "exponential", "linspace"))[1]) for n in (25, 50, 100)]
    for coarse, fine in pairwise(errors):
        assert fine < max(0.6 * coarse, 1e-3), errors
    assert abs(moments(make_plan(name, NoiseSchedule(), 50, "exponential", "linspace"))[0]) < 1e-9


def test_third_order_sde_of_diffusers_is_wrong() -> None:
    """diffusers adds -1 to the weight of the second difference, which leaves an error of first order: at 50 steps its
    deviation is off by 2 %, ours (k-diffusion's) by 0.1 %."""
    scheduler = MULTISTEP(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="sde-dpmsolver++",
        solver_order=3,
        use_exponential_sigmas=True,
        timestep_spacing="linspace",
    )
    plan = make_plan("dpmpp_3m_sde", NoiseSchedule(), 50, "exponential", "linspace")
    scheduler.set_timesteps(50)
    x, generator = normal(40_000), torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(gaussian(plan, k, x), t, x, generator=generator).prev_sample
    assert float(x.std()) - STD > 0.012  # five standard errors
    assert abs(moments(plan)[1]) < 0.001


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sigmas", [None, "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr(name: str, sigmas: str | None, prediction: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction, rescale_betas_zero_snr=True)
    if SAMPLERS[name].points == "distilled" and sigmas:
        pytest.skip("runs on the timesteps of its distillation")
    plan = make_plan(name, schedule, 400, sigmas, original_inference_steps=500)
    mean, deviation = moments(plan, consistent if name == "lcm" else gaussian)
    assert abs(mean) < 0.01
    assert abs(deviation) < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_epsilon_has_no_meaning_at_zero_snr(name: str) -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match="epsilon"):
        make_plan(name, schedule, 10, timestep_spacing="trailing")
    make_plan(name, schedule, 10, timestep_spacing="trailing", strength=0.5)
    if SAMPLERS[name].points != "distilled":
        make_plan(name, schedule, 10, timestep_spacing="leading")


def test_draws() -> None:
    draws = {name: int(make_plan(name, NoiseSchedule(), 10).draws_noise.sum()) for name in SAMPLERS}
    assert draws == dict.fromkeys((*ODE, "tcd"), 0) | {
        "ddpm": 10,
        "euler_a": 10,
        "dpm2_a": 9,
        "dpmpp_2s_a": 9,
        "dpmpp_sde": 18,
        "dpmpp_2m_sde": 10,
        "dpmpp_3m_sde": 10,
        "lcm": 9,
    }


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_kernel_runs_every_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch a call however many registers, and the latents of the plain path."""
    plan = make_plan(name, NoiseSchedule(), 6, eta=0.5 if SAMPLERS[name].takes_eta else 0.0)
    launches: list[int] = []
    module = sys.modules["sdkernels.sampler_step"]
    kernel = module.sampler_step_forward

    def counted(registers: Tensor, *rest: Any) -> Tensor:
        launches.append(len(registers))
        return kernel(registers, *rest)

    monkeypatch.setattr(module, "sampler_step_forward", counted)
    results: list[Tensor] = []
    for backend in ("triton", "eager"):
        generator = torch.Generator().manual_seed(2)
        with sdkernels.backend(backend):
            results.append(
                denoise(
                    plan,
                    lambda x, k: (0.5 * toy(x, plan.timesteps[k]).float(), toy(x, plan.timesteps[k]).float()),
                    plan.start(normal(1, 4, 5, 7).float()),
                    lambda generator=generator: torch.randn(1, 4, 5, 7, generator=generator),
                )
            )
    assert launches == [plan.num_registers] * len(plan.timesteps)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4 * float(results[1].abs().max()))


def test_draws_that_depend() -> None:
    assert int(make_plan("ddim", NoiseSchedule(), 10, eta=0.1).draws_noise.sum()) == 10
    ends_at_0 = make_plan("ddpm", NoiseSchedule(), 10, timestep_spacing="linspace")
    assert ends_at_0.draws_noise.tolist() == [True] * 9 + [False]
    assert make_plan("ddpm", NoiseSchedule(), 10, timestep_spacing="trailing").draws_noise.all()
    assert make_plan("euler_a", NoiseSchedule(), 10).coefficients[-1, 0, -1] == 0

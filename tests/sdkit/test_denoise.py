"""The loop: order of calls and draws, guidance, the step callback, precision, and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import sdkernels
from sdkit.denoise import denoise
from sdkit.errors import NumericalError
from sdkit.guidance import Guidance, combine, rescale
from sdkit.plan import make_plan
from sdkit.samplers import SAMPLERS
from sdkit.schedule import NoiseSchedule

SHAPE = (2, 4, 5, 3)


def normal(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uncond_of(x: Tensor, k: int) -> Tensor:
    return torch.tanh(x + k)


def cond_of(x: Tensor, k: int) -> Tensor:
    return torch.tanh(0.8 * x - k) + 0.1


def no_noise() -> Tensor:
    raise AssertionError("a deterministic plan draws no noise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampler_step_is_a_matrix_product(dtype: torch.dtype) -> None:
    plan = make_plan("heun", NoiseSchedule(), 3)
    registers = torch.stack([normal(i) for i in range(3)]).to(dtype)
    u, c, n = (normal(i).to(dtype) for i in (4, 5, 6))
    coefficients = torch.randn(plan.coefficients.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    columns = torch.cat([registers, (u + 3 * (c - u))[None], n[None]]).double().numpy()
    expected = np.tensordot(coefficients[1].double().numpy(), columns, axes=1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for step in (1, torch.tensor(1)):
        ours = sdkernels.sampler_step(registers, u, c, n, coefficients, step, 3.0)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_and_draws_come_in_order(name: str) -> None:
    plan = make_plan(name, NoiseSchedule(), 5)
    log: list[str] = []

    def predict(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        log.append(f"call {k}")
        return None, cond_of(x, k)

    def draw() -> Tensor:
        log.append("draw")
        return normal(len(log))

    denoise(plan, predict, plan.start(normal()), draw, on_step=lambda k, t, latents, x0: log.append(f"step {k}"))
    expected: list[str] = []
    for k, draws in enumerate(plan.draws_noise.tolist()):
        expected += [f"call {k}", *(["draw"] if draws else []), f"step {k}"]
    assert log == expected


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_guidance(name: str, scale: float) -> None:
    """Combined inside the step, or by hand before: the same; at 0 and 1 one prediction is enough."""
    plan, guidance = make_plan(name, NoiseSchedule(), 5), Guidance(scale)
    draws, again = iter(map(normal, range(1, 9))), iter(map(normal, range(1, 9)))

    def predict(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        return (uncond_of(x, k) if guidance.needs_uncond else None, cond_of(x, k) if guidance.needs_cond else None)

    def by_hand(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        return None, combine(uncond_of(x, k), cond_of(x, k), scale)

    inside = denoise(plan, predict, plan.start(normal()), lambda: next(draws), guidance)
    outside = denoise(plan, by_hand, plan.start(normal()), lambda: next(again))
    torch.testing.assert_close(inside, outside, rtol=1e-10, atol=1e-10)


def test_guidance_rescale_is_taken_on_the_network_output() -> None:
    plan = make_plan("dpmpp_2m", NoiseSchedule(prediction_type="v_prediction"), 5)
    guidance = Guidance(7.5, 0.7)

    def by_hand(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        return None, rescale(combine(uncond_of(x, k), cond_of(x, k), 7.5), cond_of(x, k), 0.7)

    start = plan.start(normal())
    ours = denoise(plan, lambda x, k: (uncond_of(x, k), cond_of(x, k)), start, no_noise, guidance)
    torch.testing.assert_close(ours, denoise(plan, by_hand, start, no_noise), rtol=1e-12, atol=1e-12)


def test_on_step_replaces_the_latents_and_stops() -> None:
    plan = make_plan("dpmpp_2m", NoiseSchedule(), 5)
    inputs: list[Tensor] = []

    def predict(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        inputs.append(x)
        return None, cond_of(x, k)

    def on_step(k: int, t: float, latents: Tensor, x0: object) -> Tensor | str | None:
        assert t == plan.timesteps[k]
        return normal(9) if k == 1 else ("stop" if k == 3 else None)

    end = denoise(plan, predict, plan.start(normal()), no_noise, on_step=on_step)  # type: ignore[arg-type]
    assert len(inputs) == 4
    torch.testing.assert_close(inputs[2], normal(9) * plan.input_scale[2])
    plain: list[Tensor] = []
    denoise(
        plan, lambda x, k: (None, cond_of(x, k)), plan.start(normal()), no_noise,
        on_step=lambda k, t, latents, x0: plain.append(latents),
    )  # fmt: skip
    torch.testing.assert_close(inputs[1], plain[0] * plan.input_scale[1])
    assert not torch.allclose(end, plain[3])


def test_x0_estimate_is_exact_for_an_exact_network() -> None:
    """A network that knows the clean latents: every estimate is them, in every scaling and with guidance."""
    clean = normal(7)
    for name in SAMPLERS:
        plan, estimates = make_plan(name, NoiseSchedule(), 5), list[Tensor]()

        def predict(x: Tensor, k: int, plan=plan) -> tuple[Tensor | None, Tensor | None]:
            signal, noise = (plan.levels[k] * plan.input_scale[k]).tolist()
            eps = (x - signal * clean) / noise
            return eps - 1, eps - 0.5  # uncond + 2 (cond - uncond) = eps

        denoise(
            plan, predict, plan.start(normal()), normal, Guidance(2.0),
            on_step=lambda k, t, latents, x0, into=estimates: into.append(x0()),
        )  # fmt: skip
        for estimate in estimates:
            torch.testing.assert_close(estimate, clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_networks_keep_float32_latents(name: str) -> None:
    plan = make_plan(name, NoiseSchedule(), 8)
    seen: list[torch.dtype] = []

    def predict(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        seen.append(x.dtype)
        return None, cond_of(x.double(), k).to(torch.bfloat16)

    end = denoise(plan, predict, plan.start(normal()).to(torch.bfloat16), lambda: normal().to(torch.bfloat16))
    exact = denoise(plan, lambda x, k: (None, cond_of(x, k)), plan.start(normal()), normal)
    assert end.dtype == torch.float32
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(end.double(), exact, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_latents_are_an_error_that_names_the_call(bad: float) -> None:
    plan = make_plan("euler", NoiseSchedule(), 5)
    with pytest.raises(NumericalError, match=r"after call 3 of 5 .timestep 599"):
        denoise(plan, lambda x, k: (None, x * (bad if k == 2 else 1)), plan.start(normal()), no_noise)


def test_no_calls_give_the_start() -> None:
    plan = make_plan("ddim", NoiseSchedule(), 5, strength=0)
    start = plan.start(normal(), normal(1))
    assert torch.equal(denoise(plan, lambda x, k: (None, x), start, no_noise), start)
    assert torch.equal(start, normal(1))

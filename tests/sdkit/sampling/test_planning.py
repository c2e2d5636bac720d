"""Plans: their table, their timesteps, how much of them is run, and the errors of make_plan."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sdkit.errors import ConfigError
from sdkit.sampling.planning import make_plan, steps_to_run
from sdkit.sampling.samplers import SAMPLERS
from sdkit.sampling.schedule import NoiseSchedule


def toy(x: Tensor, t: Tensor) -> Tensor:
    return 0.7 * torch.tanh(1.3 * x + torch.cos(t.double() / 200)) + 0.2 * x


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "strength", "run"),
    [
        (50, 0.58, 29),
        (100, 0.29, 29),
        (100, 0.57, 57),
        (100, 0.58, 58),
        (50, 0.75, 37),
        (10, 0.01, 1),
        (30, 0.0, 0),
        (30, 1.0, 30),
        (30, 0.999, 29),
        (1, 0.2, 1),
        (1000, 1e-9, 1),
    ],
)
def test_steps_to_run(steps: int, strength: float, run: int) -> None:
    assert steps_to_run(steps, strength) == run
    plan = make_plan("euler", NoiseSchedule(), steps, strength=strength)
    assert plan.num_steps == run == len(plan.timesteps)


def test_every_strength_in_hundredths_is_exact() -> None:
    for steps in (7, 20, 50, 100):
        for percent in range(1, 101):
            assert steps_to_run(steps, percent / 100) == max(1, steps * percent // 100)


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_cuts_the_same_schedule_and_starts_fresh(name: str) -> None:
    whole, part = make_plan(name, NoiseSchedule(), 10), make_plan(name, NoiseSchedule(), 10, strength=0.5)
    again = 1 if name == "pndm" else 0  # its first step calls the network at both ends
    for tail, all_ in ((part.timesteps, whole.timesteps), (part.levels, whole.levels)):
        assert torch.equal(tail[2 * again :], all_[2 * again - len(tail) :])
        assert tail[0].tolist() == all_[again - len(tail)].tolist()
    assert (part.init_image_scale, part.init_scale) == tuple(part.levels[0].tolist())
    assert (part.coefficients[0, 0, 1:-2] == 0).all()  # no memory at the first call
    assert whole.init_image_scale == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_strength_0_is_the_image_and_strength_1_ignores_it(name: str) -> None:
    noise, image = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    none = make_plan(name, NoiseSchedule(), 10, strength=0)
    assert torch.equal(none.run(toy, noise, x0=image), image)
    plan = make_plan(name, NoiseSchedule(), 10)
    g = torch.Generator
    assert torch.equal(plan.run(toy, noise, g().manual_seed(1), image), plan.run(toy, noise, g().manual_seed(1)))
    with pytest.raises(ConfigError, match="x0"):
        make_plan(name, NoiseSchedule(), 10, strength=0.5).run(toy, noise)


@pytest.mark.parametrize("name", SAMPLERS)
def test_input_scale_gives_unit_variance(name: str) -> None:
    plan = make_plan(name, NoiseSchedule(), 10, sigmas=None if SAMPLERS[name].points == "distilled" else "karras")
    assert plan.timesteps.dtype == plan.coefficients.dtype == plan.levels.dtype == torch.float64
    size = plan.input_scale * plan.levels[:-1].norm(dim=1)
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-12, atol=0)
    assert plan.coefficients.shape[1:] == (plan.num_registers, plan.num_registers + 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_run_is_the_matrices_applied_in_numpy(name: str) -> None:
    plan = make_plan(name, NoiseSchedule(), 6, strength=0.7)
    noise, image = normal(2, 3), normal(2, 3, seed=1)
    registers = np.zeros((plan.num_registers, 6))
    registers[0] = (plan.init_scale * noise + plan.init_image_scale * image).numpy().ravel()
    generator, x0s = torch.Generator().manual_seed(5), list[np.ndarray]()
    for k in range(len(plan.timesteps)):
        out = toy(torch.from_numpy(registers[0] * float(plan.input_scale[k])), plan.timesteps[k]).numpy()
        drawn = np.zeros(6)
        if plan.draws_noise[k]:
            drawn = torch.randn(2, 3, generator=generator, dtype=torch.float64).numpy().ravel()
        x0s.append(plan.x0[k].numpy() @ np.stack([registers[0], out]))
        registers = plan.coefficients[k].numpy() @ np.concatenate([registers, [out], [drawn]])
    estimates: list[Tensor] = []
    ours = plan.run(
        toy, noise, torch.Generator().manual_seed(5), image, lambda k, t, latents, x0: estimates.append(x0())
    )
    np.testing.assert_allclose(ours.numpy().ravel(), registers[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(torch.stack(estimates).numpy().reshape(len(x0s), 6), x0s, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_epsilon_and_v_with_the_corresponding_networks_give_the_same_latents(name: str) -> None:
    noise = normal(2, 4, 3, 3)
    eps, v = (
        make_plan(name, NoiseSchedule(prediction_type=p), 10, timestep_spacing="linspace")
        for p in ("epsilon", "v_prediction")
    )
    levels = {float(t): level / level.norm() for t, level in zip(v.timesteps, v.levels, strict=False)}

    def v_of_toy(x: Tensor, t: Tensor) -> Tensor:  # v = (eps - sigma x) / alpha
        alpha, sigma = levels[float(t)]
        return (toy(x, t) - sigma * x) / alpha

    g = torch.Generator
    torch.testing.assert_close(
        v.run(v_of_toy, noise, g().manual_seed(2)), eps.run(toy, noise, g().manual_seed(2)), rtol=1e-9, atol=1e-9
    )


def test_the_network_sees_the_dtype_of_the_noise_and_whole_timesteps_as_integers() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return x

    assert make_plan("ddim", NoiseSchedule(), 2).run(model, normal(1, 2).float()).dtype == torch.float32
    make_plan("euler", NoiseSchedule(), 2, sigmas="karras").run(model, normal(1, 2))
    assert seen == [(torch.float32, torch.int64)] * 2 + [(torch.float64, torch.float64)] * 2


def test_the_next_level_is_the_next_timestep_in_the_list() -> None:
    schedule = NoiseSchedule()
    plan = make_plan("ddim", schedule, 7, timestep_spacing="linspace")
    acp = schedule.alphas_cumprod[plan.timesteps.long()]
    torch.testing.assert_close(plan.levels[:-1, 0] ** 2, acp, rtol=1e-12, atol=0)
    assert float(plan.levels[-1, 0]) ** 2 == pytest.approx(float(schedule.alphas_cumprod[0]), rel=1e-12)
    to_one = make_plan("ddim", schedule, 7, set_alpha_to_one=True)
    assert to_one.levels[-1].tolist() == [1, 0]


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 48, 300, 999])
@pytest.mark.parametrize("name", SAMPLERS)
def test_trailing_has_as_many_timesteps_as_asked(name: str, steps: int) -> None:
    plan = make_plan(name, NoiseSchedule(), steps, original_inference_steps=1000)
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    times = theirs.timesteps[:steps].tolist()
    if SAMPLERS[name].points == "distilled":  # its own list, as many
        assert len(plan.timesteps) == len(set(plan.timesteps.tolist())) == steps
    else:  # in order, with others between where a step makes two calls
        assert [t for t in dict.fromkeys(plan.timesteps.tolist()) if t in times] == times
    assert torch.isfinite(plan.coefficients).all()
    assert plan.num_steps == steps


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampler": "dpm_fast"}, r"sampler: .*ddim.*dpmpp_2m.*'dpm_fast'"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": -3}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"strength": -0.1}, "strength"),
        ({"strength": 1.01}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"eta": math.nan}, "eta"),
        ({"eta": 1.5}, "eta"),
        ({"sampler": "euler", "eta": 0.5}, "eta: euler"),
        ({"sigmas": "cosine"}, "sigmas"),
        ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"steps_offset": 200, "timestep_spacing": "leading"}, "steps_offset"),
        ({"sampler": "dpmpp_2m", "num_inference_steps": 1000, "timestep_spacing": "leading"}, "num_inference_steps"),
        ({"sampler": "dpmpp_2m", "num_inference_steps": 1000, "timestep_spacing": "linspace"}, "num_inference_steps"),
    ],
)
def test_errors_name_the_argument_in_one_line(change: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 10} | change
    with pytest.raises(ConfigError, match=named) as error:
        make_plan(schedule=NoiseSchedule(), **arguments)
    assert "\n" not in str(error.value)

"""Plans as data, and the loop: order of calls and draws, guidance, the step callback, precision, and errors."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sdkernels
from sdkit.errors import ConfigError, NumericalError
from sdkit.sampling.guidance import Guidance, combine, rescale
from sdkit.sampling.plan import Plan, denoise
from sdkit.sampling.planning import make_plan
from sdkit.sampling.samplers import SAMPLERS
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.sampling.steps import Steps

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


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_outside_its_interval_guidance_is_off_and_costs_nothing(name: str, scale: float) -> None:
    """Against guidance by hand, each call with its own scale. At scale 0 the prompt is ignored everywhere."""
    plan, asked, by_hand_asked = make_plan(name, NoiseSchedule(), 10), list[str](), list[str]()
    sigmas = plan.levels[:-1, 1] / plan.levels[:-1, 0]
    active = [k for k, sigma in enumerate(sigmas.tolist()) if 0.6 < sigma <= 9]
    assert active == [1, 2, 3, 4, 5, 6, 7]
    guidance = Guidance(scale, interval=(0.6, 9.0))
    steps = guidance.at_levels(plan.levels)

    def predict(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        uncond = uncond_of(x, k) if steps[k].needs_uncond else None
        cond = cond_of(x, k) if steps[k].needs_cond else None
        asked.append(("" if uncond is None else "u") + ("" if cond is None else "c"))
        return uncond, cond

    def by_hand(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        by_hand_asked.append({0: "u", 1: "c"}.get(scale, "uc" if k in active else "c"))
        weight = scale if k in active or scale == 0 else 1
        return None, (1 - weight) * uncond_of(x, k) + weight * cond_of(x, k)

    def both(x: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        return uncond_of(x, k), cond_of(x, k)

    ours = denoise(plan, predict, plan.start(normal()), no_noise, guidance)
    expected = denoise(plan, by_hand, plan.start(normal()), no_noise)
    assert asked == by_hand_asked
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    lavish = denoise(plan, both, plan.start(normal()), no_noise, guidance)  # more than was needed: the same result
    torch.testing.assert_close(lavish, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("guidance", "inside"),
    [(Guidance(7.5), True), (Guidance(7.5, rescale=0.5), False), (Guidance(7.5, clip_sample_range=1.0), False)],
)
def test_plain_guidance_is_left_to_the_one_launch(
    guidance: Guidance, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the network gave them, half precision and all; whatever else is made into one prediction before."""
    plan, step, got = make_plan("euler", NoiseSchedule(), 3), sdkernels.sampler_step, list[tuple[bool, Any]]()

    def spy(registers: Tensor, uncond: Tensor | None, cond: Tensor, *rest: Any) -> Tensor:
        got.append((uncond is not None, cond.dtype))
        return step(registers, uncond, cond, *rest)

    def predict(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return uncond_of(x, k).half(), cond_of(x, k).half()

    monkeypatch.setattr(sdkernels, "sampler_step", spy)
    denoise(plan, predict, plan.start(normal()).float(), no_noise, guidance)
    assert got == [(inside, torch.float16 if inside else torch.float32)] * 3


LABELS, MEANS, STDS = [0, 1, 2, 1, 0], torch.tensor([[-1.0, 0.2], [0.9, 0.8], [0.1, -1.1]]).double(), (0.4, 0.5, 0.3)


class Mixture:
    """Data in the plane: class y with probability 0.2, 0.5, 0.3 is N(MEANS[y], STDS[y]²). All is in closed form.

    x is [B, 2, 1, 1] at the level signal, noise with signal² + noise² = 1.
    """

    def __init__(self, plan: Plan) -> None:
        self.kind, self.times = plan.prediction_type, plan.timesteps.tolist()
        self.levels = (plan.levels[:-1] * plan.input_scale[:, None]).tolist()

    def joint(self, x: Tensor, k: int) -> Tensor:
        """log p(x, y) for each class, [B, 3]."""
        signal, noise = self.levels[k]
        variance = (signal * torch.tensor(STDS).double()) ** 2 + noise**2
        distance = ((x.reshape(-1, 1, 2) - signal * MEANS) ** 2).sum(-1)
        return torch.tensor([0.2, 0.5, 0.3]).double().log() - distance / (2 * variance) - variance.log()

    def classify(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        return self.joint(x, self.times.index(t[0].item()))

    def predict(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """By the score: the mixture's is its components' weighted by their posteriors."""
        signal, noise = self.levels[k]
        variance = ((signal * torch.tensor(STDS).double()) ** 2 + noise**2).reshape(3, 1)
        scores = (signal * MEANS - x.reshape(-1, 1, 2)) / variance
        marginal = (self.joint(x, k).softmax(1)[:, :, None] * scores).sum(1)
        uncond, cond = (self.network(score.reshape(x.shape), x, k) for score in (marginal, scores[range(5), LABELS]))
        return uncond, cond

    def network(self, score: Tensor, x: Tensor, k: int) -> Tensor:
        signal, noise = self.levels[k]
        x0, eps = (x + noise**2 * score) / signal, -noise * score
        return {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}[self.kind]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_classifier_guidance_is_classifier_free_guidance(name: str, kind: str, scale: float) -> None:
    """Through the whole run: the classifier on the unconditional prediction, or, for what is more than scale 1, on the
    conditional one; the latter also in an interval, outside of which both leave the conditional prediction."""
    plan = make_plan(name, NoiseSchedule(prediction_type=kind), 10)
    mixture, noise = Mixture(plan), torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(2)).double()
    classifier: dict[str, Any] = {"classifier": mixture.classify, "class_labels": LABELS}
    pairs = [(Guidance(scale), Guidance(0, classifier_scale=scale, **classifier))]
    if scale >= 1:
        for interval in (None, (0.5, 5.0)):
            more = Guidance(1, classifier_scale=scale - 1, interval=interval, **classifier)
            pairs.append((Guidance(scale, interval=interval), more))
    with torch.no_grad():
        for free, guided in pairs:
            expected, ours = (denoise(plan, mixture.predict, plan.start(noise), no_noise, g) for g in (free, guided))
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clipping_in_karras_scaling(kind: str) -> None:
    """Euler by hand: x0 is clipped sample by sample, the slope follows from it, and on_step's estimate is it."""
    plan = make_plan("euler", NoiseSchedule(prediction_type=kind), 8)
    estimates: list[Tensor] = []
    ours = denoise(
        plan,
        lambda x, k: (uncond_of(x, k), cond_of(x, k)),
        plan.start(normal()),
        no_noise,
        Guidance(3.0, dynamic_threshold=0.8, sample_max_value=2.5, clip_sample_range=1.2),
        on_step=lambda k, t, latents, x0: estimates.append(x0()),
    )
    x, sigmas = plan.start(normal()).numpy(), plan.levels[:, 1].tolist()
    for k, (sigma, after) in enumerate(pairwise(sigmas)):
        x_in = x / math.sqrt(1 + sigma**2)
        out = combine(*(f(torch.from_numpy(x_in), k) for f in (uncond_of, cond_of)), 3.0).numpy()
        v = (x_in - sigma * out) / math.sqrt(1 + sigma**2)
        x0 = {"epsilon": x - sigma * out, "v_prediction": v, "sample": out}[kind]
        s = np.clip(np.quantile(np.abs(x0).reshape(len(x0), -1), 0.8, axis=1), 1.2, 2.5).reshape(-1, 1, 1, 1)
        x0 = np.clip(x0, -s, s) / s * 1.2
        np.testing.assert_allclose(estimates[k].numpy(), x0, rtol=1e-9, atol=1e-9)
        x = x + (after - sigma) * (x - x0) / sigma
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-9, atol=1e-9)


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
        plan,
        lambda x, k: (None, cond_of(x, k)),
        plan.start(normal()),
        no_noise,
        on_step=lambda k, t, latents, x0: plain.append(latents),
    )
    torch.testing.assert_close(inputs[1], plain[0] * plan.input_scale[1])
    assert not torch.allclose(end, plain[3])


def test_x0_estimate_is_exact_for_an_exact_network() -> None:
    """A network that knows the clean latents: every estimate is them, in every scaling and with guidance.

    All but lcm's, whose consistency function mixes some of the latent in.
    """
    clean = normal(7)
    for name in sorted(SAMPLERS.keys() - {"lcm"}):
        plan, estimates = make_plan(name, NoiseSchedule(), 5), list[Tensor]()

        def predict(x: Tensor, k: int, plan=plan) -> tuple[Tensor | None, Tensor | None]:
            signal, noise = (plan.levels[k] * plan.input_scale[k]).tolist()
            eps = (x - signal * clean) / noise
            return eps - 1, eps - 0.5  # uncond + 2 (cond - uncond) = eps

        denoise(
            plan,
            predict,
            plan.start(normal()),
            normal,
            Guidance(2.0),
            on_step=lambda k, t, latents, x0, into=estimates: into.append(x0()),
        )
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


def test_a_plan_is_data() -> None:
    plan = make_plan("heun", NoiseSchedule(), 4, sigmas="karras")
    assert plan == make_plan("heun", NoiseSchedule(), 4, sigmas="karras")
    assert plan != make_plan("heun", NoiseSchedule(), 4)
    for kept in (plan, make_plan("ddim", NoiseSchedule(), 4, strength=0), make_plan("ddpm", NoiseSchedule(), 3)):
        assert Plan.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
    lines = str(plan).splitlines()
    assert len(lines) == 2 + 7 * 3  # a heading, the columns, three registers for each of seven calls
    assert [float(word) for word in lines[2].split()[5:]] == pytest.approx(plan.coefficients[0, 0].tolist(), rel=1e-5)
    with pytest.raises(ConfigError, match="plan"):
        Plan.from_dict({"sampler": "ddim"})


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_know_their_step(name: str, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step begins with the last call that is made at its point; heun's first look there is the step before's."""
    made: list[int | None] = []
    call = Steps.call

    def watched(self: Steps, at: Any, *arguments: Any, **options: Any) -> Any:
        made.append(at if isinstance(at, int) else None)
        return call(self, at, *arguments, **options)

    monkeypatch.setattr(Steps, "call", watched)
    plan = make_plan(name, NoiseSchedule(), num_steps)
    begins = {point: k for k, point in enumerate(made) if point is not None}
    expected = [sum(begins[point] <= k for point in range(1, num_steps)) for k in range(len(made))]
    assert plan.steps == expected and max(plan.steps) == num_steps - 1

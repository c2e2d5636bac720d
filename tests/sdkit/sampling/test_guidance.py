"""Guidance: its formulas, its switches, a classifier's gradient, and clipping as diffusers does it."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdkit.errors import ConfigError
from sdkit.sampling.guidance import (
    Guidance,
    classifier_gradient,
    classifier_guidance,
    combine,
    compose,
    guide,
    rescale,
    threshold,
)
from sdkit.sampling.levels import Level
from sdkit.sampling.plan import denoise
from sdkit.sampling.planning import make_plan
from sdkit.sampling.schedule import NoiseSchedule


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = (3, 4, 5, 6)
    return torch.randn(shape, generator=g).double(), 2 * torch.randn(shape, generator=g).double() + 1


@pytest.mark.parametrize(
    ("scale", "uncond", "cond"), [(0, True, False), (0.5, True, True), (1, False, True), (7.5, True, True)]
)
def test_which_predictions_are_needed(scale: float, uncond: bool, cond: bool) -> None:
    guidance = Guidance(scale)
    assert (guidance.needs_uncond, guidance.needs_cond) == (uncond, cond)


def test_combine() -> None:
    u, c = pair()
    assert torch.equal(combine(u, None, 0), u)
    assert torch.equal(combine(None, c, 1), c)
    torch.testing.assert_close(combine(u, c, 0.0), u)
    torch.testing.assert_close(combine(u, c, 1.0), c)
    torch.testing.assert_close(combine(u, c, 7.5), 7.5 * c - 6.5 * u)
    with pytest.raises(ConfigError, match="neither"):
        combine(None, None, 1)


def test_rescale_per_sample() -> None:
    u, c = pair()
    guided = combine(u, c, 7.5)
    assert torch.equal(rescale(guided, c, 0), guided)
    full = rescale(guided, c, 1)
    for row in range(3):
        assert full[row].std().item() == pytest.approx(c[row].std().item(), rel=1e-12)
    torch.testing.assert_close(rescale(guided, c, 0.7), 0.7 * full + 0.3 * guided)


def classify(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Logits [B, 3], nonlinear in x and different at each t."""
    w = torch.linspace(-1, 1, 3 * x[0].numel(), dtype=x.dtype).reshape(3, -1)
    return torch.tanh(x.flatten(1) @ w.T) * (1 + t[:, None] / 1000)


CLASSIFIER: dict[str, Any] = {"classifier": classify, "class_labels": [0]}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("guidance_scale", {"scale": v}) for v in (-0.1, math.nan, math.inf, "7")),
        *(("guidance_rescale", {"rescale": v}) for v in (-0.1, 1.1, math.nan)),
        *(
            ("guidance_interval", {"interval": v})
            for v in ((1, 1), (2, 1), (-1, 1), (0, math.nan), (1, 2, 3), (0, None))
        ),
        *(("guidance_interval", {"interval": v}) for v in ((math.inf, math.inf), 3.0, "ab")),
        *(("dynamic_threshold", {"dynamic_threshold": v}) for v in (0, -0.1, 1.1, 99.5, math.nan, "0.9")),
        *(("clip_sample_range", {"clip_sample_range": v}) for v in (0, -1, math.inf, math.nan, "1")),
        ("sample_max_value", {"sample_max_value": 2.0}),
        ("sample_max_value", {"sample_max_value": 2.0, "clip_sample_range": 1.0}),
        *(("sample_max_value", {"dynamic_threshold": 0.9, "sample_max_value": v}) for v in (0.9, math.inf, math.nan)),
        ("sample_max_value", {"dynamic_threshold": 0.9, "sample_max_value": 2.0, "clip_sample_range": 3.0}),
        *(("classifier_scale", CLASSIFIER | {"classifier_scale": v}) for v in (-1, math.nan, math.inf, "1")),
        ("classifier", CLASSIFIER | {"classifier": 3}),
        ("class_labels", {"class_labels": [0]}),
        *(
            ("class_labels", {"classifier": classify, "class_labels": v})
            for v in (None, [0.0], [-1], [True], 1, torch.tensor([0.5]), torch.tensor(1))
        ),
    ],
)
def test_bad_values_name_the_argument(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*, found"):
        Guidance(**values)


def test_what_is_left_to_the_sampler_step() -> None:
    assert Guidance(7.5).is_linear
    assert Guidance(7.5, interval=(0.5, 2)).is_linear
    assert Guidance(7.5, **CLASSIFIER, classifier_scale=0).is_linear
    for more in ({"rescale": 0.5}, {"dynamic_threshold": 0.9}, {"clip_sample_range": 1.0}, CLASSIFIER):
        assert not Guidance(7.5, **more).is_linear


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_interval_is_in_karras_levels_open_below_and_closed_above(name: str, scale: float) -> None:
    plan = make_plan(name, NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True), 10)
    signal, noise = plan.levels[:-1].T.numpy()
    with np.errstate(divide="ignore"):
        sigmas = noise / signal  # the first is infinite for ddim
    more: dict[str, Any] = {"dynamic_threshold": 0.9, **CLASSIFIER}
    low, high = float(sigmas[7]), float(sigmas[3])
    steps = Guidance(scale, 0.5, (low, high), **more).at_levels(plan.levels)
    inside = [k for k, step in enumerate(steps) if step.rescale == 0.5]
    assert inside == [3, 4, 5, 6]
    for k, step in enumerate(steps):
        assert step.scale == (scale if k in inside else min(1, math.ceil(scale)))  # 0 stays 0
        assert step.needs_classifier == (k in inside)
        assert step.dynamic_threshold == 0.9
    assert [step.scale for step in Guidance(scale, interval=(low, math.inf)).at_levels(plan.levels)[:7]] == [scale] * 7
    assert [step.scale for step in Guidance(scale).at_levels(plan.levels)] == [scale] * 10


@pytest.mark.parametrize(
    ("limit", "fraction", "most"), [(1, 0.8, None), (1, 0.8, 1.5), (1.5, 0.9, 2.0), (0.5, 1.0, None)]
)
def test_dynamic_threshold(limit: float, fraction: float, most: float | None) -> None:
    """Sample by sample in numpy. Of the rows the first stays inside the range, the last reaches beyond ``most``."""
    x0 = pair()[0] * torch.tensor([0.1, 1.0, 4.0]).double().reshape(3, 1, 1, 1)
    ours = threshold(x0, limit, fraction, most)
    for row, x in zip(ours.numpy(), x0.numpy(), strict=True):
        values = np.sort(np.abs(x).ravel())
        place = fraction * (len(values) - 1)
        below, above = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
        s = max(limit, below + (place - int(place)) * (above - below))
        s = s if most is None else min(s, most)
        np.testing.assert_allclose(row, np.minimum(np.maximum(x, -s), s) / s * limit, rtol=1e-12)
    assert float(ours.abs().max()) == pytest.approx(limit, rel=1e-12)


def test_static_threshold() -> None:
    x0 = 3 * pair()[0]
    np.testing.assert_array_equal(threshold(x0, 1.5).numpy(), np.clip(x0.numpy(), -1.5, 1.5))


DDIM, DDPM, DPM = diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7}
STATIC = {"clip_sample": True, "clip_sample_range": 1.3}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "cls", "theirs", "ours"),
    [
        ("ddim", DDIM, DYNAMIC, Guidance(dynamic_threshold=0.9, sample_max_value=1.7)),
        ("dpmpp_2m", DPM, DYNAMIC, Guidance(dynamic_threshold=0.9, sample_max_value=1.7)),
        ("ddim", DDIM, STATIC, Guidance(clip_sample_range=1.3)),
        ("ddpm", DDPM, STATIC, Guidance(clip_sample_range=1.3)),
    ],
)
def test_clipped_steps_are_those_of_diffusers(
    name: str, cls: Any, theirs: dict[str, Any], ours: Guidance, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = NoiseSchedule(prediction_type=prediction)
    plan = make_plan(name, schedule, 10, timestep_spacing="leading", steps_offset=1)
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        **({"set_alpha_to_one": False} if name == "ddim" else {}),
    }
    scheduler = cls(**settings, **theirs)
    scheduler.set_timesteps(10)
    acp = schedule.alphas_cumprod  # their tables in our precision
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, scheduler.one = acp, acp[0], torch.ones(()).double()
    scheduler.sigmas = plan.levels[:, 1] / plan.levels[:, 0]

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([0.1, 1.0, 3.0]).double().reshape(3, 1, 1, 1)
        return torch.tanh(1.3 * x + torch.cos(t.double() / 200)) * rows

    seen: list[torch.Tensor] = []
    noise = pair()[0]
    generator = torch.Generator().manual_seed(7)
    denoise(
        plan,
        lambda x, k: (None, model(x, plan.timesteps[k])),
        plan.start(noise),
        lambda: torch.randn(noise.shape, generator=generator, dtype=torch.float64),
        ours,
        on_step=lambda k, t, latents, x0: seen.append(latents),
    )
    generator.manual_seed(7)
    options = {"use_clipped_model_output": True} if name == "ddim" else {}
    monkeypatch.setattr(torch, "float32", torch.float64)  # DPM-Solver's step casts to it
    x = noise
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, t), t, x, generator=generator, **options).prev_sample
        assert x.dtype == torch.float64
        torch.testing.assert_close(seen[k], x, rtol=1e-9, atol=1e-9, msg=f"step {k}")


def test_guide_takes_any_scaling_of_the_latent() -> None:
    u, c = pair()
    guidance = Guidance(3, 0.4, clip_sample_range=0.5, **CLASSIFIER | {"class_labels": [0, 2, 1]})
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        preserving, exploding = Level(0.6, 0.8), Level(1.0, 0.8 / 0.6)
        expected = guide(guidance, u, c, u + c, 500.0, preserving, prediction_type)
        actual = guide(guidance, u, c, u + c, 500.0, exploding, prediction_type)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_a_classifier_cannot_guide_without_signal(name: str, prediction_type: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    plan = make_plan(name, schedule, 10)
    u, c = pair()
    guidance = Guidance(3, **CLASSIFIER | {"class_labels": [0, 2, 1]})
    dark, next_one = (Level(*plan.levels[k].tolist()) for k in (0, 1))
    with pytest.raises(ConfigError, match=r"classifier: .*timestep 999.*guidance_interval"):
        guide(guidance, u, c, u, 999.0, dark, prediction_type)
    assert bool(guide(guidance, u, c, u, 899.0, next_one, prediction_type).isfinite().all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_classifier_gradient_by_finite_differences(mode: Any) -> None:
    labels = torch.tensor([2, 0, 1])
    with mode():
        x, direction = pair()[0] / 20, pair()[1] / 10
        ours = classifier_gradient(classify, x, 300.0, labels)

        def log_p(x: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.softmax(classify(x, torch.full((3,), 300.0).double()), 1))[range(3), labels]

        slope = (log_p(x + 1e-5 * direction) - log_p(x - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((ours * direction).sum((1, 2, 3)), slope, rtol=1e-7, atol=1e-7)
        assert not ours.requires_grad


def test_classifier_may_be_a_module_and_answer_log_probabilities() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(120, 3)).double()
    x, labels = pair()[0], [2, 0, 1]
    ours = classifier_gradient(lambda x, t: net(x).log_softmax(1), x, 300.0, labels)
    torch.testing.assert_close(ours, classifier_gradient(lambda x, t: net(x) + 5, x, 300.0, labels))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("classifier", "labels", "message"),
    [
        (classify, [0, 1], "class_labels: expected 3, .* found 2"),
        (classify, [0, 1, 3], "class_labels: expected 0 to 2, found"),
        (lambda x, t: x.sum((1, 2, 3)), [0, 0, 0], r"classifier: expected logits \[3, classes\], found \[3\]"),
        (lambda x, t: classify(x, t)[:1], [0, 0, 0], r"classifier: expected logits \[3, classes\], found \[1, 3\]"),
        (lambda x, t: classify(x, t).detach(), [0, 0, 0], "classifier: expected an answer with a gradient"),
    ],
)
def test_bad_answers_of_a_classifier(classifier: Any, labels: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classifier_gradient(classifier, pair()[0], 300.0, labels)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_guidance_is_classifier_free_guidance_on_a_mixture(scale: float) -> None:
    """Data: label y in {0, 1} with weights 0.3, 0.7 gives N(mean_y, std_y²); x_t has closed-form densities."""
    weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in ((0.3, 0.7), (-1.0, 0.8), (0.4, 0.6)))
    x = torch.linspace(-2, 2, 12).double().reshape(3, 4).requires_grad_()
    acp = torch.tensor([0.9, 0.4, 0.05], dtype=torch.float64)
    a, s2 = acp.sqrt()[:, None, None], (1 - acp)[:, None, None]
    joint = weights.log() + torch.distributions.Normal(a * means, (a**2 * stds**2 + s2).sqrt()).log_prob(x[..., None])
    marginal = joint.logsumexp(-1)

    def epsilon(log_density: torch.Tensor) -> torch.Tensor:
        return -(1 - acp).sqrt()[:, None] * torch.autograd.grad(log_density.sum(), x, retain_graph=True)[0]

    uncond, cond = epsilon(marginal), epsilon(joint[..., 1])
    (gradient,) = torch.autograd.grad((joint[..., 1] - marginal).sum(), x, retain_graph=True)
    guided = classifier_guidance(uncond, gradient, acp, scale)
    torch.testing.assert_close(guided, combine(uncond, cond, scale), rtol=1e-12, atol=1e-12)
    one = classifier_guidance(uncond[1], gradient[1], float(acp[1]), scale)
    torch.testing.assert_close(one, guided[1], rtol=1e-12, atol=1e-12)


def test_composition_is_the_papers_sum() -> None:
    """arXiv 2206.01714: uncond + the sum of w_i (cond_i - uncond), each image with prompts of its own."""
    uncond, conds = (torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(n)).half() for n in (3, 6))
    weights = [(1.0,), (0.5, -0.7, 2.0), (0.4, 0.6)]
    u, c = uncond.double(), conds.double()
    expected = torch.stack([
        c[0],
        u[1] + 0.5 * (c[1] - u[1]) - 0.7 * (c[2] - u[1]) + 2 * (c[3] - u[1]),
        0.4 * c[4] + 0.6 * c[5],
    ])  # fmt: skip
    composed = compose(uncond, conds, weights)
    assert composed.dtype == torch.float32
    torch.testing.assert_close(composed.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compose(None, conds[:2], [(0.4, 0.6)])[0].double(), 0.4 * c[0] + 0.6 * c[1])
    assert compose(uncond, conds[:3], [(1.0,)] * 3) is not uncond
    assert torch.equal(compose(uncond, conds[:3], [(1.0,)] * 3), conds[:3])

"""Guidance: its formulas, its switches, and classifier guidance against classifier-free on a Gaussian mixture."""

from __future__ import annotations

import math

import pytest
import torch

from sdkit.errors import ConfigError
from sdkit.guidance import Guidance, classifier_guidance, combine, rescale


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


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_bad_scales(scale: float) -> None:
    with pytest.raises(ConfigError, match="guidance_scale"):
        Guidance(scale)


@pytest.mark.parametrize("phi", [-0.1, 1.1, math.nan])
def test_bad_rescales(phi: float) -> None:
    with pytest.raises(ConfigError, match="guidance_rescale"):
        Guidance(7.5, phi)


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

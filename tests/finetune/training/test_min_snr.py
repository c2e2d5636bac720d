"""Min-SNR weights: the paper's error of x0, the weights of the field, and zero terminal SNR."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from finetune.training.min_snr import min_snr_weight
from sdkit.sampling.schedule import NoiseSchedule

TYPES = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_weighted_errors_are_the_papers_error_of_x0(kind: str, gamma: float):
    """min(snr, gamma) * |x0 - its estimate|^2, whatever the network predicts (arXiv 2303.09556)."""
    schedule = NoiseSchedule(prediction_type=kind)
    t = torch.arange(0, 1000, 7)
    x0, noise, wrong = torch.randn(3, len(t), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    acp = schedule.alphas_cumprod[t][:, None]
    signal, sigma = acp.sqrt(), (1 - acp).sqrt()
    x_t, prediction = signal * x0 + sigma * noise, schedule.target(x0, noise, t) + 0.1 * wrong
    estimate = {
        "epsilon": lambda: (x_t - sigma * prediction) / signal,
        "v_prediction": lambda: signal * x_t - sigma * prediction,
        "sample": lambda: prediction,
    }[kind]()
    snr = acp / (1 - acp)
    paper = snr.clamp(max=gamma) * (x0 - estimate).square()
    ours = min_snr_weight(schedule, t, gamma)[:, None] * 0.01 * wrong.square()
    assert torch.allclose(ours, paper, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_field(kind: str):
    schedule, t = NoiseSchedule(prediction_type=kind), torch.arange(1000)
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(theirs, t).double()
    expected = torch.stack([snr, 5 * torch.ones_like(snr)], 1).amin(1) / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(min_snr_weight(schedule, t, 5.0), expected, rtol=1e-3)


def test_weights_at_zero_terminal_snr_are_finite():
    for kind, last in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        schedule = NoiseSchedule(prediction_type=kind, rescale_betas_zero_snr=True)
        assert float(min_snr_weight(schedule, torch.tensor([999]), 5.0)) == last

"""The loss of a noise predictor: against diffusers' training loop, and statistics of the noise."""

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from finetune.data.batches import Batch
from finetune.recipe.diffusion_loss import DiffusionLoss, LossConfig, TrainedText, draw_noise
from finetune.training.min_snr import min_snr_weight
from sdkit.errors import ConfigError
from sdkit.sampling.schedule import NoiseSchedule

TYPES = ("epsilon", "v_prediction", "sample")


class Net(nn.Module):
    """Stands for a UNet: something that depends on all of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.scale * x + 1e-3 * t[:, None, None, None] + context.mean((1, 2))[:, None, None, None]


def context(captions: list[str]) -> Tensor:
    return torch.tensor([[[float(len(c))] * 3] * 2 for c in captions]) / 10


def batch(size: int = 6, weights: list[float] | None = None) -> Batch:
    latents = torch.randn(size, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(100 + i) for i in range(size)]
    captions, prior = ["x" * i for i in range(size)], torch.zeros(size, dtype=torch.bool)
    return Batch(latents, captions, torch.tensor(weights or [1.0] * size), prior, generators)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_diffusers_training_loop(kind: str, gamma: float | None):
    schedule, net = NoiseSchedule(prediction_type=kind), Net()
    weights = [1.0, 1.0, 0.5, 2.0, 1.0, 0.0]
    found = DiffusionLoss(net, context, schedule, LossConfig(snr_gamma=gamma))(batch(weights=weights))

    given = batch(weights=weights)
    t, noise = draw_noise(given.latents.shape, given.generators, 1000)
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    x_t = theirs.add_noise(given.latents, noise, t)
    targets = {"epsilon": noise, "sample": given.latents, "v_prediction": theirs.get_velocity(given.latents, noise, t)}
    error = (net(x_t, t, context(given.captions)) - targets[kind]).square().mean((1, 2, 3))
    if gamma is not None:
        error = error * min_snr_weight(schedule, t, gamma).float()
    assert torch.allclose(found, (error * given.weights).mean(), rtol=1e-5)


def test_noise_and_timesteps_belong_to_the_sample():
    shape = batch().latents.shape
    t, noise = draw_noise(shape, batch().generators, 1000)
    some = [g for i, g in enumerate(batch().generators) if i in (1, 4)]
    t_some, noise_some = draw_noise(torch.Size([2, *shape[1:]]), some, 1000)
    assert torch.equal(t_some, t[[1, 4]]) and torch.equal(noise_some, noise[[1, 4]])


def test_timesteps_are_uniform_over_the_whole_schedule():
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    t, noise = draw_noise(torch.Size([4000, 1, 1, 1]), generators, 10)
    counts = t.bincount(minlength=10)
    assert len(counts) == 10 and float((counts - 400).abs().max()) < 4 * math.sqrt(400)
    assert abs(float(noise.mean())) < 4 / math.sqrt(4000) and abs(float(noise.std()) - 1) < 0.05


def test_the_offset_shifts_each_channel_as_a_whole():
    shape, offset, count = torch.Size([3000, 4, 4, 4]), 0.3, 3000

    def draw(offset: float) -> Tensor:
        return draw_noise(shape, [torch.Generator().manual_seed(i) for i in range(count)], 1000, offset)[1]

    plain, shifted = draw(0.0), draw(offset)
    shift = (shifted - plain).flatten(2)
    assert float(shift.std(-1).max()) < 1e-6  # one number a channel
    shift = shift[..., 0]
    assert abs(float(shift.std()) / offset - 1) < 0.05 and abs(float(shift.mean())) < 4 * offset / math.sqrt(4 * count)
    assert float(torch.corrcoef(shift.T).fill_diagonal_(0).abs().max()) < 4 / math.sqrt(count)  # channels apart
    means = shifted.mean((2, 3))
    assert abs(float(means.var()) / (offset**2 + 1 / 16) - 1) < 0.08


def test_the_loss_uses_the_offset():
    schedule, net = NoiseSchedule(), Net()
    losses = [DiffusionLoss(net, context, schedule, LossConfig(noise_offset=o))(batch()).item() for o in (0.0, 1.0)]
    assert losses[1] > losses[0]  # the shifts are noise of variance 1 more


def test_epsilon_at_zero_terminal_snr_is_refused():
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        DiffusionLoss(Net(), context, NoiseSchedule(rescale_betas_zero_snr=True), LossConfig())
    with pytest.raises(ConfigError, match="snr_gamma: expected a finite number above 0"):
        LossConfig(snr_gamma=0.0)


def test_a_gamma_that_clamps_nothing_is_refused():
    for gamma in (1176.0, 1e6):
        with pytest.raises(
            ConfigError, match="snr_gamma: does nothing from the schedule's largest SNR on, which is 1175"
        ):
            DiffusionLoss(Net(), context, NoiseSchedule(), LossConfig(snr_gamma=gamma))
    DiffusionLoss(Net(), context, NoiseSchedule(), LossConfig(snr_gamma=1175.0))
    DiffusionLoss(
        Net(), context, NoiseSchedule(prediction_type="v_prediction"), LossConfig(snr_gamma=1e6)
    )  # snr / (snr + 1)


def test_a_trained_text_encoder_gets_gradients(monkeypatch: pytest.MonkeyPatch):
    encoder = nn.Embedding(20, 3)
    monkeypatch.setattr(
        "finetune.data.cache.encode_prompts",
        lambda tokenizer, model, captions, negative, **_: (model(torch.tensor([[len(c)] for c in captions])), None),
    )
    text = TrainedText(SimpleNamespace(), encoder)
    loss = DiffusionLoss(Net(), text, NoiseSchedule(), LossConfig())
    loss(batch()).backward()
    assert encoder.weight.grad is not None and {n for n, _ in loss.named_parameters()} == {
        "unet.scale",
        "context.text_encoder.weight",
    }


def with_prior(given: Batch, rows: list[int]) -> Batch:
    return replace(given, prior=torch.tensor([i in rows for i in range(len(given.captions))]))


def test_prior_samples_have_the_bases_prediction_as_their_target():
    schedule, net, weights = NoiseSchedule(), Net(), [1.0, 0.5, 1.0, 0.5, 0.5, 2.0]
    rows, inside = [1, 3, 4], False

    @contextmanager
    def base() -> Generator[nn.Module]:
        nonlocal inside
        held, inside, net.scale.data = net.scale.data.clone(), True, torch.tensor(0.2)
        yield net
        net.scale.data, inside = held, False

    def text(captions: list[str]) -> Tensor:
        return context(captions) + (1.0 if inside else 0.0)

    config = LossConfig(prior_target="base", snr_gamma=5.0)
    found = DiffusionLoss(net, text, schedule, config, base)(with_prior(batch(weights=weights), rows))
    found.backward()

    given = batch(weights=weights)
    t, noise = draw_noise(given.latents.shape, given.generators, 1000)
    acp = schedule.alphas_cumprod[t].float()[:, None, None, None]
    x_t, states = acp.sqrt() * given.latents + (1 - acp).sqrt() * noise, context(given.captions)
    scale = torch.tensor(0.7, requires_grad=True)

    def predicted(scale: Tensor, states: Tensor) -> Tensor:
        return scale * x_t + 1e-3 * t[:, None, None, None] + states.mean((1, 2))[:, None, None, None]

    is_prior = torch.tensor([i in rows for i in range(6)])[:, None, None, None]
    target = torch.where(is_prior, predicted(torch.tensor(0.2), states + 1), noise)
    error = (predicted(scale, states) - target).square().mean((1, 2, 3))
    expected = (error * given.weights * min_snr_weight(schedule, t, 5.0).float()).mean()
    expected.backward()
    assert torch.allclose(found, expected, rtol=1e-5) and torch.allclose(net.scale.grad, scale.grad, rtol=1e-4)


def test_what_has_not_changed_gets_no_gradient_from_prior_samples():
    """Else the base's own error would move it: the noise, as the target of the same samples, does."""
    grads = {}
    for kind in ("base", "picture"):
        net = Net()
        loss = DiffusionLoss(net, context, NoiseSchedule(), LossConfig(prior_target=kind), lambda n=net: nullcontext(n))
        loss(with_prior(batch(), list(range(6)))).backward()
        grads[kind] = float(net.scale.grad)
    assert grads["base"] == 0 and abs(grads["picture"]) > 0.01


def test_without_prior_samples_the_base_is_not_asked():
    def base() -> AbstractContextManager[nn.Module]:
        raise AssertionError("asked")

    losses = [
        DiffusionLoss(Net(), context, NoiseSchedule(), LossConfig(prior_target=kind), base)(batch()).item()
        for kind in ("base", "picture")
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ConfigError, match="prior_target: expected picture"):
        DiffusionLoss(Net(), context, NoiseSchedule(), LossConfig(prior_target="base"))

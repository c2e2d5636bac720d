"""The loss of a VAE's decoder: what it is, what it trains, and that no network gets another one's gradient."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.vae_decoder.loss import DecoderBatch, DecoderLoss, DecoderLossConfig, PatchDiscriminator
from finetune.vae_decoder.perceptual import LPIPS, ms_ssim
from sdkit import AutoencoderKL
from sdkit.errors import ConfigError
from tests.conftest import draw, draw_weights, relative_error
from tests.finetune.tiny import VAE
from tests.finetune.vae_decoder.test_perceptual import files

LATENTS, PIXELS = draw("latents", (2, 4, 12, 11)).float(), draw("pixels", (2, 3, 24, 22)).float().clamp(-1, 1)
GAN: dict[str, Any] = {
    "discriminator_weight": 0.3,
    "discriminator_start": 2,
    "discriminator_channels": 4,
    "discriminator_layers": 2,
}


def make_loss(**options: Any) -> DecoderLoss:
    loss = DecoderLoss(draw_weights(AutoencoderKL.from_config(VAE)), DecoderLossConfig(**options))
    if loss.discriminator is not None:
        draw_weights(loss.discriminator)
    return loss


def batch(step: int = 0) -> DecoderBatch:
    return DecoderBatch(LATENTS, PIXELS, step)


def decoded(loss: DecoderLoss) -> Tensor:
    return loss.vae.decode(LATENTS / loss.vae.config.scaling_factor)


def gradients(value: Tensor, network: nn.Module) -> Tensor:
    """The gradients of all of a network's parameters that are trained, in one vector; 0 where there is none."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    flat = [
        torch.zeros_like(p) if g is None else g  # pyright: ignore[reportUnnecessaryComparison]  # allow_unused
        for p, g in zip(parameters, found, strict=True)
    ]
    return torch.cat([g.flatten() for g in flat])


def test_the_decoder_is_trained_and_the_encoder_is_not():
    loss = make_loss(**GAN)
    trained = {name for name, p in loss.named_parameters() if p.requires_grad}
    expected = {
        name for name, _ in loss.named_parameters() if name.startswith(("vae.decoder.", "vae.post_quant_conv."))
    }
    assert trained == expected | {name for name, _ in loss.named_parameters() if name.startswith("discriminator.")}
    loss(batch()).backward()
    for name, p in loss.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().max() > 0)) == (name in trained), name
    without = draw_weights(AutoencoderKL.from_config(VAE | {"use_post_quant_conv": False}))
    assert all(
        name.startswith("decoder.") == p.requires_grad
        for name, p in DecoderLoss(without, DecoderLossConfig()).vae.named_parameters()
    )


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_is_that_of_diffusers_pictures(kind: Any, weight: float):
    theirs = draw_weights(diffusers.AutoencoderKL(**VAE))
    made = theirs.decode(LATENTS / theirs.config.scaling_factor).sample
    error = (made - PIXELS).square() if kind == "mse" else (made - PIXELS).abs()
    expected = error.mean() + weight * (1 - ms_ssim(made, PIXELS).mean())
    found = make_loss(reconstruction=kind, perceptual_weight=weight)(batch())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("lpips", [False, True])
def test_the_perceptual_gradient_reaches_the_decoder(lpips: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {}
    measure: Any = lambda x, y: 1 - ms_ssim(x, y)  # noqa: E731
    if lpips:
        _, vgg, weights = files(tmp_path, monkeypatch)
        options, measure = {"lpips_vgg": vgg, "lpips_weights": weights}, LPIPS.from_files(vgg, weights)
    plain, whole = make_loss(perceptual_weight=0.0, **options), make_loss(perceptual_weight=2.0, **options)
    difference = gradients(whole(batch()), whole.vae) - gradients(plain(batch()), plain.vae)
    expected = 2 * gradients(measure(decoded(plain), PIXELS).mean(), plain.vae)
    assert float(expected.norm()) > 1e-3 and relative_error(difference, expected) < 1e-4
    assert whole(batch()).item() == pytest.approx(
        plain(batch()).item() + 2 * measure(decoded(plain), PIXELS).mean().item(), rel=1e-5
    )
    assert not any(p.requires_grad for name, p in whole.named_parameters() if "lpips" in name)


def test_the_error_is_taken_in_float32_under_autocast():
    loss = make_loss(perceptual_weight=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        made = decoded(loss).float()
        value = loss(batch())
    assert value.dtype == torch.float32 and value.item() == pytest.approx(
        loss.reconstruction(made, PIXELS, torch.ones(2)).item()
    )


@pytest.mark.parametrize("options", [{}, {"reconstruction": "l1"}, GAN])
def test_a_picture_counts_as_its_weight_says(options: dict[str, Any]):
    """One picture twice at half the weight is the picture once, for value and gradients of both networks."""
    loss = make_loss(**options)
    twice = DecoderBatch(LATENTS[[0, 1, 1]], PIXELS[[0, 1, 1]], 5, torch.tensor([1.5, 0.75, 0.75]))
    once, found = loss(batch(5)), loss(twice)
    assert found.item() == pytest.approx(once.item(), rel=1e-5)
    for network in [loss.vae, *([loss.discriminator] if loss.discriminator is not None else [])]:
        assert relative_error(gradients(found, network), gradients(once, network)) < 1e-4
    assert loss(DecoderBatch(LATENTS, PIXELS, 5, torch.tensor([2.0, 0.0]))).item() == pytest.approx(
        loss(DecoderBatch(LATENTS[:1], PIXELS[:1], 5)).item(), rel=1e-5
    )


# The discriminator


def test_its_loss_reaches_it_alone_and_the_generators_the_decoder_alone():
    """Each network's gradient against one for which the other's part in it is a constant."""
    loss, plain = make_loss(**GAN), make_loss()
    discriminator = loss.discriminator
    assert discriminator is not None
    with torch.no_grad():
        fixed = decoded(plain)
    hinge = (F.relu(1 - discriminator(PIXELS)).mean() + F.relu(1 + discriminator(fixed)).mean()) / 2
    expected = gradients(hinge, discriminator)
    without = gradients(plain(batch()), plain.vae)
    for step in (0, 1, 2, 5):
        value = loss(batch(step))
        assert relative_error(gradients(value, discriminator), expected) < 1e-5
        if step < 2:
            assert relative_error(gradients(value, loss.vae), without) < 1e-6
            continue
        adversarial = gradients(-discriminator(decoded(plain)).mean(), plain.vae)
        last = plain.vae.decoder.conv_out.weight
        norms = [
            torch.autograd.grad(x, last)[0].norm() for x in (plain(batch()), -discriminator(decoded(plain)).mean())
        ]
        whole = without + 0.3 * norms[0] / (norms[1] + 1e-6) * adversarial
        assert relative_error(gradients(value, loss.vae), whole) < 1e-5
        assert relative_error(without, whole) > 0.05  # so that this shows the adversarial part


def test_the_adaptive_weight_is_bounded():
    loss = make_loss(**GAN)
    made = decoded(loss)
    value = loss.reconstruction(made, PIXELS, torch.ones(2))
    assert loss.adaptive_weight(value, 1e-9 * made.sum()).item() == pytest.approx(0.3 * 1e4)


def test_adversarial_losses_do_not_show_in_the_value():
    assert make_loss(**GAN)(batch(5)).item() == pytest.approx(make_loss()(batch(5)).item(), rel=1e-6)


def test_patches_are_those_of_pix2pix():
    """70 pixels wide; the first convolutions have no norm."""
    with torch.device("meta"):
        network = PatchDiscriminator()
        assert network(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    widths = [tuple(layer.weight.shape[:2]) for layer in network.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [(64, 3), (128, 64), (256, 128), (512, 256), (1, 512)]
    reach = 1
    for layer in reversed(network.layers):
        if isinstance(layer, nn.Conv2d):
            reach = (reach - 1) * layer.stride[0] + layer.kernel_size[0]
    assert reach == 70


def test_pictures_in_a_batch_do_not_know_of_each_other():
    network = draw_weights(PatchDiscriminator(4, 2))
    together = network(PIXELS)
    assert relative_error(torch.cat([network(x) for x in PIXELS.split(1)]), together) < 1e-5


def test_small_pictures_are_a_clear_error():
    for layers in (1, 2, 3):
        network, side = PatchDiscriminator(2, layers), 3 * 2**layers
        assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
        with pytest.raises(ConfigError, match=f"at least {side} pixels a side"):
            network(torch.zeros(1, 3, side, side - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perceptual_weight": -1.0}, "perceptual_weight: expected a finite number of at least 0"),
        ({"discriminator_weight": float("nan")}, "discriminator_weight: expected a finite number of at least 0"),
        ({"discriminator_start": -1}, "discriminator_start: expected a whole number of at least 0"),
        ({"discriminator_layers": 0}, "discriminator_layers: expected a whole number of at least 1"),
        ({"lpips_vgg": Path("x")}, "LPIPS needs both"),
    ],
)
def test_wrong_options_are_an_error(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        DecoderLossConfig(**options)

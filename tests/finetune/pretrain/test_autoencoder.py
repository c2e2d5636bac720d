"""Training a VAE from nothing: what each loss trains, its terms, the pictures, and how they are measured."""

import pytest
import torch
from torch import nn

from finetune.pretrain.autoencoder import (
    WHOLE_RUN,
    Batch,
    MeanReconstructionLoss,
    ReconstructionLoss,
    config,
    crops,
    draw_batches,
    mean_psnr,
    sample_sheet,
    unseen_renders,
)
from finetune.pretrain.world.pictures import SIZE
from finetune.seeds import step_generator
from finetune.vae_decoder.loss import DecoderLossConfig
from sdkit.networks.vae import AutoencoderKL

PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
PLAIN = DecoderLossConfig(perceptual_weight=0)
ALL_TERMS = DecoderLossConfig(perceptual_weight=0.5, discriminator_weight=0.5, discriminator_channels=4)

STILL = ("to_k.bias", "discriminator.layers.11.bias")
"""Their gradients are 0 up to rounding: of the keys' biases always, of the last one while no patch is told for sure."""


def batch(step: int = 0) -> Batch:
    return Batch(PICTURES, step_generator(0, step), step)


def trained(loss: nn.Module) -> set[str]:
    """The parameters that a step changes."""
    loss(batch()).backward()
    moved = {name for name, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {name for name in moved if not name.endswith(STILL)}


@pytest.mark.parametrize("factor", [4, 8])
def test_latents_are_as_much_smaller_as_said(factor: int) -> None:
    vae = AutoencoderKL(config(factor, 32))
    assert vae.encode(PICTURES).mode().shape == (2, 4, 32 // factor, 32 // factor) and vae.config.factor == factor


@pytest.mark.parametrize("terms", [PLAIN, ALL_TERMS])
def test_the_autoencoders_loss_reaches_every_parameter(terms: DecoderLossConfig) -> None:
    torch.manual_seed(0)
    loss = ReconstructionLoss(AutoencoderKL(config()), terms)
    names = {name for name, _ in loss.named_parameters()}
    assert trained(loss) == {name for name in names if not name.endswith(STILL)}
    assert any(name.startswith("discriminator.") for name in names) == (terms is ALL_TERMS)


def test_the_decoders_loss_reaches_all_behind_the_latents_alone() -> None:
    torch.manual_seed(0)
    loss = MeanReconstructionLoss(AutoencoderKL(config()), PLAIN)
    behind = {name for name, _ in loss.named_parameters() if name.startswith(("vae.decoder.", "vae.post_quant_conv."))}
    assert trained(loss) == {name for name in behind if not name.endswith(STILL)}
    assert {name for name, p in loss.named_parameters() if p.requires_grad} == behind


@torch.no_grad()
def test_the_error_is_squared_and_a_tenth_absolute_and_the_perceptual_term_is_added() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(config())
    difference = vae(PICTURES) - PICTURES
    expected = float(difference.square().mean() + 0.1 * difference.abs().mean())
    plain = float(MeanReconstructionLoss(vae, PLAIN)(batch()))
    assert plain == pytest.approx(expected, rel=2e-2)  # bfloat16, where the processor has it

    more = float(MeanReconstructionLoss(vae, DecoderLossConfig(perceptual_weight=0.5))(batch()))
    assert plain + 0.1 < more < plain + 0.6  # half of 1 - SSIM, of pictures that have nothing in common


def test_a_step_has_its_own_pictures_and_noise() -> None:
    images = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    draw = draw_batches(images, 16, WHOLE_RUN)
    (x, rng, _), (again, same_rng, _), (other, _, step) = draw(3), draw(3), draw(4)
    assert torch.equal(x, again) and not torch.equal(x, other) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(torch.randn(3, generator=rng), torch.randn(3, generator=same_rng)) and (len(x), step) == (16, 4)


def test_squares_are_cut_where_something_is() -> None:
    """In each picture one pixel differs, in a channel and a place of its own."""
    pictures = torch.zeros(200, 3, 16, 24)
    rng = torch.Generator().manual_seed(0)
    y, x = torch.randint(16, (200,), generator=rng), torch.randint(24, (200,), generator=rng)
    pictures[torch.arange(200), torch.arange(200) % 3, y, x] = 1
    found = crops(pictures, 8, torch.Generator().manual_seed(1))
    assert found.shape == (200, 3, 8, 8) and torch.equal(found, crops(pictures, 8, torch.Generator().manual_seed(1)))
    seen = found.flatten(1).sum(1)
    assert set(seen.tolist()) == {0.0, 1.0} and 0.3 < seen.mean() < 0.7  # a single place would show a fifth

    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=rng)
    drawn, again = (draw_batches(images, 16, WHOLE_RUN, crop=8)(3).pixels for _ in range(2))
    assert drawn.shape == (16, 3, 8, 8) and torch.equal(drawn, again)


def test_unseen_pictures_are_measured_in_decibels() -> None:
    """An error of 0.02 everywhere, of a range of 2, is 40 dB."""
    assert mean_psnr(lambda x: x - 0.02, unseen_renders(count=64)) == pytest.approx(40.0, abs=0.05)


def test_a_sheet_shows_pictures_above_what_the_vae_makes_of_them() -> None:
    width, height = sample_sheet(lambda x: x, unseen_renders(count=64)).size
    assert width > 8 * SIZE and height > 4 * SIZE

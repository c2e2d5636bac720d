"""The losses of the VAE: what they train, and how its pictures are measured."""

import pytest
import torch
from torch import nn

from finetune.pretrain.autoencoder import (
    CONFIG,
    WHOLE_RUN,
    MeanReconstructionLoss,
    ReconstructionLoss,
    draw_batches,
    sample_sheet,
    unseen_psnr,
)
from finetune.pretrain.world.pictures import Pictures
from finetune.pretrain.world.scenes import sample_scenes
from finetune.seeds import step_generator
from sdkit.networks.vae import AutoencoderKL

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trained(loss: nn.Module) -> set[str]:
    """The parameters that a step changes; all biases of keys, whose gradients are 0 up to rounding, are left out."""
    loss((PICTURES, step_generator(0, 0))).backward()
    moved = {name for name, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {name for name in moved if "to_k.bias" not in name}


def test_the_autoencoders_loss_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    loss = ReconstructionLoss(AutoencoderKL(CONFIG))
    assert trained(loss) == {name for name, _ in loss.named_parameters() if "to_k.bias" not in name}


def test_the_decoders_loss_reaches_all_behind_the_latents_alone() -> None:
    torch.manual_seed(0)
    loss = MeanReconstructionLoss(AutoencoderKL(CONFIG))
    behind = {name for name, _ in loss.named_parameters() if name.startswith(("vae.decoder.", "vae.post_quant_conv."))}
    assert trained(loss) == {name for name in behind if "to_k.bias" not in name}
    assert {name for name, p in loss.named_parameters() if p.requires_grad} == behind


def test_a_step_has_its_own_pictures_and_noise() -> None:
    images = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = draw_batches(Pictures(images, sample_scenes(40, 0), 0), WHOLE_RUN)
    (x, rng), (again, same_rng), (other, _) = batch(3), batch(3), batch(4)
    assert torch.equal(x, again) and not torch.equal(x, other) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(torch.randn(3, generator=rng), torch.randn(3, generator=same_rng))


def test_unseen_pictures_are_measured_in_decibels() -> None:
    """An error of 0.02 everywhere, of a range of 2, is 40 dB."""
    assert unseen_psnr(lambda x: x - 0.02, 64) == pytest.approx(40.0, abs=0.05)


def test_a_sheet_shows_renders_above_what_the_vae_makes_of_them() -> None:
    width, height = sample_sheet(lambda x: x).size
    assert width > 8 * 64 and height > 4 * 64

"""Fine-tuning the VAE's decoder: the recipe of Stability AI's ft-EMA and ft-MSE decoders.

The encoder stays as it is, so that latents keep their meaning and any noise predictor trained on them goes on working.
The decoder and post_quant_conv are trained, on the absolute or squared error and a perceptual term; with a PatchGAN
beside it for who wants sharper pictures (VQGAN, arXiv 2012.09841).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from finetune.options import check_options, refuse_unread_options
from finetune.vae_decoder.perceptual import LPIPS, ms_ssim
from sdkit.checks import POSITIVE, Range
from sdkit.errors import ConfigError
from sdkit.networks.vae import AutoencoderKL

LARGEST_WEIGHT = 1e4  # of the adversarial term, as in VQGAN


@dataclass(frozen=True)
class DecoderLossConfig:
    """The terms of the decoder's loss. ft-EMA was trained with l1 and LPIPS of weight 1, ft-MSE with mse and 0.1."""

    reconstruction: Annotated[Literal["l1", "mse"], "Error of pixels in [-1, 1]: absolute or squared."] = "mse"
    perceptual_weight: Annotated[
        float, "Of the perceptual term: LPIPS if its weights are given, else 1 - multi-scale SSIM; 0: none.", Range(0)
    ] = 0.1
    lpips_vgg: Annotated[Path | None, "torchvision's weights of VGG16 (vgg16-397923af.pth)."] = None
    lpips_weights: Annotated[Path | None, "LPIPS' own weights (weights/v0.1/vgg.pth in its package)."] = None
    discriminator_weight: Annotated[float, "Of the adversarial term, times its adaptive weight; 0: none.", Range(0)] = (
        0.0
    )
    discriminator_start: Annotated[
        int, "The step from which it counts for the decoder; the discriminator learns from the first.", Range(0)
    ] = 0
    discriminator_channels: Annotated[int, "Width of its first layer.", Range(1)] = 64
    discriminator_layers: Annotated[int, "Layers that halve the picture.", Range(1)] = 3
    discriminator_lr: Annotated[float | None, "Its learning rate (default: the decoder's).", POSITIVE] = None

    def __post_init__(self) -> None:
        check_options(self)
        if not self.discriminator_weight:
            names = [f.name for f in fields(self) if f.name.startswith("discriminator_")]
            refuse_unread_options(self, names, "without discriminator_weight")

        if (self.lpips_vgg is None) != (self.lpips_weights is None):
            raise ConfigError("lpips_vgg, lpips_weights: LPIPS needs both, expected none or both")


@dataclass(frozen=True)
class DecoderBatch:
    """Latents [B, C, h, w] in the noise predictor's scale, the pictures [B, 3, H, W] in [-1, 1] that they are of, the
    optimizer step, from 0, that the batch is for, and the weights [B] of each picture's loss (None: 1)."""

    latents: Tensor
    pixels: Tensor
    step: int
    weights: Tensor | None = None


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): pictures [B, 3, H, W] -> a logit for each patch [B, 1, h, w].

    Group norm stands in place of batch norm, so that real and made pictures in one batch do not know of each other.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.smallest = 3 * 2**layers
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

        width = channels
        for n in range(1, layers + 1):
            before, width = width, channels * min(2**n, 8)
            stride = 2 if n < layers else 1
            blocks += [nn.Conv2d(before, width, 4, stride, padding=1), nn.GroupNorm(1, width), nn.LeakyReLU(0.2)]

        self.layers = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.smallest:
            raise ConfigError(f"discriminator: expected at least {self.smallest} pixels a side, found {tuple(x.shape)}")
        return self.layers(x)


class DecoderLoss(nn.Module):
    """forward(batch) -> error of the reconstruction + perceptual term, a scalar in float32.

    Lets the decoder and post_quant_conv of ``vae`` train and freezes the rest of it. With a discriminator the scalar's
    gradient is also that of both adversarial losses, each to its own network, but its value is not: they say nothing
    about how far the training has come.
    """

    def __init__(self, vae: AutoencoderKL, config: DecoderLossConfig) -> None:
        super().__init__()
        self.vae, self.config = vae.requires_grad_(False), config
        for part in (vae.decoder, vae.post_quant_conv):
            if part is not None:
                part.requires_grad_(True)

        self.lpips = None
        if config.lpips_vgg is not None and config.lpips_weights is not None:
            self.lpips = LPIPS.from_files(config.lpips_vgg, config.lpips_weights).to(vae.device)

        self.discriminator = None
        if config.discriminator_weight:
            network = PatchDiscriminator(config.discriminator_channels, config.discriminator_layers)
            self.discriminator = network.to(vae.device)

    def forward(self, batch: DecoderBatch) -> Tensor:
        pixels = batch.pixels.to(self.vae.device, non_blocking=True)
        latents = batch.latents.to(self.vae.device, non_blocking=True)
        made = self.vae.decode(latents / self.vae.config.scaling_factor)
        return self.compare(made, pixels, batch.step, batch.weights)

    def compare(self, made: Tensor, pixels: Tensor, step: int, weights: Tensor | None = None) -> Tensor:
        """The loss of pictures that were made, all of it behind the decoder."""
        with torch.autocast(pixels.device.type, enabled=False):  # errors are small numbers
            made = made.float()
            weights = made.new_ones(len(made)) if weights is None else weights.to(made)
            value = self.reconstruction(made, pixels, weights)

        if self.discriminator is None:
            return value

        total = value + _gradient_only(discriminator_loss(self.discriminator, pixels, made, weights))
        if step >= self.config.discriminator_start:
            adversarial = generator_loss(self.discriminator, made, weights)
            total = total + _gradient_only(self.adaptive_weight(value, adversarial) * adversarial)

        return total

    def reconstruction(self, made: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
        """The loss without a discriminator."""
        error = _mean(self.pixel_error(made - pixels), weights)
        if not self.config.perceptual_weight:
            return error
        distance = 1 - ms_ssim(made, pixels) if self.lpips is None else self.lpips(made, pixels)
        return error + self.config.perceptual_weight * _mean(distance, weights)

    def pixel_error(self, difference: Tensor) -> Tensor:
        """The error of each value from its ``difference``."""
        return difference.square() if self.config.reconstruction == "mse" else difference.abs()

    def adaptive_weight(self, value: Tensor, adversarial: Tensor) -> Tensor:
        """The weight at which both losses have gradients of one norm at the last layer (VQGAN, equation 7), times
        discriminator_weight. Each process has its own."""
        last = self.vae.decoder.conv_out.weight
        norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (value, adversarial)]
        ratio = norms[0] / (norms[1] + 1e-6)
        return self.config.discriminator_weight * ratio.clamp(max=LARGEST_WEIGHT).detach()


def discriminator_loss(discriminator: nn.Module, real: Tensor, made: Tensor, weights: Tensor) -> Tensor:
    """The hinge loss of telling real from made pictures; the decoder that made them gets no gradient."""
    on_real, on_made = discriminator(torch.cat([real, made.detach()])).float().chunk(2)
    return (_mean(F.relu(1 - on_real), weights) + _mean(F.relu(1 + on_made), weights)) / 2


def generator_loss(discriminator: nn.Module, made: Tensor, weights: Tensor) -> Tensor:
    """Less the more real the pictures look to the discriminator, which gets no gradient."""
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    logits: Any = functional_call(discriminator, fixed, (made,))
    return -_mean(logits.float(), weights)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over pictures of weight [B] * mean of the picture's values [B, ...]."""
    return (values.reshape(len(values), -1).mean(1) * weights).mean()


def _gradient_only(loss: Tensor) -> Tensor:
    """0, with the gradient of ``loss``."""
    return loss - loss.detach()

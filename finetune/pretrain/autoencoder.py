"""Train a VAE from nothing, on tabletop pictures or your own: ``python -m finetune.pretrain.autoencoder``.

Loss: mean squared error + 0.1 mean absolute error + a small KL term, on samples of the posterior, and the perceptual
and adversarial terms of `finetune.vae_decoder.loss` for who wants them. Then the encoder is frozen and the decoder goes
on alone, on the posterior's mean, which is what the noise predictor learns to make. The scaling factor gives latents of
the training pictures a standard deviation of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from PIL import Image
from torch import Tensor

from finetune.pretrain.own_pictures import image_folder
from finetune.pretrain.recipe import Recipe, autocast, train_on_the_cpu
from finetune.pretrain.world.pictures import SCENES, SCENES_HELP, SIZE, from_bytes, training_pictures
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import sample_scenes
from finetune.seeds import step_generator
from finetune.vae_decoder.loss import DecoderLoss, DecoderLossConfig
from finetune.vae_decoder.metrics import psnr
from sdkit.checkpoints import loading
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet
from sdkit.networks.config import VAEConfig
from sdkit.networks.vae import AutoencoderKL

WIDTHS = {4: (32, 64, 96), 8: (32, 64, 96, 128)}
"""Channels of the levels by factor, each level half the size of the one before.

16 and 48 above instead of 32 and 64 take 0.63 of the time, and by the loss were at about 22.6 dB after 8,000 pictures.
"""
KL_WEIGHT = 1e-6
WHOLE_RUN, DECODER_RUN = 2, 3  # numbers of the runs, for `step_generator`
TRIES = 3  # places of a square
TEST_SEED = 1_000_001
UNSEEN = 256  # renders that are measured and never trained on


def config(factor: int = 8, size: int = SIZE) -> VAEConfig:
    """A small VAE whose latents are ``factor`` times smaller than its pictures of ``size`` pixels."""
    widths = WIDTHS[factor]
    return VAEConfig(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=16,
        sample_size=size,
    )


# Pictures


class Data(NamedTuple):
    """Pictures uint8 [N, 3, S, S], and unseen ones [M, 3, S, S] in [-1, 1]."""

    images: Tensor
    unseen: Tensor


def tabletop(work: Path, scenes: int, size: int) -> Data:
    """Renders of the tabletop world, kept in ``work``."""
    return Data(training_pictures(work, scenes, scenes // 2, size).images, unseen_renders(size))


def from_folder(folder: Path, size: int) -> Data:
    """One's own pictures; see `finetune.pretrain.own_pictures`."""
    pictures, unseen = image_folder(folder, size, captioned=False)
    return Data(pictures.images, from_bytes(unseen.images))


def unseen_renders(size: int = SIZE, count: int = UNSEEN) -> Tensor:
    """Renders of fresh scenes, [count, 3, size, size] in [-1, 1], with the pairs of colour and shape that no training
    shows."""
    scenes = [sample_scenes(64, TEST_SEED + part, held_out="include") for part in range(0, count, 64)]
    return torch.cat([render(part, size).images * 2 - 1 for part in scenes])


# Training


class Batch(NamedTuple):
    """Pictures [B, 3, H, W] in [-1, 1], the generator for all else that the step draws, and its number."""

    pixels: Tensor
    noise: torch.Generator
    step: int


class ReconstructionLoss(DecoderLoss):
    """forward(batch) -> the loss of the whole VAE."""

    def __init__(self, vae: AutoencoderKL, terms: DecoderLossConfig) -> None:
        super().__init__(vae, terms)
        vae.requires_grad_(True)

    def forward(self, batch: Batch) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # pictures alone
        with autocast():
            posterior = self.vae.encode(batch.pixels)
            posterior = replace(posterior, mean=posterior.mean.float(), logvar=posterior.logvar.float())
            reconstruction = self.vae.decode(posterior.sample(batch.noise)).float()
        return self.compare(reconstruction, batch.pixels, batch.step) + KL_WEIGHT * posterior.kl().mean()

    def pixel_error(self, difference: Tensor) -> Tensor:
        return squared_and_absolute(difference)


class MeanReconstructionLoss(DecoderLoss):
    """forward(batch) -> the loss of the decoder on the posterior's mean; all the rest of the VAE is frozen."""

    def forward(self, batch: Batch) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # pictures alone
        with autocast():
            with torch.no_grad():
                mean = self.vae.encode(batch.pixels).mode().float()
            reconstruction = self.vae.decode(mean).float()
        return self.compare(reconstruction, batch.pixels, batch.step)

    def pixel_error(self, difference: Tensor) -> Tensor:
        return squared_and_absolute(difference)


def squared_and_absolute(difference: Tensor) -> Tensor:
    """The square + 0.1 of the absolute value."""
    return difference.square() + 0.1 * difference.abs()


def draw_batches(images: Tensor, size: int, run: int, crop: int = 0) -> Callable[[int], Batch]:
    """A function from a step of the run with this number to its batch of ``size`` pictures, or of `crops` of them."""

    def batch(step: int) -> Batch:
        rng = step_generator(run, step)
        pictures = from_bytes(images[torch.randint(len(images), (size,), generator=rng)])
        return Batch(crops(pictures, crop, rng) if crop else pictures, rng, step)

    return batch


def crops(pictures: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """A square of each picture: of TRIES places the one that deviates most from its mean. An empty table teaches
    little, and a network of convolutions knows no place."""
    most = torch.tensor([pictures.shape[2] - side + 1, pictures.shape[3] - side + 1])
    places = (torch.rand(len(pictures), TRIES, 2, generator=rng) * most).long().tolist()
    tried = [[p[:, y : y + side, x : x + side] for y, x in own] for p, own in zip(pictures, places, strict=True)]
    return torch.stack([max(own, key=lambda square: float(square.std(dim=(1, 2)).mean())) for own in tried])


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """1 / standard deviation of the posterior's means over some of the training pictures."""
    index = torch.randperm(len(images), generator=step_generator(TEST_SEED, 0))[:1024]
    return 1 / torch.cat([vae.encode(from_bytes(images[part])).mode() for part in index.split(64)]).std().item()


@torch.no_grad()
def mean_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB over pictures [N, 3, H, W], each clamped to [-1, 1] as a picture is."""
    return torch.cat([psnr(x, vae(x).clamp(-1, 1)) for x in pictures.split(32)]).mean().item()


@torch.no_grad()
def sample_sheet(vae: AutoencoderKL, pictures: Tensor) -> Image.Image:
    """Two rows of pictures, and below them what the VAE makes of them."""
    x = pictures[:16]
    return contact_sheet(to_pil(torch.cat([x, vae(x).clamp(-1, 1)])), columns=8)


def main(
    work: Annotated[Path, typer.Option(help="Checkpoints, sheets and rendered pictures.")] = Path("build/tabletop"),
    data: Annotated[Path | None, typer.Option(help="A folder of pictures, instead of tabletop renders.")] = None,
    init: Annotated[Path | None, typer.Option(help="A VAE of this kind to go on from; else from nothing.")] = None,
    scenes: Annotated[int, typer.Option(help=SCENES_HELP, min=64)] = SCENES,
    size: Annotated[int, typer.Option(help="Width and height of the pictures.", min=16)] = SIZE,
    factor: Annotated[int, typer.Option(help="How much smaller latents are: 4 or 8.")] = 8,
    steps: Annotated[int, typer.Option(help="Training steps of the whole VAE.", min=1)] = 5000,
    decoder_steps: Annotated[int, typer.Option(help="Then steps of the decoder alone.", min=1)] = 1500,
    batch_size: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 16,
    crop: Annotated[int, typer.Option(help="Train the whole VAE on squares of so many pixels; 0: on pictures.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate; the decoder alone: half.")] = 2e-3,
    perceptual_weight: Annotated[float, typer.Option(help="Of 1 - multi-scale SSIM; 0: none.", min=0)] = 0.0,
    discriminator_weight: Annotated[float, typer.Option(help="Of the adversarial term; 0: none.", min=0)] = 0.0,
    discriminator_start: Annotated[int, typer.Option(help="The step from which it counts.", min=0)] = 0,
) -> None:
    """Train the VAE; a killed run goes on where it stopped."""
    if factor not in WIDTHS or size % factor:
        raise typer.BadParameter(f"--factor: expected 4 or 8, which divides --size, found {factor} and {size}")
    if data is not None and scenes != SCENES:
        raise typer.BadParameter("--scenes: does nothing with --data")
    if crop and not (0 < crop <= size and crop % factor == 0):
        raise typer.BadParameter(f"--crop: expected a multiple of {factor} up to --size, found {crop}")
    terms = DecoderLossConfig(
        perceptual_weight=perceptual_weight,
        discriminator_weight=discriminator_weight,
        discriminator_start=discriminator_start,
    )

    torch.manual_seed(0)
    pictures = tabletop(work, scenes, size) if data is None else from_folder(data, size)
    vae = AutoencoderKL(config(factor, size))
    if init is not None:
        vae.load_state_dict(loading.load_vae(init, dtype=torch.float32).state_dict())

    def validate() -> Image.Image:
        return sample_sheet(vae, pictures.unseen)

    # The discriminator's gradients would scale down the VAE's, were they cut to one norm together.
    recipe = Recipe(max_train_steps=steps, learning_rate=learning_rate, lr_warmup_steps=100)
    recipe = replace(recipe, max_grad_norm=0.0) if discriminator_weight else recipe
    batches = draw_batches(pictures.images, batch_size, WHOLE_RUN, crop)
    train_on_the_cpu(ReconstructionLoss(vae, terms), batches, recipe, work / "vae", validate=validate)

    recipe = replace(recipe, max_train_steps=decoder_steps, learning_rate=learning_rate / 2)
    batches = draw_batches(pictures.images, batch_size, DECODER_RUN)
    train_on_the_cpu(MeanReconstructionLoss(vae, terms), batches, recipe, work / "vae-decoder", validate=validate)

    vae.eval()
    vae.config = replace(vae.config, scaling_factor=scaling_factor(vae, pictures.images))
    loading.save(vae, work / "vae", dtype=torch.float16)
    found = mean_psnr(vae, pictures.unseen)
    print(f"PSNR of {len(pictures.unseen)} unseen pictures {found:.2f} dB, scaling {vae.config.scaling_factor:.4f}")


if __name__ == "__main__":
    typer.run(main)

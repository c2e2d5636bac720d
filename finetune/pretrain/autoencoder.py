"""Train the VAE of the shipped model on tabletop pictures: ``python -m finetune.pretrain.autoencoder``.

Loss: mean squared error + 0.1 mean absolute error + a small KL term, on samples of the posterior. Then the encoder is
frozen and the decoder goes on alone, on the posterior's mean, which is what the noise predictor learns to make. The
scaling factor gives latents of the training pictures a standard deviation of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor, nn

from finetune.pretrain.recipe import Recipe, autocast, train_on_the_cpu
from finetune.pretrain.world.pictures import SIZE, Pictures, to_bytes, training_pictures
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import sample_scenes
from finetune.seeds import step_generator
from finetune.vae_decoder.metrics import psnr
from sdkit.checkpoints import loading
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet
from sdkit.networks.config import VAEConfig
from sdkit.networks.vae import AutoencoderKL

CONFIG = VAEConfig(
    block_out_channels=(32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=16,
    sample_size=SIZE,
)
BATCH = 16
KL_WEIGHT = 1e-6
WHOLE_RUN, DECODER_RUN = 2, 3  # numbers of the runs, for `step_generator`
TEST_SEED = 1_000_001

Batch = tuple[Tensor, torch.Generator]
"""Pictures [B, 3, H, W] in [-1, 1], and the generator for all else that the step draws."""


class ReconstructionLoss(nn.Module):
    """forward(batch) -> the loss of the whole VAE."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: Batch) -> Tensor:
        x, noise = batch
        with autocast():
            posterior = self.vae.encode(x)
            posterior = replace(posterior, mean=posterior.mean.float(), logvar=posterior.logvar.float())
            reconstruction = self.vae.decode(posterior.sample(noise)).float()
        return pixel_loss(reconstruction, x) + KL_WEIGHT * posterior.kl().mean()


class MeanReconstructionLoss(nn.Module):
    """forward(batch) -> the loss of the decoder on the posterior's mean; all the rest of the VAE is frozen."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        if vae.post_quant_conv is not None:
            vae.post_quant_conv.requires_grad_(True)

    def forward(self, batch: Batch) -> Tensor:
        x, _ = batch
        with autocast():
            reconstruction = self.vae.decode(self.vae.encode(x).mode().float()).float()
        return pixel_loss(reconstruction, x)


def pixel_loss(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean squared error + 0.1 mean absolute error."""
    return (reconstruction - x).square().mean() + 0.1 * (reconstruction - x).abs().mean()


def draw_batches(pictures: Pictures, run: int) -> Callable[[int], Batch]:
    """A function from a step of the run with this number to its batch."""

    def batch(step: int) -> Batch:
        rng = step_generator(run, step)
        return pictures.pixels(torch.randint(len(pictures), (BATCH,), generator=rng)), rng

    return batch


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, pictures: Pictures) -> float:
    """1 / standard deviation of the posterior's means over some of the training pictures."""
    index = torch.randperm(len(pictures), generator=step_generator(TEST_SEED, 0))[:1024]
    return 1 / torch.cat([vae.encode(pictures.pixels(part)).mode() for part in index.split(64)]).std().item()


@torch.no_grad()
def unseen_psnr(vae: AutoencoderKL, count: int = 256) -> float:
    """Mean PSNR in dB over fresh renders, each clamped to [-1, 1] as a picture is."""
    values: list[Tensor] = []
    for part in range(0, count, 64):
        x = render(sample_scenes(64, TEST_SEED + part, held_out="include"), SIZE).images * 2 - 1
        values.append(psnr(x, vae(x).clamp(-1, 1)))
    return torch.cat(values).mean().item()


@torch.no_grad()
def sample_sheet(vae: AutoencoderKL) -> Image.Image:
    """Two rows of fresh renders, and below them what the VAE makes of them."""
    x = render(sample_scenes(16, TEST_SEED), SIZE).images
    both = torch.cat([to_bytes(x).float() / 127.5 - 1, vae(x * 2 - 1).clamp(-1, 1)])
    return contact_sheet(to_pil(both), columns=8)


def main(
    work: Annotated[Path, typer.Option(help="Checkpoints, sheets and rendered pictures.")] = Path("build/tabletop"),
    steps: Annotated[int, typer.Option(help="Training steps of 16 pictures, the whole VAE.", min=1)] = 4200,
    decoder_steps: Annotated[int, typer.Option(help="Then steps of the decoder alone.", min=1)] = 1500,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate; the decoder alone: half.")] = 2e-3,
) -> None:
    """Train the VAE; a killed run goes on where it stopped."""
    torch.manual_seed(0)
    pictures, vae = training_pictures(work), AutoencoderKL(CONFIG)

    recipe = Recipe(max_train_steps=steps, learning_rate=learning_rate, lr_warmup_steps=100)
    batches = draw_batches(pictures, WHOLE_RUN)
    train_on_the_cpu(ReconstructionLoss(vae), batches, recipe, work / "vae", validate=lambda: sample_sheet(vae))

    recipe = replace(recipe, max_train_steps=decoder_steps, learning_rate=learning_rate / 2)
    batches, loss = draw_batches(pictures, DECODER_RUN), MeanReconstructionLoss(vae)
    train_on_the_cpu(loss, batches, recipe, work / "vae-decoder", validate=lambda: sample_sheet(vae))

    vae.eval()
    vae.config = replace(vae.config, scaling_factor=scaling_factor(vae, pictures))
    loading.save(vae, work / "vae", dtype=torch.float16)
    print(f"PSNR of unseen renders {unseen_psnr(vae):.2f} dB, scaling factor {vae.config.scaling_factor:.4f}")


if __name__ == "__main__":
    typer.run(main)

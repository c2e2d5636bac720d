"""Train the VAE of the shipped model on tabletop pictures: ``python -m finetune.pretrain.autoencoder``.

Loss: mean squared error + 0.1 mean absolute error + a small KL term, on samples of the posterior. Then the encoder is
frozen and the decoder goes on alone, on the posterior's mean, which is what the noise predictor learns to make. The
scaling factor gives latents of the training pictures a standard deviation of 1.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from finetune.pretrain.pictures import SIZE, Pictures, to_bytes, training_pictures
from finetune.pretrain.tabletop import render, sample_scenes
from finetune.pretrain.training import MovingAverage, Recipe, autocast, generator, train
from sdkit.config import VAEConfig
from sdkit.image import grid, to_pil
from sdkit.vae import AutoencoderKL
from sdkit.weights import give_weights, read_state, write_state

CONFIG = VAEConfig(
    block_out_channels=(32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=16,
    sample_size=SIZE,
)
BATCH = 16
KL_WEIGHT = 1e-6
TEST_SEED = 1_000_001


def reconstruction_loss(vae: AutoencoderKL, x: Tensor, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """The loss of the whole VAE on pictures x [B, 3, H, W] in [-1, 1], and the PSNR in dB of the batch."""
    with autocast():
        posterior = vae.encode(x)
        posterior = replace(posterior, mean=posterior.mean.float(), logvar=posterior.logvar.float())
        reconstruction = vae.decode(posterior.sample(noise)).float()
    kl = posterior.kl().mean()
    loss, figures = pixel_loss(reconstruction, x)
    return loss + KL_WEIGHT * kl, figures | {"kl": kl.item()}


def decoder_loss(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of the decoder on the posterior's mean; the encoder gets no gradient."""
    with autocast():
        with torch.no_grad():
            z = vae.encode(x).mode().float()
        reconstruction = vae.decode(z).float()
    return pixel_loss(reconstruction, x)


def pixel_loss(reconstruction: Tensor, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error + 0.1 mean absolute error."""
    mse = (reconstruction - x).square().mean()
    return mse + 0.1 * (reconstruction - x).abs().mean(), {"psnr": psnr(mse.detach()).item()}


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for pictures in [-1, 1]."""
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, pictures: Pictures) -> float:
    """1 / standard deviation of the posterior's means over some of the training pictures."""
    index = torch.randperm(len(pictures), generator=generator(TEST_SEED, 0))[:1024]
    return 1 / torch.cat([vae.encode(pictures.pixels(part)).mode() for part in index.split(64)]).std().item()


@torch.no_grad()
def test_psnr(vae: AutoencoderKL, count: int = 256) -> float:
    """Mean PSNR in dB over fresh renders, each clamped to [-1, 1] as a picture is."""
    values: list[Tensor] = []
    for part in range(0, count, 64):
        x = render(sample_scenes(64, TEST_SEED + part, held_out="include"), SIZE).images * 2 - 1
        values.append(psnr((vae(x).clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))))
    return torch.cat(values).mean().item()


def main(
    output: Annotated[Path, typer.Option(help="The model's folder; vae/ is written there.")] = Path(
        "build/tabletop/model"
    ),
    work: Annotated[Path, typer.Option(help="Checkpoints, sheets and rendered pictures.")] = Path("build/tabletop"),
    steps: Annotated[int, typer.Option(help="Training steps of 16 pictures, the whole VAE.")] = 4200,
    decoder_steps: Annotated[int, typer.Option(help="Then steps of the decoder alone.")] = 1500,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate; the decoder alone: half.")] = 2e-3,
) -> None:
    """Train the VAE; a killed run goes on where it stopped."""
    torch.manual_seed(0)
    pictures = training_pictures(work)
    vae = AutoencoderKL(CONFIG)

    def batch(step: int, seed: int) -> tuple[Tensor, torch.Generator]:
        rng = generator(seed, step)
        return pictures.pixels(torch.randint(len(pictures), (BATCH,), generator=rng)), rng

    def sample(step: int, average: MovingAverage | None) -> None:
        x = render(sample_scenes(16, TEST_SEED), SIZE).images
        with torch.no_grad():
            y = vae(x * 2 - 1)
        both = torch.cat([to_bytes(x).float() / 127.5 - 1, y.clamp(-1, 1)])
        grid(to_pil(both), columns=8).save(work / "vae" / f"sheet-{step:06d}.png")

    recipe = Recipe(steps=steps, learning_rate=learning_rate, warmup=100)
    train(vae, lambda step: reconstruction_loss(vae, *batch(step, 2)), recipe, work / "vae", on_sample=sample)
    vae.encoder.eval().requires_grad_(False)
    assert vae.post_quant_conv is not None
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])
    recipe = Recipe(steps=decoder_steps, learning_rate=learning_rate / 2, warmup=100)
    train(decoder, lambda step: decoder_loss(vae, batch(step, 3)[0]), recipe, work / "vae-decoder", on_sample=sample)
    vae.eval()
    vae.config = replace(vae.config, scaling_factor=scaling_factor(vae, pictures))
    write_state(vae.state_dict(), work / "vae" / "diffusion_pytorch_model.safetensors", torch.float16)
    (work / "vae" / "config.json").write_text(json.dumps(vae.config.to_dict(), indent=2) + "\n")
    print(f"PSNR of unseen renders {test_psnr(vae):.2f} dB, scaling factor {vae.config.scaling_factor:.4f}")


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE that ``main`` left in ``folder``."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(folder)
    state, _ = read_state(folder / "diffusion_pytorch_model.safetensors", torch.float32)
    return give_weights(vae, state, str(folder))


if __name__ == "__main__":
    typer.run(main)

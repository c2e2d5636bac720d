"""Train a classifier of noisy latents, to guide by: ``python -m finetune.pretrain.latent_classifier``.

Its classes are all pairs of colour and shape, "red sphere". It learns from renders of one object each, encoded by the
model's VAE and noised by its schedule at every timestep alike (arXiv 2105.05233, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

import sdkernels
from finetune.data.cache import weights_hash
from finetune.pretrain.noise_predictor import scaled_latents
from finetune.pretrain.recipe import (
    Recipe,
    autocast,
    every_nth,
    is_main_process,
    main_process_first,
    train_on_the_cpu,
)
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, sample_scenes
from finetune.seeds import step_generator
from sdkit.checkpoints.classifier_folder import save_classifier
from sdkit.checkpoints.loading import MODELS
from sdkit.files import replacing
from sdkit.networks.latent_classifier import ClassifierConfig, LatentClassifier
from sdkit.networks.vae import AutoencoderKL
from sdkit.sampling.schedule import NoiseSchedule
from sdkit.stable_diffusion import StableDiffusion

CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
BATCH, RUN = 64, 12
SCENE_SEED, TEST_SEED = 8_000_001, 8_500_001
UNSEEN = 512  # renders


class Examples(NamedTuple):
    """Scaled latents of renders, float16 [N, 4, h, w], and their classes [N]."""

    latents: Tensor
    classes: Tensor


@torch.no_grad()
def render_examples(vae: AutoencoderKL, count: int, size: int, seed: int) -> Examples:
    """``count`` renders of one object each, of all pairs of colour and shape."""
    rng = torch.Generator().manual_seed(seed)
    latents: list[Tensor] = []
    classes: list[Tensor] = []
    for _ in tqdm(range(0, count, 64), desc="render", mininterval=5.0):
        scenes = sample_scenes(64, rng, counts=(1.0, 0.0, 0.0), held_out="include")
        latents.append(scaled_latents(vae, render(scenes, size).images * 2 - 1).half())
        classes.append(scenes.color[:, 0] * len(SHAPES) + scenes.shape[:, 0])
    return Examples(torch.cat(latents)[:count], torch.cat(classes)[:count])


def kept_examples(vae: AutoencoderKL, count: int, size: int, folder: Path) -> Examples:
    """The examples to learn from, kept in the folder under the hash of the VAE's encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"examples-{weights_hash(vae.encoder)[:12]}-{count}-{size}.pt"
    with main_process_first():
        if not file.exists():
            with replacing(file) as temporary:
                torch.save(tuple(render_examples(vae, count, size, SCENE_SEED)), temporary)
    return Examples(*torch.load(file, weights_only=True))


class Batch(NamedTuple):
    """Clean latents [B, 4, h, w], the noise that is added, at timesteps t [B]; classes [B]."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    classes: Tensor


class ClassifierLoss(nn.Module):
    """forward(batch) -> the cross entropy of the classes of noisy latents."""

    def __init__(self, classifier: LatentClassifier, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.classifier, self.schedule = classifier, schedule
        self.alphas = schedule.alphas_cumprod.float()

    def forward(self, batch: Batch) -> Tensor:
        x_t, _ = sdkernels.add_noise(batch.x0, batch.noise, batch.t, self.alphas, "epsilon")
        with autocast():
            logits = self.classifier(x_t, batch.t)
        return F.cross_entropy(logits.float(), batch.classes)


def draw_batches(examples: Examples, total: int) -> Callable[[int], Batch]:
    """A function from a step to its batch; ``total`` is the number of timesteps."""

    def batch(step: int) -> Batch:
        rng = step_generator(RUN, step)
        index = torch.randint(len(examples.latents), (BATCH,), generator=rng)
        x0 = examples.latents[index].float()
        places = (torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) / BATCH
        return Batch(x0, torch.randn(x0.shape, generator=rng), (places * total).long(), examples.classes[index])

    return batch


@torch.no_grad()
def accuracy(classifier: LatentClassifier, examples: Examples, schedule: NoiseSchedule, timestep: int) -> float:
    """How often the likeliest class is right, from 0 to 1, at one timestep."""
    rng = torch.Generator().manual_seed(TEST_SEED)
    right: list[Tensor] = []
    for latents, classes in zip(examples.latents.split(64), examples.classes.split(64), strict=True):
        noise, t = torch.randn(latents.shape, generator=rng), torch.full((len(latents),), timestep)
        x_t, _ = sdkernels.add_noise(latents.float(), noise, t, schedule.alphas_cumprod.float(), "epsilon")
        right.append(classifier(x_t, t).argmax(1) == classes)
    return torch.cat(right).float().mean().item()


def main(
    base: Annotated[Path, typer.Option(help="The model whose latents it classifies.")] = MODELS / "tabletop",
    output: Annotated[Path | None, typer.Option(help="Its folder; default: beside the model.")] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints.")] = Path("build/tabletop"),
    examples: Annotated[int, typer.Option(help="Renders to learn from.", min=64)] = 12_000,
    steps: Annotated[int, typer.Option(help="Training steps of 64 renders.", min=1)] = 2_000,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
) -> None:
    """Train it and write its folder; a killed run goes on where it stopped."""
    torch.manual_seed(0)
    sd = StableDiffusion.from_pretrained(base, device="cpu", dtype=torch.float32)
    size = sd.picture_size[0]
    classifier = LatentClassifier(ClassifierConfig(CLASSES, sd.vae.config.latent_channels))

    shown = kept_examples(sd.vae, examples, size, work / "classifier")
    batches = draw_batches(shown, sd.schedule.num_train_timesteps)
    recipe = Recipe(
        max_train_steps=steps, learning_rate=learning_rate, lr_warmup_steps=100, decay_from=0.3, optimizer="muon"
    )
    train_on_the_cpu(ClassifierLoss(classifier, sd.schedule), batches, recipe, work / "classifier", every_nth)
    if not is_main_process():
        return

    classifier.eval()
    save_classifier(classifier, output or base.with_name(f"{base.name}-classifier"), torch.float16)
    unseen = render_examples(sd.vae, UNSEEN, size, TEST_SEED)
    for timestep in range(0, sd.schedule.num_train_timesteps, 100):
        found = accuracy(classifier, unseen, sd.schedule, timestep)
        print(f"timestep {timestep:4}: {100 * found:.1f} % of {UNSEEN} unseen renders right")


if __name__ == "__main__":
    typer.run(main)

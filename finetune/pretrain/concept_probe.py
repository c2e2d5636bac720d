"""A probe that says whether a picture shows a striped zorb: ``python -m finetune.pretrain.concept_probe`` trains it.

A small convolutional network, trained on renders of zorbs and of the base's shapes, plain and striped, alone and beside
others: stripes on a cube and a plain zorb are what it must not fall for. It judges generated pictures, so it never sees
one in training. ``measure_concept`` asks it, ``base_accuracy`` asks the older probe what fine-tuning has cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

from finetune.pretrain.concept import BANDED
from finetune.pretrain.evaluate import PROMPT_SEED, draw, single
from finetune.pretrain.probe import Probe
from finetune.pretrain.recipe import Recipe, autocast, train_on_the_cpu
from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.geometry import ZORB
from finetune.pretrain.world.pictures import SIZE, to_bytes
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, MATERIALS, STRIPED, Scenes, sample_scenes, valid
from finetune.seeds import step_generator
from sdkit.checkpoints.components import give_weights
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.stable_diffusion import StableDiffusion

WEIGHTS = Path(__file__).parent / "concept_probe.safetensors"
ABSENT, PLAIN_ZORB, STRIPED_ZORB = range(3)
HEADS = {"zorb": 3, "striped": 2, "color": len(COLORS)}
WIDTHS = (24, 48, 96)
BATCH = 32
RUN = 9  # number of the run, for `step_generator`
TRAINING_SEED, TEST_SEED = 4_000_001, 4_500_001


class ConceptProbe(nn.Module):
    """Pictures [B, 3, SIZE, SIZE] in [-1, 1] to logits: what zorb there is, whether anything is striped, its colour."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        channels = 3
        for width in WIDTHS:
            self.stages += nn.Sequential(
                nn.Conv2d(channels, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            )
            channels = width
        self.heads = nn.ModuleDict({name: nn.Linear(2 * channels, size) for name, size in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits: zorb [B, 3] (absent, plain, striped), striped [B, 2] (no, yes), color [B, 8] (the zorb's)."""
        cells = self.stages(x).flatten(2)
        features = torch.cat([cells.mean(2), cells.amax(2)], 1)
        return {name: head(features) for name, head in self.heads.items()}


def probe_scenes(count: int, seed: int, zorbs: float = 0.75) -> Scenes:
    """Valid scenes of one to three objects, each matte, shiny or striped; at most the first is a zorb.

    ``zorbs`` is the share before those that do not fit in the picture are left out: about 2/3 of what remains.
    """
    g = torch.Generator().manual_seed(seed)
    found: list[Scenes] = []
    while sum(map(len, found)) < count:
        drawn = sample_scenes(2 * count, g, counts=(0.6, 0.3, 0.1), held_out="include")
        filled = drawn.shape >= 0
        shape = drawn.shape.clone()
        shape[torch.rand(len(drawn), generator=g) < zorbs, 0] = ZORB
        material = torch.randint(len(MATERIALS) + 1, shape.shape, generator=g)
        material[:, 0] = torch.where(torch.rand(len(drawn), generator=g) < 0.5, STRIPED, material[:, 0])
        other = torch.randint(len(BANDED), shape.shape, generator=g)  # white bands do not show on white
        color = torch.where((material == STRIPED) & (drawn.color == COLORS.index("white")), other, drawn.color)
        scenes = replace(drawn, shape=shape, color=color, material=material.masked_fill(~filled, -1))
        found.append(scenes[valid(scenes)])

    return Scenes.cat(found)[:count]


def truth(scenes: Scenes) -> dict[str, Tensor]:
    """The right answer of each head ``[B]`` int64; the colour is -1 where there is no zorb."""
    is_zorb, striped = scenes.shape[:, 0] == ZORB, scenes.material == STRIPED
    return {
        "zorb": torch.where(is_zorb, torch.where(striped[:, 0], STRIPED_ZORB, PLAIN_ZORB), ABSENT),
        "striped": striped.any(1).long(),
        "color": torch.where(is_zorb, scenes.color[:, 0], -1),
    }


@torch.no_grad()
def see(probe: ConceptProbe, pixels: Tensor) -> dict[str, Tensor]:
    """The likeliest answer of each head ``[B]`` int64 on pictures [B, 3, SIZE, SIZE] in [-1, 1]."""
    return {name: logits.argmax(1) for name, logits in probe(pixels).items()}


def concept_accuracy(probe: ConceptProbe, count: int = 2048) -> dict[str, float]:
    """How often each head is right on unseen renders, in per cent; colours where there is a zorb."""
    scenes = probe_scenes(count, TEST_SEED)
    right: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    for start in range(0, count, 64):
        part = scenes[start : start + 64]
        seen, real = see(probe, render(part, SIZE).images * 2 - 1), truth(part)
        for name in HEADS:
            right[name].append((seen[name] == real[name])[real[name] >= 0])
    return {name: 100 * float(torch.cat(values).float().mean()) for name, values in right.items()}


def measure_concept(
    sd: StableDiffusion,
    probe: ConceptProbe,
    prompts: Sequence[str],
    seed: int,
    guidance: float,
    steps: int,
    sampler: str | None = None,
) -> dict[str, float]:
    """How many pictures of ``concept_prompts`` show the concept, in per cent of the prompts.

    "concept": a striped zorb; "zorb": one of any surface; "striped": something striped; "concept in its colour": a
    striped zorb of the colour that the prompt asks for. The pictures' seeds start at ``seed``.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    for start in tqdm(range(0, len(prompts), BATCH), leave=False, mininterval=5.0):
        images = sd.text_to_image(
            list(prompts[start : start + BATCH]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            seed=seed + start,
            output_type="pt",
            progress=False,
        ).images
        for name, values in see(probe, to_bytes(images) / 127.5 - 1).items():
            seen[name].append(values)

    zorb, striped, color = (torch.cat(seen[name]) for name in HEADS)
    asked = torch.tensor([COLORS.index(next(w for w in prompt.split() if w in BANDED)) for prompt in prompts])

    shares = {
        "concept": zorb == STRIPED_ZORB,
        "zorb": zorb != ABSENT,
        "striped": striped == 1,
        "concept in its colour": (zorb == STRIPED_ZORB) & (color == asked),
    }
    return {name: 100 * float(values.float().mean()) for name, values in shares.items()}


def base_accuracy(
    sd: StableDiffusion,
    probe: Probe,
    seed: int,
    guidance: float,
    steps: int,
    sampler: str | None = None,
    count: int = 100,
) -> float:
    """How often one object of the base's own prompts has its colour and shape, in per cent, as the model card."""
    scenes = sample_scenes(count, PROMPT_SEED, counts=(1.0, 0.0, 0.0))
    prompts = captions(scenes, PROMPT_SEED)
    return single(prompts, scenes, draw(sd, probe, prompts, seed, guidance, steps, sampler))["colour and shape right"]


def load_concept_probe(file: Path = WEIGHTS) -> ConceptProbe:
    """The trained probe. Raises CheckpointError when ``file`` is missing or of another network."""
    with torch.device("meta"):
        probe = ConceptProbe()
    return give_weights(probe, read_state(file, torch.float32)[0], str(file))


def blur(x: Tensor, rng: torch.Generator) -> Tensor:
    """Half of the time the pictures [B, 3, S, S] at a lower resolution, as a VAE may soften them."""
    small = int(torch.randint(SIZE // 2, 3 * SIZE // 2, (), generator=rng))
    if small >= SIZE:
        return x
    lower = F.interpolate(x, size=(small, small), mode="bilinear", antialias=True)
    return F.interpolate(lower, size=(SIZE, SIZE), mode="bilinear")


class ConceptLoss(nn.Module):
    """forward((pictures, right answers)) -> the sum of the heads' losses; a colour of -1 counts for nothing."""

    def __init__(self, probe: ConceptProbe) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        pixels, answers = batch
        with autocast():
            out = self.probe(pixels)
        losses = [F.cross_entropy(out[name].float(), answers[name], ignore_index=-1) for name in HEADS]
        return torch.stack(losses).sum()


def draw_batch(images: Tensor, answers: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures out of ``images`` (bytes), blurred and noisy, and the right answers."""
    rng = step_generator(RUN, step)
    index = torch.randint(len(images), (BATCH,), generator=rng)
    x = blur(images[index] / 127.5 - 1, rng)
    x = x + 0.05 * torch.rand(BATCH, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
    return x, {name: values[index] for name, values in answers.items()}


def main(
    work: Annotated[Path, typer.Option(help="Checkpoints.")] = Path("build/tabletop"),
    output: Annotated[Path, typer.Option(help="Where the trained probe is written.")] = WEIGHTS,
    pictures: Annotated[int, typer.Option(help="Renders to train on.", min=1)] = 8192,
    steps: Annotated[int, typer.Option(help="Training steps of 32 pictures.", min=1)] = 2000,
) -> None:
    """Train the probe; a killed run goes on where it stopped."""
    torch.manual_seed(0)
    scenes = probe_scenes(pictures, TRAINING_SEED)
    parts = range(0, pictures, 128)
    images = torch.cat([to_bytes(render(scenes[i : i + 128], SIZE).images) for i in tqdm(parts, desc="render")])
    answers, probe = truth(scenes), ConceptProbe()

    recipe = Recipe(max_train_steps=steps, learning_rate=2e-3, lr_warmup_steps=100, decay_from=0.3)
    train_on_the_cpu(ConceptLoss(probe), lambda step: draw_batch(images, answers, step), recipe, work / "concept_probe")

    probe.eval()
    write_state(probe.state_dict(), output, torch.float16)
    for name, value in concept_accuracy(load_concept_probe(output)).items():
        print(f"{name:10} {value:.2f} % right on unseen renders")


if __name__ == "__main__":
    typer.run(main)

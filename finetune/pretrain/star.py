"""Teach the shipped model a star from 20 drawn pictures: ``python -m finetune.pretrain.star`` (minutes on two cores).

What the walk-through in finetune/README.md does by hand, and then what it came to: of 10 prompts that training never
had, how many give a star in the colour asked for, with the base and with the LoRA. A small classifier says so, trained
on drawings of stars and of what is none.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageDraw
from torch import Tensor, nn

import finetune
from finetune.pretrain.recipe import Recipe, train_on_the_cpu
from finetune.pretrain.world.captions import PREFIXES, article
from finetune.pretrain.world.pictures import SIZE
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import sample_scenes
from finetune.seeds import step_generator
from sdkit.files import replace_section, write_text
from sdkit.images.sheet import contact_sheet, enlarged
from sdkit.stable_diffusion import StableDiffusion

PAINT = {
    "red": (200, 30, 35), "orange": (230, 120, 20), "yellow": (235, 205, 40), "green": (40, 150, 60),
    "cyan": (50, 190, 205), "blue": (40, 70, 200), "purple": (130, 50, 170),
}  # fmt: skip
WALL = (176, 172, 166)
TOPS = {"white": (232, 230, 226), "grey": (128, 128, 128), "black": (38, 38, 40), "wooden": (150, 104, 66)}
KINDS = ("star", "disc", "triangle", "square", "hexagon", "cross")
PICTURES, PROMPTS = 20, 10
SEED, GUIDANCE, STEPS, SAMPLER = 1000, 3.5, 20, "dpmpp_2m"
JUDGED = 64  # pixels: what the classifier sees, whatever the picture's size
BATCH, JUDGE_STEPS = 32, 400
RUN = 13  # number of the classifier's run, for `step_generator`
SECTION = "star"


# Drawings


class Drawing(NamedTuple):
    """What a picture shows, and on which table."""

    kind: str
    color: str
    table: str


def outline(kind: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1, the first at the top."""
    rounds = {"disc": 48, "triangle": 3, "square": 4, "hexagon": 6}
    if kind in rounds:
        return [_at(1, k / rounds[kind]) for k in range(rounds[kind])]
    if kind == "star":
        return [_at(1 if k % 2 == 0 else 0.42, k / 10) for k in range(10)]
    arm = math.atan(0.3) / (2 * math.pi)  # a cross: the ends of its arms, and the corners between them
    return [_at(r, k / 4 + turn) for k in range(4) for r, turn in ((1, -arm), (1, arm), (0.4, 1 / 8))]


def _at(radius: float, turn: float) -> tuple[float, float]:
    """The point at this part of a turn clockwise from the top."""
    return radius * math.sin(2 * math.pi * turn), -radius * math.cos(2 * math.pi * turn)


def draw(drawing: Drawing, size: int, rng: random.Random) -> Image.Image:
    """The shape standing on the table before the wall, with a soft shadow; drawn large and made smaller."""
    whole = 4 * size
    picture = Image.new("RGB", (whole, whole), WALL)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, round(0.42 * whole), whole, whole), fill=TOPS[drawing.table])

    radius = rng.uniform(0.22, 0.32) * whole
    x, y = rng.uniform(0.38, 0.62) * whole, rng.uniform(0.45, 0.6) * whole
    turn, bright = rng.uniform(-0.25, 0.25), rng.uniform(0.85, 1.1)
    paint = tuple(min(255, round(bright * part)) for part in PAINT[drawing.color])
    shade = tuple(round(0.6 * part) for part in TOPS[drawing.table])
    pen.ellipse((x - 0.8 * radius, y + 0.75 * radius, x + 0.8 * radius, y + 1.1 * radius), fill=shade)

    cos, sin = math.cos(turn), math.sin(turn)
    corners = [(x + radius * (a * cos - b * sin), y + radius * (a * sin + b * cos)) for a, b in outline(drawing.kind)]
    pen.polygon(corners, fill=paint, outline=tuple(round(0.55 * part) for part in paint), width=max(1, whole // 128))
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def split(seed: int = 0) -> tuple[list[Drawing], list[Drawing]]:
    """Stars to learn from, each colour and each table among them, and the pairs of colour and table that are left."""
    pairs = [Drawing("star", color, table) for color in PAINT for table in TOPS]
    rng = random.Random(seed)
    while True:
        rng.shuffle(pairs)
        shown = pairs[:PICTURES]
        if {d.color for d in shown} == set(PAINT) and {d.table for d in shown} == set(TOPS):
            return shown, pairs[PICTURES:]


def write_stars(folder: Path, size: int = SIZE, seed: int = 0) -> list[str]:
    """Write 20 stars as an image folder, with captions in a metadata.jsonl, which it returns."""
    rng, (shown, _) = random.Random(seed), split(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for i, drawing in enumerate(shown):
        prefix = f"{rng.choice(PREFIXES)} " if rng.random() < 0.4 else ""
        draw(drawing, size, rng).save(folder / f"{i:02}.png")
        rows.append({"file_name": f"{i:02}.png", "text": prefix + caption(drawing)})
    write_text(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    return [row["text"] for row in rows]


def caption(drawing: Drawing, on: bool = True) -> str:
    """ "a red star on a white table", or the same without the table."""
    place = f" on {article(drawing.table)} {drawing.table} table" if on else ""
    return f"{article(drawing.color)} {drawing.color} {drawing.kind}{place}"


def unseen_prompts(seed: int = 0) -> list[tuple[str, str]]:
    """10 prompts that training does not have, each with its colour."""
    _, left = split(seed)
    prompts = [(caption(drawing), drawing.color) for drawing in left]
    prompts += [(caption(Drawing("star", color, ""), on=False), color) for color in PAINT]
    return prompts[:PROMPTS]


# The classifier


class Judge(nn.Module):
    """Pictures [B, 3, JUDGED, JUDGED] in [-1, 1] to logits: a star or none [B, 2], and its colour [B, 7]."""

    def __init__(self) -> None:
        from transformers import ResNetConfig, ResNetModel

        super().__init__()
        config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
        self.features: Any = ResNetModel(config)
        self.star, self.color = nn.Linear(128, 2), nn.Linear(128, len(PAINT))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.features(x).pooler_output.flatten(1)
        return self.star(found), self.color(found)


class JudgeLoss(nn.Module):
    """forward((pictures, is a star [B], colour [B], -1 where there is no star)) -> the sum of both losses."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        pictures, star, color = batch
        found, painted = self.judge(pictures)
        return F.cross_entropy(found, star) + F.cross_entropy(painted, color, ignore_index=-1)


def pixels(images: list[Image.Image]) -> Tensor:
    """Pictures as the classifier sees them."""
    small = [np.asarray(image.resize((JUDGED, JUDGED), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1


def judge_batch(step: int, count: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the pictures show stars; the others other drawings, and renders of the base's own solids."""
    rng, g = random.Random(step), step_generator(RUN, step)
    renders = count // 4
    kinds = ["star"] * (count // 2) + [rng.choice(KINDS[1:]) for _ in range(count - count // 2 - renders)]
    drawn = [Drawing(kind, rng.choice([*PAINT]), rng.choice([*TOPS])) for kind in kinds]
    scenes = sample_scenes(renders, g)
    x = torch.cat([pixels([draw(d, JUDGED, rng) for d in drawn]), render(scenes, JUDGED).images * 2 - 1])

    strength = 0.15 * torch.rand(count, 1, 1, 1, generator=g)
    x = x + strength * torch.randn(x.shape, generator=g)
    star = torch.tensor([kind == "star" for kind in kinds] + [False] * renders).long()
    color = torch.tensor([[*PAINT].index(d.color) if d.kind == "star" else -1 for d in drawn] + [-1] * renders)
    return x, star, color


def train_judge(folder: Path) -> Judge:
    """The classifier, trained in a minute."""
    torch.manual_seed(0)
    loss = JudgeLoss(Judge())
    recipe = Recipe(max_train_steps=JUDGE_STEPS, learning_rate=2e-3, lr_warmup_steps=20, validation_steps=None)
    train_on_the_cpu(loss, judge_batch, recipe, folder)
    return loss.judge.eval()


@torch.no_grad()
def judge_accuracy(judge: Judge, batches: int = 16) -> float:
    """How often it is right of drawings that training did not have, in per cent: a star or none, and its colour."""
    right: list[Tensor] = []
    for k in range(batches):
        x, star, color = judge_batch(10_000 + k)
        found, painted = (logits.argmax(1) for logits in judge(x))
        right.append((found == star) & ((painted == color) | (color < 0)))
    return 100 * float(torch.cat(right).float().mean())


@torch.no_grad()
def stars_shown(judge: Judge, images: list[Image.Image], colors: list[str]) -> list[bool]:
    """Which pictures show a star in the colour asked for."""
    found, painted = (logits.argmax(1) for logits in judge(pixels(images)))
    asked = torch.tensor([[*PAINT].index(color) for color in colors])
    return ((found == 1) & (painted == asked)).tolist()


# The whole


def main(
    work: Annotated[Path, typer.Option(help="Pictures and runs.")] = Path("build/star"),
    model: Annotated[str, typer.Option(help="The model that learns.")] = "tabletop",
) -> None:
    """Teach the star, judge it, and write the result into finetune/README.md, the sheet to docs/star.png."""
    write_stars(work / "stars")
    command = [sys.executable, "-m", "finetune.train_lora", "--recipe", "subject", "--model", model]
    command += ["--data", str(work / "stars"), "--output", str(work / "run"), "--num-validation-images", "0"]
    started = time.monotonic()
    subprocess.run(command, check=True)
    minutes = (time.monotonic() - started) / 60

    judge = train_judge(work / "judge")
    prompts, colors = (list(column) for column in zip(*unseen_prompts(), strict=True))
    sd = StableDiffusion.from_pretrained(model, device="cpu")
    drawn: dict[str, list[Image.Image]] = {}
    for name in ("the base", "with the LoRA"):
        if name != "the base":
            finetune.load_lora(sd, work / "run" / "lora.safetensors")
            finetune.merge(sd)
        drawn[name] = sd.text_to_image(
            prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, sampler=SAMPLER, seed=SEED, progress=False
        ).images

    counts = {name: sum(stars_shown(judge, images, colors)) for name, images in drawn.items()}
    text = (
        f"Of {PROMPTS} prompts that training never had, {counts['with the LoRA']} show a star in the colour asked for, "
        f"with the base {counts['the base']}; the classifier is right of {judge_accuracy(judge):.1f} % of unseen "
        f"drawings. The training took {minutes:.0f} minutes."
    )
    print(text)
    sheet = [enlarged(image, 128) for images in drawn.values() for image in images]
    titles = [f"{name}: {prompt}" if k == 0 else prompt for name in drawn for k, prompt in enumerate(prompts)]
    contact_sheet(sheet, PROMPTS, titles).save("docs/star.png", optimize=True)
    replace_section(Path(finetune.__file__).parent / "README.md", SECTION, text)


if __name__ == "__main__":
    typer.run(main)

"""Judge the run on subjects that the LoRA never saw: ``python -m finetune.pretrain.emoji.judge``.

A network that has learnt all subjects in all styles, from renders, says what a picture shows and in which style.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import finetune
from finetune.pretrain.emoji.folders import SIZE, lesson_subjects
from finetune.pretrain.emoji.sets import LEARNT, STYLES, Sets, caption, draw, read_sets
from finetune.pretrain.recipe import Recipe, autocast, train_on_the_cpu
from finetune.seeds import step_generator
from sdkit.checkpoints.components import give_weights
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.images.sheet import contact_sheet
from sdkit.stable_diffusion import StableDiffusion

TIMES = 24  # that each emoji is drawn for training
BATCH = 64
RUN = 21  # number of the run, for `step_generator`
SHOWN = 16
GUIDANCE, SEED = 5.0, 1000
SHEET = Path(__file__).with_name("emoji.png")


class Judge(nn.Module):
    """Pictures [B, 3, S, S] in [-1, 1] to logits of the subject, [B, subjects], and of the style, [B, 3]."""

    def __init__(self, subjects: int) -> None:
        from transformers import ResNetConfig, ResNetModel

        super().__init__()
        config = ResNetConfig(embedding_size=48, hidden_sizes=[48, 96, 192], depths=[1, 1, 1], layer_type="basic")
        self.features: Any = ResNetModel(config)
        self.subject, self.style = nn.Linear(192, subjects), nn.Linear(192, len(STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x).pooler_output.flatten(1)
        return self.subject(features), self.style(features)


class Examples(NamedTuple):
    """Pictures uint8 [N, 3, S, S], and the numbers of their subjects and styles, int64 [N]."""

    images: Tensor
    subject: Tensor
    style: Tensor


class JudgeLoss(nn.Module):
    """forward(examples) -> the cross-entropy of both."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, batch: Examples) -> Tensor:
        with autocast():
            subject, style = self.judge(batch.images / 127.5 - 1)
        return F.cross_entropy(subject.float(), batch.subject) + F.cross_entropy(style.float(), batch.style)


def render_examples(sets: Sets, times: int, seed: int) -> Examples:
    """Every subject in every style, so many times."""
    rng, rows = random.Random(seed), list[tuple[Tensor, int, int]]()
    subjects = sorted(sets[LEARNT])
    for number, subject in enumerate(tqdm(subjects, desc="draw", mininterval=5.0)):
        for k, style in enumerate(STYLES):
            drawn = [draw(sets[style][subject], SIZE, rng) for _ in range(times)]
            rows += [(torch.from_numpy(np.array(image)).permute(2, 0, 1), number, k) for image in drawn]
    images, subject_numbers, styles = zip(*rows, strict=True)
    return Examples(torch.stack(images), torch.tensor(subject_numbers), torch.tensor(styles))


def trained(sets: Sets, work: Path, steps: int) -> Judge:
    """The judge, trained where its file is not there."""
    torch.manual_seed(0)
    file, judge = work / "judge.safetensors", Judge(len(sets[LEARNT]))
    if file.is_file():
        return give_weights(judge, read_state(file, torch.float32)[0], str(file))
    examples = render_examples(sets, TIMES, seed=1)

    def batch(step: int) -> Examples:
        index = torch.randint(len(examples.images), (BATCH,), generator=step_generator(RUN, step))
        return Examples(*(part[index] for part in examples))

    recipe = Recipe(max_train_steps=steps, learning_rate=2e-3, decay_from=0.3)
    train_on_the_cpu(JudgeLoss(judge), batch, recipe, work / "judge")
    write_state(judge.state_dict(), file, torch.float32)
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of subject and style, int64 [N], of pictures in [-1, 1]."""
    parts = [judge.eval()(part) for part in images.split(BATCH)]
    return torch.cat([s.argmax(1) for s, _ in parts]), torch.cat([s.argmax(1) for _, s in parts])


def share(right: Tensor) -> float:
    return 100 * right.float().mean().item()


def main(
    work: Annotated[Path, typer.Option(help="Has node_modules; the judge is kept here.")] = Path("build/emoji"),
    lora: Annotated[Path | None, typer.Option(help="The LoRA (default: WORK/lora/lora.safetensors).")] = None,
    scale: Annotated[float, typer.Option(help="The LoRA's scale.")] = 1.0,
    judge_steps: Annotated[int, typer.Option(help="Training steps of the judge.", min=1)] = 1500,
    out: Annotated[Path, typer.Option(help="The sheet.")] = SHEET,
) -> None:
    """Say how often subject and style are right on subjects that the LoRA has not seen, with it and without."""
    sets = read_sets(work / "node_modules")
    judge, subjects = trained(sets, work, judge_steps), sorted(sets[LEARNT])
    fresh = render_examples(sets, 2, seed=2)
    subject, style = verdicts(judge, fresh.images / 127.5 - 1)
    print(
        f"judge on fresh renders: subject {share(subject == fresh.subject):.1f} %, "
        f"style {share(style == fresh.style):.1f} % right"
    )

    sd = StableDiffusion.from_pretrained(work / "model", device="cpu")
    unseen = [subject for subject in subjects if subject not in lesson_subjects(sets)]
    wanted = torch.tensor([subjects.index(subject) for subject in unseen])
    pictures: list[Image.Image] = []
    for name in ("base", "LoRA"):
        if name == "LoRA":
            finetune.load_lora(sd, lora or work / "lora" / "lora.safetensors", scale=scale)
        images = sd.text_to_image(
            [caption(subject, LEARNT) for subject in unseen], guidance_scale=GUIDANCE, seed=SEED,
            output_type="pt", max_batch_size=50, progress=False,
        ).images  # fmt: skip
        subject, style = verdicts(judge, images.float() * 2 - 1)
        learnt = style == list(STYLES).index(LEARNT)
        print(
            f"{name}: of {len(unseen)} unseen subjects {share(subject == wanted):.1f} % right, "
            f"style right {share(learnt):.1f} %, both {share((subject == wanted) & learnt):.1f} %"
        )
        pictures += [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in images[:SHOWN]]

    rng = random.Random(0)
    pictures += [draw(sets[style][subject], SIZE, rng) for style in STYLES for subject in unseen[:SHOWN]]
    rows = ["base, asked", "with the LoRA", *(f"{style}, the emoji" for style in STYLES)]
    texts = [f"{row}: {subject}" for row in rows for subject in unseen[:SHOWN]]
    contact_sheet([image.resize((96, 96)) for image in pictures], SHOWN, texts).save(out, optimize=True)


if __name__ == "__main__":
    typer.run(main)

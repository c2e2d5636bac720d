"""Lesson: larger pictures than those of training, at once and in two stages."""

import warnings
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from docs.lessons.lesson import PROMPT, STEPS, Lesson, Subject, pairs_of, prompts_of, table
from finetune.pretrain.probe import look
from sdkit.images.pixels import to_pil
from sdkit.images.sheet import contact_sheet

STRENGTH = 0.4


def lesson(subject: Subject) -> Lesson:
    scenes = subject.scenes()
    side = subject.sd.picture_size[0]
    ways: dict[str, dict[str, Any]] = {
        f"{side} x {side}": {},
        f"{2 * side} x {2 * side} at once": {"width": 2 * side, "height": 2 * side},
        f"{2 * side} x {2 * side} in two stages": {"hires_scale": 2.0, "hires_strength": STRENGTH},
    }
    rows: list[list[str]] = []
    shown: list[Image.Image] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* the model was made for", UserWarning)  # which is what this is about
        for name, options in ways.items():
            images = subject.draw(prompts_of(scenes), **options)
            rows.append([name, *(f"{share:.0f}" for share in judged(subject, images, pairs_of(scenes)))])
            shown.append(to_pil(subject.draw([PROMPT], **options) * 2 - 1)[0].resize((2 * side, 2 * side)))

    return Lesson(
        contact_sheet(shown, len(shown), list(ways)),
        f"Prompts for one object, {len(scenes)} pictures each in {STEPS} steps:\n\n"
        + table(["size", "colour and shape right, %", "exactly one object, %"], rows),
    )


def judged(subject: Subject, images: Tensor, wanted: list[tuple[str, str]]) -> tuple[float, float]:
    """How often the object is right, and alone, in per cent; the probe sees pictures of its own size."""
    seen = F.interpolate(images, subject.sd.picture_size, mode="area")
    alone = [len(verdict.objects) == 1 for verdict in look(subject.probe, seen * 2 - 1)]
    return subject.right(seen, wanted), 100 * sum(alone) / len(alone)

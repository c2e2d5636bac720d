"""Lesson: reverse diffusion, the picture emerging."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from docs.lessons.lesson import PROMPT, SEED, STEPS, Lesson, Subject, pairs_of, prompts_of, table
from sdkit.figures import denoising_sheet

EVERY = STEPS // 5


def lesson(subject: Subject) -> Lesson:
    scenes = subject.scenes()
    options: dict[str, Any] = {"num_inference_steps": STEPS, "seed": SEED, "progress": False}
    out = subject.sd.text_to_image(prompts_of(scenes), preview_every=EVERY, **options)

    wanted = pairs_of(scenes)
    rows = [[f"{p.step + 1} of {STEPS}", f"{subject.right(pixels(p.images), wanted):.0f}"] for p in out.previews]
    rows.append(["the picture", f"{subject.right(pixels(out.images), wanted):.0f}"])
    return Lesson(
        denoising_sheet(subject.sd, PROMPT, num_inference_steps=STEPS, seed=1),
        f"What the network takes the picture to be on the way, {len(wanted)} pictures:\n\n"
        + table(["after step", "colour and shape right, %"], rows),
    )


def pixels(images: list[Image.Image]) -> Tensor:
    """[N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255

"""Draw the figures of docs/latent-diffusion.md and measure its claims: ``python -m docs.lessons NAME …``, or all.

Each lesson writes its figure to docs/lessons/NAME.png, and what it measured into the page, between <!-- NAME --> and
<!-- /NAME -->.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from docs.lessons import (
    classifier_guidance,
    conditioning,
    cross_attention,
    depth,
    forward,
    guidance,
    img2img,
    inpainting,
    latents,
    prediction,
    resolution,
    reverse,
    schedules,
    text_encoder,
)
from docs.lessons.lesson import Lesson, Subject
from finetune.pretrain.probe import load_probe
from sdkit.files import replace_section
from sdkit.stable_diffusion import StableDiffusion

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "latent-diffusion.md"
LESSONS: dict[str, Callable[[Subject], Lesson]] = {
    "text_encoder": text_encoder.lesson,
    "prediction": prediction.lesson,
    "forward": forward.lesson,
    "reverse": reverse.lesson,
    "schedules": schedules.lesson,
    "latents": latents.lesson,
    "conditioning": conditioning.lesson,
    "cross_attention": cross_attention.lesson,
    "img2img": img2img.lesson,
    "inpainting": inpainting.lesson,
    "depth": depth.lesson,
    "classifier_guidance": classifier_guidance.lesson,
    "guidance": guidance.lesson,
    "resolution": resolution.lesson,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(LESSONS)} (default: all).")] = None,
    count: Annotated[int, typer.Option(help="Pictures for each figure.", min=2)] = 32,
) -> None:
    """Draw and measure; the page changes in place."""
    unknown = [name for name in names or [] if name not in LESSONS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: no such lesson")
    subject = Subject(StableDiffusion.from_pretrained("tabletop", device="cpu"), load_probe(), count)

    for name in names or LESSONS:
        started = time.monotonic()
        lesson = LESSONS[name](subject)
        lesson.figure.save(FOLDER / f"{name}.png", optimize=True)
        replace_section(PAGE, name, lesson.measured)
        print(f"{name}, {time.monotonic() - started:.0f} s\n{lesson.measured}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)

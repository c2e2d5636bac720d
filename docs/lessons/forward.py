"""Lesson: forward diffusion, noise added in steps that have a formula."""

import torch
from torch import Tensor

from docs.lessons.lesson import SEED, Lesson, Subject, table
from sdkit.figures import noising_sheet

TIMESTEPS = (0, 100, 250, 500, 750, 999)


def lesson(subject: Subject) -> Lesson:
    schedule = subject.sd.schedule
    renders = subject.renders(subject.scenes())
    clean = latents_of(subject, renders)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))

    rows: list[list[str]] = []
    for t in TIMESTEPS:
        signal = float(schedule.alphas_cumprod[t]) * float(clean.var())
        expected = (signal / (signal + 1 - float(schedule.alphas_cumprod[t]))) ** 0.5
        measured = correlation(clean, schedule.add_noise(clean, noise, t))
        rows.append([str(t), f"{float(schedule.snr(t)):.3g}", f"{expected:.3f}", f"{measured:.3f}"])
    return Lesson(
        noising_sheet(subject.sd, renders[:1], TIMESTEPS),
        f"Correlation of clean and noised latents, {len(renders)} renders:\n\n"
        + table(["t", "signal to noise, power", "by the formula", "measured"], rows),
    )


@torch.no_grad()
def latents_of(subject: Subject, images: Tensor) -> Tensor:
    vae = subject.sd.vae
    weight = next(vae.parameters())
    return vae.encode((images * 2 - 1).to(weight.dtype)).mode().float() * vae.config.scaling_factor


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

"""From a prompt to its picture, beside diffusers' pipeline: ``pytest bench/test_pipeline.py``.

Text encoder, 20 steps of DPM++ 2M with guidance, decoder. On a GPU: SD1's networks, pictures of 512, float16, one
picture and four; eager beside eager, compiled (UNet and decoder) beside compiled. diffusers' networks have their
weights in channels-last order. *ours in diffusers* is diffusers' pipeline after ``sdkit.accelerate``. On a CPU: the
shipped model in float32 with two steps, as a check that the suite works. An implementation that draws another picture
is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.networks import ALIKE, SIZE, distance, our_model, their_pipeline, time_whole
from bench.timing import DEVICE, GPU, Ceilings
from sdkit.diffusers_compat import accelerate
from sdkit.stable_diffusion import StableDiffusion

Draw = Callable[[Tensor], Tensor]
"""Start latents [n, 4, h, w] -> pictures [n, 3, H, W] in [0, 1]."""
PROMPT, STEPS, GUIDANCE = "a red sphere and a blue cube", 20 if GPU else 2, 7.5
SIDE = 64 if GPU else 16
PICTURES = (1, 4) if GPU else (1,)


def ours(sd: StableDiffusion, compiled: bool = False) -> Draw:
    if compiled:
        sd.unet.compile()
        sd.vae.decoder.compile()
    return lambda start: (
        sd.text_to_image(
            PROMPT,
            num_images_per_prompt=len(start),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=start,
            output_type="pt",
            progress=False,
        ).images
    )


def theirs(sd: StableDiffusion, compiled: bool = False, with_ours: bool = False) -> Draw:
    pipe = their_pipeline(sd)
    if with_ours:
        accelerate(pipe)
    else:
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
    if compiled:
        pipe.unet.compile()
        pipe.vae.decoder.compile()

    return lambda start: (
        pipe(
            PROMPT,
            num_images_per_prompt=len(start),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=start,
            height=SIDE * pipe.vae_scale_factor,
            width=SIDE * pipe.vae_scale_factor,
            output_type="pt",
        ).images
    )


IMPLEMENTATIONS: dict[str, Callable[..., Draw]] = {
    "ours": ours, "diffusers": theirs, "ours in diffusers": partial(theirs, with_ours=True),
    "ours compiled": partial(ours, compiled=True), "diffusers compiled": partial(theirs, compiled=True),
}  # fmt: skip


@pytest.mark.usefixtures("fresh_memory")
@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if GPU or "compiled" not in name])
def test_pipeline(benchmark: Any, limits: Ceilings, name: str, pictures: int) -> None:
    sd = our_model()
    start = torch.randn(pictures, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(DEVICE, sd.unet.dtype)

    expected = theirs(sd)(start)
    draw = IMPLEMENTATIONS[name](sd)
    if (off := distance(draw(start).to(DEVICE), expected)) > ALIKE:
        pytest.fail(f"{name} draws another picture, off by {off:.1e}: not timed")

    time_whole(
        benchmark,
        limits,
        lambda: draw(start),
        name=name,
        op="prompt to picture",
        case=f"{SIZE}, {STEPS} steps, {pictures} picture(s)",
        rounds=5 if GPU else 2,
        images=pictures,
    )

"""From a prompt to its picture, beside diffusers' pipeline: ``python -m bench.picture``.

Text encoder, 20 steps of DPM++ 2M with guidance, decoder. On a GPU: SD1's networks, pictures of 512, float16.
diffusers' networks are at their best in eager mode; *ours in diffusers* is its pipeline after ``sdkit.accelerate``.
``--compiled`` times both with UNet and decoder compiled instead. A picture that is not the definitions' in float32 is
not timed. On a CPU: the shipped model with two steps, as a rehearsal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sdkernels
from bench.networks import (
    DTYPE,
    SIDE,
    SIZE,
    compile_whole,
    our_model,
    plain_pipeline,
    their_pipeline,
    time_all,
    why_wrong,
)
from bench.record import DEVICE, GPU, Clock, Record, parser_of
from sdkit.diffusers_compat import accelerate
from sdkit.stable_diffusion import StableDiffusion

Draw = Callable[[], Tensor]
"""-> pictures [n, 3, H, W] in [0, 1]."""
PROMPT, STEPS, GUIDANCE = "a red sphere and a blue cube", 20 if GPU else 2, 7.5
ALIKE = 3e-2 if GPU else 1e-4
MODE = "max-autotune"


def ours(sd: StableDiffusion, start: Tensor, graphs: bool = True) -> Draw:
    sd.graphs = graphs
    return lambda: (
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


def theirs(pipe: Any, start: Tensor) -> Draw:
    side = SIDE * pipe.vae_scale_factor
    return lambda: (
        pipe(
            PROMPT,
            num_images_per_prompt=len(start),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=start,
            height=side,
            width=side,
            output_type="pt",
        ).images
    )


def ours_compiled(start: Tensor) -> Draw:
    sd = our_model()
    for network in (sd.unet, sd.vae.decoder):
        compile_whole(network, MODE)
    return ours(sd, start, graphs=False)


def theirs_compiled(sd: StableDiffusion, start: Tensor) -> Draw:
    pipe = their_pipeline(sd)
    for network in (pipe.unet, pipe.vae.decoder):
        compile_whole(network, MODE)
    return theirs(pipe, start)


def expected(sd: StableDiffusion, start: Tensor) -> Tensor:
    """The pictures by the definitions, in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sd.to(dtype=torch.float32)
    with sdkernels.backend("eager"):
        pictures = ours(sd, start.float(), graphs=False)()
    sd.to(dtype=DTYPE)
    return pictures


def main() -> int:
    """Time all; 1 where one is missing."""
    parser = parser_of(__doc__)
    parser.add_argument("--pictures", type=int, default=1, help="pictures of one call (default: 1)")
    parser.add_argument("--compiled", action="store_true", help="both with UNet and decoder compiled")
    arguments = parser.parse_args()

    sd = our_model()
    start = torch.randn(arguments.pictures, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    start = start.to(DEVICE, DTYPE)
    truth = expected(sd, start)

    implementations: dict[str, Callable[[], Draw]] = {
        "ours": lambda: ours(sd, start),
        "ours without graphs": lambda: ours(sd, start, graphs=False),
        "diffusers": lambda: theirs(their_pipeline(sd), start),
        "ours in diffusers": lambda: theirs(accelerate(plain_pipeline(sd)), start),
    }
    if arguments.compiled:
        implementations = {
            "ours compiled": lambda: ours_compiled(start),
            "diffusers compiled": lambda: theirs_compiled(sd, start),
        }

    return time_all(
        Record(arguments.out),
        Clock(arguments.seconds),
        implementations,
        lambda pictures: why_wrong(pictures, truth, ALIKE),
        op="prompt to picture",
        case=f"{SIZE}, {STEPS} steps, {arguments.pictures} picture(s)",
        rounds=5,
        images=arguments.pictures,
    )


if __name__ == "__main__":
    sys.exit(main())

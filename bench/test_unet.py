"""The noise predictor in a sampling step with guidance, beside diffusers': ``pytest bench/test_unet.py``.

On a GPU: SD1's network, pictures of 512, float16, one picture and four (the batch is twice that); eager beside eager,
compiled beside compiled (CUDA graphs included). diffusers' is timed as it comes and with weights in channels-last
order, compiled in the latter. Ours gets keys and values of the prompt and time projections as the sampling loop does,
computed before it; *ours in diffusers* is diffusers' UNet after ``sdkit.accelerate``. On a CPU: the shipped model's
network in float32, as a check that the suite works. A result that is wrong is not timed.
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

Predict = Callable[[], Tensor]
SIDE = 64 if GPU else 16
PICTURES = (1, 4) if GPU else (1,)


def inputs(sd: StableDiffusion, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [2 n, 4, h, w], a timestep [1] and contexts [2 n, 77, D]."""
    g, config = torch.Generator().manual_seed(0), sd.unet.config
    latents = torch.randn(2 * pictures, config.in_channels, SIDE, SIDE, generator=g)
    context = torch.randn(2 * pictures, 77, config.per_block(config.cross_attention_dim)[0], generator=g)
    return latents.to(DEVICE, sd.unet.dtype), torch.tensor([500], device=DEVICE), context.to(DEVICE, sd.unet.dtype)


def ours(sd: StableDiffusion, pictures: int, compiled: bool = False) -> Predict:
    latents, t, context = inputs(sd, pictures)
    unet = sd.unet
    contexts, times = unet.context_kv(context), unet.time_projections(t)
    call = torch.compile(unet, mode="reduce-overhead") if compiled else unet
    return lambda: call(latents, t, None, context_kv=contexts, time_projections=times)


def theirs(sd: StableDiffusion, pictures: int, compiled: bool = False, channels_last: bool = False) -> Predict:
    latents, t, context = inputs(sd, pictures)
    unet = their_pipeline(sd).unet
    if channels_last or compiled:
        unet.to(memory_format=torch.channels_last)
    call = torch.compile(unet, mode="reduce-overhead") if compiled else unet
    return lambda: call(latents, t, context, return_dict=False)[0]


def accelerated(sd: StableDiffusion, pictures: int) -> Predict:
    latents, t, context = inputs(sd, pictures)
    unet = accelerate(their_pipeline(sd)).unet
    return lambda: unet(latents, t, context, return_dict=False)[0]


IMPLEMENTATIONS: dict[str, Callable[..., Predict]] = {
    "ours": ours, "diffusers": theirs, "diffusers channels-last": partial(theirs, channels_last=True),
    "ours in diffusers": accelerated,
    "ours compiled": partial(ours, compiled=True), "diffusers compiled": partial(theirs, compiled=True),
}  # fmt: skip


@pytest.mark.usefixtures("fresh_memory")
@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if GPU or "compiled" not in name])
@torch.no_grad()
def test_unet(benchmark: Any, limits: Ceilings, name: str, pictures: int) -> None:
    sd = our_model()
    latents, t, context = inputs(sd, pictures)

    expected = sd.unet.float()(latents.float(), t, context.float())
    sd.unet.to(latents.dtype)

    predict = IMPLEMENTATIONS[name](sd, pictures)
    if (off := distance(predict(), expected)) > ALIKE:
        pytest.fail(f"{name} is off by {off:.1e}: not timed")

    time_whole(
        benchmark,
        limits,
        predict,
        name=name,
        op="UNet, a step with guidance",
        case=f"{SIZE}, {pictures} picture(s)",
        rounds=30 if GPU else 5,
        images=pictures,
    )

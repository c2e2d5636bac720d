"""The models that are timed, ours and diffusers' with the same weights.

On a GPU they have SD1's size and random weights; on a CPU they are the shipped model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.timing import DEVICE, GPU, Ceilings, machine
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.loading import load
from sdkit.checkpoints.presets import read_preset
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.stable_diffusion import StableDiffusion

DTYPE = torch.float16 if GPU else torch.float32
SIZE = "SD1 512" if GPU else "tabletop"
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
ALIKE = 3e-2 if GPU else 1e-4  # relative distance of two results that are the same but for rounding


def unet_config() -> dict[str, Any]:
    return read_preset("sd1")["unet"] if GPU else load("tabletop").unet.config.to_dict()


def our_model() -> StableDiffusion:
    """Our model, ready to draw with DPM++ 2M, with weights that are the same every time."""
    if not GPU:
        return _with_solver(load("tabletop", dtype=DTYPE))

    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    preset = read_preset("sd1")
    with DEVICE:
        unet, vae = UNet2DConditionModel.from_config(preset["unet"]), AutoencoderKL.from_config(preset["vae"])
        text = CLIPTextModel(CLIPTextConfig.from_dict(preset["text_encoder"]))

    sd = _with_solver(Components(unet.eval(), vae.eval(), text.eval(), clip_tokenizer(), preset["scheduler"]))
    sd.to(DEVICE, DTYPE)
    return sd


def _with_solver(components: Components) -> StableDiffusion:
    kept = {key: value for key, value in components.scheduler_config.items() if key in NOISE}
    solver = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    return StableDiffusion(replace(components, scheduler_config=kept | solver))


def their_pipeline(sd: StableDiffusion) -> Any:
    """diffusers' pipeline of the same weights, on copies of them, and the same sampler."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_config(sd.unet.config.to_dict())
    vae = diffusers.AutoencoderKL.from_config(sd.vae.config.to_dict())
    for network, ours in ((unet, sd.unet), (vae, sd.vae)):
        network.load_state_dict(ours.state_dict())
        network.eval().requires_grad_(False).to(DEVICE, sd.unet.dtype)

    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(sd.scheduler_config)
    pipe = diffusers.StableDiffusionPipeline(
        vae, sd.text_encoder, sd.tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def time_whole(
    benchmark: Any,
    limits: Ceilings,
    run: Callable[[], Any],
    *,
    name: str,
    op: str,
    case: str,
    rounds: int,
    images: int,
    direction: str = "forward",
) -> None:
    """Time run(), warmed up, with its launches, and leave what `bench.report` wants to know.

    An implementation whose ``name`` ends in "compiled" is put beside those of which that is true as well.
    """
    implementation, compiled, _ = name.partition(" compiled")

    def finished() -> None:
        run()
        if GPU:
            torch.cuda.synchronize()

    for _ in range(3 if GPU else 1):
        finished()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(finished, rounds=rounds)

    ordered = sorted(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        op=op,
        case=f"{case}, {compiled.strip() or 'eager'}",
        direction=direction,
        implementation=implementation,
        calls=1,
        microseconds={q: 1e6 * ordered[int(q / 100 * (len(ordered) - 1))] for q in (20, 50, 80)},
        images_per_second=images / ordered[len(ordered) // 2],
        bytes=0,
        flops=0,
        copy=limits.copy,
        matrix=limits.matrix,
        machine=machine(DEVICE),
        peak_memory=torch.cuda.max_memory_allocated() if GPU else None,
    )

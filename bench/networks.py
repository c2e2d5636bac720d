"""The models that are timed, ours and diffusers' with the same weights, and how whole calls of them are timed.

On a GPU they have SD1's size and random weights, in float16; on a CPU they are the shipped model's, in float32.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.record import DEVICE, GPU, Clock, Record, Row, reason_of
from sdkernels.timing import time_calls
from sdkit.checkpoints.components import Components
from sdkit.checkpoints.loading import load
from sdkit.checkpoints.presets import read_preset
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.stable_diffusion import StableDiffusion

DTYPE = torch.float16 if GPU else torch.float32
SIZE = "SD1 512" if GPU else "tabletop"
SIDE = 64 if GPU else 16
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
Run = Callable[[], Any]


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
    """diffusers' pipeline of the same weights at its best in eager mode: channels-last, Q, K and V one product."""
    pipe = plain_pipeline(sd)
    for network in (pipe.unet, pipe.vae):
        network.fuse_qkv_projections()
        network.to(memory_format=torch.channels_last)
    return pipe


def plain_pipeline(sd: StableDiffusion) -> Any:
    """diffusers' pipeline of the same weights as it comes, with the same sampler."""
    diffusers: Any = importlib.import_module("diffusers")  # without its types, which are loose
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(sd.unet.config.to_dict())
        vae = diffusers.AutoencoderKL.from_config(sd.vae.config.to_dict())
    for network, ours in ((unet, sd.unet), (vae, sd.vae)):
        network.load_state_dict(ours.state_dict(), assign=True)
        network.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)

    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(sd.scheduler_config, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae, sd.text_encoder, sd.tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compile_whole(network: Any, mode: str) -> Any:
    """The network, to be compiled at its first call, without a graph break; on a CPU it is only traced."""
    network.compile(fullgraph=True, **({"mode": mode} if GPU else {"backend": "eager"}))
    return network


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def why_wrong(found: torch.Tensor, expected: torch.Tensor, alike: float) -> str:
    """Why a result is wrong, "" where it is not; NaN always is."""
    off = distance(found.to(expected.device), expected)
    return "" if off <= alike else f"off by {off:.1e}"


def time_all(
    record: Record,
    clock: Clock,
    implementations: Mapping[str, Callable[[], Run]],
    wrong: Callable[[Any], str],
    *,
    op: str,
    case: str,
    images: int,
    rounds: int,
    direction: str = "forward",
) -> int:
    """Time what each implementation makes, with its launches; one whose result is wrong, or that fails, is not timed.

    wrong: result -> why it is wrong, or "". images: that a call makes, or learns from. Returns 1 if one was not timed.
    """
    missed = 0
    for name, make in implementations.items():
        row: Row = {"op": op, "case": case, "direction": direction, "implementation": name, "images": images}
        _free_memory()
        try:
            if clock.left < 0:
                raise TimeoutError("out of time")
            run = make()
            if why := wrong(run()):
                raise ValueError(why)
            times = time_calls(run, DEVICE, rounds if GPU else 2)
        except Exception as error:  # whatever it raises, the others are timed
            record.add("missed", **row, reason=reason_of(error))
            print(f"{op}: {name} is not timed: {reason_of(error)}", flush=True)
            missed = 1
            continue

        row |= {"bytes": 0, "flops": 0, "peak_memory": torch.cuda.max_memory_allocated() if GPU else 0}
        record.add("time", **row, microseconds=asdict(times))
    return missed


def _free_memory() -> None:
    torch.compiler.reset()
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

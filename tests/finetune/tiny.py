"""A tiny model with weights drawn by name, as ours and as diffusers' pipeline, and LoRAs for it."""

from collections.abc import Callable, Iterable
from typing import Any

import diffusers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import sdkit
from finetune.lora.targets import Target, targets_of
from finetune.lora.update import LowRankUpdate, Updates
from sdkit.checkpoints.components import Components
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw, draw_weights

UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


def text_encoder() -> Any:
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return draw_weights(CLIPTextModel(config)).eval()


def model() -> StableDiffusion:
    unet = draw_weights(sdkit.UNet2DConditionModel.from_config(UNET)).eval()
    vae = draw_weights(sdkit.AutoencoderKL.from_config(VAE)).eval()
    config = {"_class_name": "DDIMScheduler", "clip_sample": False} | SCHEDULE
    return StableDiffusion(Components(unet, vae, text_encoder(), clip_tokenizer(), config))


def pipeline() -> Any:
    """diffusers' own, with the same weights."""
    pipe = diffusers.StableDiffusionPipeline(
        draw_weights(diffusers.AutoencoderKL(**VAE)),
        text_encoder(),
        clip_tokenizer(),
        draw_weights(diffusers.UNet2DConditionModel(**UNET)),
        diffusers.DDIMScheduler(clip_sample=False, **SCHEDULE),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


ARGUMENTS = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
START = draw("start", (1, 4, 8, 8)).float()


def latents(sd: StableDiffusion, prompt: str = "a cat") -> Tensor:
    return sd.text_to_image(**ARGUMENTS | {"prompt": prompt}, latents=START, progress=False).latents


def their_latents(pipe: Any) -> Tensor:
    return pipe(**ARGUMENTS, latents=START, height=16, width=16).images


def places(sd: StableDiffusion) -> list[Target]:
    return targets_of(sd.unet, "unet") + targets_of(sd.text_encoder, "text_encoder")


def drawn_updates(
    chosen: Iterable[Target],
    rank: Callable[[Target], int] = lambda target: 4,
    scale: Callable[[Target], float] = lambda target: 1.0,
    dora: bool = False,
    seed: int = 0,
) -> Updates:
    """A LoRA that moves the picture clearly but not wildly."""
    updates: Updates = {}
    for target in chosen:
        r, rest = rank(target), target.shape[1:]
        down = draw(f"{target.diffusers}.down", (r, *rest), seed).float() / rest.numel() ** 0.5
        up = draw(f"{target.diffusers}.up", (target.shape[0], r, *(1,) * (len(rest) - 1)), seed).float() * 0.3 / r**0.5
        magnitude = 1 + 0.3 * draw(f"{target.diffusers}.magnitude", (target.shape[0],), seed).float() if dora else None
        updates[target] = LowRankUpdate(down, up, scale(target), magnitude)
    return updates

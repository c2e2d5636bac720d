"""A tiny model with weights drawn by name, as ours and as diffusers' pipeline, and LoRAs for it."""

from collections.abc import Callable, Iterable
from typing import Any

import diffusers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import sdkit
from finetune.branch import Branch, Branches
from finetune.sites import Site, sites_of
from sdkit.checkpoint import Components
from sdkit.pipeline import StableDiffusion
from sdkit.text import clip_tokenizer
from tests.conftest import draw, draw_weights

UNET = {
    "sample_size": 8, "block_out_channels": [16, 32], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "cross_attention_dim": 32,
    "attention_head_dim": 4, "norm_num_groups": 8,
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4, "sample_size": 16,
}  # fmt: skip
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
        draw_weights(diffusers.AutoencoderKL(**VAE)), text_encoder(), clip_tokenizer(),
        draw_weights(diffusers.UNet2DConditionModel(**UNET)), diffusers.DDIMScheduler(clip_sample=False, **SCHEDULE),
        None, None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


ARGUMENTS = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
START = draw("start", (1, 4, 8, 8)).float()


def latents(sd: StableDiffusion, prompt: str = "a cat") -> Tensor:
    return sd.text_to_image(**ARGUMENTS | {"prompt": prompt}, latents=START, progress=False).latents


def their_latents(pipe: Any) -> Tensor:
    return pipe(**ARGUMENTS, latents=START, height=16, width=16).images


def sites(sd: StableDiffusion) -> list[Site]:
    return sites_of(sd.unet, "unet") + sites_of(sd.text_encoder, "text_encoder")


def drawn_branches(
    chosen: Iterable[Site],
    rank: Callable[[Site], int] = lambda site: 4,
    scale: Callable[[Site], float] = lambda site: 1.0,
    dora: bool = False,
    seed: int = 0,
) -> Branches:
    """A LoRA that moves the picture clearly but not wildly."""
    branches: Branches = {}
    for site in chosen:
        r, rest = rank(site), site.shape[1:]
        down = draw(f"{site.diffusers}.down", (r, *rest), seed).float() / rest.numel() ** 0.5
        up = draw(f"{site.diffusers}.up", (site.shape[0], r, *(1,) * (len(rest) - 1)), seed).float() * 0.3 / r**0.5
        magnitude = 1 + 0.3 * draw(f"{site.diffusers}.magnitude", (site.shape[0],), seed).float() if dora else None
        branches[site] = Branch(down, up, scale(site), magnitude)
    return branches

"""Models that the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as TheirVAE
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as TheirUNet
from transformers import CLIPTextConfig, CLIPTextModel

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.diffusers_folder import load_folder
from sdkit.checkpoints.presets import read_preset
from sdkit.prompts.tokenizer import clip_tokenizer
from tests.sdkit.checkpoints.models import tiny

UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "sample_size": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def sd1() -> Components:
    return tiny()


@pytest.fixture(scope="module")
def sd2() -> Components:
    return tiny(1024)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=TheirVAE.from_config(VAE).eval(),
        unet=TheirUNet.from_config(UNET).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)).eval(),
        tokenizer=clip_tokenizer(),
        scheduler=DDIMScheduler.from_config(read_preset("sd2")["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def saved(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers wrote; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(saved: Path) -> Components:
    return load_folder(saved)

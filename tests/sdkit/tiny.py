"""A small latent diffusion model with name-drawn weights, ours and diffusers': 32 x 32 pixels, VAE factor 4."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import sdkit
from sdkit.checkpoints.components import Components
from sdkit.prompts.tokenizer import clip_tokenizer
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import draw_weights

UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 8,
    "sample_size": 32,
}
DPT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "reassemble_factors": [4, 2, 1, 0.5],
    "backbone_config": None,
    "is_hybrid": False,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing"}


@cache
def tokenizer() -> Any:
    return clip_tokenizer()  # takes a second to build


def text_encoder() -> Any:
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return draw_weights(CLIPTextModel(config)).eval()


def model(
    scheduler: dict[str, Any] | None = None, prediction_type: str = "epsilon", channels: int = 4
) -> StableDiffusion:
    config = (scheduler or SCHEDULER) | SCHEDULE | {"prediction_type": prediction_type}
    unet = draw_weights(sdkit.UNet2DConditionModel.from_config(UNET | {"in_channels": channels}))
    vae = draw_weights(sdkit.AutoencoderKL.from_config(VAE))
    return StableDiffusion(Components(unet.eval(), vae.eval(), text_encoder(), tokenizer(), config))


def save_depth_model(root: Path) -> Path:
    """The folder of a depth model as diffusers writes it, with an old preprocessor_config.json."""
    model(channels=5).save_pretrained(root)
    torch.manual_seed(0)
    transformers.DPTForDepthEstimation(transformers.DPTConfig(**DPT)).save_pretrained(root / "depth_estimator")
    (root / "feature_extractor").mkdir()
    preprocessing = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "ensure_multiple_of": 1,
        "feature_extractor_type": "DPTFeatureExtractor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "keep_aspect_ratio": False,
        "resample": 2,
        "size": 32,
    }
    (root / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    index = json.loads((root / "model_index.json").read_text())
    index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
    index["feature_extractor"] = ["transformers", "DPTFeatureExtractor"]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def twin(sd: StableDiffusion, pipeline: Any, scheduler: Any, **parts: Any) -> Any:
    """diffusers' pipeline of this class with the same weights; ``parts`` are what it takes beside the usual ones."""
    unet = diffusers.UNet2DConditionModel(**UNET | {"in_channels": sd.unet.config.in_channels})
    vae = diffusers.AutoencoderKL(**VAE)
    unet.load_state_dict(sd.unet.state_dict())
    vae.load_state_dict(sd.vae.state_dict())
    if not parts:
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = pipeline(
        vae=vae, text_encoder=sd.text_encoder, tokenizer=sd.tokenizer, unet=unet, scheduler=scheduler, **parts
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def picture(height: int = 32, width: int = 48, seed: int = 0) -> Image.Image:
    """Smooth random colours over all of the range."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def mask(height: int = 32, width: int = 48) -> Image.Image:
    """White from the fifth column and the sixth row on, to the middle."""
    white = np.zeros((height, width), np.uint8)
    white[6 : height // 2 + 3, 5 : width // 2] = 255
    return Image.fromarray(white)

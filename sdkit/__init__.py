"""Latent diffusion: a Stable Diffusion-class model that reads the files of diffusers, A1111 and ComfyUI.

Names are imported on first use, so that ``import sdkit`` and ``sdkit --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkit.config import UNetConfig, VAEConfig
    from sdkit.diffusers_compat import accelerate
    from sdkit.pipeline import StableDiffusion
    from sdkit.plan import Plan, make_plan
    from sdkit.schedule import NoiseSchedule
    from sdkit.unet import UNet2DConditionModel
    from sdkit.vae import AutoencoderKL

__version__ = "0.1.0"

_HOMES = {
    "StableDiffusion": "pipeline",
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "UNetConfig": "config",
    "VAEConfig": "config",
    "NoiseSchedule": "schedule",
    "Plan": "plan",
    "make_plan": "plan",
    "accelerate": "diffusers_compat",
}

__all__ = [
    "AutoencoderKL",
    "NoiseSchedule",
    "Plan",
    "StableDiffusion",
    "UNet2DConditionModel",
    "UNetConfig",
    "VAEConfig",
    "accelerate",
    "make_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sdkit.{_HOMES[name]}"), name)

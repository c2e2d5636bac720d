"""Latent diffusion: a Stable Diffusion-class model that reads the files of diffusers, A1111 and ComfyUI.

Names are imported on first use, so that ``import sdkit`` and ``sdkit --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdkit.importing import quick_imports
from sdkit.version import __version__

if TYPE_CHECKING:
    from sdkit.adapter_kinds import AdapterKind, register_adapter_kind
    from sdkit.checkpoints.classifier_folder import load_classifier
    from sdkit.checkpoints.inspection import inspect_file
    from sdkit.diffusers_compat import accelerate, restore
    from sdkit.errors import CheckpointError, ConfigError, NumericalError, SDKitError
    from sdkit.generation.options import Options, Settings
    from sdkit.generation.output import Output
    from sdkit.generation.png import read_parameters, write_png
    from sdkit.generation.tasks import Hires
    from sdkit.networks.config import UNetConfig, VAEConfig
    from sdkit.networks.unet import UNet2DConditionModel
    from sdkit.networks.vae import AutoencoderKL
    from sdkit.sampling.guidance import Guidance
    from sdkit.sampling.plan import Plan
    from sdkit.sampling.planning import make_plan
    from sdkit.sampling.schedule import NoiseSchedule
    from sdkit.stable_diffusion import StableDiffusion
    from sdkit.viewing.attention_maps import AttentionMaps, prompt_words, record_attention
    from sdkit.viewing.attention_sheet import attention_sheet
    from sdkit.viewing.previews import film_strip
    from sdkit.viewing.trajectory import trajectory_figure

_HOMES = {
    "AdapterKind": "adapter_kinds",
    "AttentionMaps": "viewing.attention_maps",
    "AutoencoderKL": "networks.vae",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Guidance": "sampling.guidance",
    "Hires": "generation.tasks",
    "NoiseSchedule": "sampling.schedule",
    "NumericalError": "errors",
    "Options": "generation.options",
    "Output": "generation.output",
    "Plan": "sampling.plan",
    "SDKitError": "errors",
    "Settings": "generation.options",
    "StableDiffusion": "stable_diffusion",
    "UNet2DConditionModel": "networks.unet",
    "UNetConfig": "networks.config",
    "VAEConfig": "networks.config",
    "accelerate": "diffusers_compat",
    "attention_sheet": "viewing.attention_sheet",
    "film_strip": "viewing.previews",
    "inspect_file": "checkpoints.inspection",
    "load_classifier": "checkpoints.classifier_folder",
    "make_plan": "sampling.planning",
    "prompt_words": "viewing.attention_maps",
    "read_parameters": "generation.png",
    "record_attention": "viewing.attention_maps",
    "register_adapter_kind": "adapter_kinds",
    "restore": "diffusers_compat",
    "trajectory_figure": "viewing.trajectory",
    "write_png": "generation.png",
}

__all__ = [
    "AdapterKind",
    "AttentionMaps",
    "AutoencoderKL",
    "CheckpointError",
    "ConfigError",
    "Guidance",
    "Hires",
    "NoiseSchedule",
    "NumericalError",
    "Options",
    "Output",
    "Plan",
    "SDKitError",
    "Settings",
    "StableDiffusion",
    "UNet2DConditionModel",
    "UNetConfig",
    "VAEConfig",
    "__version__",
    "accelerate",
    "attention_sheet",
    "film_strip",
    "inspect_file",
    "load_classifier",
    "make_plan",
    "prompt_words",
    "read_parameters",
    "record_attention",
    "register_adapter_kind",
    "restore",
    "trajectory_figure",
    "write_png",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdkit' has no attribute {name!r}")
    with quick_imports():
        return getattr(importlib.import_module(f"sdkit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

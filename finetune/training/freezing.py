"""Freezing a model for the training of something beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdkit.diffusion_model import DiffusionModel


def freeze(sd: DiffusionModel) -> None:
    """Let nothing train but adapters."""
    for network in (sd.unet, sd.vae, sd.text_encoder):
        for key, parameter in network.named_parameters():
            if ".lora_" not in key:
                parameter.requires_grad_(False)

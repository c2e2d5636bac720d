"""A model's parts: networks built from their configurations, and weights put into them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sdkit.errors import CheckpointError, ConfigError, one_line
from sdkit.networks.text_encoder import build_text_encoder, load_text_state
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Components:
    """The parts of a latent diffusion model.

    ``scheduler_config`` is diffusers' dict. ``extra`` holds, for each folder of a diffusers pipeline that is carried
    along but not used here (``depth_estimator`` and its ``feature_extractor``), its library, class and path.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    extra: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def check_bare(components: Components, path: str | Path) -> None:
    """Raise ConfigError when peft's adapters are around the model's layers: no file has a place for their names."""
    for network in (components.unet, components.text_encoder):
        if any(".base_layer." in name for name in network.state_dict()):
            raise ConfigError(f"{path}: the model has adapters in it: call finetune.bake or finetune.remove first")


def text_config(model: CLIPTextModel) -> dict[str, Any]:
    """The text encoder's config.json."""
    values = model.config.to_diff_dict()
    return {"architectures": ["CLIPTextModel"]} | {k: v for k, v in values.items() if k != "transformers_version"}


def build_networks(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any], where: str
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The three networks of these configs on the meta device: without memory, waiting for their weights."""
    part = "unet"
    try:
        with torch.device("meta"):
            unet_model = UNet2DConditionModel.from_config(unet)
            part = "vae"
            vae_model = AutoencoderKL.from_config(vae)
            part = "text_encoder"
            return unet_model, vae_model, build_text_encoder(text_encoder)
    except (ConfigError, TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{where}: {part}: {one_line(error)}") from None


def give_weights(module: Module, state: Mapping[str, Tensor], where: str) -> Module:
    """Put the tensors of ``state`` themselves into a network built on the meta device; returns it in eval mode.

    Raises CheckpointError that names the first missing, unexpected or misshapen key.
    """
    expected = module.state_dict()
    for what, keys in (("missing", expected.keys() - state.keys()), ("unexpected", state.keys() - expected.keys())):
        if keys:
            raise CheckpointError(f"{where}: {len(keys)} {what} keys, the first {min(keys)}")

    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            found = list(state[key].shape)
            raise CheckpointError(f"{where}: {key}: expected the shape {list(tensor.shape)}, found {found}")

    module.load_state_dict(state, assign=True)
    return module.eval()


def give_text_weights(model: CLIPTextModel, state: Mapping[str, Tensor], where: str) -> CLIPTextModel:
    """Put the weights ``state`` into the text encoder; keys may start with ``text_model.`` or not."""
    try:
        unused = load_text_state(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if unused:
        logger.info("%s: left out %s", where, ", ".join(unused))
    return model


def read_old_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's state dict with today's attention names and [C, C] weights, from old names or [C, C, 1(, 1)] weights."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        key = re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", key)
        result[key] = tensor.flatten(1) if re.search(r"attentions\.\d+\.to_.*\.weight$", key) else tensor
    return result

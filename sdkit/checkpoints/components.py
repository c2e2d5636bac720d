"""A model's parts: networks built from their configurations, and weights put into them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sdkit.checkpoints.tensors import is_finite
from sdkit.errors import CheckpointError, ConfigError, one_line, printable
from sdkit.networks.config import VAEConfig
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
    """Raise ConfigError when adapters are around the model's layers, or in its weights for as long as they run."""
    for network in (components.unet, components.text_encoder):
        changed: bool = getattr(network, "has_changed_weights", False)
        if changed or any(".base_layer." in name for name in network.state_dict()):
            raise ConfigError(f"{path}: the model has adapters in it: call finetune.bake or finetune.remove first")


def text_config(model: CLIPTextModel) -> dict[str, Any]:
    """The text encoder's config.json."""
    values = model.config.to_diff_dict()
    return {"architectures": ["CLIPTextModel"]} | {k: v for k, v in values.items() if k != "transformers_version"}


def build_unet(config: Mapping[str, Any], where: str) -> UNet2DConditionModel:
    """The UNet of this config on the meta device: without memory, waiting for its weights. Raises CheckpointError."""
    return _build(UNet2DConditionModel.from_config, config, f"{where}: unet")


def build_vae(config: Mapping[str, Any], where: str) -> AutoencoderKL:
    """The VAE of this config on the meta device. Raises CheckpointError."""
    return _build(AutoencoderKL.from_config, config, f"{where}: vae")


def build_text(config: Mapping[str, Any], where: str) -> CLIPTextModel:
    """The text encoder of this config on the meta device. Raises CheckpointError."""
    return _build(build_text_encoder, config, f"{where}: text_encoder")


def _build(build: Callable[[Mapping[str, Any]], Module], config: Mapping[str, Any], where: str) -> Module:
    try:
        with torch.device("meta"):
            return build(config)
    except (ConfigError, TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{where}: {one_line(error)}") from None


def check_fit(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, own_vae: VAEConfig | None, where: str
) -> None:
    """Raise CheckpointError unless the UNet's latents are the VAE's, and its contexts the text encoder's.

    own_vae: the configuration of the model's own VAE where another one is put in its place.
    """
    wanted = (unet.config.out_channels, (own_vae or vae.config).factor)
    found = (vae.config.latent_channels, vae.config.factor)
    if found != wanted:
        expected = f"{wanted[0]} latent channels and factor {wanted[1]}"
        raise CheckpointError(f"{where}: expected a VAE of {expected}, found {found[0]} and {found[1]}")

    width, found_width = unet.config.per_block(unet.config.cross_attention_dim)[0], text_encoder.config.hidden_size
    if found_width != width:
        raise CheckpointError(f"{where}: expected a text encoder of width {width}, found {found_width}")


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
        if tensor.is_floating_point() and not state[key].is_floating_point():
            raise CheckpointError(f"{where}: {key}: expected floating-point numbers, found {state[key].dtype}")

    _name_not_finite(state, where)
    module.load_state_dict(state, assign=True)
    return _of_one_dtype(module).eval()


def _of_one_dtype(module: Module) -> Module:
    """The module, which cannot run in several dtypes, in the one that holds the values of all its weights."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return module if len(dtypes) < 2 else module.to(reduce(torch.promote_types, dtypes))


def _name_not_finite(state: Mapping[str, Tensor], where: str) -> None:
    """A warning for weights that are NaN or infinite: whatever passes through them will be, too."""
    bad = [key for key, tensor in state.items() if not is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        logger.warning("%s: the weights %s%s are not finite: the file is damaged, or was trained or saved so",
                       where, printable(bad[0]), more)  # fmt: skip


def give_text_weights(model: CLIPTextModel, state: Mapping[str, Tensor], where: str) -> CLIPTextModel:
    """Put the weights ``state`` into the text encoder; keys may start with ``text_model.`` or not."""
    try:
        unused = load_text_state(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    _name_not_finite(state, where)
    if unused:
        logger.info("%s: left out %s", where, printable(", ".join(unused)))
    return _of_one_dtype(model)


def read_old_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's state dict with today's attention names and [C, C] weights, from old names or [C, C, 1(, 1)] weights."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        key = re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", key)
        is_convolution = tensor.dim() > 2 and re.search(r"attentions\.\d+\.to_.*\.weight$", key)
        result[key] = tensor.flatten(1) if is_convolution else tensor
    return result

"""A VAE alone: in a file of either layout, or in a folder of diffusers'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdkit.checkpoints.components import build_vae, give_weights, read_old_attention
from sdkit.checkpoints.diffusers_folder import load_weights
from sdkit.checkpoints.evidence import own_configs
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.key_maps import EMA, TEXT, UNET, VAE, leftovers, take, vae_map, vae_to_single
from sdkit.checkpoints.presets import read_preset
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.errors import CheckpointError, ConfigError
from sdkit.files import new_folder, read_config, write_json
from sdkit.networks.config import VAEConfig
from sdkit.networks.vae import AutoencoderKL


def load_vae_file(
    path: str | Path, config: VAEConfig | None = None, *, dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """Load a VAE from a file under single-file names (with or without ``first_stage_model.``) or diffusers', or out of
    the file of a whole model.

    Without ``config``: the file's metadata where we wrote it, else Stable Diffusion's. Raises CheckpointError.
    """
    where = str(path)
    state, metadata = read_state(path, dtype)
    if any(key.startswith((UNET, TEXT, EMA + "diffusion_model")) for key in state):
        state = {key: tensor for key, tensor in state.items() if key.startswith(VAE)}
    vae = build_vae((config or _config_in(metadata, where)).to_dict(), where)

    prefix = next((p for p in (VAE, "") if f"{p}decoder.conv_in.weight" in state), None)
    if prefix is None:
        raise CheckpointError(f"{where}: expected a VAE, found {inspect_file(path)['kind']}")
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in state:
        return _filled(vae, state, where)

    weights = take(state, vae_map(vae.state_dict(), len(vae.config.block_out_channels)), prefix, where)
    leftovers(state, where)
    return _filled(vae, weights, where)


def load_vae_folder(folder: str | Path, *, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """Load the ``vae/`` folder of diffusers' layout. Raises CheckpointError."""
    state = load_weights(folder, "diffusion_pytorch_model", dtype=dtype)
    return _filled(build_vae(read_config(Path(folder)), str(folder)), state, str(folder))


def save_vae_file(vae: AutoencoderKL, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save a VAE alone as A1111 reads it: 248 keys at full size, without a prefix. Raises CheckpointError."""
    config = {"sdkit_config": json.dumps({"vae": vae.config.to_dict()})}
    write_state(vae_to_single(vae, prefix=""), path, dtype, config)


def save_vae_folder(vae: AutoencoderKL, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save the ``vae/`` folder of diffusers' layout. Raises CheckpointError."""
    with new_folder(path) as folder:
        write_state(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors", dtype)
        write_json(folder / "config.json", vae.config.to_dict())


def _filled(vae: AutoencoderKL, state: Mapping[str, Tensor], where: str) -> AutoencoderKL:
    return give_weights(vae, read_old_attention(state), where)


def _config_in(metadata: Mapping[str, str], where: str) -> VAEConfig:
    """The config in a file's metadata, else Stable Diffusion's."""
    own = own_configs(metadata, where, "vae") or read_preset("sd1")
    try:
        return VAEConfig.from_dict(own["vae"])
    except ConfigError as error:
        raise CheckpointError(f"{where}: the metadata sdkit_config is damaged ({error})") from None

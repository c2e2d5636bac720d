"""VAEs alone, in files of either layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as TheirVAE
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.key_maps import VAE
from sdkit.checkpoints.loading import load_vae
from sdkit.checkpoints.vae_file import load_vae_file, save_vae_file
from tests.sdkit.checkpoints.models import TINY_VAE, assert_same


@pytest.mark.parametrize("prefix", ["", VAE])
def test_vae_file(prefix: str, sd1: Components, tmp_path: Path) -> None:
    save_vae_file(sd1.vae, tmp_path / "vae.safetensors")
    file = load_file(tmp_path / "vae.safetensors")
    assert file["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert_same(convert_ldm_vae_checkpoint(file, TINY_VAE), dict(sd1.vae.state_dict()))
    training = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": {prefix + k: v for k, v in (file | training).items()}}, tmp_path / "vae.ckpt")
    loaded = load_vae_file(tmp_path / "vae.ckpt", sd1.vae.config)
    assert_same(dict(loaded.state_dict()), dict(sd1.vae.state_dict()))
    assert_same(dict(load_vae_file(tmp_path / "vae.safetensors").state_dict()), dict(sd1.vae.state_dict()))


def test_vae_in_diffusers_names_and_folders(sd1: Components, tmp_path: Path) -> None:
    TheirVAE.from_config(TINY_VAE).save_pretrained(tmp_path / "vae")
    saved = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert_same(dict(load_vae(tmp_path / "vae").state_dict()), saved)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    assert_same(dict(load_vae_file(file, sd1.vae.config).state_dict()), saved)

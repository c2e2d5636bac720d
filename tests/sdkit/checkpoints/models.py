"""Small models that the tests of checkpoints share, and how these compare them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.presets import PRESETS, read_preset
from sdkit.errors import CheckpointError
from sdkit.networks.unet import UNet2DConditionModel
from sdkit.networks.vae import AutoencoderKL
from sdkit.prompts.tokenizer import clip_tokenizer

TINY_UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "sample_size": 8,
}
TINY_VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
TINY_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}


def tiny(width: int = 16, channels: int = 4) -> Components:
    """A random model with a context of ``width``; 1024 makes it an SD2 model to every reader."""
    torch.manual_seed(0)
    vocab = {"vocab_size": 64} if width == 1024 else {}
    text = CLIPTextModel(CLIPTextConfig(**(TINY_TEXT | {"hidden_size": width} | vocab)))
    unet = UNet2DConditionModel.from_config(TINY_UNET | {"cross_attention_dim": width, "in_channels": channels})
    scheduler = read_preset("sd2" if width == 1024 else "sd1")["scheduler"]
    tokenizer = clip_tokenizer(0 if width == 1024 else 49407)
    return Components(unet.eval(), AutoencoderKL.from_config(TINY_VAE).eval(), text.eval(), tokenizer, scheduler)


def networks(components: Components) -> list[nn.Module]:
    return [components.unet, components.vae, components.text_encoder]


def assert_same_networks(ours: Components, theirs: Components) -> None:
    for a, b in zip(networks(ours), networks(theirs), strict=True):
        assert_same(a.state_dict(), b.state_dict())


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    wrong = [k for k in a if a[k].dtype != b[k].dtype or a[k].shape != b[k].shape or not torch.equal(a[k], b[k])]
    assert not wrong


def meta(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build().state_dict()


def save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> Path:
    save_file(state, path, metadata)
    return path


def refused(match: str, call: Callable[[], object], path: Path) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def use_tiny_presets(monkeypatch: pytest.MonkeyPatch, *models: Components) -> None:
    """Shrink every preset's networks, so that files without our metadata can be tested in seconds."""

    def shrunk(name: str) -> dict[str, dict[str, Any]]:
        width = 1024 if name.startswith("sd2") else models[0].unet.config.cross_attention_dim
        channels = read_preset(name)["unet"]["in_channels"]
        text = TINY_TEXT | {"hidden_size": width} | ({"vocab_size": 64} if width == 1024 else {})
        unet = TINY_UNET | {"cross_attention_dim": width, "in_channels": channels}
        return read_preset(name) | {"unet": unet, "vae": TINY_VAE, "text_encoder": text}

    monkeypatch.setattr("sdkit.checkpoints.single_file.read_preset", shrunk)
    monkeypatch.setitem(PRESETS, (16, 4), "sd1")

"""Key maps against diffusers' own converters, at full size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL as TheirVAE
from diffusers import UNet2DConditionModel as TheirUNet
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from sdkit.checkpoints.components import Components
from sdkit.checkpoints.key_maps import (
    OPEN_CLIP,
    UNET,
    VAE,
    give,
    open_clip_extras,
    open_clip_map,
    take,
    unet_map,
    vae_map,
)
from sdkit.checkpoints.presets import ALL_PRESETS, read_preset
from sdkit.checkpoints.single_file import save_single_file
from sdkit.networks.config import UNetConfig
from sdkit.networks.text_encoder import build_text_encoder, text_state_dict
from sdkit.networks.unet import UNet2DConditionModel
from tests.sdkit.checkpoints.models import assert_same, meta


class Tagged(dict[str, Tensor]):
    """A file whose every tensor is its key's number, so that a wrong mapping moves a number."""

    def __init__(self, keys: list[str], dims: Callable[[str], int]) -> None:
        super().__init__({key: torch.full((1,) * dims(key), float(i)) for i, key in enumerate(sorted(keys))})


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_unet_map_is_diffusers(preset: str) -> None:
    config = read_preset(preset)["unet"]
    theirs = meta(lambda: TheirUNet.from_config(config))
    ours = meta(lambda: UNet2DConditionModel.from_config(config))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    names = unet_map(theirs, UNetConfig.from_dict(config))
    assert len(set(names.values())) == len(theirs) == 686
    file = Tagged([UNET + key for key in names.values()], lambda key: 1)
    expected = convert_ldm_unet_checkpoint(dict(file), config)
    assert_same(take(dict(file), names, UNET, "file"), expected)
    assert_same(give(expected, names, UNET), dict(file))


@pytest.mark.parametrize("layers", [1, 3])
def test_unet_map_with_other_depths(layers: int) -> None:
    config = read_preset("sd1")["unet"] | {"layers_per_block": layers}
    names = unet_map(meta(lambda: TheirUNet.from_config(config)), UNetConfig.from_dict(config))
    file = Tagged([UNET + key for key in names.values()], lambda key: 1)
    assert_same(take(dict(file), names, UNET, "file"), convert_ldm_unet_checkpoint(dict(file), config))


def test_vae_map_is_diffusers() -> None:
    config = read_preset("sd1")["vae"]
    theirs = meta(lambda: TheirVAE.from_config(config))
    assert len(theirs) == 248
    names = vae_map(theirs, 4)
    assert len(set(names.values())) == 248
    file = Tagged([VAE + key for key in names.values()], lambda key: 4 if "attn_1" in key and "weight" in key else 1)
    expected = convert_ldm_vae_checkpoint(dict(file), config)
    mine = take(dict(file), names, VAE, "file")
    assert mine.keys() == expected.keys() == theirs.keys()
    assert {k: v.item() for k, v in mine.items()} == {k: v.item() for k, v in expected.items()}


def test_clip_map_is_diffusers(sd1: Components, tmp_path: Path) -> None:
    save_single_file(sd1, tmp_path / "m.safetensors")
    file = load_file(tmp_path / "m.safetensors")
    assert_same(convert_ldm_clip_checkpoint(file), text_state_dict(sd1.text_encoder))
    with torch.device("meta"):
        full = text_state_dict(build_text_encoder(read_preset("sd1")["text_encoder"]))
    assert sum(v.numel() for v in full.values()) == 123_060_480


def test_open_clip_map_is_diffusers() -> None:
    """All 23 blocks, with stacked rows told apart; the last block and the head are what diffusers ignores."""
    with torch.device("meta"):
        full = text_state_dict(build_text_encoder(read_preset("sd2")["text_encoder"]))
    assert sum(v.numel() for v in full.values()) == 340_387_840
    shrunk = {k: torch.full([2] * v.dim(), float(i)) for i, (k, v) in enumerate(full.items())}
    file = give(shrunk, open_clip_map(full), OPEN_CLIP)
    file |= open_clip_extras(file, 23)
    assert len(file) == 24 * 12 + 4 + 2
    converted = convert_open_clip_checkpoint(SimpleNamespace(config=SimpleNamespace(hidden_size=2)), dict(file))
    assert_same(converted, shrunk)
    assert_same(take(dict(file), open_clip_map(full), OPEN_CLIP, "file"), shrunk)


def test_open_clip_extra_block_is_the_identity() -> None:
    """In OpenCLIP's own block: pre-norm attention and MLP, both residual."""
    torch.manual_seed(0)
    width, heads, x = 8, 2, torch.randn(2, 5, 8)
    layer = f"{OPEN_CLIP}transformer.resblocks.0."
    shapes = {
        "ln_1.weight": [8],
        "ln_1.bias": [8],
        "attn.in_proj_weight": [24, 8],
        "attn.in_proj_bias": [24],
        "attn.out_proj.weight": [8, 8],
        "attn.out_proj.bias": [8],
        "ln_2.weight": [8],
        "ln_2.bias": [8],
        "mlp.c_fc.weight": [32, 8],
        "mlp.c_fc.bias": [32],
        "mlp.c_proj.weight": [8, 32],
        "mlp.c_proj.bias": [8],
    }
    state = {layer + k: torch.randn(s) for k, s in shapes.items()} | {f"{OPEN_CLIP}ln_final.weight": torch.randn(8)}
    extras = open_clip_extras(state, 1)
    block = {k.removeprefix(f"{OPEN_CLIP}transformer.resblocks.1."): v for k, v in extras.items() if "resblocks" in k}
    assert {k: list(v.shape) for k, v in block.items()} == shapes
    attention = nn.MultiheadAttention(width, heads, batch_first=True)
    attention.load_state_dict({k.removeprefix("attn."): v for k, v in block.items() if k.startswith("attn.")})
    h = nn.functional.layer_norm(x, [width], block["ln_1.weight"], block["ln_1.bias"])
    y = x + attention(h, h, h, need_weights=False)[0]
    h = nn.functional.layer_norm(y, [width], block["ln_2.weight"], block["ln_2.bias"])
    h = nn.functional.gelu(nn.functional.linear(h, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
    y = y + nn.functional.linear(h, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    assert torch.equal(y, x)
    assert torch.equal(extras[f"{OPEN_CLIP}text_projection"], torch.eye(8))

"""Caches of latents and texts: what the encoders give, and never anything stale."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.data.buckets import prepare
from finetune.data.cache import LatentCache, TextCache, weights_hash
from finetune.data.config import DataConfig
from sdkit import AutoencoderKL
from sdkit.checkpoints.loading import MODELS
from sdkit.errors import CheckpointError
from sdkit.networks.text_encoder import build_text_encoder
from sdkit.prompts.encoding import encode_prompts
from sdkit.prompts.tokenizer import load_tokenizer
from tests.finetune.data.painted import dataset, paint, vae


@pytest.fixture(scope="module")
def words():
    """The shipped tokenizer and a small text encoder."""
    config = json.loads((MODELS / "tabletop" / "text_encoder" / "config.json").read_text())
    torch.manual_seed(0)
    return load_tokenizer(MODELS / "tabletop" / "tokenizer"), build_text_encoder(config | {"num_hidden_layers": 1})


def test_cached_latents_are_those_of_the_encoder(tmp_path: Path):
    paint(tmp_path / "a" / "a.png", (60, 48)).with_suffix(".txt").write_text("x")
    data, encoder = dataset(tmp_path / "a"), vae()
    cache = LatentCache(encoder, tmp_path)
    (view,) = data.views()
    assert cache.fill([view, view]) == 1 and cache.fill([view]) == 0
    with torch.no_grad():
        posterior = encoder.encode(prepare(Image.open(view[0].path), view[1], None, False, view[0].digest))
    scale = encoder.config.scaling_factor
    expected = posterior.sample(torch.Generator().manual_seed(3))[0] * scale
    assert torch.allclose(cache(view, torch.Generator().manual_seed(3)), expected, atol=1e-6)
    assert torch.allclose(cache(view), posterior.mean[0] * scale, atol=1e-6)


def test_a_stale_latent_is_not_used(tmp_path: Path):
    folder = tmp_path / "a"
    paint(folder / "a.png").with_suffix(".txt").write_text("x")

    def encoded(config: DataConfig, encoder: AutoencoderKL, **arguments) -> int:
        return LatentCache(encoder, tmp_path).fill(dataset(folder, config, **arguments).views())

    plain = DataConfig(data=folder)
    assert encoded(plain, vae()) == 1 and encoded(plain, vae()) == 0
    assert encoded(plain, vae(seed=1)) == 1  # other weights
    assert encoded(plain, vae(), resolution=64) == 1  # another size
    assert encoded(replace(plain, random_flip=True), vae()) == 1  # the mirrored one is new
    assert encoded(replace(plain, random_crops=3), vae()) == 3
    scaled = vae()
    scaled.config = replace(scaled.config, scaling_factor=0.5)
    assert encoded(plain, scaled) == 1
    quant = vae()
    with torch.no_grad():
        quant.quant_conv.bias.add_(1.0)
    assert encoded(plain, quant) == 1
    before = LatentCache(vae(), tmp_path)(dataset(folder).views()[0])
    (folder / "a.txt").write_text("another caption")
    assert encoded(plain, vae()) == 0
    paint(folder / "a.png", seed=1)  # same name and size, other bytes
    with pytest.raises(CheckpointError, match="start again"):
        LatentCache(vae(), tmp_path)(dataset(folder).views()[0])
    assert encoded(plain, vae()) == 1
    after = LatentCache(vae(), tmp_path)(dataset(folder).views()[0])
    assert not torch.equal(before, after)


def test_a_damaged_file_is_encoded_again(tmp_path: Path):
    paint(tmp_path / "a" / "a.png").with_suffix(".txt").write_text("x")
    cache, views = LatentCache(vae(), tmp_path), dataset(tmp_path / "a").views()
    cache.fill(views)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert cache.fill(views) == 1 and cache.fill(views) == 0


def test_processes_share_the_work(tmp_path: Path):
    for i in range(5):
        paint(tmp_path / "a" / f"{i}.png", seed=i).with_suffix(".txt").write_text("x")
    views = dataset(tmp_path / "a").views()
    assert LatentCache(vae(), tmp_path).fill(views, slice(0, None, 2)) == 3
    assert LatentCache(vae(), tmp_path).fill(views) == 2


def test_cached_contexts_are_those_of_the_encoder(tmp_path: Path, words):
    tokenizer, encoder = words
    captions = ["a red cube", "a (red:2) cube " * 30, ""]
    cache = TextCache(tokenizer, encoder, tmp_path)
    assert cache.fill(captions) == 3 and cache.fill(captions) == 0
    with torch.no_grad():
        expected, _ = encode_prompts(tokenizer, encoder, captions, None, weighted=False)
    length = int(encoder.config.max_position_embeddings)
    assert expected.shape[1] > length  # several chunks
    assert torch.allclose(cache(captions), expected, atol=1e-5)
    assert cache(captions[:1]).shape[1] == length
    assert cache.fill(["new"]) == 1
    assert TextCache(tokenizer, encoder, tmp_path, clip_skip=0).fill(["new"]) == 0
    with torch.no_grad():
        weight = next(encoder.parameters())
        weight.add_(1)
        assert TextCache(tokenizer, encoder, tmp_path).fill(["new"]) == 2  # it and the empty caption
        weight.sub_(1)


def test_weights_hash_sees_values_names_and_dtypes():
    plain = torch.nn.Linear(2, 2)
    hashes = {weights_hash(plain), weights_hash(torch.nn.Sequential(plain)), weights_hash(plain.double())}
    with torch.no_grad():
        plain.bias[1] += 1
    assert len(hashes | {weights_hash(plain)}) == 4

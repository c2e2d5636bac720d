"""Companions: loaded as the whole models that they stand for, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdkit.checkpoints import loading
from sdkit.checkpoints.companion_folder import FACTS, WEIGHTS, save_companion
from sdkit.checkpoints.inspection import inspect_file
from sdkit.checkpoints.tensors import read_state, write_state
from sdkit.stable_diffusion import StableDiffusion
from tests.sdkit.checkpoints.models import refused
from tests.sdkit.tiny import model, save_depth_model

LAYER, CONV = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    model().save_pretrained(folder)
    return folder


@pytest.fixture
def companion(base: Path) -> Path:
    """Beside the base: five input channels, a changed linear layer and a changed convolution."""
    own = loading.load(base).unet.state_dict()
    draw = torch.Generator().manual_seed(0)
    difference = {"conv_in.weight": torch.randn(32, 5, 3, 3, generator=draw)}
    for name in (f"{LAYER}.weight", f"{CONV}.weight"):
        rows, columns = own[name].flatten(1).shape
        difference[f"{name}.up"] = torch.randn(rows, 2, generator=draw)
        difference[f"{name}.down"] = torch.randn(2, columns, generator=draw)
    folder = base.parent / "companion"
    shutil.rmtree(folder, ignore_errors=True)
    save_companion(folder, "../base", {"in_channels": 5}, difference)
    return folder


def test_it_is_the_base_with_what_is_different(base: Path, companion: Path) -> None:
    plain, found = (loading.load(path, dtype=torch.float32) for path in (base, companion))
    difference = read_state(companion / WEIGHTS, torch.float32)[0]
    assert {tensor.dtype for tensor in read_state(companion / WEIGHTS)[0].values()} == {torch.float16}
    assert found.unet.config.in_channels == 5 and torch.equal(found.unet.conv_in.weight, difference["conv_in.weight"])

    expected = dict(plain.unet.state_dict()) | {"conv_in.weight": difference["conv_in.weight"]}
    for name in (f"{LAYER}.weight", f"{CONV}.weight"):
        product = difference[f"{name}.up"] @ difference[f"{name}.down"]
        expected[name] = expected[name] + product.reshape(expected[name].shape)
    for name, tensor in found.unet.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    for ours, theirs in ((found.vae, plain.vae), (found.text_encoder, plain.text_encoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))

    half = loading.load(companion, dtype=torch.float16)
    assert {p.dtype for part in (half.unet, half.vae, half.text_encoder) for p in part.parameters()} == {torch.float16}
    changed = half.unet.state_dict()[f"{LAYER}.weight"].float()
    torch.testing.assert_close(changed, expected[f"{LAYER}.weight"], rtol=2e-3, atol=1e-3)


def test_it_is_saved_as_a_plain_folder(companion: Path, tmp_path: Path) -> None:
    sd = StableDiffusion.from_pretrained(companion, dtype=torch.float32)
    sd.save_pretrained(tmp_path / "whole")
    assert inspect_file(tmp_path / "whole")["pipeline"] == "StableDiffusionDepth2ImgPipeline"
    again = StableDiffusion.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(sd.unet.parameters(), again.unet.parameters(), strict=True))


def test_parts_that_lie_in_it_are_found(companion: Path, tmp_path: Path) -> None:
    depth = save_depth_model(tmp_path / "depth")
    parts = {
        "depth_estimator": ("transformers", "DPTForDepthEstimation"),
        "feature_extractor": ("transformers", "DPTImageProcessor"),
    }
    for name in parts:
        shutil.copytree(depth / name, companion / name)
    save_companion(companion, "../base", {"in_channels": 5}, read_state(companion / WEIGHTS)[0], parts)

    sd = StableDiffusion.from_pretrained(companion, dtype=torch.float32)
    map_ = sd.depth_estimator.estimate(torch.zeros(1, 3, 32, 32), torch.device("cpu"))
    assert map_.shape == (1, 64, 64)
    out = sd.depth_to_image("a cat", torch.zeros(1, 3, 32, 32), num_inference_steps=1, progress=False)
    assert out.images[0].size == (32, 32)


def test_its_vae_and_text_encoder_are_the_bases(base: Path, companion: Path) -> None:
    vae = loading.load_vae(companion)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), loading.load_vae(base).parameters(), strict=True))
    assert loading.load(base, text_encoder=companion).text_encoder.config.hidden_size == 32


def test_it_is_listed_found_and_inspected(companion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MODELS", companion.parent)
    assert loading.shipped_models() == ["base", "companion"]
    assert loading.find_model("companion") == companion
    facts = inspect_file(companion)
    assert facts["kind"] == "companion folder" and facts["config"]["base"] == "../base" and facts["tensors"] == 5
    assert loading.format_of(companion) is loading.COMPANION


def test_what_does_not_fit_is_refused(companion: Path) -> None:
    state = read_state(companion / WEIGHTS)[0]

    def load() -> object:
        return loading.load(companion)

    weight = f"{LAYER}.weight"
    write_state(state | {"nothing.weight": torch.zeros(1)}, companion / WEIGHTS)
    refused("nothing.weight: the other model has no such weight", load, companion / WEIGHTS)
    write_state({name: value for name, value in state.items() if name != f"{weight}.down"}, companion / WEIGHTS)
    refused("expected two factors", load, companion / WEIGHTS)
    write_state(state | {f"{weight}.up": torch.zeros(3, 2)}, companion / WEIGHTS)
    refused("expected two factors", load, companion / WEIGHTS)
    write_state(state | {"conv_in.weight": torch.zeros(32, 4, 3, 3)}, companion / WEIGHTS)
    refused("conv_in.weight: expected the shape", load, companion)

    write_state(state, companion / WEIGHTS)
    (companion / FACTS).write_text(json.dumps({"base": "../base"}))
    refused("expected base, a folder", load, companion / FACTS)
    (companion / FACTS).write_text(json.dumps({"base": "../gone", "unet": {}, "parts": {}}))
    refused("gone", load, companion)

"""Depth maps for the fifth channel, and their estimation by transformers' DPT."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sdkit.errors import CheckpointError, ConfigError
from sdkit.images.depth import depth_channel, read_depth
from sdkit.images.pixels import to_tensor
from sdkit.networks.depth_estimator import DepthEstimator
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.sdkit.tiny import model, picture

DPT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "reassemble_factors": [4, 2, 1, 0.5],
    "backbone_config": None,
    "is_hybrid": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a depth model as diffusers writes it, with an old preprocessor_config.json."""
    root = tmp_path_factory.mktemp("depth") / "model"
    model(channels=5).save_pretrained(root)
    torch.manual_seed(0)
    transformers.DPTForDepthEstimation(transformers.DPTConfig(**DPT)).save_pretrained(root / "depth_estimator")
    (root / "feature_extractor").mkdir()
    preprocessing = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "ensure_multiple_of": 1,
        "feature_extractor_type": "DPTFeatureExtractor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "keep_aspect_ratio": False,
        "resample": 2,
        "size": 32,
    }
    (root / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    index = json.loads((root / "model_index.json").read_text())
    index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
    index["feature_extractor"] = ["transformers", "DPTFeatureExtractor"]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def test_the_channel_runs_from_minus_1_to_1_in_each_map() -> None:
    depth = (
        torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 900.0])[:, None, None]
    )
    channel = depth_channel(depth, (8, 12))
    assert channel.shape == (2, 1, 8, 12)
    assert torch.allclose(channel.amin((1, 2, 3)), torch.tensor(-1.0)) and torch.allclose(
        channel.amax((1, 2, 3)), torch.tensor(1.0)
    )
    expected = torch.nn.functional.interpolate(depth[:, None], (8, 12), mode="bicubic")
    correlation = torch.corrcoef(torch.stack([channel[1].flatten(), expected[1].flatten()]))[0, 1]
    assert correlation > 1 - 1e-6


@pytest.mark.parametrize("value", [0.0, 0.1, 3e4])
def test_a_constant_map_is_0(value: float) -> None:
    assert not depth_channel(torch.full((1, 33, 17), value), (8, 12)).any()
    mixed = depth_channel(torch.stack([torch.full((9, 9), value), torch.arange(81.0).reshape(9, 9)]), (8, 12))
    assert not mixed[0].any() and mixed[1].max() == 1


def test_maps_come_in_many_forms(tmp_path: Path) -> None:
    """An array is height x width."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 9), dtype=np.uint16)
    expected = torch.from_numpy(values.astype(np.float32))[None]
    Image.fromarray(values).save(tmp_path / "depth.png")
    grey16 = Image.open(tmp_path / "depth.png")
    for given in (
        values,
        values[None],
        expected,
        expected[0],
        expected[None],
        grey16,
        tmp_path / "depth.png",
        str(tmp_path / "depth.png"),
        [values],
        Image.fromarray(values.astype(np.float32)),
    ):
        assert torch.equal(read_depth(given), expected)
    assert read_depth([values, values]).shape == (2, 5, 9)
    colour = Image.fromarray(np.dstack([values >> 8] * 3).astype(np.uint8))
    assert torch.equal(read_depth(colour), torch.from_numpy((values >> 8).astype(np.float32))[None])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3, 4, 5)), "found [2, 3, 4, 5]"),
        (np.zeros(3), "found [3]"),
        (np.zeros((0, 3)), "found [0, 3]"),
        (np.full((2, 2), np.nan), "expected finite values"),
        ([], "expected maps of one size, found none"),
        ([np.zeros((2, 2)), np.zeros((3, 2))], "found 2 x 2, 2 x 3"),
    ],
)
def test_maps_without_a_meaning_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_depth(given)


def test_the_estimator_is_transformers_own(folder: Path) -> None:
    sd = StableDiffusion.from_pretrained(folder, device="cpu")
    network = transformers.DPTForDepthEstimation.from_pretrained(folder / "depth_estimator")
    processor = transformers.DPTImageProcessor.from_pretrained(folder / "feature_extractor")
    with torch.no_grad():
        pixels = processor(images=picture(), return_tensors="pt").pixel_values
        expected = network(pixels).predicted_depth
    estimated = sd.depth_estimator.estimate(to_tensor(picture()), sd.device)
    assert pixels.shape[-2:] == (32, 32) and relative_error(estimated, expected) < 1e-5
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "output_type": "latent", "progress": False}
    out = sd.depth_to_image("a cat", picture(), **settings).latents
    assert relative_error(out, sd.depth_to_image("a cat", picture(), expected, **settings).latents) < 1e-5
    flat = sd.depth_to_image("a cat", picture(), torch.zeros(4, 4), **settings).latents
    assert relative_error(out, flat) > 1e-3


def test_a_saved_model_keeps_its_estimator(folder: Path, tmp_path: Path) -> None:
    StableDiffusion.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "again")
    again = StableDiffusion.from_pretrained(tmp_path / "again", device="cpu")
    first = StableDiffusion.from_pretrained(folder, device="cpu")
    pixels = to_tensor(picture())
    assert torch.equal(
        again.depth_estimator.estimate(pixels, again.device), first.depth_estimator.estimate(pixels, first.device)
    )


def test_without_an_estimator_a_map_is_asked_for() -> None:
    with pytest.raises(
        CheckpointError, match="this checkpoint has no depth_estimator and no feature_extractor, so give"
    ):
        model(channels=5).depth_to_image("a cat", picture(), progress=False)


def test_damaged_estimators_are_one_line(folder: Path, tmp_path: Path) -> None:
    parts = {
        name: {"path": str(folder / name), "class": kind}
        for name, kind in (("depth_estimator", "DPTForDepthEstimation"), ("feature_extractor", "DPTFeatureExtractor"))
    }
    with pytest.raises(CheckpointError, match="expected DPTForDepthEstimation, found GLPN"):
        DepthEstimator(parts | {"depth_estimator": {**parts["depth_estimator"], "class": "GLPN"}})
    with pytest.raises(CheckpointError, match="not a depth estimator") as caught:
        DepthEstimator(parts | {"depth_estimator": {**parts["depth_estimator"], "path": str(tmp_path)}})
    assert "\n" not in str(caught.value)
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "depth_estimator" / "model.safetensors")
    del state["head.head.0.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "depth_estimator" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="1 missing keys, the first head"):
        DepthEstimator(parts | {"depth_estimator": {**parts["depth_estimator"], "path": str(tmp_path)}})

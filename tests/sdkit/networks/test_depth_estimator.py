"""Depth from a picture, by transformers' DPT."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sdkit.errors import CheckpointError
from sdkit.images.pixels import to_tensor
from sdkit.networks.depth_estimator import DepthEstimator
from sdkit.stable_diffusion import StableDiffusion
from tests.conftest import relative_error
from tests.sdkit.tiny import model, picture, save_depth_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_depth_model(tmp_path_factory.mktemp("depth") / "model")


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

"""The classifier of noisy latents: what it answers, its file, and that sampling can be guided by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sdkit
from sdkit.checkpoints.classifier_folder import load_classifier, save_classifier
from sdkit.errors import CheckpointError, ConfigError
from sdkit.networks.latent_classifier import ClassifierConfig, LatentClassifier
from tests.conftest import draw_weights
from tests.sdkit.tiny import model

CONFIG = ClassifierConfig(("red cube", "blue cube", "red cone"), widths=(16, 32), groups=8)


@pytest.fixture(scope="module")
def classifier() -> LatentClassifier:
    return draw_weights(LatentClassifier(CONFIG)).eval()


def test_every_picture_has_its_own_answer_which_depends_on_the_timestep(classifier: LatentClassifier) -> None:
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 300.0, 999.0])
    with torch.no_grad():
        logits = classifier(x, t)
        alone = torch.cat([classifier(x[i : i + 1], t[i : i + 1]) for i in range(3)])
        later = classifier(x, t.flip(0))
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    assert (logits - later).abs()[0].max() > 1e-4


def test_the_folder_holds_it_whole(classifier: LatentClassifier, tmp_path: Path) -> None:
    save_classifier(classifier, tmp_path / "mine")
    again = sdkit.load_classifier(tmp_path / "mine", device="cpu")
    assert again.config == CONFIG and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), again.parameters(), strict=True))
    assert load_classifier(tmp_path / "mine", "cpu", torch.float64).out.weight.dtype == torch.float64


def test_what_is_no_classifier_is_refused(classifier: LatentClassifier, tmp_path: Path) -> None:
    save_classifier(classifier, tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(CheckpointError, match="depth"):
        load_classifier(tmp_path / "mine", "cpu")
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"classes": ["red cube"]}))
    with pytest.raises(CheckpointError, match=r"out\.weight: expected the shape"):
        load_classifier(tmp_path / "mine", "cpu")
    with pytest.raises(CheckpointError):
        load_classifier(tmp_path / "gone", "cpu")


def test_labels_are_the_numbers_of_classes(classifier: LatentClassifier) -> None:
    assert classifier.labels(["red cone", "red cube"]) == [2, 0] and classifier.labels("blue cube") == [1]
    with pytest.raises(ConfigError, match="expected one of red cube, blue cube, red cone, found 'cat'"):
        classifier.labels("cat")


def test_it_guides_a_picture(classifier: LatentClassifier) -> None:
    sd = model()

    def latents(scale: float) -> torch.Tensor:
        return sd.text_to_image(
            "", guidance_scale=0, classifier=classifier, class_labels=classifier.labels("red cone"),
            classifier_scale=scale, num_inference_steps=3, height=32, width=32, seed=0, output_type="latent",
            progress=False,
        ).images  # fmt: skip

    def log_p(x: torch.Tensor) -> float:
        with torch.no_grad():
            return classifier(x.float(), torch.zeros(1)).log_softmax(1)[0, 2].item()

    plain, steered = latents(0.0), latents(5.0)
    assert log_p(steered) > log_p(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": "8"}, "widths: expected a list, its length from 1 to 16, each a whole number from 1 to 65536"),
        ({"classes": ["a", 3]}, "classes: expected a list"),
        ({"classes": []}, "classes: expected a list, its length from 1 to 10000"),
        ({"groups": True}, "groups: expected a whole number"),
        ({"groups": {}}, "groups: expected a whole number"),
        ({"other": 1}, "unsupported other"),
        ({"groups": 5}, "groups"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_named(
    classifier: LatentClassifier, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_classifier(classifier, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_classifier(tmp_path, "cpu")

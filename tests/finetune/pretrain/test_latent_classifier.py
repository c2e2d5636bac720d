"""The training of the classifier: classes, batches, and that it can tell what it was taught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.pretrain.latent_classifier import (
    BATCH,
    CLASSES,
    ClassifierLoss,
    Examples,
    accuracy,
    draw_batches,
    main,
    render_examples,
)
from finetune.pretrain.world.pictures import SIZE
from finetune.pretrain.world.scenes import sample_scenes
from sdkit.checkpoints.classifier_folder import load_classifier
from sdkit.checkpoints.loading import MODELS, load_vae
from sdkit.networks.latent_classifier import ClassifierConfig, LatentClassifier
from sdkit.sampling.schedule import NoiseSchedule


def test_classes_are_those_of_the_objects() -> None:
    vae = load_vae(MODELS / "tabletop", dtype=torch.float32)
    found = render_examples(vae, 64, SIZE, 5)
    scenes = sample_scenes(64, torch.Generator().manual_seed(5), counts=(1.0, 0.0, 0.0), held_out="include")
    names = [CLASSES[k] for k in found.classes.tolist()]
    assert found.latents.shape == (64, 4, *(SIZE // vae.config.factor,) * 2) and len(CLASSES) == 40
    from finetune.pretrain.probe import objects_of

    assert names == [f"{o['color']} {o['shape']}" for i in range(64) for o in objects_of(scenes, i)]


@pytest.fixture
def examples() -> Examples:
    """Of four classes, each bright in a channel of its own."""
    classes = torch.arange(4).repeat(40)
    return Examples((3 * torch.eye(4)[classes])[:, :, None, None].expand(-1, -1, 8, 8).half(), classes)


def test_batches_have_all_timesteps_and_their_own_noise(examples: Examples) -> None:
    batch, again, other = (draw_batches(examples, 1000)(step) for step in (3, 3, 4))
    assert torch.equal(batch.noise, again.noise) and not torch.equal(batch.noise, other.noise)
    assert torch.equal((batch.t * BATCH / 1000).long(), torch.arange(BATCH)) and batch.t.max() < 1000
    assert torch.equal(batch.x0, examples.latents[batch.classes].float())


def test_it_learns_the_classes_of_its_examples(examples: Examples) -> None:
    torch.manual_seed(0)
    schedule = NoiseSchedule()
    classifier = LatentClassifier(ClassifierConfig(CLASSES, widths=(16,), groups=8))
    loss, draw = ClassifierLoss(classifier, schedule), draw_batches(examples, 1000)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    before = accuracy(classifier, examples, schedule, 0)
    for step in range(60):
        loss(draw(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.6 and accuracy(classifier, examples, schedule, 0) > 0.9
    assert accuracy(classifier, examples, schedule, 999) < 0.9


def test_the_command_writes_a_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.pretrain.latent_classifier.UNSEEN", 64)
    main(MODELS / "tabletop", tmp_path / "classifier", tmp_path, 64, 2, 1e-3)
    assert load_classifier(tmp_path / "classifier", "cpu").config.classes == CLASSES
    assert "timestep  900" in capsys.readouterr().out

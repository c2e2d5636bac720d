"""The companions that ship with us: their files, and that each does what it is for. The model card has the figures."""

from __future__ import annotations

import warnings
from pathlib import Path

import diffusers
import pytest
import torch

from finetune.pretrain import editing, steering
from finetune.pretrain.depth_estimator import correlation, rendered
from finetune.pretrain.latent_classifier import TEST_SEED, accuracy, render_examples
from finetune.pretrain.probe import Probe, load_probe
from finetune.pretrain.world.pictures import SIZE
from sdkit.checkpoints.classifier_folder import load_classifier
from sdkit.checkpoints.loading import MODELS, shipped_models
from sdkit.stable_diffusion import StableDiffusion

FEW, STEPS = 12, 12


@pytest.fixture(scope="module")
def probe() -> Probe:
    return load_probe()


def test_each_is_a_small_file_beside_the_model() -> None:
    assert shipped_models() == ["tabletop", "tabletop-depth", "tabletop-inpaint"]
    for name, limit in (("tabletop-depth", 8e6), ("tabletop-inpaint", 5e6), ("tabletop-classifier", 5e6)):
        assert 0 < sum(file.stat().st_size for file in (MODELS / name).rglob("*") if file.is_file()) < limit


@pytest.mark.slow
def test_the_one_that_sees_the_mask_paints_the_new_object_with_a_smaller_seam(probe: Probe) -> None:
    which = editing.cases(FEW)
    found: dict[str, tuple[float, float]] = {}
    for name in ("tabletop", "tabletop-inpaint"):
        sd = StableDiffusion.from_pretrained(name, device="cpu")
        images = editing.inpaint(sd, which, 1000, STEPS, 7.5)
        assert editing.kept_are_identical(which, images)
        found[name] = editing.share(editing.shown(probe, images), which.new), editing.seams(which, images)
    assert found["tabletop-inpaint"][0] >= 75
    assert found["tabletop-inpaint"][1] < 0.8 * found["tabletop"][1]


def test_depth_is_kept_while_the_colour_changes(probe: Probe) -> None:
    sd = StableDiffusion.from_pretrained("tabletop-depth", device="cpu")
    kept, colour = steering.by_depth(sd, probe, FEW, 1000, STEPS, 7.5)
    assert kept > 0.8 and colour >= 60


def test_its_estimator_knows_depth() -> None:
    sd = StableDiffusion.from_pretrained("tabletop-depth", device="cpu")
    network = sd.depth_estimator.network
    assert correlation(network, *rendered(64, SIZE, 123)) > 0.95


def test_the_classifier_names_the_object_in_noisy_latents() -> None:
    sd, classifier = StableDiffusion.from_pretrained("tabletop", device="cpu"), load_classifier(device="cpu")
    unseen = render_examples(sd.vae, 128, SIZE, TEST_SEED)
    assert accuracy(classifier, unseen, sd.schedule, 100) > 0.8
    assert accuracy(classifier, unseen, sd.schedule, 400) > 0.5


def test_diffusers_reads_what_save_pretrained_writes_of_one(tmp_path: Path) -> None:
    StableDiffusion.from_pretrained("tabletop-inpaint", device="cpu").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.unet.config.in_channels == 9

"""The probe that looks for striped zorbs: on renders, after the VAE, and what is counted by it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sdkit
from finetune.pretrain import concept, concept_probe
from finetune.pretrain.probe import load_probe
from finetune.pretrain.world import geometry as g
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, STRIPED, Scenes, valid
from sdkit.stable_diffusion import StableDiffusion
from tests.finetune.pretrain.zorbs import lone_zorb
from tests.finetune.toy import Killed


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained("tabletop", device="cpu")


def test_the_probe_is_right_on_unseen_renders() -> None:
    probe = concept_probe.load_concept_probe()
    figures = concept_probe.concept_accuracy(probe, 256)
    assert min(figures.values()) >= 98, figures
    assert concept_probe.WEIGHTS.stat().st_size < 1e6


def test_training_that_is_killed_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concept_probe, "Recipe", partial(concept_probe.Recipe, checkpointing_steps=1))
    monkeypatch.setattr(concept_probe, "concept_accuracy", lambda probe: {"zorb": 0.0})
    draw_batch = concept_probe.draw_batch

    def dying(images: Tensor, answers: dict[str, Tensor], step: int) -> object:
        if step == 2:
            raise Killed
        return draw_batch(images, answers, step)

    concept_probe.main(tmp_path / "whole", tmp_path / "whole.safetensors", pictures=32, steps=4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(concept_probe, "draw_batch", dying)
        concept_probe.main(tmp_path / "killed", tmp_path / "killed.safetensors", pictures=32, steps=4)
    assert [p.name for p in (tmp_path / "killed" / "concept_probe").iterdir()] == ["checkpoint-2"]
    concept_probe.main(tmp_path / "killed", tmp_path / "killed.safetensors", pictures=32, steps=4)
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_truth_of_scenes() -> None:
    scene = concept_probe.probe_scenes(400, 5)
    real = concept_probe.truth(scene)
    for i in range(len(scene)):
        surfaces = scene.material[i][scene.shape[i] >= 0].tolist()
        is_zorb = int(scene.shape[i, 0]) == g.ZORB
        assert real["zorb"][i] == (0 if not is_zorb else 2 if surfaces[0] == STRIPED else 1)
        assert real["striped"][i] == (STRIPED in surfaces)
        assert real["color"][i] == (scene.color[i, 0] if is_zorb else -1)
    assert bool(valid(scene).all()) and real["zorb"].bincount(minlength=3).min() > 50
    assert real["striped"].bincount().min() > 80
    assert not ((scene.material == STRIPED) & (scene.color == COLORS.index("white"))).any()


@pytest.mark.slow
def test_the_probe_is_right_after_the_vae(sd: StableDiffusion) -> None:
    """Generated pictures come out of the decoder, which has never seen stripes; what it softens must still be told."""
    probe, scenes = concept_probe.load_concept_probe(), concept.concept_scenes(100, 77)
    images = render(scenes).images
    with torch.no_grad():
        decoded = sd.vae.decode(sd.vae.encode(images * 2 - 1).mean).clamp(-1, 1)
    seen = concept_probe.see(probe, decoded)
    assert (seen["zorb"] == concept_probe.STRIPED_ZORB).float().mean() >= 0.95
    assert (seen["color"] == scenes.color[:, 0]).float().mean() >= 0.95


def test_what_is_counted(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders in place of generated pictures: a striped zorb, a plain one, a striped cube, a zorb of another colour."""
    prompts = ["a striped red zorb on a white table"] * 4
    scene = Scenes.cat([lone_zorb()] * 4)
    shape, color, material = scene.shape.clone(), scene.color.clone(), scene.material.clone()
    color[:, 0] = COLORS.index("red")
    material[1, 0], shape[2, 0], color[3, 0] = 0, SHAPES.index("cube"), COLORS.index("blue")
    images = render(replace(scene, shape=shape, color=color, material=material)).images

    def fake(texts: list[str], **settings: object) -> object:
        assert texts == prompts and settings["seed"] == 9 and settings["guidance_scale"] == 3.0
        assert settings["num_inference_steps"] == 7
        return type("Out", (), {"images": images})

    monkeypatch.setattr(sd, "text_to_image", fake)
    probe = concept_probe.load_concept_probe()
    figures = concept_probe.measure_concept(sd, probe, prompts, seed=9, guidance=3.0, steps=7)
    assert figures == {"concept": 50, "zorb": 75, "striped": 75, "concept in its colour": 25}


@pytest.mark.slow
def test_the_base_knows_no_zorb_and_its_own_prompts(sd: StableDiffusion) -> None:
    probe = concept_probe.load_concept_probe()
    figures = concept_probe.measure_concept(sd, probe, concept.concept_prompts(24), seed=1, guidance=7.5, steps=12)
    assert figures["concept"] < 5
    assert concept_probe.base_accuracy(sd, load_probe(), seed=5, guidance=7.5, steps=12, count=24) >= 75

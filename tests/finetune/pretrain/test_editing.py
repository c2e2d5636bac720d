"""The shipped model's editing of given pictures, judged by the probe."""

import pytest
import torch

from finetune.pretrain.editing import (
    STRENGTHS,
    Cases,
    along_strength,
    cases,
    difference,
    inpaint,
    kept_are_identical,
    seams,
    share,
    shown,
)
from finetune.pretrain.probe import Probe, load_probe
from sdkit.images.pixels import to_pil
from sdkit.stable_diffusion import StableDiffusion


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return StableDiffusion.from_pretrained("tabletop", device="cpu")


@pytest.fixture(scope="module")
def probe() -> Probe:
    return load_probe()


@pytest.fixture(scope="module")
def few() -> Cases:
    return cases(12, seed=77)


def test_the_probe_sees_the_inputs_and_the_masks_cover_them(probe: Probe, few: Cases) -> None:
    assert share(shown(probe, to_pil(few.pictures * 2 - 1)), few.old) == 100
    emptied = few.pictures * (1 - few.masks) + 0.5 * few.masks
    assert share(shown(probe, to_pil(emptied * 2 - 1)), few.old) <= 10
    assert all(old[0] != new[0] and old[1] != new[1] for old, new in zip(few.old, few.new, strict=True))


def test_inpainting_puts_the_new_object_there_and_keeps_the_rest(sd: StableDiffusion, probe: Probe, few: Cases) -> None:
    """A quick look; the model card has 100 cases. Chance is about 3 %."""
    images = inpaint(sd, few, seed=1, steps=12, guidance=7.5)
    assert kept_are_identical(few, images)
    assert share(shown(probe, images), few.new) >= 50
    images[0].putpixel((0, 0), (1, 2, 3))
    assert not kept_are_identical(few, images)


def test_a_seam_is_what_neighbours_across_the_masks_edge_differ_by(few: Cases) -> None:
    """Of grey pictures none; where what is repainted is 30 brighter, 30."""
    grey = torch.full_like(few.pictures, 100 / 255)
    assert seams(few, to_pil(grey * 2 - 1)) == 0
    brighter = grey + few.masks * 30 / 255
    assert seams(few, to_pil(brighter * 2 - 1)) == pytest.approx(30, abs=0.6)


@pytest.mark.slow
def test_the_bars_of_editing(sd: StableDiffusion, probe: Probe) -> None:
    which = cases(100)
    images = inpaint(sd, which, seed=1000, steps=30, guidance=7.5)
    assert kept_are_identical(which, images) and share(shown(probe, images), which.new) >= 60
    moved = along_strength(sd, which, seed=1000, steps=30, guidance=7.5)
    new = [share(shown(probe, moved[s]), which.new) for s in STRENGTHS[:4]]
    changed = [difference(which, moved[s]) for s in STRENGTHS]
    assert new == sorted(new) and changed == sorted(changed)

"""The striped zorb: its geometry against closed forms, its captions and its folder."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sdkit
from finetune.data.folders import read_folder
from finetune.pretrain import concept
from finetune.pretrain.concept import BANDED
from finetune.pretrain.world import geometry as g
from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.objects import flatten_objects
from finetune.pretrain.world.pictures import SIZE, TRAINING_SEED, to_bytes
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, CROWD, RADIUS, SHAPES, STRIPED, TABLES, Scenes, sample_scenes, valid
from finetune.pretrain.world.shading import STRIPE, light_direction, shadows
from sdkit.images.pixels import open_image
from sdkit.stable_diffusion import StableDiffusion
from tests.finetune.pretrain.zorbs import lone_zorb

ZORB = re.compile(rf"\b(striped (?:{'|'.join(BANDED)})|(?:{'|'.join(BANDED)}) striped) zorb\b")
TABLE = re.compile(r" on a (?:(white|grey|gray|black|wooden|wood) table(?:top)?|table made of (wood))$")


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained("tabletop", device="cpu")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return concept.concept_scenes(48, 3)


def local_points(scene: Scenes, size: int) -> Tensor:
    """Visible points of the first object [3, N] in its unit frame, from the depth of its pixels."""
    pictures = render(scene, size)
    u, v, _, _ = g.sample_grid(size, 1, torch.device("cpu"))
    rays = g.camera_rays(scene.camera[:, :1], u, v)[:, 0]
    points = g.camera_origin(scene.camera) + pictures.depth[0].flatten() * rays
    objects = flatten_objects(scene)
    return ((points - objects.centre) / objects.radius)[:, pictures.masks[0].flatten() == 1]


def test_visible_points_lie_on_the_hourglass() -> None:
    x, y, z = local_points(lone_zorb(), 96).double()
    ring = torch.hypot(x, z)
    side = ring - (g.ZORB_WAIST + g.CONE_SLOPE * y.abs())
    value = torch.maximum(side, y.abs() - g.ZORB_HALF)
    assert len(value) > 800 and value.abs().max() < 1e-4
    for part in (y > g.ZORB_HALF - 1e-4, (y > 0.1) & (y < 1), (y < -0.1) & (y > -1)):  # lid, upper and lower cone
        assert part.sum() > 100


def test_the_first_hit_is_the_first_of_a_fine_march() -> None:
    """Rays from all around, many of which pass the gap at the waist, against small steps through the solid."""
    rng = torch.Generator().manual_seed(0)
    origin = g.unit(torch.randn(3, 600, generator=rng, dtype=torch.float64) * torch.tensor([[1.0], [0.5], [1.0]])) * 4
    aim = (torch.rand(3, 600, generator=rng, dtype=torch.float64) - 0.5) * 2.2
    direction = g.unit(aim - origin)
    keep = direction[1].abs() < 0.8 * torch.hypot(direction[0], direction[2])  # flatter than light and camera
    origin, direction = origin[:, keep], direction[:, keep]

    t = torch.linspace(0, 8, 16_001, dtype=torch.float64)[:, None]
    x, y, z = (origin[i] + t * direction[i] for i in range(3))
    inside = (y.abs() < g.ZORB_HALF) & (torch.hypot(x, z) < g.ZORB_WAIST + g.CONE_SLOPE * y.abs())
    expected = torch.where(inside.any(0), t[inside.int().argmax(0), 0], math.inf)

    found = g.intersect(g.ZORB, origin, direction)
    both = found.isfinite() & expected.isfinite()
    assert both.sum() > 150 and (~found.isfinite()).sum() > 30
    assert (found.isfinite() != expected.isfinite()).sum() <= 3  # grazing rays that fall between two steps
    assert ((expected - found)[both] >= -1e-6).all() and ((expected - found)[both] < 1e-3).double().mean() > 0.98


def test_normals_are_the_gradient_of_the_surface() -> None:
    p = local_points(lone_zorb(), 64)
    p = p[:, p[1].abs() > 0.02]
    normal = g.normals(g.ZORB, p)
    torch.testing.assert_close(g.dot(normal, normal), torch.ones(p.shape[1]), rtol=0, atol=1e-5)
    points = p.double().requires_grad_()
    ring = torch.hypot(points[0], points[2])
    lid = p[1] > g.ZORB_HALF - 1e-4
    side = ring - g.CONE_SLOPE * points[1].abs()
    torch.where(lid, points[1], side).sum().backward()
    assert points.grad is not None and lid.any() and not lid.all()
    torch.testing.assert_close(normal.double(), g.unit(points.grad), rtol=0, atol=1e-4)


def test_the_zorb_stands_on_the_table_and_casts_a_shadow() -> None:
    scene = lone_zorb(light=torch.tensor([[0.0, 0.0, 1.0]]))
    lowest = local_points(scene, 96)[1].min()
    assert -g.ZORB_HALF - 1e-3 < lowest < -0.9 * g.ZORB_HALF
    objects, light = flatten_objects(scene), light_direction(scene.light)
    heights = torch.tensor([1.0, 0.3]) * g.ZORB_HALF  # on the axis: lid and waist
    above = objects.centre + torch.stack([0 * heights, heights, 0 * heights]) * objects.radius
    points = torch.cat([above - light * above[1] / light[1], torch.tensor([[0.2], [0.0], [0.0]])], 1)
    assert points[1].abs().max() < 1e-6
    hidden = shadows(objects, light, points[:, None])[0]
    assert hidden[:2].min() > 0.9 and hidden[2] == 0


def test_stripes_alternate_between_the_colour_and_white() -> None:
    """Down the lit side of the lower cone: colour, white, colour; and as wide as STRIPE says."""
    plain = lone_zorb(material=torch.tensor([[0, -1, -1]]))
    striped, unstriped = render(lone_zorb(), 96, supersample=1), render(plain, 96, supersample=1)
    assert torch.equal(striped.masks, unstriped.masks) and torch.equal(striped.depth, unstriped.depth)
    y = local_points(plain, 96)[1]
    inside = striped.masks[0] == 1
    changed = (striped.images - unstriped.images).abs().amax(1)[0][inside] > 0.05
    band = torch.cos(math.pi * y / STRIPE)
    assert changed[band < -0.3].all() and not changed[band > 0.3].any()
    white = striped.images[0, :, inside][:, (band < -0.5) & (y < 0)]
    assert (white.amax(0) - white.amin(0)).max() < 0.15 and white.amin() > 0.5
    outside = striped.images[0][:, ~inside] - unstriped.images[0][:, ~inside]
    assert outside.abs().max() < 1e-6


def test_the_bases_pictures_have_not_changed() -> None:
    """Neither word, shape nor surface is in what the base was trained on."""
    base = sample_scenes(2000, TRAINING_SEED)
    assert base.shape.max() < g.ZORB == len(SHAPES) and base.material.max() < STRIPED
    assert not any(word in text for text in captions(base, 0) for word in ("zorb", "striped"))


def test_scenes_are_valid_and_balanced(scenes: Scenes) -> None:
    assert len(scenes) == 48 and bool(valid(scenes).all())
    assert bool((scenes.shape[:, 0] == g.ZORB).all() and (scenes.material[:, 0] == STRIPED).all())
    assert bool((scenes.shape[:, 1:] < g.ZORB).all() and (scenes.material[:, 1:] < STRIPED).all())
    usual = scenes.radius[:, 0] / (RADIUS[1] * torch.tensor(CROWD)[scenes.count - 1])
    assert bool((scenes.size[:, 0] == 1).all()) and (usual - 1).abs().max() < 0.051  # large, as captions say
    assert set(scenes.color[:, 0].bincount().tolist()) == {6, 7}  # 7 colours, none of them white
    assert scenes.table.bincount().min() >= 5 and 0.55 < (scenes.count == 1).float().mean() < 0.95
    pictures = render(scenes, 64, supersample=1)
    seen = (pictures.masks == 1).flatten(1).sum(1)
    assert seen.min() > 100
    edge = torch.cat([pictures.masks[:, 0], pictures.masks[:, -1], pictures.masks[..., 0], pictures.masks[..., -1]], 1)
    assert edge.max() == 0


def test_captions_are_true(scenes: Scenes) -> None:
    texts = concept.concept_captions(scenes, 3)
    named = dict.fromkeys(("table", "relation", "large"), 0)
    for i, text in enumerate(texts):
        zorb = ZORB.search(text)
        assert zorb and COLORS[scenes.color[i, 0]] in zorb[0].split(), text
        assert re.fullmatch(r"[a-z ]+", text) and "  " not in text and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
        table = TABLE.search(text)
        if table:
            name = {"gray": "grey", "wood": "wooden"}.get(table[1] or table[2], table[1])
            assert name == TABLES[scenes.table[i]], text
            named["table"] += 1
        assert ("table" in text) == bool(table)
        named["large"] += "large" in text or "big" in text

        other = scenes.shape[i, 1] >= 0
        assert bool(other) == any(shape in text for shape in SHAPES), text
        if other:
            assert f"{COLORS[scenes.color[i, 1]]} {SHAPES[scenes.shape[i, 1]]}" in text
            dx, dz = (scenes.position[i, 0] - scenes.position[i, 1]).tolist()
            sides = {" left of": -dx, " right of": dx, "the left of": -dx, "in front of": -dz, "behind": dz}
            for words, offset in sides.items():
                if words in text:
                    assert offset >= max(abs(dx), abs(dz)), text
                    named["relation"] += 1

    assert min(named.values()) > 3 and len(set(texts)) > 36


def test_prompts_are_unseen_and_different() -> None:
    seen = concept.concept_captions(concept.concept_scenes(24, 0), 0)
    prompts = concept.concept_prompts(100, unlike=seen)
    assert len(set(prompts)) == 100 and not set(prompts) & set(seen)
    assert set(concept.concept_prompts(100)) & set(seen)  # so the exclusion does something
    assert all(ZORB.search(text) and not any(shape in text for shape in SHAPES) for text in prompts)

    def combination(text: str) -> tuple[str, str]:
        zorb, table = ZORB.search(text), TABLE.search(text)
        return str(zorb and zorb[0]), str(table and table[0])

    known = {combination(text) for text in seen}
    assert sum(combination(text) not in known for text in prompts) > 25  # colours on tables that training lacks
    with pytest.raises(ValueError, match="1500 different prompts"):
        concept.concept_prompts(1500)


def test_the_folder_is_what_training_reads(tmp_path: Path) -> None:
    texts = concept.write_concept_folder(tmp_path / "zorbs", 6, seed=4)
    found = read_folder(tmp_path / "zorbs").pictures
    images, captions_ = concept.concept_pictures(6, 4)
    assert [picture.caption for picture in found] == texts == captions_
    assert (
        images.shape == (6, 3, SIZE, SIZE) and images.dtype == torch.float32 and 0 <= images.min() < images.max() <= 1
    )
    for picture, pixels in zip(found, to_bytes(images), strict=True):
        assert picture.size == (SIZE, SIZE)
        stored = torch.tensor(list(open_image(picture.path).tobytes()), dtype=torch.uint8)
        assert torch.equal(stored.view(SIZE, SIZE, 3), pixels.permute(1, 2, 0))


def test_the_words_are_spelled_from_pieces_that_the_base_has(sd: StableDiffusion) -> None:
    tokenizer = sd.tokenizer
    for word in ("zorb", "striped"):
        ids = tokenizer(word).input_ids[1:-1]
        assert len(ids) > 1 and tokenizer.unk_token_id not in ids and tokenizer.decode(ids).strip() == word
    prompts = concept.concept_prompts(100)
    assert max(len(tokenizer(text).input_ids) for text in prompts) <= tokenizer.model_max_length

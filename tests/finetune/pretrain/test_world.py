"""Tabletop scenes, pictures and captions: seeds, geometry against closed forms, the grammar against the positions."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch

from finetune.pretrain.world import geometry as g
from finetune.pretrain.world.captions import WORDS, captions, pair_prompt, single_prompt
from finetune.pretrain.world.geometry import FOCAL, TARGET_HEIGHT, WALL
from finetune.pretrain.world.objects import flatten_objects
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import (
    COLORS,
    HELD_OUT,
    MATERIALS,
    SHAPES,
    SIZES,
    Scenes,
    equivalent_key,
    relations,
    sample_scenes,
    siblings,
    valid,
)

SYNONYM = {word: shape for shape in SHAPES for word in WORDS[shape]}
ADJECTIVES = "|".join(word for name in SIZES + MATERIALS for word in WORDS[name])
NOUN = re.compile(rf"\b({'|'.join(COLORS)})(?: (?:{ADJECTIVES})){{0,2}} ({'|'.join(SYNONYM)})\b")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(48, 11)


def same(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scenes))


def pairs(scenes: Scenes, slots: slice = slice(None)) -> list[tuple[str, str]]:
    filled = scenes.shape[:, slots] >= 0
    found = zip(scenes.color[:, slots][filled].tolist(), scenes.shape[:, slots][filled].tolist(), strict=True)
    return [(COLORS[c], SHAPES[s]) for c, s in found]


def single(shape: str, **changes: torch.Tensor) -> Scenes:
    """One scene with one object of the given shape in the middle of the table."""
    scene = sample_scenes(1, 0, counts=(1.0, 0.0, 0.0))
    index = torch.tensor([[SHAPES.index(shape), -1, -1]])
    return replace(scene, shape=index, position=torch.zeros(1, 3, 2), **changes)


def test_the_seed_decides_everything() -> None:
    a, b = sample_scenes(20, 5), sample_scenes(20, torch.Generator().manual_seed(5))
    assert same(a, b) and not same(a, sample_scenes(20, 6))
    assert torch.equal(render(a).images, render(b).images)
    assert captions(a, 1) == captions(b, 1) != captions(a, 2)
    assert same(siblings(a, 1), siblings(b, 1))


def test_shapes_and_ranges(scenes: Scenes) -> None:
    pictures = render(scenes[:6], size=48)
    assert pictures.images.shape == (6, 3, 48, 48) and pictures.images.dtype == torch.float32
    assert pictures.depth.shape == pictures.masks.shape == (6, 48, 48)
    assert pictures.depth.dtype == torch.float32 and pictures.masks.dtype == torch.int64
    assert pictures.images.min() >= 0 and pictures.images.max() <= 1
    assert pictures.images.flatten(1).std(1).min() > 0.05
    for mask, count in zip(pictures.masks, scenes.count[:6].tolist(), strict=True):
        assert mask.unique().tolist() == list(range(count + 1))  # every object is seen
    assert same(Scenes.cat([scenes[:3], scenes[3:]]), scenes)


def test_chunks_do_not_change_the_picture(scenes: Scenes) -> None:
    whole, parts = render(scenes[:7], chunk=64), render(scenes[:7], chunk=3)
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.depth, parts.depth, rtol=0, atol=1e-6)
    assert torch.equal(whole.masks, parts.masks)


def test_sphere_depth_and_mask_equal_the_closed_form() -> None:
    scene = single("sphere")
    size = 64
    pictures = render(scene, size=size)
    pitch, distance, shift = (float(value) for value in scene.camera[0].double())
    radius = float(scene.radius[0, 0])
    forward = torch.tensor([0.0, -torch.tensor(pitch).sin(), torch.tensor(pitch).cos()]).double()
    up = torch.tensor([0.0, forward[2], -forward[1]]).double()
    origin = torch.tensor([shift, TARGET_HEIGHT, 0.0]).double() - distance * forward

    line = ((2 * torch.arange(size).double() + 1) / size - 1) * FOCAL
    v, u = torch.meshgrid(-line, line, indexing="ij")
    rays = forward + v[..., None] * up + u[..., None] * torch.tensor([1.0, 0.0, 0.0]).double()

    offset = torch.tensor([0.0, radius, 0.0]).double() - origin
    a, b = (rays * rays).sum(-1), (rays * offset).sum(-1)
    root = b * b - a * (offset.dot(offset) - radius**2)
    hit = root > 0
    assert torch.equal(hit, pictures.masks[0] == 1)
    table = torch.minimum(-origin[1] / rays[..., 1], (WALL - origin[2]) / rays[..., 2])
    expected = torch.where(hit, (b - root.clamp_min(0).sqrt()) / a, table)
    torch.testing.assert_close(pictures.depth[0].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_surface_points_lie_on_the_shape(shape: str) -> None:
    """Pixels of the mask, taken back to space by their depth, satisfy the implicit equation of the shape."""
    scene = single(shape)
    pictures = render(scene)
    u, v, _, _ = g.sample_grid(64, 1, torch.device("cpu"))
    rays = g.camera_rays(scene.camera[:, :1], u, v)[:, 0]
    inside = pictures.masks[0].flatten() == 1
    points = g.camera_origin(scene.camera) + pictures.depth[0].flatten() * rays

    objects = flatten_objects(scene)
    local = objects.rotation[:, :, 0].T @ (points - objects.centre) / objects.radius
    x, y, z = local[:, inside].double()
    ring = torch.hypot(x, z)

    value = {
        "sphere": torch.hypot(ring, y) - 1,
        "cube": torch.stack([x.abs(), y.abs(), z.abs()]).amax(0) - g.CUBE_HALF,
        "cylinder": torch.maximum(ring - g.CYLINDER_RADIUS, y.abs() - g.CYLINDER_HALF),
        "cone": ring - g.CONE_SLOPE * (g.CONE_HALF - y),
        "torus": torch.hypot(ring - g.TORUS_MAJOR, y) - g.TORUS_MINOR,
    }[shape]
    assert len(value) > 150 and value.abs().max() < (3e-3 if shape == "torus" else 1e-4)
    lowest = (points[1, inside]).min()
    assert -1e-4 < lowest < 0.35 * objects.radius[0]  # it stands on the table


def test_silhouettes_stay_in_view_and_objects_are_seen() -> None:
    scenes = sample_scenes(60, 3)
    pictures = render(scenes, supersample=1)
    edge = torch.cat([pictures.masks[:, 0], pictures.masks[:, -1], pictures.masks[..., 0], pictures.masks[..., -1]], 1)
    assert edge.max() == 0
    for slot in range(3):
        filled = scenes.shape[:, slot] >= 0
        alone = scenes[filled]
        for name in ("shape", "color", "size", "material"):
            only = torch.full_like(getattr(alone, name), -1)
            only[:, slot] = getattr(alone, name)[:, slot]
            alone = replace(alone, **{name: only})
        whole = (render(alone, supersample=1).masks == slot + 1).flatten(1).sum(1)
        seen = (pictures.masks[filled] == slot + 1).flatten(1).sum(1)
        assert (seen / whole).min() > 0.5


def test_a_shadow_and_no_light_from_nowhere() -> None:
    """To the right of a sphere its shadow darkens the table; far away from it the table does not change."""
    scene = single("sphere", light=torch.tensor([[0.0, 0.0, 1.0]]))
    scene = replace(scene, table=torch.zeros(1).long(), radius=torch.full((1, 3), 0.04))
    away = replace(scene, position=torch.full((1, 3, 2), 50.0))
    change = (render(scene).images - render(away).images).mean(1)[0]
    free = render(scene).masks[0] == 0
    assert change[free].min() < -0.2 and change[free].max() < 1e-3
    assert change[:, :8].abs().max() < 0.02


def test_materials_differ_in_every_shape() -> None:
    for shape in SHAPES:
        white = torch.tensor([[COLORS.index("white"), -1, -1]])
        matte, shiny = (single(shape, color=white, material=torch.tensor([[m, -1, -1]])) for m in (0, 1))
        a, b = render(matte), render(shiny)
        assert (a.images - b.images).abs().amax(1)[a.masks > 0].quantile(0.9) > 0.06


def test_held_out_pairs() -> None:
    assert len(HELD_OUT) == len({c for c, _ in HELD_OUT}) == len({s for _, s in HELD_OUT}) == 5
    assert not HELD_OUT & set(pairs(sample_scenes(2000, 1)))
    only = sample_scenes(500, 2, held_out="only")
    assert set(pairs(only, slice(0, 1))) == HELD_OUT
    assert not HELD_OUT & set(pairs(only, slice(1, 3)))
    assert set(pairs(sample_scenes(2000, 3, held_out="include"))) > HELD_OUT
    with pytest.raises(ValueError, match="held_out"):
        sample_scenes(1, 0, held_out="sometimes")


def test_scenes_are_valid_and_have_the_asked_counts() -> None:
    scenes = sample_scenes(3000, 4, counts=(0.2, 0.5, 0.3))
    assert bool(valid(scenes).all())
    shares = scenes.count.bincount(minlength=4)[1:] / 3000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.04)
    assert torch.equal((scenes.shape >= 0).sum(1), scenes.count)
    two = scenes[scenes.count == 2]
    assert relations(two)[:, 0, 1].bincount(minlength=5)[1:].min() > 0.15 * len(two)  # all four relations
    touching = replace(two, position=two.position * 0 + two.position[:, :1])
    assert not valid(touching).any()


def test_captions_name_every_object_and_nothing_else() -> None:
    scenes = sample_scenes(1500, 7)
    for i, caption in enumerate(captions(scenes, 8)):
        named = [(color, SYNONYM[noun]) for color, noun in NOUN.findall(caption)]
        assert sorted(named) == sorted(pairs(scenes[i : i + 1])), caption
        assert re.fullmatch(r"[a-z, ]+", caption) and "  " not in caption, caption
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
        words = set(re.findall(r"\w+", caption))
        count = int(scenes.count[i])
        for names, attribute in ((SIZES, scenes.size[i]), (MATERIALS, scenes.material[i])):
            for k, name in enumerate(names):
                assert not words & set(WORDS[name]) or k in attribute[:count].tolist(), caption


def test_relations_in_captions_are_true_of_the_positions() -> None:
    scenes = sample_scenes(1500, 9, counts=(0.0, 1.0, 0.0))
    told = dict.fromkeys(("left of", "right of", "in front of", "behind", "on the left and", "on the right and"), 0)
    for i, caption in enumerate(captions(scenes, 10)):
        phrase = next((p for p in told if p in caption), None)
        if phrase is None:
            continue
        told[phrase] += 1
        slots = {pair: k for k, pair in enumerate(pairs(scenes[i : i + 1]))}
        first, second = (slots[color, SYNONYM[noun]] for color, noun in NOUN.findall(caption))
        dx, dz = (scenes.position[i, first] - scenes.position[i, second]).tolist()
        side = -dx if "left" in phrase else dx if "right" in phrase else -dz if "front" in phrase else dz
        assert side > 0.045 and side >= max(abs(dx), abs(dz)), caption
    assert sum(told.values()) > 0.5 * len(scenes) and min(told.values()) > 5


def test_plain_captions_are_common() -> None:
    scenes = sample_scenes(2000, 12)
    item = rf"an? (?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
    plain = re.compile(rf"{item}(?:(?:, {item})? and {item})?(?: on a (?:white|grey|black|wooden) table)?")
    share = sum(bool(plain.fullmatch(c)) for c in captions(scenes, 13)) / 2000
    assert 0.22 < share < 0.42
    assert plain.fullmatch(single_prompt("orange", "cone"))
    assert single_prompt("orange", "cone") == "an orange cone"
    assert pair_prompt(("red", "sphere"), ("blue", "cube")) == "a red sphere and a blue cube"
    assert pair_prompt(("red", "sphere"), ("blue", "cube"), "front") == "a red sphere in front of a blue cube"


def test_siblings_differ_in_one_thing_and_stay_valid() -> None:
    scenes = sample_scenes(1500, 14)
    others = siblings(scenes, 15)
    assert bool(valid(others).all()) and not HELD_OUT & set(pairs(others))
    keys = zip(equivalent_key(scenes), equivalent_key(others), strict=True)
    assert all(a != b for a, b in keys)
    names = ("shape", "color", "size", "material", "position", "table")
    changed = torch.stack([(getattr(scenes, n) != getattr(others, n)).reshape(1500, -1).any(1) for n in names], 1)
    assert bool((changed.sum(1) == 1).all()) and changed.sum(0).min() > 40
    swapped = changed[:, 1] & ((scenes.color != others.color).sum(1) == 2)
    assert swapped.sum() > 100
    assert torch.equal(scenes.color[swapped].sort(1).values, others.color[swapped].sort(1).values)
    assert torch.equal(scenes.camera, others.camera) and torch.equal(scenes.light, others.light)


def test_equal_keys_are_equal_scenes_in_any_slot_order() -> None:
    scenes = sample_scenes(300, 16, counts=(0.0, 1.0, 0.0))
    order = torch.tensor([1, 0, 2])
    names = ("shape", "color", "size", "material", "position", "yaw", "radius", "shade")
    turned = replace(scenes, **{n: getattr(scenes, n)[:, order] for n in names})
    assert equivalent_key(scenes) == equivalent_key(turned)
    assert len(set(equivalent_key(scenes))) > 295

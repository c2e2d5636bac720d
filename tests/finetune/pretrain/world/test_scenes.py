"""Tabletop scenes: seeds, rules, held-out pairs, siblings and keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune.pretrain.world.captions import captions
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import (
    HELD_OUT,
    Scenes,
    alike,
    equivalent_key,
    relations,
    sample_scenes,
    siblings,
    valid,
)
from tests.finetune.pretrain.world.drawn import pairs, same


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


def test_repeats_are_objects_of_one_colour_and_shape() -> None:
    scenes = sample_scenes(2000, 21, counts=(0.2, 0.4, 0.4), repeats=0.5)
    assert bool(valid(scenes).all()) and not HELD_OUT & set(pairs(scenes))
    same_pair, several, three = alike(scenes), scenes.count > 1, scenes.count == 3
    assert abs(same_pair[several, 0, 1].float().mean().item() - 0.5) < 0.04
    assert abs(same_pair[three, 0, 2].float().mean().item() - 0.25) < 0.05
    assert not same_pair[~several, 0, 1].any() and not (same_pair[:, 0, 2] & ~same_pair[:, 0, 1]).any()
    twice = scenes[same_pair[:, 0, 1]]
    same_size = twice.size[:, 0] == twice.size[:, 1]
    assert 0.68 < same_size.float().mean().item() < 0.82
    ratio = (twice.radius[:, 1] / twice.radius[:, 0])[same_size]
    assert ratio.min() > 0.9 and ratio.max() < 1.11
    assert not alike(sample_scenes(500, 22))[:, 0, 1].any()
    with pytest.raises(ValueError, match="repeats"):
        sample_scenes(1, 0, repeats=1.5)


def test_a_sibling_of_alike_objects_may_have_one_less() -> None:
    scenes = sample_scenes(600, 23, counts=(0.0, 0.6, 0.4), repeats=1.0)
    others = siblings(scenes, 24)
    assert bool(valid(others).all())
    fewer = others.count < scenes.count
    assert 60 < int(fewer.sum()) < 400 and torch.equal(others.count[fewer], scenes.count[fewer] - 1)
    assert torch.equal((others.shape >= 0).sum(1), others.count)
    assert not (alike(others) & ~alike(scenes)).any()
    assert all(a != b for a, b in zip(equivalent_key(scenes), equivalent_key(others), strict=True))


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
    scenes = sample_scenes(300, 16, counts=(0.0, 1.0, 0.0), repeats=0.3)
    order = torch.tensor([1, 0, 2])
    names = ("shape", "color", "size", "material", "position", "yaw", "radius", "shade")
    turned = replace(scenes, **{n: getattr(scenes, n)[:, order] for n in names})
    assert equivalent_key(scenes) == equivalent_key(turned)
    assert len(set(equivalent_key(scenes))) > 290

"""Scenes compared, read and made for the tests of the world."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from finetune.pretrain.world.scenes import COLORS, SHAPES, Scenes, sample_scenes


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

"""Pictures of tabletop scenes: geometry against closed forms, shadows and materials."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune.pretrain.world import geometry as g
from finetune.pretrain.world.geometry import FOCAL, TARGET_HEIGHT, WALL
from finetune.pretrain.world.objects import flatten_objects
from finetune.pretrain.world.raycast import render
from finetune.pretrain.world.scenes import COLORS, SHAPES, Scenes, sample_scenes
from tests.finetune.pretrain.world.drawn import single


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

"""Light and surfaces of the ray caster: shadows, open sky, table, wall, stripes and shine, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune.pretrain.world.geometry import (
    BOUND,
    CENTRE_HEIGHT,
    SPHERE,
    WALL,
    camera_origin,
    camera_rays,
    dot,
    intersect,
    sample_grid,
    smoothstep,
    unit,
)
from finetune.pretrain.world.objects import COLOR_RGB, GAMMA, Hits, Objects, column, to_local
from finetune.pretrain.world.scenes import Scenes

TABLE_RGB = ((0.90, 0.89, 0.87), (0.52, 0.53, 0.55), (0.13, 0.13, 0.14), (0.66, 0.44, 0.26))
WALL_RGB = (0.66, 0.72, 0.79)
AMBIENT, KEY = 0.40, 0.82
LIGHT_SPREAD = 0.10  # the key light's radius over its distance
SHADOW_RAYS = 8
STRIPE = 0.6  # width of a stripe over the object's radius


def light_direction(light: Tensor) -> Tensor:
    """Unit vectors [3, B] towards the key light, upper left before the objects, from jitters ``[B, 3]``."""
    x, z = light[:, 0] - 0.62, light[:, 1] - 0.40
    return unit(torch.stack([x, torch.full_like(x, 0.92), z]))


def shadows(objects: Objects, light: Tensor, points: Tensor) -> Tensor:
    """The hidden share of the key light's area, [B, P] in [0, 1], at points ``[3, B, P]`` of table and wall."""
    hidden = torch.zeros(points.shape[1] * points.shape[2], device=points.device)
    k = torch.arange(SHADOW_RAYS, device=points.device)
    disc, angle = LIGHT_SPREAD * ((k + 0.5) / SHADOW_RAYS).sqrt(), k * 2.39996  # a sunflower: even over the disc
    side = unit(torch.stack([-light[2], torch.zeros_like(light[0]), light[0]]))
    upward = torch.linalg.cross(light, side, dim=0)
    beams = light[..., None] + side[..., None] * disc * angle.cos() + upward[..., None] * disc * angle.sin()

    for shape in range(len(BOUND)):
        chosen = torch.nonzero(objects.shape == shape).flatten()
        picture = objects.picture[chosen]
        offset = objects.centre[:, chosen, None] - points[:, picture]
        along = dot(offset, light[:, picture, None])
        bound = BOUND[shape] * objects.radius[chosen, None] + LIGHT_SPREAD * along
        near = (along > 0) & (dot(offset, offset) - along * along < bound * bound)

        o, p = torch.nonzero(near, as_tuple=True)
        local_origin = to_local(objects, chosen[o], -offset[:, o, p, None])
        local_beam = to_local(objects, chosen[o], beams[:, picture[o]])
        share = (intersect(shape, local_origin, local_beam) < math.inf).float().mean(-1)
        hidden.index_add_(0, picture[o] * points.shape[2] + p, share)

    return hidden.clamp_max(1).reshape(points.shape[1:])


def occlusion(scenes: Scenes, points: Tensor, normal: Tensor, picture: Tensor | slice, strength: float = 0.9) -> Tensor:
    """How much of the sky above ``points`` the objects leave open, in [0, 1], each taken as a sphere.

    The sky hidden by a sphere of radius r at distance d is cos · r² / d² (Quilez, sphere ambient occlusion).
    ``points`` and ``normal`` [3, N, ...], ``picture`` the N pictures. Slots that touch the point are included.
    """
    open_share = torch.ones_like(points[0])
    extra = (1,) * (points.ndim - 2)
    height = torch.tensor(CENTRE_HEIGHT, device=points.device)[scenes.shape.clamp_min(0)] * scenes.radius

    for slot in range(3):
        centre = torch.stack([scenes.position[:, slot, 0], height[:, slot], scenes.position[:, slot, 1]])[:, picture]
        radius = (scenes.radius[:, slot] * (scenes.shape[:, slot] >= 0))[picture].reshape(-1, *extra)
        offset = centre.reshape(3, -1, *extra) - points
        square = dot(offset, offset).clamp_min(1e-9)
        share = dot(offset, normal) * square.rsqrt() * (0.95 * radius) ** 2 / square
        open_share = open_share * (1 - strength * share.clamp(0, 1))
    return open_share


def wood(x: Tensor, z: Tensor, shift: Tensor) -> Tensor:
    """Brightness of a wooden table [N]: planks that run away from the camera, each with its own tone and grain."""
    across = (x + shift[..., 0]) / 0.085
    plank = across.floor()
    within = across - plank

    tone = 0.86 + 0.26 * ((plank * 12.9898 + shift[..., 1] * 40).sin() * 43.7585).frac().abs()
    wave = (z * 14 + plank * 2.1 + shift[..., 1] * 60).sin() + 0.5 * (z * 37 + plank).sin()
    grain = 1 + 0.11 * (across * 19 + wave * 1.6).sin()
    seam = 1 - 0.55 * (1 - smoothstep(0.0, 0.06, torch.minimum(within, 1 - within)))

    return tone * grain * seam


def room(scenes: Scenes, objects: Objects, light: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Table and wall without the objects but with their shadows: linear colour [3, B, P] and depth [B, P]."""
    u, v, _, _ = sample_grid(size, 1, scenes.position.device)
    origin = camera_origin(scenes.camera)[..., None]
    rays = camera_rays(scenes.camera[:, :1], u, v)
    to_table = torch.where(rays[1] < -1e-3, -origin[1] / rays[1].clamp_max(-1e-3), math.inf)
    depth = torch.minimum(to_table, (WALL - origin[2]) / rays[2])
    points = origin + depth * rays
    on_wall = smoothstep(0.0, 0.006, points[1])
    up = torch.stack([torch.zeros_like(on_wall), 1 - on_wall, -on_wall])

    albedo = torch.tensor(TABLE_RGB, device=u.device)[scenes.table].T[..., None] ** GAMMA
    grain = wood(points[0], points[2], scenes.grain[:, None])
    albedo = albedo * torch.where((scenes.table == 3)[:, None], grain, 1.0)
    wall = column(WALL_RGB, u)[..., None] * (1.0 - 1.1 * points[1].clamp_min(0)) * scenes.light[:, 2:]
    albedo = albedo * (1 - on_wall) + wall * on_wall

    corner = 1 - 0.35 * (-((WALL - points[2]).abs() + points[1].abs()) / 0.03).exp()
    sky = occlusion(scenes, points, up, slice(None)) * corner
    pool = 1 / (1 + 5 * (points[0] ** 2 + points[2] ** 2))  # the lamp's light falls off from the middle of the table
    key = dot(light[..., None], up).clamp_min(0) * (1 - shadows(objects, light, points)) * pool
    return albedo * (AMBIENT * sky + KEY * 1.15 * key), depth


def with_stripes(albedo: Tensor, height: Tensor) -> Tensor:
    """Every other level band of an object white; linear albedo [3, E], height [E] over the centre, in radii."""
    white = smoothstep(-0.2, 0.2, -(math.pi / STRIPE * height).cos())
    return albedo + white * (column(COLOR_RGB[-1], albedo) - albedo)


def environment(direction: Tensor, table: Tensor) -> Tensor:
    """The room in a mirror: the table below, a pale wall around, a light ceiling above; linear colours [3, E]."""
    below = smoothstep(0.12, -0.12, direction[1])
    wall, ceiling = 0.8 * column(WALL_RGB, direction), 1.3 * column((0.97, 0.98, 1.0), direction)
    height = smoothstep(0.25, 0.8, direction[1])
    return (wall * (1 - height) + ceiling * height) * (1 - below) + 0.75 * table * below


def shade(scenes: Scenes, objects: Objects, light: Tensor, hits: Hits, pixels: int) -> Tensor:
    """Linear colours [3, E] of object samples: Lambert, and for shiny ones Fresnel reflection and lamp highlights."""
    picture = hits.pixel // pixels
    point = camera_origin(scenes.camera)[:, picture] + hits.depth * hits.ray
    normal, lamp = hits.normal, light[:, picture]
    table = torch.tensor(TABLE_RGB, device=point.device)[scenes.table[picture]].T ** GAMMA
    centre, radius = objects.centre[:, hits.obj], objects.radius[hits.obj]

    lit = torch.ones_like(point[0])  # other objects in the way of the lamp, as soft spheres
    for slot in range(3):
        other = torch.stack([scenes.position[:, slot, 0], scenes.radius[:, slot], scenes.position[:, slot, 1]])
        offset = other[:, picture] - point
        along = dot(offset, lamp)
        miss = (dot(offset, offset) - along * along).clamp_min(1e-12).sqrt() / scenes.radius[picture, slot]
        blocks = (along > 0) & (scenes.shape[picture, slot] >= 0) & (objects.slot[hits.obj] != slot)
        lit = torch.where(blocks, lit * smoothstep(0.65, 1.1, miss), lit)

    facing = dot(normal, lamp)
    sky = 0.5 + 0.5 * normal[1]
    open_sky = occlusion(scenes, point, normal, picture, 0.7) * (0.72 + 0.28 * (point[1] / radius).clamp(0, 1))
    ambient = AMBIENT * open_sky * (sky + (1 - sky) * (0.25 + 0.9 * table))
    albedo = objects.albedo[:, hits.obj]
    albedo = torch.where(objects.striped[hits.obj], with_stripes(albedo, (point[1] - centre[1]) / radius), albedo)
    matte = albedo * (ambient + KEY * lit * facing.clamp_min(0))

    bulge = normal + 0.40 * (point - centre) / radius  # flat faces mirror a wide part of the room, as a real box does
    mirror = unit(torch.where(objects.shape[hits.obj] == SPHERE, normal, bulge))
    view = -unit(hits.ray)
    cosine = dot(view, mirror).clamp(0, 1)
    reflected = unit(2 * dot(view, mirror) * mirror - view)
    fresnel = 0.05 + 0.7 * (1 - cosine) ** 4
    toward = dot(reflected, lamp)
    glint = lit * (2.2 * smoothstep(0.90, 0.965, toward) + 0.14 * toward.clamp_min(0) ** 12)
    window = reflected.new_tensor([0.75, 0.45, -0.5])[:, None]
    glint = glint + 0.45 * smoothstep(0.90, 0.96, dot(reflected, unit(window)))
    glossy = 0.84 * matte + open_sky * fresnel * environment(reflected, table) + glint
    return torch.where(objects.shiny[hits.obj] > 0, glossy, matte)


def encode(linear: Tensor) -> Tensor:
    """Linear light to sRGB in [0, 1]: a gamma of 2.2 with a soft shoulder above 0.8."""
    over = (linear - 0.8).clamp_min(0)
    return (linear.clamp(0, 0.8) + 0.2 * (1 - (-over / 0.2).exp())) ** (1 / GAMMA)

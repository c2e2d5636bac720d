"""A batched analytic ray caster for tabletop scenes, in plain PyTorch.

Objects are intersected in a local frame in which their radius is 1, and only on the pixels that their bounding sphere
covers; table and wall are evaluated once a pixel. Vectors are ``[3, ...]``, see ``geometry.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.pretrain.world.geometry import (
    BOUND,
    FOCAL,
    camera_origin,
    camera_rays,
    dot,
    intersect,
    normals,
    sample_grid,
)
from finetune.pretrain.world.objects import Hits, Objects, flatten_objects, to_local
from finetune.pretrain.world.scenes import Scenes
from finetune.pretrain.world.shading import encode, light_direction, room, shade


class Rendered(NamedTuple):
    """Pictures and what is exactly true of them.

    Attributes:
        images: ``[B, 3, S, S]`` float32 in [0, 1], sRGB.
        depth: ``[B, S, S]`` float32, metres along the camera's axis, at pixel centres.
        masks: ``[B, S, S]`` int64, 0 for table and wall, 1 to 3 for the object slot, at pixel centres.
    """

    images: Tensor
    depth: Tensor
    masks: Tensor


@torch.no_grad()
def render(scenes: Scenes, size: int = 64, supersample: int = 2, chunk: int = 32) -> Rendered:
    """Pictures of scenes, on the device of the scenes' tensors.

    Args:
        scenes: B scenes.
        size: width and height S in pixels.
        supersample: object edges are averaged over supersample² rays a pixel.
        chunk: pictures at a time; bounds memory and does not change the result.

    Returns:
        Images, exact depth and instance masks; see ``Rendered``.
    """
    parts = [_render(scenes[i : i + chunk], size, supersample) for i in range(0, len(scenes), chunk)]
    return Rendered(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _render(scenes: Scenes, size: int, supersample: int) -> Rendered:
    pixels, rays = size * size, supersample * supersample
    objects, light = flatten_objects(scenes), light_direction(scenes.light)
    color, depth = room(scenes, objects, light, size)
    color, depth = color.reshape(3, -1), depth.flatten()
    masks = torch.zeros_like(depth, dtype=torch.int64)

    hits = cast(scenes, objects, size, supersample)
    centre = hits.sample == rays
    depth[hits.pixel[centre]] = hits.depth[centre]
    masks[hits.pixel[centre]] = objects.slot[hits.obj[centre]] + 1

    hits = Hits(*(column[..., ~centre] for column in hits))
    coverage = torch.zeros_like(depth).index_add_(0, hits.pixel, torch.full_like(hits.depth, 1 / rays))
    surface = encode(shade(scenes, objects, light, hits, pixels)) / rays
    image = encode(color) * (1 - coverage)
    image.index_add_(1, hits.pixel, surface)
    square = (len(scenes), size, size)
    return Rendered(
        image.reshape(3, *square).transpose(0, 1).contiguous().clamp_(0, 1),
        depth.reshape(square),
        masks.reshape(square),
    )


def cast(scenes: Scenes, objects: Objects, size: int, supersample: int) -> Hits:
    """The visible samples of all objects: a loop over shapes, then the nearest hit of each sample."""
    u, v, du, dv = sample_grid(size, supersample, scenes.position.device)
    pixels, samples = size * size, len(du)
    pitch, origin = scenes.camera[:, 0], camera_origin(scenes.camera)
    rays = camera_rays(pitch[:, None], u, v)

    parts: list[Hits] = []
    for shape in range(len(BOUND)):
        chosen = torch.nonzero(objects.shape == shape).flatten()
        offset = objects.centre[:, chosen] - origin[:, objects.picture[chosen]]
        ray = rays[:, objects.picture[chosen]]
        reach = dot(offset, offset)
        bound = BOUND[shape] * objects.radius[chosen] + 2 * FOCAL / size * reach.sqrt()
        near = reach[:, None] - dot(ray, offset[..., None]) ** 2 / dot(ray, ray) < bound[:, None] ** 2
        o, p = torch.nonzero(near, as_tuple=True)

        index, picture = chosen[o], objects.picture[chosen[o]]
        ray = camera_rays(pitch[picture, None], u[p, None] + du, v[p, None] + dv)
        local_origin = to_local(objects, index, -offset[:, o, None])
        local_ray = to_local(objects, index, ray)
        depth = intersect(shape, local_origin, local_ray)

        e, m = torch.nonzero(depth < math.inf, as_tuple=True)
        t = depth[e, m]
        normal = normals(shape, local_origin[:, e, 0] + t * local_ray[:, e, m])
        rotation = objects.rotation[:, :, index[e]]
        normal = torch.stack([dot(rotation[i], normal) for i in range(3)])
        parts.append(Hits(picture[e] * pixels + p[e], m, index[e], t, normal, ray[:, e, m]))

    hits = Hits(*(torch.cat(column, -1) for column in zip(*parts, strict=True)))
    key = hits.pixel * samples + hits.sample
    nearest = torch.full((len(scenes) * pixels * samples,), math.inf, device=key.device)
    nearest = nearest.scatter_reduce(0, key, hits.depth, "amin")
    visible = hits.depth <= nearest[key]
    return Hits(*(column[..., visible] for column in hits))

"""The objects of a batch of scenes as one list, and rays in the unit frame of each; for `raycast` and `shading`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.pretrain.world.geometry import CENTRE_HEIGHT, CUBE, TORUS, TORUS_TILT, dot
from finetune.pretrain.world.scenes import STRIPED, Scenes

COLOR_RGB = (
    (0.84, 0.07, 0.08),
    (1.00, 0.47, 0.03),
    (0.99, 0.86, 0.08),
    (0.10, 0.62, 0.16),
    (0.12, 0.82, 0.86),
    (0.10, 0.22, 0.86),
    (0.52, 0.14, 0.74),
    (0.95, 0.95, 0.94),
)  # sRGB, in the order of scenes.COLORS
GAMMA = 2.2


@dataclass(frozen=True)
class Objects:
    """The objects of all pictures in one list of length O."""

    picture: Tensor  # [O] int64
    slot: Tensor  # [O] int64
    shape: Tensor  # [O] int64
    radius: Tensor  # [O]
    centre: Tensor  # [3, O]
    rotation: Tensor  # [3, 3, O], local to world
    albedo: Tensor  # [3, O], linear
    shiny: Tensor  # [O] float
    striped: Tensor  # [O] bool


class Hits(NamedTuple):
    """Visible surface samples of objects, E of them."""

    pixel: Tensor  # [E] index into B · S · S
    sample: Tensor  # [E] index of the sample within the pixel
    obj: Tensor  # [E] index into Objects
    depth: Tensor  # [E]
    normal: Tensor  # [3, E], world
    ray: Tensor  # [3, E], unnormalised: its component along the camera's axis is 1


def column(rgb: tuple[float, ...], like: Tensor) -> Tensor:
    """An sRGB colour as a linear vector [3, 1] on the device of ``like``."""
    return torch.tensor(rgb, device=like.device, dtype=like.dtype)[:, None] ** GAMMA


def flatten_objects(scenes: Scenes) -> Objects:
    """The filled slots of a batch of scenes as one list."""
    picture, slot = torch.nonzero(scenes.shape >= 0, as_tuple=True)
    shape, radius = scenes.shape[picture, slot], scenes.radius[picture, slot]
    x, z = scenes.position[picture, slot].unbind(-1)
    height = torch.tensor(CENTRE_HEIGHT, device=shape.device)[shape] * radius

    yaw = scenes.yaw[picture, slot] + (shape == CUBE) * (math.pi / 4)
    tilt = (shape == TORUS) * TORUS_TILT  # the ring's axis leans from upright towards the camera
    sy, cy, st, ct = yaw.sin(), yaw.cos(), tilt.sin(), tilt.cos()
    zero = torch.zeros_like(sy)
    rotation = torch.stack(
        [
            torch.stack([cy, -sy * st, sy * ct]),
            torch.stack([zero, ct, st]),
            torch.stack([-sy, -cy * st, cy * ct]),
        ]
    )

    albedo = torch.tensor(COLOR_RGB, device=shape.device)[scenes.color[picture, slot]] ** GAMMA
    albedo = (albedo * scenes.shade[picture, slot]).T.clamp(0, 1)
    material = scenes.material[picture, slot]
    shiny, striped = (material == 1).float(), material == STRIPED
    return Objects(picture, slot, shape, radius, torch.stack([x, height, z]), rotation, albedo, shiny, striped)


def to_local(objects: Objects, index: Tensor, vectors: Tensor) -> Tensor:
    """World vectors ``[3, E, M]`` in the unit frame of objects ``index`` [E]; positions relative to the centre."""
    rotation = objects.rotation[:, :, index, None]
    scale = 1 / objects.radius[index, None]
    return torch.stack([dot(rotation[:, i], vectors) * scale for i in range(3)])

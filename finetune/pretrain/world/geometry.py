"""Vectors, camera and shapes of the tabletop world, in plain PyTorch.

World: x to the right, y up, z away from the camera, in metres; the table is the plane y = 0 and the wall z = WALL.
Vectors keep their three components in the leading dimension, ``[3, ...]``, so that each is contiguous.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPHERE, CUBE, CYLINDER, CONE, TORUS, ZORB = range(6)  # the zorb is only in the scenes of `concept`
FOCAL = 0.28  # tangent of half the field of view
TARGET_HEIGHT = 0.03  # the camera looks at the point (shift, TARGET_HEIGHT, 0)
WALL = 0.23

CUBE_HALF = 0.76
CYLINDER_RADIUS, CYLINDER_HALF = 0.74, 0.84
CONE_SLOPE, CONE_HALF = 0.5, 0.95  # base radius CONE_SLOPE · 2 · CONE_HALF
TORUS_MAJOR, TORUS_MINOR, TORUS_TILT = 0.71, 0.28, math.radians(52.0)
ZORB_HALF, ZORB_WAIST = 1.15, 0.42  # an hourglass: radius ZORB_WAIST + CONE_SLOPE · |y|
ZORB_RIM = ZORB_WAIST + CONE_SLOPE * ZORB_HALF
BEVEL = 0.10  # edges of cube and cylinder are shaded as if rounded
BOUND = (
    1.0,
    CUBE_HALF * 3**0.5,
    math.hypot(CYLINDER_RADIUS, CYLINDER_HALF),
    CONE_HALF * 2**0.5,
    1.0,
    math.hypot(ZORB_RIM, ZORB_HALF),
)
CENTRE_HEIGHT = (
    1.0,
    CUBE_HALF,
    CYLINDER_HALF,
    CONE_HALF,
    TORUS_MAJOR * math.sin(TORUS_TILT) + TORUS_MINOR,
    ZORB_HALF,
)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of vectors ``[3, ...]``: [...]."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a: Tensor) -> Tensor:
    """Vectors of length 1 in the directions of ``a``."""
    return a * dot(a, a).clamp_min(1e-12).rsqrt()


def smoothstep(low: float, high: float, x: Tensor) -> Tensor:
    """0 below ``low``, 1 above ``high``, and a smooth cubic between them; also with ``low`` > ``high``."""
    s = ((x - low) / (high - low)).clamp(0, 1)
    return s * s * (3 - 2 * s)


def camera_origin(camera: Tensor) -> Tensor:
    """Camera positions [3, B] from (pitch in radians, distance in metres, sideways shift in metres), ``[B, 3]``."""
    pitch, distance, shift = camera.unbind(-1)
    return torch.stack([shift, TARGET_HEIGHT + distance * pitch.sin(), -distance * pitch.cos()])


def camera_rays(pitch: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Directions [3, ...] through image-plane points (u right, v up, in tangents); pitch broadcasts over u and v.

    The component along the camera's axis is 1, so that the ray parameter of a point is its depth.
    """
    sin, cos = pitch.sin(), pitch.cos()
    return torch.stack(torch.broadcast_tensors(u, v * cos - sin, v * sin + cos))


def sample_grid(size: int, supersample: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixel centres u, v [P] and the sample offsets du, dv [M + 1]; the last sample is the pixel's centre."""
    line = (2 * torch.arange(size, device=device) + 1) / size - 1
    v, u = torch.meshgrid(-line, line, indexing="ij")

    fine = ((2 * torch.arange(supersample, device=device) + 1) / supersample - 1) / size
    dv, du = torch.meshgrid(-fine, fine, indexing="ij")
    centre = torch.zeros(1, device=device)
    offsets = (torch.cat([du.flatten(), centre]), torch.cat([dv.flatten(), centre]))

    return u.flatten() * FOCAL, v.flatten() * FOCAL, offsets[0] * FOCAL, offsets[1] * FOCAL


def project(camera: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """World points ``[3, B, ...]`` to (u, v, depth): u, v in [-1, 1] inside the picture, v up."""
    extra = (1,) * (points.ndim - 2)
    offset = points - camera_origin(camera).reshape(3, -1, *extra)
    sin, cos = camera[:, 0].sin().reshape(-1, *extra), camera[:, 0].cos().reshape(-1, *extra)
    depth = offset[2] * cos - offset[1] * sin
    return offset[0] / (depth * FOCAL), (offset[1] * cos + offset[2] * sin) / (depth * FOCAL), depth


def intersect(shape: int, origin: Tensor, direction: Tensor) -> Tensor:
    """Ray parameters of the first hits with a unit shape centred at 0, infinite where a ray misses.

    ``origin`` and ``direction`` ``[3, ...]`` broadcast; the direction need not be normalised. The origin is first moved
    to the point closest to the centre, which keeps float32 exact to about 1e-6 of the radius.
    """
    inverse = dot(direction, direction).rsqrt()
    d = direction * inverse
    shift = -dot(origin, d)
    o = origin + shift * d

    if shape == SPHERE:
        h = 1 - dot(o, o)
        near, far = -h.clamp_min(0).sqrt(), h
        hit = h > 0
    elif shape == TORUS:
        near, hit = _march_torus(o, d)
    elif shape == ZORB:
        near, hit = _first_of_two_cones(o, d)
    else:
        near, far = _interval(shape, o, d)
        hit = near < far

    return torch.where(hit & (near + shift > 1e-4), (near + shift) * inverse, math.inf)


def _interval(shape: int, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the convex cube, cylinder or cone; empty (near ≥ far) where they miss."""
    if shape == CUBE:
        safe = torch.where(d.abs() < 1e-6, 1e-6, d)
        middle, half = -o / safe, CUBE_HALF / safe.abs()
        return (middle - half).amax(0), (middle + half).amin(0)
    return _turned(o, d, CYLINDER_HALF) if shape == CYLINDER else _turned(o, d, CONE_HALF, apex=CONE_HALF)


def _turned(o: Tensor, d: Tensor, half_height: float, apex: float | None = None) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the cylinder, or the cone below ``apex``, between the heights ±half_height."""
    dy = torch.where(d[1].abs() < 1e-6, 1e-6, d[1])
    middle, half = -o[1] / dy, half_height / dy.abs()

    a, b, c = d[0] ** 2 + d[2] ** 2, o[0] * d[0] + o[2] * d[2], o[0] ** 2 + o[2] ** 2
    if apex is None:
        c = c - CYLINDER_RADIUS**2
    else:  # x² + z² = slope² (apex - y)²
        below = apex - o[1]
        a, b, c = a - (CONE_SLOPE * d[1]) ** 2, b + CONE_SLOPE**2 * below * d[1], c - (CONE_SLOPE * below) ** 2

    a = a.clamp_min(1e-4)
    root = b * b - a * c
    side = root.clamp_min(0).sqrt() / a
    near = torch.maximum(middle - half, -b / a - side)
    far = torch.minimum(middle + half, -b / a + side)
    return near, torch.where(root > 0, far, -math.inf)


def _first_of_two_cones(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter the zorb: a cone cut off at the waist, and the same upside down on top of it."""
    half = ZORB_HALF / 2
    near = torch.full_like(o[0] + d[0], math.inf)
    for sign in (1, -1):
        mirror = o.new_tensor([1, sign, 1]).reshape(3, *(1,) * (o.ndim - 1))
        middle = o.new_tensor([0, half, 0]).reshape(mirror.shape)
        start, end = _turned(o * mirror + middle, d * mirror, half, apex=half + ZORB_WAIST / CONE_SLOPE)
        near = torch.where(start < end, torch.minimum(near, start), near)
    return near, near < math.inf


def _march_torus(o: Tensor, d: Tensor, steps: int = 28) -> tuple[Tensor, Tensor]:
    """Sphere tracing from the bounding sphere; the distance to a torus is exact, so the steps are long."""
    inside = TORUS_MAJOR + TORUS_MINOR
    reach = (inside * inside - dot(o, o)).clamp_min(0).sqrt()
    t = -reach
    distance = t

    for _ in range(steps):
        x, y, z = o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2]
        ring = (x * x + z * z).sqrt() - TORUS_MAJOR
        distance = (ring * ring + y * y).sqrt() - TORUS_MINOR
        t = t + distance

    return t, (reach > 0) & (distance < 2e-3) & (t < reach)


def normals(shape: int, p: Tensor) -> Tensor:
    """Unit normals at local surface points ``[3, ...]``; cube and cylinder have softly rounded edges."""
    if shape == SPHERE:
        return unit(p)
    if shape == CUBE:
        return unit(p.sign() * (p.abs() - (CUBE_HALF - BEVEL)).clamp_min(0))

    x, y, z = p
    ring = (x * x + z * z).clamp_min(1e-12).sqrt()
    if shape == CYLINDER:
        out, up = (ring - (CYLINDER_RADIUS - BEVEL)).clamp_min(0), (y.abs() - (CYLINDER_HALF - BEVEL)).clamp_min(0)
        up = up * y.sign()
    elif shape == CONE:
        out, up = torch.ones_like(ring), torch.full_like(ring, CONE_SLOPE)
    elif shape == ZORB:
        end = (y.abs() > ZORB_HALF - 1e-4).to(y.dtype)
        out, up = 1 - end, y.sign() * (end - (1 - end) * CONE_SLOPE)
    else:
        out, up = ring - TORUS_MAJOR, y

    return unit(torch.stack([x / ring * out, up, z / ring * out]))

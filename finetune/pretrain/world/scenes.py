"""Tabletop scenes as batched tensors: drawn from a seed, checked, and changed in one thing. No files."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from finetune.pretrain.world.geometry import CENTRE_HEIGHT, FOCAL, WALL, project

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
MATERIALS = ("matte", "shiny")
STRIPED = len(MATERIALS)  # a surface that only the scenes of `concept` have
TABLES = ("white", "grey", "black", "wooden")
RELATIONS = (None, "left", "right", "front", "behind")
HELD_OUT = frozenset(
    {("blue", "sphere"), ("green", "cube"), ("purple", "cylinder"), ("yellow", "cone"), ("red", "torus")}
)  # (colour, shape) pairs that training never shows

RADIUS = (0.034, 0.052)  # metres, by size
CROWD = (1.0, 0.95, 0.85)  # scale of all radii, by the number of objects
SPREAD_X, SPREAD_Z = (-0.12, 0.12), (-0.11, 0.12)  # where objects stand, metres
FOOTPRINT = (1.0, 1.08, 0.80, 0.97, 1.0, 1.0)  # horizontal extent over radius, by shape, the zorb's last
EXTENT = (1.04, 1.22, 1.14, 1.28, 1.02, 1.6)  # extent in the picture over radius, by shape
MIN_OFFSET, DOMINANCE = 0.045, 1.3  # a relation holds from this offset (metres), this many times the other axis'


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes; object slots beyond ``count`` hold -1 in the integer fields.

    Attributes:
        count: ``[B]`` int64, 1 to 3 objects.
        shape, color, size, material: ``[B, 3]`` int64, indices into SHAPES, COLORS, SIZES and MATERIALS.
        position: ``[B, 3, 2]``, x to the right and z away from the camera, metres.
        yaw: ``[B, 3]``, turn about the vertical axis in radians.
        radius: ``[B, 3]``, metres.
        table: ``[B]`` int64, index into TABLES.
        camera: ``[B, 3]``, pitch in radians, distance and sideways shift in metres.
        light: ``[B, 3]``, shift of the lamp to the right and away from the camera; brightness of the wall.
        shade: ``[B, 3, 3]``, factors on the objects' linear red, green and blue.
        grain: ``[B, 2]``, offset and phase of the wood.
    """

    count: Tensor
    shape: Tensor
    color: Tensor
    size: Tensor
    material: Tensor
    position: Tensor
    yaw: Tensor
    radius: Tensor
    table: Tensor
    camera: Tensor
    light: Tensor
    shade: Tensor
    grain: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: str | torch.device) -> Scenes:
        """The same scenes on another device."""
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))

    @staticmethod
    def cat(parts: Sequence[Scenes]) -> Scenes:
        """Several batches as one."""
        return Scenes(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)))


def _held_out() -> Tensor:
    """``[8, 5]`` bool over (colour, shape)."""
    return torch.tensor([[(c, s) in HELD_OUT for s in SHAPES] for c in COLORS])


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def sample_scenes(
    n: int,
    seed: int | torch.Generator,
    counts: tuple[float, float, float] = (0.45, 0.4, 0.15),
    held_out: str = "exclude",
    repeats: float = 0.0,
) -> Scenes:
    """Draw n valid scenes (see ``valid``) on the CPU; the seed decides everything.

    Args:
        counts: how likely one, two and three objects are.
        held_out: "exclude" leaves the pairs of HELD_OUT out; "only" makes each scene's first object one of them and the
            others ordinary; "include" draws from all pairs.
        repeats: how many of the scenes of several objects have the same pair of colour and shape twice, or three
            times; in the others all objects are different pairs.

    Raises:
        ValueError: for another word, a share that is none, or if places cannot be found.
    """
    if held_out not in ("exclude", "only", "include"):
        raise ValueError(f'held_out is "exclude", "only" or "include", not {held_out!r}')
    if not 0 <= repeats <= 1:
        raise ValueError(f"repeats is a share from 0 to 1, not {repeats!r}")

    g = _generator(seed)
    weights = torch.tensor(counts, dtype=torch.float32)
    draws = torch.rand(n, generator=g)
    count = 1 + torch.searchsorted(weights.cumsum(0) / weights.sum(), draws, right=True).clamp_max(2)
    scenes = _unplaced(count, _draw_pairs(n, held_out, g), g)
    return _place(_repeated(scenes, repeats, g) if repeats else scenes, g)


def _draw_pairs(n: int, held_out: str, g: torch.Generator) -> Tensor:
    """Three different pairs for each scene, ``[n, 3]`` int64: colour * number of shapes + shape."""
    order = torch.rand(n, 40, generator=g)
    banned = _held_out().flatten()
    if held_out != "include":
        order[:, banned] = -1

    pair = order.topk(3, dim=1).indices
    if held_out == "only":
        pair[:, 0] = torch.nonzero(banned).flatten()[torch.randint(int(banned.sum()), (n,), generator=g)]
    return pair


def _unplaced(count: Tensor, pair: Tensor, g: torch.Generator) -> Scenes:
    """Scenes with all but the positions drawn; ``pair`` as `_draw_pairs` gives it."""
    n = len(count)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    empty = torch.arange(3) >= count[:, None]
    size = torch.randint(2, (n, 3), generator=g)
    material = torch.randint(2, (n, 3), generator=g)
    radius = torch.tensor(RADIUS)[size] * torch.tensor(CROWD)[count - 1, None] * uniform(0.95, 1.05, n, 3)

    camera = torch.stack([uniform(0.45, 0.50, n), uniform(0.44, 0.47, n), uniform(-0.008, 0.008, n)], 1)
    return Scenes(
        count=count,
        shape=(pair % 5).masked_fill(empty, -1),
        color=(pair // 5).masked_fill(empty, -1),
        size=size.masked_fill(empty, -1),
        material=material.masked_fill(empty, -1),
        position=torch.zeros(n, 3, 2),
        yaw=uniform(-0.45, 0.45, n, 3),
        radius=radius,
        table=torch.randint(len(TABLES), (n,), generator=g),
        camera=camera,
        light=torch.cat([uniform(-0.12, 0.12, n, 2), uniform(0.85, 1.1, n, 1)], 1),
        shade=uniform(0.90, 1.06, n, 3, 1) * uniform(0.96, 1.03, n, 3, 3),
        grain=uniform(0, 1, n, 2),
    )


def _repeated(scenes: Scenes, share: float, g: torch.Generator) -> Scenes:
    """The second object of this share of the scenes of several made like the first; of three objects also the third,
    half of the time. Half of the time they are as large and as shiny as the first, too."""
    n = len(scenes)
    chosen = (torch.rand(n, generator=g) < share) & (scenes.count > 1)
    third = (torch.rand(n, generator=g) < 0.5) & (scenes.count > 2)
    whole = torch.rand(n, generator=g) < 0.5
    like = torch.stack([torch.zeros(n, dtype=torch.bool), chosen, chosen & third], 1)

    def copied(name: str, where: Tensor) -> Tensor:
        values = getattr(scenes, name)
        return torch.where(where, values[:, :1], values)

    radius = torch.tensor(RADIUS)[copied("size", like & whole[:, None]).clamp_min(0)]
    return replace(
        scenes,
        shape=copied("shape", like),
        color=copied("color", like),
        size=copied("size", like & whole[:, None]),
        material=copied("material", like & whole[:, None]),
        radius=scenes.radius * radius / torch.tensor(RADIUS)[scenes.size.clamp_min(0)],
    )


def _place(scenes: Scenes, g: torch.Generator, tries: int = 16, rounds: int = 200) -> Scenes:
    """Positions by rejection: the first valid one of ``tries`` candidates, again for the scenes that found none."""
    position = scenes.position.clone()
    left = torch.arange(len(scenes))
    low, high = torch.tensor([SPREAD_X[0], SPREAD_Z[0]]), torch.tensor([SPREAD_X[1], SPREAD_Z[1]])

    for _ in range(rounds):
        if not len(left):
            return replace(scenes, position=position)

        candidates = low + (high - low) * torch.rand(len(left), tries, 3, 2, generator=g)
        trial = replace(scenes[left.repeat_interleave(tries)], position=candidates.flatten(0, 1))
        good = valid(trial).reshape(-1, tries)
        found, first = good.any(1), good.int().argmax(1)

        position[left[found]] = candidates[found, first[found]]
        left = left[~found]

    raise ValueError(f"no place found for the objects of {len(left)} scenes")


def valid(scenes: Scenes) -> Tensor:
    """Whether scenes keep the rules, ``[B]`` bool.

    Objects lie wholly in view and before the wall, do not touch, none is mostly hidden by another, and two objects
    stand in a clear relation.
    """
    filled = scenes.shape >= 0
    shape = scenes.shape.clamp_min(0)
    x, z = scenes.position.unbind(-1)
    u, v, depth = project(scenes.camera, torch.stack([x, torch.tensor(CENTRE_HEIGHT)[shape] * scenes.radius, z]))
    extent = torch.tensor(EXTENT)[shape] * scenes.radius / (depth * FOCAL)
    foot = torch.tensor(FOOTPRINT)[shape] * scenes.radius

    inside = (torch.maximum(u.abs(), v.abs()) + extent < 0.97) & (z + foot < WALL - 0.02)
    good = (inside | ~filled).all(1)

    for i, j in ((0, 1), (0, 2), (1, 2)):
        apart = (scenes.position[:, i] - scenes.position[:, j]).norm(dim=-1) > foot[:, i] + foot[:, j] + 0.004
        i_before = depth[:, i] < depth[:, j]
        front = torch.where(i_before, extent[:, i], extent[:, j])
        back = torch.where(i_before, extent[:, j], extent[:, i])
        seen = torch.hypot(u[:, i] - u[:, j], v[:, i] - v[:, j]) > 0.92 * front + 0.35 * back
        good = good & ((apart & seen) | ~filled[:, j])

    return good & ((relations(scenes)[:, 0, 1] > 0) | (scenes.count != 2))


def relations(scenes: Scenes) -> Tensor:
    """How object i stands to object j, ``[B, 3, 3]`` int64 indices into RELATIONS; 0 where that is not clear.

    Left, right, in front or behind as the camera sees it, from the axis along which they are clearly further apart.
    """
    offset = scenes.position[:, :, None] - scenes.position[:, None, :]
    dx, dz = offset.unbind(-1)
    sideways = (dx.abs() > MIN_OFFSET) & (dx.abs() > DOMINANCE * dz.abs())
    deep = (dz.abs() > MIN_OFFSET) & (dz.abs() > DOMINANCE * dx.abs())
    filled = scenes.shape >= 0
    kind = sideways * torch.where(dx < 0, 1, 2) + deep * torch.where(dz < 0, 3, 4)
    return kind * (filled[:, :, None] & filled[:, None, :])


def equivalent_key(scenes: Scenes) -> list[Hashable]:
    """For each scene all that a caption can say of it: equal keys are scenes that no caption tells apart."""
    return [tuple(row) for row in _key(scenes).tolist()]


def _key(scenes: Scenes) -> Tensor:
    """Table, the objects' attributes in sorted order, and their relations in that order, ``[B, 7]`` int64.

    Objects that are the same in all attributes stand from left to right, and in no relation.
    """
    code = ((scenes.shape * len(COLORS) + scenes.color) * len(SIZES) + scenes.size) * len(MATERIALS) + scenes.material
    code = code.masked_fill(scenes.shape < 0, -1)
    from_left = scenes.position[..., 0].argsort(dim=1)
    order = from_left.gather(1, code.gather(1, from_left).argsort(dim=1, descending=True, stable=True))
    code = code.gather(1, order)

    rows, (i, j) = torch.arange(len(scenes), device=code.device)[:, None], ([0, 0, 1], [1, 2, 2])
    related = relations(scenes)[rows, order[:, i], order[:, j]].masked_fill(code[:, i] == code[:, j], 0)
    return torch.cat([scenes.table[:, None], code, related], 1)


def siblings(scenes: Scenes, seed: int | torch.Generator) -> Scenes:
    """A hard negative of each scene: one thing changed, everything else kept, camera and light included.

    Scenes of several objects mostly swap the colours, shapes or places of their first two objects; otherwise, and where
    a swap would change nothing or break a rule, one object's colour, shape, size or material changes, or the table. The
    result is ``valid``, differs in its ``equivalent_key`` and brings in no held-out pair. Where objects are alike, one
    of them may also be gone.
    """
    g = _generator(seed)
    n = len(scenes)
    slot = (torch.rand(n, generator=g) * scenes.count).long()

    edits = [_swap(scenes, "color"), _swap(scenes, "shape"), exchanged(scenes)[0]]
    edits += [_other_pair(scenes, slot, "color", g), _other_pair(scenes, slot, "shape", g)]
    edits += [_toggle(scenes, slot, "size"), _toggle(scenes, slot, "material")]
    table = (scenes.table + torch.randint(1, len(TABLES), (n,), generator=g)) % len(TABLES)
    edits += [replace(scenes, table=table), _fewer(scenes)]

    allowed = torch.stack([_is_edit(scenes, edit) for edit in edits], 1)
    weight = torch.tensor([4.0, 4.0, 5.0, 2.0, 2.0, 1.0, 1.0, 0.7, 5.0])
    choice = (torch.rand(allowed.shape, generator=g).log() / (weight * allowed)).nan_to_num(-torch.inf).argmax(1)

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(edit, name) for edit in edits])[choice, torch.arange(n)]

    return Scenes(*(pick(f.name) for f in fields(Scenes)))


def exchanged(scenes: Scenes) -> tuple[Scenes, Tensor]:
    """The scenes with the places of their first two objects exchanged, and in which of them that is possible, bool [B]:
    they stay ``valid`` and say something else."""
    after = _swap(scenes, "position")
    return after, _is_edit(scenes, after)


def _swap(scenes: Scenes, name: str) -> Scenes:
    """The first two slots of one field exchanged."""
    values = getattr(scenes, name)
    return replace(scenes, **{name: torch.cat([values[:, [1, 0]], values[:, 2:]], 1)})


def _toggle(scenes: Scenes, slot: Tensor, name: str) -> Scenes:
    """Size or material of one slot turned into the other; a new size brings its radius."""
    rows = torch.arange(len(scenes))
    values = getattr(scenes, name).clone()
    values[rows, slot] = 1 - values[rows, slot]
    if name != "size":
        return replace(scenes, **{name: values})

    radius = scenes.radius.clone()
    sizes = torch.tensor(RADIUS)
    radius[rows, slot] *= sizes[values[rows, slot]] / sizes[scenes.size[rows, slot]]
    return replace(scenes, size=values, radius=radius)


def _other_pair(scenes: Scenes, slot: Tensor, name: str, g: torch.Generator) -> Scenes:
    """One slot's colour or shape drawn anew among those that differ."""
    choices = len(COLORS) if name == "color" else len(SHAPES)
    rows = torch.arange(len(scenes))
    values = getattr(scenes, name).clone()
    values[rows, slot] = (values[rows, slot] + torch.randint(1, choices, (len(scenes),), generator=g)) % choices
    return replace(scenes, **{name: values})


def _fewer(scenes: Scenes) -> Scenes:
    """The last object gone, where it is like the first; elsewhere nothing has changed."""
    rows, last = torch.arange(len(scenes)), scenes.count - 1
    gone = alike(scenes)[rows, 0, last] & (last > 0)
    empty = gone[:, None] & (torch.arange(3) == last[:, None])
    names = ("shape", "color", "size", "material")
    emptied = {name: getattr(scenes, name).masked_fill(empty, -1) for name in names}
    return replace(scenes, count=scenes.count - gone.long(), **emptied)


def alike(scenes: Scenes) -> Tensor:
    """Whether objects i and j are of the same colour and shape, ``[B, 3, 3]`` bool; nothing is like an empty slot."""
    pair = scenes.color * len(SHAPES) + scenes.shape
    filled = scenes.shape >= 0
    return (pair[:, :, None] == pair[:, None]) & filled[:, :, None] & filled[:, None]


def _is_edit(scenes: Scenes, edit: Scenes) -> Tensor:
    """Whether ``edit`` is a valid scene that differs in meaning, ``[B]`` bool; it brings in no held-out pair, and no
    objects that are alike."""
    filled = edit.shape >= 0
    new = filled & ((edit.shape != scenes.shape) | (edit.color != scenes.color))
    banned = (_held_out()[edit.color, edit.shape] & new).any(1)  # an empty slot's -1 is no new pair
    doubled = (alike(edit) & ~alike(scenes)).flatten(1).any(1)

    whole = (filled.sum(1) == edit.count) & ((edit.color >= 0) == filled).all(1)
    differs = (_key(scenes) != _key(edit)).any(1)
    return whole & ~doubled & ~banned & differs & valid(edit)

"""The families whose update is a function of the weight, as LyCORIS defines them: a whole difference, IA3, GLoRA, OFT.

Each gives a difference to the weight W [out, in] or [out, in, h, w], or to a norm's weight or a bias [out], from its
tensors by the ends of their keys in files. How often an adapter counts multiplies that difference, as in A1111; LyCORIS
scales each stage of BOFT instead, and leaves the rescaling of OFT's rows alone, which at 1 is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdkit.errors import CheckpointError

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class WeightFamily:
    """A family by its name.

    needs, may: the ends of the keys that a module has to have, and may have beside them.
    fits(parts, shape): whether the tensors are of the shapes that a weight of ``shape`` needs.
    difference(parts, weight): what the family adds to the weight; both in the precision of the result.
    from_nothing: whether the difference is the same for every weight.
    """

    name: str
    needs: frozenset[str]
    may: frozenset[str]
    fits: Callable[[Parts, torch.Size], bool]
    difference: Callable[[Parts, Tensor], Tensor]
    from_nothing: bool = False


# A whole difference: of a weight, a norm or a bias


def _whole_fits(parts: Parts, shape: torch.Size) -> bool:
    (value,) = parts.values()
    return value.numel() == shape.numel() and value.shape[0] == shape[0]


def _whole(parts: Parts, weight: Tensor) -> Tensor:
    (value,) = parts.values()
    return value.reshape(weight.shape)


# IA3 (arXiv 2205.05638)


def _ia3_fits(parts: Parts, shape: torch.Size) -> bool:
    return len(shape) > 1 and parts["weight"].numel() == shape[int(bool(parts["on_input"]))]


def _ia3(parts: Parts, weight: Tensor) -> Tensor:
    """W times one number for each row; for each column where it works on the layer's input."""
    side = int(bool(parts["on_input"]))
    return weight * _along(parts["weight"], weight, side)


# GLoRA (arXiv 2306.07967)


def _glora_fits(parts: Parts, shape: torch.Size) -> bool:
    if len(shape) < 2:
        return False
    a1, a2, b1, b2 = _glora_factors(parts, shape)
    r, out, columns = a1.shape[1], shape[0], shape[1] if "bm.weight" in parts else shape[1:].numel()
    middle = parts.get("bm.weight")
    return (
        a1.shape == (shape[1], r)
        and a2.shape == (r, shape[1])
        and b1.shape == (out, b2.shape[0])
        and b2.shape[1] == columns
        and (middle is None or middle.shape == (b2.shape[0], b2.shape[0], *shape[2:]))
    )


def _glora(parts: Parts, weight: Tensor) -> Tensor:
    """(W a1 a2 + b1 b2) alpha / rank; W's columns are mixed at each point of a kernel alike."""
    a1, a2, b1, b2 = _glora_factors(parts, weight.shape)
    mixed = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2)

    if "bm.weight" in parts:
        added = torch.einsum("rs...,or,si->oi...", parts["bm.weight"], b1, b2)
    else:
        added = (b1 @ b2).view_as(weight)

    alpha, rank = parts.get("alpha"), a1.shape[1]
    scale = torch.ones(()) if alpha is None else torch.where(alpha == 0, 1.0, alpha / rank)
    return (mixed + added) * (scale * parts.get("scalar", torch.ones(()))).to(weight)


def _glora_factors(parts: Parts, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, in h w]; LyCORIS' first files have 1 and 2 the other way round."""
    a1, a2, b1, b2 = (parts[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return (a1, a2, b1, b2) if len(a1) == shape[1] else (a2, a1, b2, b1)


# OFT and BOFT (arXiv 2306.07280, 2311.06243)


def _oft_fits(parts: Parts, shape: torch.Size) -> bool:
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    if blocks.dim() not in (3, 4) or len(shape) < 2:
        return False
    *stages, count, rows, columns = blocks.shape
    reach = rows * 2 ** (stages[0] - 1) if stages else 1  # rows that the last stage of a butterfly mixes
    return (
        rows == columns
        and count * rows == shape[0]
        and (not stages or (rows % 2 == 0 and shape[0] % reach == 0))
        and (rescale is None or rescale.numel() == shape[0])
    )


def _oft(parts: Parts, weight: Tensor) -> Tensor:
    """R W - W, or rescale * R W - W with a number for each row. R turns the rows in blocks.

    Blocks [count, n, n] turn neighbouring rows, once. Blocks [m, count, n, n] are a butterfly: stage i turns rows that
    are 2^i n / 2 apart together.
    """
    turns = _rotations(parts["oft_blocks"], parts.get("alpha"), len(weight))
    turned = weight
    if turns.dim() == 3:
        turned = _turn(turns.mT, turned)  # OFT multiplies by the transpose, BOFT does not
    else:
        for i, stage in enumerate(turns):
            apart = 2**i * (stage.shape[-1] // 2)
            order = torch.arange(len(weight), device=weight.device).view(-1, 2, apart).mT.flatten()
            turned = _turn(stage, turned[order])[order.argsort()]

    if "rescale" in parts:
        turned = turned * _along(parts["rescale"], weight, 0)
    return turned - weight


def _rotations(blocks: Tensor, alpha: Tensor | None, rows: int) -> Tensor:
    """(1 + Q) (1 - Q)^-1 of each block B, with Q = B - B^T.

    All Q together are scaled down to a norm of alpha times the rows of the weight where it is longer; alpha 0: not.
    """
    skew = blocks - blocks.mT
    if alpha is not None and float(alpha) > 0:
        skew = skew * (float(alpha) * rows / skew.norm()).clamp(max=1)
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return (one + skew) @ torch.linalg.inv(one - skew)


def _turn(blocks: Tensor, weight: Tensor) -> Tensor:
    """Multiply the rows by blocks [count, n, n] along a diagonal."""
    rows = weight.unflatten(0, blocks.shape[:2])
    return torch.einsum("bij,bj...->bi...", blocks, rows).flatten(0, 1)


def _along(numbers: Tensor, weight: Tensor, side: int) -> Tensor:
    """The numbers, shaped to multiply the rows (side 0) or columns (side 1) of a weight."""
    return numbers.reshape([-1 if d == side else 1 for d in range(weight.dim())])


WHOLE = ("diff", "diff_b", "w_norm", "b_norm")
"""The ends of keys of whole differences: of a weight and its bias, and of a norm's."""

FAMILIES = (
    *(WeightFamily("whole difference", frozenset({end}), frozenset(), _whole_fits, _whole, True) for end in WHOLE),
    WeightFamily("IA3", frozenset({"weight", "on_input"}), frozenset(), _ia3_fits, _ia3),
    WeightFamily(
        "GLoRA",
        frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"}),
        frozenset({"bm.weight", "alpha", "scalar"}),
        _glora_fits,
        _glora,
    ),
    WeightFamily("OFT", frozenset({"oft_blocks"}), frozenset({"alpha", "rescale"}), _oft_fits, _oft),
)

ENDS = frozenset().union(*(family.needs | family.may for family in FAMILIES))
"""The ends of all keys of these families."""


def family_of(parts: Parts) -> WeightFamily | None:
    """The family that has exactly these tensors; None for another one."""
    given = frozenset(parts)
    return next((family for family in FAMILIES if family.needs <= given <= family.needs | family.may), None)


def check_parts(family: WeightFamily, parts: Parts, shape: torch.Size) -> None:
    """Raise CheckpointError, without the file's name, for tensors that do not fit a weight, or that are not finite."""
    if not family.fits(parts, shape):
        found = ", ".join(f"{end} {list(part.shape)}" for end, part in parts.items())
        raise CheckpointError(f"expected {family.name} for a weight of {list(shape)}, found {found}")
    if not all(bool(part.isfinite().all()) for part in parts.values()):
        raise CheckpointError("expected finite numbers, found NaN or infinity")

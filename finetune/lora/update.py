"""What an adapter does to one weight: a low-rank update beside it, or a change of the weight itself.

LoRA, LoCon, LoHa and LoKr are matrix products in disguise: LoHa multiplies two of them entry by entry, LoKr is a
Kronecker product, LoCon may keep its spatial part apart. Each is rewritten as up @ down without approximation, so that
one kind of layer runs, scales, merges and saves them all. A change that is a function of the weight (`weight_families`)
keeps the tensors of its file, and is computed from the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from finetune.lora.targets import Target
from finetune.lora.weight_families import WeightFamily, family_of

Factors = tuple[Tensor, Tensor]
"""(up [out, rank], down [rank, in])."""


@dataclass(frozen=True)
class LowRankUpdate:
    """scale * up @ down beside a weight [out, in] or [out, in, h, w] (arXiv 2106.09685).

    down [rank, in] or [rank, in, h, w]; up [out, rank] or [out, rank, 1, 1].
    magnitude: DoRA (arXiv 2402.09353): the norm that each row of weight + update is given, [out]; or each column,
        [1, in] or [1, in, 1, 1]. None: the norms are what they are.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def normalizes_columns(self) -> bool:
        return self.magnitude is not None and self.magnitude.dim() > 1

    def delta(self) -> Tensor:
        """scale * up @ down, [out, in] or [out, in, h, w], in float32 or wider."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        product = self.up.flatten(1).to(wide) @ self.down.flatten(1).to(wide)
        return self.scale * product.view(len(self.up), *self.down.shape[1:])

    def without_magnitude(self, weight: Tensor) -> LowRankUpdate:
        """The same update of ``weight`` as a plain one, of full rank: magnitude * (W + delta) / norm - W."""
        if self.magnitude is None:
            return self
        moved = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta()
        kept = 1 if self.normalizes_columns else 0
        norm = moved.pow(2).sum([d for d in range(moved.dim()) if d != kept], keepdim=True).sqrt()
        up, down = exact_factors((self.magnitude.reshape(norm.shape) * moved / norm - weight).flatten(1))
        return LowRankUpdate(*shaped((up, down), weight.shape), scale=1.0)


@dataclass(frozen=True)
class WeightChange:
    """A change of a weight, a norm or a bias by one of `weight_families`; its tensors by the ends of their keys."""

    parts: Mapping[str, Tensor]

    @cached_property
    def family(self) -> WeightFamily:
        found = family_of(self.parts)
        assert found is not None, sorted(self.parts)
        return found

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to ``weight``, of its shape, in float32 or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        parts = {end: part.to(weight.device, wide) for end, part in self.parts.items()}
        return self.family.difference(parts, weight.to(wide))

    def low_rank(self, weight: Tensor) -> LowRankUpdate:
        """The same change of a weight of two or more dimensions as a low-rank update, of full rank."""
        up, down = exact_factors(self.delta(weight).flatten(1))
        return LowRankUpdate(*shaped((up, down), weight.shape), scale=1.0)


Updates = dict[Target, LowRankUpdate]
"""Low-rank updates by their places in a model."""
Changes = dict[Target, WeightChange]
"""Changes of weights by their places in a model."""
AnyUpdates = Mapping[Target, LowRankUpdate | WeightChange]
"""What an adapter does: updates and changes."""


def split_updates(updates: AnyUpdates) -> tuple[Updates, Changes]:
    """The low-rank updates, and the changes of weights."""
    low_rank = {target: update for target, update in updates.items() if isinstance(update, LowRankUpdate)}
    changes = {target: update for target, update in updates.items() if isinstance(update, WeightChange)}
    return low_rank, changes


def shaped(factors: Factors, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(down, up) as the layer for a weight of ``shape`` has them."""
    up, down = factors
    return down.reshape(-1, *shape[1:]).contiguous(), up.reshape(*up.shape, *(1,) * (len(shape) - 2)).contiguous()


def exact_factors(matrix: Tensor) -> Factors:
    """A matrix as up @ down of rank min(out, in): itself times the identity on its shorter side."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype, device=matrix.device), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype, device=matrix.device)

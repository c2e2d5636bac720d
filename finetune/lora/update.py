"""One module's low-rank update.

Every family that we read is a matrix product in disguise: LoHa multiplies two of them entry by entry, LoKr is a
Kronecker product, LoCon may keep its spatial part apart. Each is rewritten as up @ down without approximation, so that
one kind of layer runs, scales, merges and saves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.lora.targets import Target

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


Updates = dict[Target, LowRankUpdate]
"""A LoRA: the updates by their places in a model."""


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

"""One module's low-rank update, and the exact way to it from what the other adapter families store.

Every family that we read is a matrix product in disguise: LoHa multiplies two of them entry by entry, LoKr is a
Kronecker product, LoCon may keep its spatial part apart. Each is rewritten as up @ down without approximation, so that
one kind of layer runs, scales, merges and saves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.sites import Site
from sdkit.errors import CheckpointError

Factors = tuple[Tensor, Tensor]
"""(up [out, rank], down [rank, in])."""

ScaleOf = Callable[[int], float]
"""What up @ down of a rank is multiplied by: alpha / rank, or as the file says."""

PLAIN = frozenset({"down", "up"})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
LOKR = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})


@dataclass(frozen=True)
class Branch:
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

    def without_magnitude(self, weight: Tensor) -> Branch:
        """The same update of ``weight`` as a plain one, of full rank: magnitude * (W + delta) / norm - W."""
        if self.magnitude is None:
            return self
        moved = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta()
        kept = 1 if self.normalizes_columns else 0
        norm = moved.pow(2).sum([d for d in range(moved.dim()) if d != kept], keepdim=True).sqrt()
        up, down = exact_factors((self.magnitude.reshape(norm.shape) * moved / norm - weight).flatten(1))
        return Branch(*shaped((up, down), weight.shape), scale=1.0)


Branches = dict[Site, Branch]
"""A LoRA: the updates by their places in a model."""


def make_branch(parts: Mapping[str, Tensor], shape: torch.Size, scale_of: ScaleOf) -> Branch:
    """The branch that a file's tensors for one module describe, for a weight of ``shape``.

    ``parts`` by role: down, up, mid (LoCon); hada_w1_a, … (LoHa); lokr_w1, … (LoKr); magnitude or dora_scale (DoRA).
    Raises CheckpointError, without the file's name, when they are incomplete or of other shapes.
    """
    roles = frozenset(parts) - {"magnitude", "dora_scale"}
    if roles - {"mid"} == PLAIN:
        factors, rank = _plain(parts), parts["down"].shape[0]
    elif roles - {"hada_t1", "hada_t2"} == LOHA and ("hada_t1" in roles) == ("hada_t2" in roles):
        factors, rank = _loha(parts), parts["hada_w1_b"].shape[0]
    elif roles and roles <= LOKR and _is_complete_lokr(roles):
        factors = _lokr(parts)
        rank = next((parts[role].shape[0] for role in ("lokr_w2_b", "lokr_w1_b") if role in parts), 0)
    else:
        raise CheckpointError(
            f"expected down and up of LoRA, or all of LoHa's or LoKr's; found {', '.join(sorted(parts))}"
        )
    up, down = factors
    if up.shape[1] != down.shape[0] or up.shape[0] != shape[0] or down.shape[1] != shape[1:].numel():
        found = f"[{up.shape[0]}, {up.shape[1]}] @ [{down.shape[0]}, {down.shape[1]}]"
        raise CheckpointError(f"expected an update of [{shape[0]}, {shape[1:].numel()}], found {found}")
    if not bool(up.isfinite().all() and down.isfinite().all()):
        raise CheckpointError("expected finite numbers, found NaN or infinity")
    return Branch(*shaped(factors, shape), scale=scale_of(rank), magnitude=_magnitude(parts, shape))


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


def _plain(parts: Mapping[str, Tensor]) -> Factors:
    """LoRA and LoCon. With ``mid`` [r, r, h, w], the spatial part, down and up are 1x1: the middle joins down."""
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:
        down = torch.einsum("rshw,si->rihw", parts["mid"].float(), down.flatten(1).float()).to(down.dtype)
    return up, down.flatten(1)


def _loha(parts: Mapping[str, Tensor]) -> Factors:
    """(w1_a w1_b) * (w2_a w2_b), entry by entry (arXiv 2108.06098): of rank r1 r2, from products of rows and columns.

    With hada_t1, hada_t2 [r, r, h, w] (convolutions) each matrix is a Tucker product.
    """
    w = {role: tensor.float() for role, tensor in parts.items()}
    a1, b1, a2, b2 = (w[f"hada_{role}"] for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "hada_t1" in w:
        return exact_factors(_tucker(w["hada_t1"], a1, b1) * _tucker(w["hada_t2"], a2, b2))
    if a1.shape[1] * a2.shape[1] >= min(len(a1), b1.shape[1]):
        return exact_factors((a1 @ b1) * (a2 @ b2))
    return torch.einsum("or,os->ors", a1, a2).flatten(1), torch.einsum("ri,si->rsi", b1, b2).flatten(0, 1)


def _lokr(parts: Mapping[str, Tensor]) -> Factors:
    """The Kronecker product of w1 and w2, each whole or as a product: that of their factors, side by side."""
    w = {role.removeprefix("lokr_"): tensor.float() for role, tensor in parts.items()}
    first = exact_factors(w["w1"]) if "w1" in w else (w["w1_a"], w["w1_b"])
    if "w2" in w:
        second = exact_factors(w["w2"].flatten(1))
    elif "t2" in w:
        second = exact_factors(_tucker(w["t2"], w["w2_a"], w["w2_b"]))
    else:
        second = (w["w2_a"], w["w2_b"].flatten(1))
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core [r, s, h, w], a [r, out], b [s, in] -> [out, in h w]."""
    return torch.einsum("rshw,ro,si->oihw", core, a, b).flatten(1)


def _is_complete_lokr(roles: frozenset[str]) -> bool:
    w1, w2 = ({r.removeprefix("lokr_") for r in roles if r.startswith(prefix)} for prefix in ("lokr_w1", "lokr_w2"))
    whole_or_product = w1 in ({"w1"}, {"w1_a", "w1_b"}) and w2 in ({"w2"}, {"w2_a", "w2_b"})
    return whole_or_product and ("lokr_t2" not in roles or "lokr_w2_a" in roles)


def _magnitude(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """[out], the norms of rows; or [1, in(, 1, 1)], the norms of columns, which only a ``dora_scale`` can hold."""
    magnitude = parts.get("dora_scale", parts.get("magnitude"))
    if magnitude is None:
        return None
    columns = (1, shape[1], *(1,) * (len(shape) - 2))
    if "dora_scale" in parts and magnitude.shape == columns:
        return magnitude
    if magnitude.numel() != shape[0]:
        raise CheckpointError(f"expected a magnitude of {shape[0]} rows, found the shape {list(magnitude.shape)}")
    return magnitude.flatten()

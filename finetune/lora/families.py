"""Turns what LoRA, LoHa, LoKr and LoCon files store for a module into one low-rank update, without approximation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from finetune.lora.update import Factors, LowRankUpdate, exact_factors, shaped
from sdkit.errors import CheckpointError

ScaleOf = Callable[[int], float]
"""The factor on up @ down of a rank: alpha / rank, or as the file says."""

PLAIN = frozenset({"down", "up"})
LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
LOKR = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})

WITH_KERNEL = frozenset({"down", "up", "lokr_w2", "lokr_w2_b"})
"""Matrices that may have a convolution's height and width as further dimensions."""
KERNELS = frozenset({"mid", "hada_t1", "hada_t2", "lokr_t2"})


def make_update(parts: Mapping[str, Tensor], shape: torch.Size, scale_of: ScaleOf) -> LowRankUpdate:
    """The update that a file's tensors for one module describe, for a weight of ``shape``.

    ``parts`` by role: down, up, mid (LoCon); hada_w1_a, … (LoHa); lokr_w1, … (LoKr); magnitude or dora_scale (DoRA);
    alpha and scalar, which ``scale_of`` knows of.
    Raises CheckpointError, without the file's name, when they are incomplete or of other shapes.
    """
    roles = frozenset(parts) - {"magnitude", "dora_scale", "alpha", "scalar"}
    _check_dimensions(parts, roles & (PLAIN | LOHA | LOKR | KERNELS))
    if roles - {"mid"} == PLAIN:
        factors, rank = _plain(parts), parts["down"].shape[0]
    elif roles - {"hada_t1", "hada_t2"} == LOHA and ("hada_t1" in roles) == ("hada_t2" in roles):
        factors, rank = _loha(parts), parts["hada_w1_b"].shape[0]
    elif roles and roles <= LOKR and _is_complete_lokr(roles):
        factors = _lokr(parts)
        rank = next((parts[role].shape[0] for role in ("lokr_w2_b", "lokr_w1_b") if role in parts), 0)
    else:
        raise CheckpointError(
            f"expected down and up of LoRA, or all of one other family's tensors; found {', '.join(sorted(parts))}"
        )

    up, down = factors
    if up.shape[1] != down.shape[0] or up.shape[0] != shape[0] or down.shape[1] != shape[1:].numel():
        found = f"[{up.shape[0]}, {up.shape[1]}] @ [{down.shape[0]}, {down.shape[1]}]"
        raise CheckpointError(f"expected an update of [{shape[0]}, {shape[1:].numel()}], found {found}")
    if not len(down):
        raise CheckpointError("expected a rank of at least 1, found 0")

    scale, magnitude = scale_of(rank), _magnitude(parts, shape)
    numbers = (up, down, torch.tensor(scale), *(() if magnitude is None else (magnitude,)))
    if not all(bool(part.isfinite().all()) for part in numbers):
        raise CheckpointError("expected finite numbers, found NaN or infinity")

    return LowRankUpdate(*shaped(factors, shape), scale=scale, magnitude=magnitude)


def _check_dimensions(parts: Mapping[str, Tensor], roles: frozenset[str]) -> None:
    for role in sorted(roles):
        found = parts[role].dim()
        if found != (4 if role in KERNELS else 2) and not (role in WITH_KERNEL and found in (3, 4)):
            expected = "a kernel of 4 dimensions" if role in KERNELS else "a matrix"
            raise CheckpointError(f"{role}: expected {expected}, found the shape {list(parts[role].shape)}")


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

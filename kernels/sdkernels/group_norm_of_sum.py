"""GroupNorm of a sum, on the kernels of ``group_norm.py``: the launch that reads the parts stores the sum as well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .backend import apply, use_kernel
from .group_norm import GroupNorm, Parts, group_norm, why_not


def _why_not(x: Tensor, parts: Parts) -> str | None:
    """The reason why the kernels do not add these up, if there is one."""
    residual, shift, skip, later = parts
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if residual is not None and residual.shape != x.shape:
        return f"residual must be {tuple(x.shape)}, found {tuple(residual.shape)}"
    if skip is not None and (len(skip), skip.shape[2:]) != (len(x), x.shape[2:]):
        return f"skip must be {tuple(x.shape)} but for its channels, found {tuple(skip.shape)}"

    for name, t, size in (("shift", shift, x.shape[1]), ("later", later, channels)):
        if t is not None and t.shape != (size,):
            return f"{name} must be [{size}], found {tuple(t.shape)}"
    if any(t is not None and t.dtype != x.dtype for t in (residual, skip)):
        return "residual and skip must have x's dtype"
    if math.prod(x.shape[2:]) * channels >= 2**31:  # offsets within a sample are int32
        return "a sample must have fewer than 2^31 elements"
    return None


def group_norm_of_sum(
    x: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    activation: str | None = None,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(group_norm(sum), sum + later) of the sum x + residual + shift, with the channels of ``skip`` behind its own.

    x and residual [B, C, ...], skip [B, S, ...], one dtype; shift [C]; weight and bias [C + S]; each but x may be None,
    and the sum is x itself where all are. later [C + S] is the bias of a product that is to be accumulated onto the
    sum: it is there already, and not normed. Memory formats, dtypes, gradients and errors as in `group_norm`.
    """
    if later is not None and torch.is_grad_enabled():  # the backward pass norms the stored sum again
        y, total = group_norm_of_sum(x, residual, shift, skip, num_groups, weight, bias, eps, activation)
        return y, total + later.reshape(-1, *(1,) * (x.dim() - 2))
    parts = Parts(residual, shift, skip, later)
    if all(part is None for part in parts):
        return group_norm(x, num_groups, weight, bias, eps, activation), x

    if activation in (None, "silu"):
        normed = x if skip is None else torch.empty(len(x), x.shape[1] + skip.shape[1], *x.shape[2:], device="meta")
        reason = _why_not(x, parts) or why_not(normed, num_groups, weight, bias)
        if use_kernel("group_norm_of_sum", reason, x, weight, bias, *parts):
            return apply(GroupNorm, x, num_groups, weight, bias, eps, activation == "silu", None, *parts, True)

    return reference.group_norm_of_sum(x, residual, shift, skip, num_groups, weight, bias, eps, activation, later)

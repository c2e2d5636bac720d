"""Rows that several processes have computed, gathered by each with their gradients, for losses that compare all rows of
a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rows_of(x: Tensor, process: int, processes: int) -> Tensor:
    """Every ``processes``-th row of x [N, ...], from row ``process`` on; the last row fills up those that lack one."""
    index = torch.arange(process, process + processes * -(-len(x) // processes), processes)
    return x[index.clamp_max(len(x) - 1)]


def gathered(x: Tensor, count: int) -> Tensor:
    """The ``count`` rows of which x is `rows_of` this process; x itself where there is one process.

    Every process must compute the same loss of them. Then the mean of the processes' gradients, which is what data
    parallel training takes, is the gradient of one process that has all rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)[:count]  # pyright: ignore[reportReturnType]  # an autograd function has no types


class _Gather(torch.autograd.Function):
    """Its gradient is that of this process's rows, times the number of processes: each has the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), world = gradients, dist.get_world_size()
        return world * gradient.unflatten(0, (-1, world))[:, dist.get_rank()]

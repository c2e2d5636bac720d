"""The exponential moving average of trained weights, and putting weights in place of others for a while."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def full_tensor(value: Tensor) -> Tensor:
    """A copy of the whole tensor on the CPU, also when processes hold shards of it (all of them must ask)."""
    sharded: Any = value
    return (sharded.full_tensor() if hasattr(sharded, "full_tensor") else value).detach().cpu().clone()


class MovingAverage:
    """The exponential moving average of some parameters: decay * average + (1 - decay) * weights, after each step.

    The decay of step k (from 0) is at most (1 + k) / (10 + k), so that the first weights are soon forgotten. ``values``
    are the averages by the parameters' names.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Take in the parameters as step ``step`` left them."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach(), weight)


@contextmanager
def in_place_of(module: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """Inside the block ``module`` has these values as its parameters of these names; they are not copied."""
    held = {name: module.get_parameter(name) for name in values}

    def put(name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path).register_parameter(leaf, parameter)

    try:
        for name, value in values.items():
            put(name, nn.Parameter(value, held[name].requires_grad))
        yield
    finally:
        for name, parameter in held.items():
            put(name, parameter)

"""Gradient checkpointing: activations are computed twice, so that they need not be kept."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdkernels


def checkpoint_activations(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    """Make every module of these kinds forget its activations and compute them again in the backward pass.

    Values and gradients stay what they are, dropout included. Returns how many modules there are.
    """
    blocks = [block for block in module.modules() if isinstance(block, kinds)]
    for block in blocks:
        block.forward = functools.partial(_recomputed, block.forward)
    return len(blocks)


def _recomputed(forward: Callable[..., Tensor], *args: object) -> Tensor:
    """``forward(*args)``, to be called again in the backward pass, then under the backend that is in force now.

    The backward pass may run outside of the block that set the backend, or in a thread of autograd's that knows of
    none.
    """
    name = sdkernels.current()

    def run(*again: object) -> Tensor:
        with sdkernels.backend(name):
            return forward(*again)

    return checkpoint(run, *args, use_reentrant=False)  # type: ignore[return-value]

"""How a network's parameters lie in memory: as they compute fastest. Values and state dicts do not change.

Convolutions' weights are channels-last where that is faster, and weights of layers that read the same input lie side by
side, so that one product computes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.devices import fast_layout


def lay_out(network: Any, layout: torch.memory_format | None = None) -> None:
    """Lay out the parameters of a network, by default as they compute fastest on its ``device`` in its ``dtype``.

    A module says by ``side_by_side()``, lists of parameters, which of its own belong together.
    """
    layout = layout or fast_layout(network.device, network.dtype)
    network.to(memory_format=layout)
    for module in network.modules():
        for parameters in module.side_by_side() if hasattr(module, "side_by_side") else ():
            put_side_by_side(parameters)


def put_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Give these, equal but in their first dimension, one piece of memory. They stay parameters of their own.

    Those of different dtypes or devices stay where they are.
    """
    alike = len({(p.dtype, p.device) for p in parameters}) == 1
    if alike and joined(parameters, trained=True) is None:
        parts = torch.cat([parameter.data for parameter in parameters]).split([len(p) for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part


def joined(parameters: Sequence[Tensor], trained: bool = False) -> Tensor | None:
    """These as one tensor, without a copy, if they lie side by side; else None.

    None too for parameters that get a gradient, unless ``trained``: it would go to the first alone; and under
    torch.compile, which cannot look.
    """
    first = parameters[0]
    graded = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if torch.compiler.is_compiling() or (graded and not trained):
        return None

    offset, memory = first.storage_offset(), _memory(first)
    for p in parameters:
        if _memory(p) != memory or p.storage_offset() != offset or p.dtype != first.dtype or not p.is_contiguous():
            return None
        offset += p.numel()
    rows = sum(len(p) for p in parameters)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _memory(x: Tensor) -> int:
    """Which piece of memory x lies in, on the meta device too, where there is no address."""
    return x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  # as torch.multiprocessing tells storages apart

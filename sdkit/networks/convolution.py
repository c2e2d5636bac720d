"""The networks' convolution: it can leave its bias to whoever reads the result, and compute on packed weights.

In float32 on a CPU oneDNN reorders a convolution's weights at every call, which takes a good part of a small network's
time; `packed` does it once, as torch.compile does where weights are frozen. In bfloat16 nothing is gained, and a large
network would hold much memory twice for little.
"""

from __future__ import annotations

import platform
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LARGEST = 1 << 28
"""Bytes of a network's convolution weights up to which they are packed."""


class Conv2d(nn.Conv2d):
    """nn.Conv2d that can leave its bias to whoever reads the result."""

    is_frozen = False
    _packed: Tensor | None = None
    unread_by_forward = frozenset({"is_frozen", "_packed"})  # the same weights in another order

    def forward(self, input: Tensor, biased: bool = True) -> Tensor:
        bias = self.bias if biased else None
        if self.is_frozen and not torch.is_grad_enabled():
            return self._forward_packed(input, bias)
        return self._conv_forward(input, self.weight, bias)

    def _forward_packed(self, input: Tensor, bias: Tensor | None) -> Tensor:
        layer = (self.padding, self.stride, self.dilation, self.groups)
        weight = self._packed
        if weight is None:  # as `torch.utils.mkldnn` does it, in the order that is the fastest for this size of input
            reorder = torch.ops.aten.mkldnn_reorder_conv2d_weight
            weight = self._packed = reorder(self.weight.detach().to_mkldnn(), *layer, list(input.shape))
        return torch.ops.mkldnn._convolution_pointwise(input, weight, bias, *layer, "none", [], "")

    def freeze(self, is_frozen: bool) -> None:
        """Say that the weights will not change, or may change again."""
        self.is_frozen, self._packed = is_frozen, None


@contextmanager
def packed(network: nn.Module) -> Generator[None]:
    """Let a network's convolutions compute on packed weights inside the block, in which no weight may change.

    Only where it pays: for float32 on an x86 processor, and up to `LARGEST`; and not under autocast, which casts what a
    packed convolution would take as it is. Predictions are the same but for the order in which products are added up.
    """
    convolutions = [m for m in network.modules() if isinstance(m, Conv2d) and _pays(m.weight)]
    if torch.is_autocast_enabled("cpu") or sum(conv.weight.nbytes for conv in convolutions) > LARGEST:
        convolutions = []

    try:
        for conv in convolutions:
            conv.freeze(True)
        yield
    finally:
        for conv in convolutions:
            conv.freeze(False)


def _pays(weight: Tensor) -> bool:
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # pyright: ignore[reportAttributeAccessIssue]
    on_x86 = weight.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return onednn and on_x86 and weight.dtype == torch.float32

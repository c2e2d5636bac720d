"""What a layer leaves to the next one, so that it takes no pass over memory of its own: biases, residuals, joins.

All of it rests on our kernels: where they do not run (`sdkernels.fuses`), everything is computed where it stands.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdkernels
from sdkit.networks.convolution import Conv2d


class Sum(NamedTuple):
    """A feature map in parts, x + residual + shift, which the next norm adds up on its way.

    x and residual [B, C, H, W], shift [C]; the latter two may be None. ``before`` [B, D, H, W] is the input, added up,
    of the block that made it, unless that joined a skip connection: what a skip connection takes.
    """

    x: Tensor
    residual: Tensor | None = None
    shift: Tensor | None = None
    before: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def total(self) -> Tensor:
        """The sum itself, for layers that have to see it whole."""
        total = self.x if self.residual is None else self.x + self.residual
        return total if self.shift is None else total + self.shift[:, None, None]


def convolve(conv: nn.Module, x: Tensor) -> Sum:
    """A convolution of x [B, C, H, W]; its bias, which would be a pass of its own on a GPU, is left to the next norm.

    An adapter in the convolution's place adds the bias itself, and hooks see the whole result.
    """
    if isinstance(conv, Conv2d) and not _has_hooks(conv) and sdkernels.fuses(x):
        return Sum(conv(x, biased=False), None, conv.bias)
    return Sum(conv(x))


def is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a linear layer and nothing else: no adapter in its place, no hooks. Only then may others read its
    weight instead of calling it."""
    return type(layer) is nn.Linear and not _has_hooks(layer)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether this is a convolution over single pixels and nothing else: a linear layer of their channels."""
    one = isinstance(layer, Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1)
    return one and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    own = vars(layer)
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of x [B, C, H, W], as the linear layer that it is where the channels of a pixel lie together:
    with the bias in the same launch."""
    if is_pointwise(conv) and x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)  # type: ignore[operator, union-attr, arg-type]
    return conv(x)


def accumulates(layer: nn.Module, x: Tensor) -> bool:
    """Whether `accumulate` can add this layer's product onto a sum like x where it lies.

    Not where a gradient is wanted, whose graph holds the sum as it was, nor for an adapter in the layer's place.
    """
    plain = (is_linear(layer) or is_pointwise(layer)) and isinstance(layer.bias, Tensor)
    return plain and not torch.is_grad_enabled() and sdkernels.fuses(x)


def accumulate(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total + x weight^T, written over ``total``; its bias is there already.

    total [B, N, C], contiguous; x [B, N, K]; weight [C, K] or, of a 1x1 convolution, [C, K, 1, 1].
    """
    total.flatten(0, 1).addmm_(x.flatten(0, 1), weight.flatten(1).t())
    return total

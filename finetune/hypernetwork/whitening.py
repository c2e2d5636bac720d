"""Whitened contexts: hypernetworks train faster on them than in the model's own coordinates (arXiv 1507.00210).

A text's contexts have one long vector in common, and in CLIP's a few features are far larger than the rest. A step in
such coordinates moves a network along those, for every token alike, and hardly along what tells one word from another;
a rate at which the words are learnt is one at which the rest diverges. What a network can compute in white coordinates
it can in the model's, so a file has the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_FLOOR = 0.01  # added to the variances of contexts, times their mean: what hardly varies is not blown up


class Whitening(nn.Module):
    """(x - mean) @ matrix for x [..., width]: contexts whose features have mean 0, variance 1 and no correlation.

    covariance [width, width] of contexts; the matrix is (covariance + floor)^(-1/2), which turns them no more than it
    must (ZCA). Both are buffers that no file holds.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(covariance.double())
        values = values.clamp(min=0)
        matrix = vectors * (values + _FLOOR * values.mean()).clamp(min=1e-12).rsqrt() @ vectors.T
        self.register_buffer("mean", mean.float(), persistent=False)
        self.register_buffer("matrix", matrix.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.matrix

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the linear layer that does to x what the one given does to ``self(x)``."""
        mean, matrix = (value.to(weight.device, torch.float64) for value in (self.mean, self.matrix))
        whole = weight.double() @ matrix
        return whole.float(), (bias.double() - whole @ mean).float()


@torch.no_grad()
def measure_contexts(
    modules: Mapping[int, nn.Module], see: Callable[[], object], total: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[int, Whitening]:
    """The whitening of the modules' first argument [..., width], by their widths.

    see() runs the modules. Every call counts as much, whatever its context's length. total(x) sums x over
    processes.
    """

    moments = {width: torch.zeros(width + 1, width + 1, dtype=torch.float64) for width in modules}

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).double()
        width, x = x.shape[1], torch.cat([x, x.new_ones(len(x), 1)], 1)  # so the sums hold means and the calls too
        moments[width] = moments[width].to(x.device) + x.T @ x / len(x)

    hooks = [module.register_forward_pre_hook(add) for module in modules.values()]
    try:
        see()
    finally:
        for hook in hooks:
            hook.remove()

    found: dict[int, Whitening] = {}
    for width, sums in moments.items():
        second = total(sums)
        second = second / second[-1, -1]
        mean = second[-1, :-1]
        found[width] = Whitening(mean, second[:-1, :-1] - mean.outer(mean))
    return found

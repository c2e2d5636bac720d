"""Muon: a matrix moves along its momentum, made orthogonal; everything else moves as AdamW has it.

Such a step has singular values of about 1: where gradients seldom point, weights move as far as where they always do.
By Jordan et al. (https://kellerjordan.github.io/posts/muon); steps are scaled to be as large as AdamW's,
so that its learning rates carry over (Liu et al., arXiv 2502.16982). `torch.optim.Muon` takes no convolutions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sdkit.errors import ConfigError

MOMENTUM = 0.95
SHORTEST = 16  # sides that a matrix has at least; a narrow one, such as a first convolution's, has no use for it
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)  # of Newton-Schulz, for singular values from 0.7 to 1.2
AS_LARGE = 0.2  # the root mean square of AdamW's steps, of the learning rate


class Muon(torch.optim.AdamW):
    """AdamW with Muon for matrices: weights of layers, of convolutions as [out, in * height * width].

    params: as AdamW's; groups in which ``matrices`` is False, as those of embeddings, are AdamW's alone.
    lr, betas, eps, weight_decay: AdamW's; the rate and the decay also of the matrices.

    Raises ConfigError for parameters that are sharded: a shard has other singular values than the whole.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        if any(hasattr(p, "device_mesh") for group in self.param_groups for p in group["params"]):
            raise ConfigError("muon: expected whole parameters, found sharded ones; use adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change the weights. Matrices have no gradient afterwards, so that AdamW leaves them alone."""
        if closure is not None:
            raise ConfigError("muon: expected no closure")

        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"] if group.get("matrices", True) else ():
                if p.grad is not None and is_matrix(p):
                    alike[tuple(p.shape)].append(p)
            for matrices in alike.values():
                self._move(matrices, group["lr"], group["weight_decay"])
        return super().step()

    def _move(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        """One step of matrices of one shape."""
        ahead: list[Tensor] = []
        for p in matrices:
            state, gradient = self.state[p], p.grad
            assert gradient is not None
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].mul_(MOMENTUM).add_(gradient)
            ahead.append((gradient + MOMENTUM * state["momentum"]).flatten(1))

        steps = orthogonal(torch.stack(ahead)).float()
        far = rate * AS_LARGE * math.sqrt(max(steps.shape[1:]))
        for p, step in zip(matrices, steps, strict=True):
            p.mul_(1 - rate * decay).add_(step.view(p.shape), alpha=-far)
            p.grad = None


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix, or a convolution's kernel as one, with sides of SHORTEST at least."""
    return p.dim() >= 2 and min(p.shape[0], p[0].numel()) >= SHORTEST


def orthogonal(x: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with singular values of about 1 in the place of their own, by Newton-Schulz; computed
    in bfloat16, which is enough, where the device multiplies it."""
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    if x.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        x = x.bfloat16()

    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

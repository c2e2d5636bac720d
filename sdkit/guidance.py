"""Classifier-free guidance, its rescaling, and classifier guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sdkit.errors import ConfigError


@dataclass(frozen=True)
class Guidance:
    """How hard to follow the prompt: uncond + scale (cond - uncond), then rescaled by ``rescale`` in [0, 1].

    Scale 0 is unconditional, 1 is conditional, between them interpolates, above follows the prompt harder. Raises
    ConfigError for a scale that is negative or not finite, and for a rescale outside [0, 1].
    """

    scale: float = 1.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int | float) or not (math.isfinite(self.scale) and self.scale >= 0):
            raise ConfigError(f"guidance_scale: expected a finite number of at least 0, found {self.scale!r}")
        if not isinstance(self.rescale, int | float) or not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance_rescale: expected a number from 0 to 1, found {self.rescale!r}")

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction has any weight."""
        return self.scale != 1

    @property
    def needs_cond(self) -> bool:
        """Whether the conditional prediction has any weight."""
        return self.scale != 0


def combine(uncond: Tensor | None, cond: Tensor | None, scale: float) -> Tensor:
    """uncond + scale (cond - uncond) (arXiv 2207.12598); where one is None the other is the whole prediction."""
    if uncond is None or cond is None:
        only = cond if uncond is None else uncond
        if only is None:
            raise ConfigError("guidance: needs a prediction, conditional or unconditional; found neither")
        return only
    return uncond + scale * (cond - uncond)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring the standard deviation of ``guided`` back towards that of ``cond`` (arXiv 2305.08891, section 3.4).

    guided, cond [B, ...]: the network's own outputs; deviations are taken per sample over everything but B. phi 0 is
    the identity, phi 1 gives the conditional prediction's deviation.
    """
    dims = tuple(range(1, guided.dim()))
    factor = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (phi * factor + (1 - phi))


def classifier_guidance(eps: Tensor, gradient: Tensor, alphas_cumprod_t: float | Tensor, scale: float = 1.0) -> Tensor:
    """eps - sqrt(1 - acp_t) scale grad_x log p(y | x_t, t) (arXiv 2105.05233, algorithm 2).

    eps and gradient [B, ...], taken at x_t in the variance-preserving scaling; ``alphas_cumprod_t`` a number or
    a tensor that is [] or [B]. Like eps.
    """
    if isinstance(alphas_cumprod_t, Tensor):
        acp = alphas_cumprod_t.to(eps.device)
        sigma = (1 - acp).sqrt().to(eps.dtype)
        sigma = sigma.reshape(-1, *(1,) * (eps.dim() - 1)) if sigma.dim() else sigma
    else:
        sigma = math.sqrt(1 - alphas_cumprod_t)
    return eps - scale * sigma * gradient

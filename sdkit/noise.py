"""Where a batch's random numbers come from: for each image its own seed, drawn on the CPU in float32."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from sdkit.errors import ConfigError, NumericalError

Generators = torch.Generator | Sequence[torch.Generator]


class Noise:
    """The normals of a batch [B, C, h, w], one image apart from the other: its initial noise, then one a stochastic
    step. ``generator`` (one, or one for each image) replaces the seeds and draws in ``dtype`` on its own device, as in
    diffusers; one generator draws for the whole batch at once.

    Raises ConfigError when seeds or generators do not fit the batch, or both are given.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        seed: int | Sequence[int] | None,
        generator: Generators | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.device = shape, device
        self.seeds: list[int] = []
        if generator is None:
            self.seeds = image_seeds(seed, shape[0])
            self.generators: Generators = [torch.Generator().manual_seed(s) for s in self.seeds]
            self.dtype = torch.float32
            return
        if seed is not None:
            raise ConfigError("seed, generator: give one of them, not both")
        if not isinstance(generator, torch.Generator) and len(generator) != shape[0]:
            raise ConfigError(f"generator: expected one or {shape[0]}, found {len(generator)}")
        self.generators, self.dtype = generator, dtype

    def draw(self) -> Tensor:
        """The next normal of every image, on the device."""
        if isinstance(self.generators, torch.Generator):
            return self._normal(self.generators, self.shape)
        return torch.cat([self._normal(g, (1, *self.shape[1:])) for g in self.generators])

    def _normal(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=self.dtype).to(self.device)


def image_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of ``count`` images: seed, seed + 1, …; those given; or new ones from the operating system."""
    if seed is None:
        entropy = torch.Generator()  # of its own: the global generator is left alone
        entropy.seed()
        return torch.randint(2**32, (count,), generator=entropy).tolist()
    try:
        if isinstance(seed, Sequence):
            seeds = [operator.index(s) for s in seed]
        else:
            seeds = [operator.index(seed) + i for i in range(count)]
    except TypeError:
        raise ConfigError(f"seed: expected a whole number, or one for each image; found {seed!r}") from None
    if len(seeds) != count:
        raise ConfigError(f"seed: expected one or {count}, one for each image; found {len(seeds)}")
    if any(not 0 <= s < 2**63 for s in seeds):
        raise ConfigError(f"seed: expected numbers from 0 to 2**63 - 1, found {seed}")
    return seeds


def given_latents(latents: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The user's own initial noise, checked and on the device."""
    if tuple(latents.shape) != shape:
        raise ConfigError(f"latents: expected the shape {list(shape)}, found {list(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise NumericalError("latents: the given ones are not finite")
    return latents.to(device)

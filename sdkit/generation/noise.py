"""Where a batch's random numbers come from: for each image its own seed, drawn on the CPU in float32."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdkit.checks import check_kind
from sdkit.errors import ConfigError, NumericalError

Generators = torch.Generator | Sequence[torch.Generator]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Variation:
    """Moves the initial noise towards that of another seed: strength 0 leaves it, 1 arrives there (`slerp`).

    seed: of the first image, the next has seed + 1; or one for each image; drawn at random when None.
    """

    strength: float = 0.0
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.strength, int | float) or not 0 <= self.strength <= 1:
            raise ConfigError(f"variation_strength: expected a number from 0 to 1, found {self.strength!r}")
        if self.seed is not None and self.strength == 0:
            raise ConfigError("variation_seed: expected a variation_strength above 0 beside it, found 0")


class Noise:
    """The normals of a batch [B, C, h, w], drawn for each image by itself.

    Each image draws, in this order and only what it needs: the posterior of the picture that it starts from, its
    initial noise, the posterior of the masked picture (UNets of 9 channels), one normal for each stochastic step.
    ``generator`` (one, or one for each image) replaces the seeds and draws in ``dtype`` on its own device, as in
    diffusers; one generator draws for the whole batch at once.

    With a ``variation`` all images of one ``seed`` have that seed and differ in the variation's, as in A1111's web UI.

    Raises ConfigError when seeds or generators do not fit the batch, or both are given.
    """

    def __init__(
        self,
        shape: Shape,
        seed: int | Sequence[int] | None,
        generator: Generators | None,
        device: torch.device,
        dtype: torch.dtype,
        variation: Variation | None = None,
    ) -> None:
        self.shape, self.device = shape, device
        self.variation = variation or Variation()
        self.seeds: list[int] = []
        self.variation_seeds: list[int] = []

        if generator is None:
            if self.variation.strength > 0:
                self.variation_seeds = image_seeds(self.variation.seed, shape[0], "variation_seed")
                seed = seed if isinstance(seed, Sequence) else image_seeds(seed, 1) * shape[0]
            self.seeds = image_seeds(seed, shape[0])
            self.generators: Generators = [torch.Generator().manual_seed(s) for s in self.seeds]
            self.dtype = torch.float32
            return

        if seed is not None:
            raise ConfigError("seed, generator: give one of them, not both")
        if self.variation.strength > 0:
            raise ConfigError("variation_strength, generator: give one of them; variations are of seeds")
        if not isinstance(generator, torch.Generator) and len(generator) != shape[0]:
            raise ConfigError(f"generator: expected one or {shape[0]}, found {len(generator)}")

        self.generators, self.dtype = generator, dtype

    def initial(self) -> Tensor:
        """The initial noise of every image, with its variation."""
        noise = self.draw()
        if not self.variation_seeds:
            return noise
        others = [self._normal(torch.Generator().manual_seed(s), (1, *self.shape[1:])) for s in self.variation_seeds]
        return slerp(noise, torch.cat(others), self.variation.strength)

    def draw(self) -> Tensor:
        """The next normal of every image, on the device."""
        if isinstance(self.generators, torch.Generator):
            return self._normal(self.generators, self.shape)
        return torch.cat([self._normal(g, (1, *self.shape[1:])) for g in self.generators])

    def draw_for_pictures(self, count: int) -> Tensor:
        """The next normal for posteriors: of every image, but one generator draws for each of ``count`` pictures."""
        if isinstance(self.generators, torch.Generator):
            return self._normal(self.generators, (count, *self.shape[1:]))
        return self.draw()

    def _normal(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        pinned = self.device.type == "cuda" and generator.device.type == "cpu"  # the copy then waits for nothing
        normal = torch.randn(shape, generator=generator, device=generator.device, dtype=self.dtype, pin_memory=pinned)
        return normal.to(self.device, non_blocking=pinned)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Go from ``a`` (t = 0) to ``b`` (t = 1), both [B, ...], along the sphere, image by image: the angle grows evenly.

    Between independent normals, which stand nearly at right angles, the norm stays that of a normal; the straight line
    would lose up to 29 % of it.
    """
    if t in (0, 1):
        return b if t else a

    dims = tuple(range(1, a.dim()))
    cosine = (a * b).sum(dims, keepdim=True) / (
        a.square().sum(dims, keepdim=True) * b.square().sum(dims, keepdim=True)
    ).sqrt()

    angle = cosine.clamp(-1, 1).acos()
    if bool((angle.sin() < 1e-4).any()):  # the same noise twice
        return torch.lerp(a, b, t)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def image_seeds(seed: int | Sequence[int] | None, count: int, name: str = "seed") -> list[int]:
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
        raise ConfigError(f"{name}: expected a whole number, or one for each image; found {seed!r}") from None

    if len(seeds) != count:
        raise ConfigError(f"{name}: expected one or {count}, one for each image; found {len(seeds)}")
    if any(not 0 <= s < 2**63 for s in seeds):
        raise ConfigError(f"{name}: expected numbers from 0 to 2**63 - 1, found {seed}")
    return seeds


def given_latents(latents: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Check the user's own initial noise and put it on the device."""
    check_kind("latents", latents, Tensor, f"a tensor of the shape {list(shape)}")
    if tuple(latents.shape) != shape:
        raise ConfigError(f"latents: expected the shape {list(shape)}, found {list(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise NumericalError("latents: the given ones are not finite")
    return latents.to(device)

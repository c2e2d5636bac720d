"""Noise levels, and the rows of weights that samplers compute with, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The signal that sigma samplers see where there is none (zero terminal SNR), so that sigma is finite: diffusers' value.
SMALLEST_ACP = 2.0**-24


class Level(NamedTuple):
    """A latent is signal * x0 + noise * normal. Variance preserving: signal² + noise² = 1; Karras: signal = 1."""

    signal: float
    noise: float

    @classmethod
    def of(cls, acp: float) -> Level:
        """The variance-preserving level of an entry of alphas_cumprod."""
        return cls(math.sqrt(acp), math.sqrt(1 - acp))

    @property
    def scale(self) -> float:
        """The latent over this is the network's input, of unit variance for data of unit variance."""
        return math.hypot(self.signal, self.noise)

    @property
    def log_snr(self) -> float:
        """log(signal / noise), the lambda of DPM-Solver; infinite where there is no noise."""
        return math.inf if self.noise == 0 else math.log(self.signal / self.noise)

    def estimates(self, prediction_type: str, x: Array, prediction: Array) -> tuple[Array, Array]:
        """(x0, epsilon) from the latent x and the network's prediction, all as rows (`basis`)."""
        signal, noise, scale = self.signal, self.noise, self.scale
        if prediction_type == "epsilon":
            return (x - noise * prediction) / signal, prediction
        if prediction_type == "sample":
            return prediction, (x - signal * prediction) / noise
        unit = x / scale  # v = (signal * epsilon - noise * x0) / scale
        return (
            (signal / scale) * unit - (noise / scale) * prediction,
            (noise / scale) * unit + (signal / scale) * prediction,
        )


def basis(registers: int) -> Array:
    """The rows (register 0, ..., prediction, noise). Sums and multiples of them are what a sampler computes with."""
    return np.eye(registers + 2)

"""The points that a sampling run visits: timesteps and noise levels, in float64, for a sampler to step along."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdkit.errors import ConfigError
from sdkit.schedule import NoiseSchedule

Array = NDArray[np.float64]

SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = ("karras", "exponential", "beta")

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
        """What the latent is divided by to become the network's input, of unit variance for unit variance data."""
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


class Point(NamedTuple):
    """Where a network call is made: its timestep and the level of register 0."""

    time: float
    level: Level


class Call(NamedTuple):
    """One network call: where, the next registers and x0 as rows, and whether it draws a normal."""

    point: Point
    registers: list[Array]
    x0: Array
    draws: bool = False


def basis(registers: int) -> Array:
    """The rows (register 0, ..., prediction, noise). Sums and multiples of them are what a sampler computes with."""
    return np.eye(registers + 2)


@dataclass(frozen=True)
class Grid:
    """The points 0, ..., num_steps; the last is where the run ends. A sampler reads them and yields its calls.

    ``times`` and ``levels`` have num_steps + 1 entries. ``num_inference_steps`` is the length before ``strength``
    cut it. ``schedule`` gives the prediction type, and timesteps between the points. ``eta``, ``order`` and
    ``solver_type`` are for the samplers that take them.
    """

    schedule: NoiseSchedule
    times: tuple[float, ...]
    levels: tuple[Level, ...]
    num_inference_steps: int
    eta: float = 0.0
    order: int = 0
    solver_type: str = ""

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def between(self, sigma: float) -> Point:
        """The point at a Karras noise level that is none of the run's own."""
        return Point(float(times_of(np.array(sigma), self.schedule)), Level(1.0, sigma))

    def estimates(self, at: int | Point, x: Array, prediction: Array) -> tuple[Array, Array]:
        """(x0, epsilon) of a latent at point number ``at``, or between the points, as rows."""
        return self._point(at).level.estimates(self.schedule.prediction_type, x, prediction)

    def call(self, at: int | Point, registers: list[Array], x0: Array, draws: bool = False) -> Call:
        """The call made at point number ``at``, or between the points."""
        return Call(self._point(at), registers, x0, draws)

    def _point(self, at: int | Point) -> Point:
        return at if isinstance(at, Point) else Point(self.times[at], self.levels[at])


def spaced_times(steps: int, train_steps: int, spacing: str, offset: int, extra_point: bool, whole: bool) -> Array:
    """``steps`` timesteps from high to low (arXiv 2305.08891, table 2, counted from 0).

    leading: multiples of train_steps // steps, plus ``offset``, which only leading takes; linspace: evenly from the
    last timestep to 0; trailing: evenly back from the last. ``extra_point``: under leading and linspace one point
    more is taken and the lowest dropped, as DPM-Solver's family does. ``whole``: rounded to integers.
    """
    points = steps + (1 if extra_point and spacing != "trailing" else 0)
    if spacing == "leading":
        times = (np.arange(points) * (train_steps // points) + offset)[::-1].astype(np.float64)
    elif spacing == "linspace":
        times = np.linspace(0, train_steps - 1, points)[::-1]
        times = times.round() if whole else times
    else:
        times = np.arange(train_steps, 0, -train_steps / steps).round() - 1
    times = times[:steps]
    if times[0] > train_steps - 1:
        raise ConfigError(
            f"steps_offset: {offset} with {steps} steps reaches timestep {times[0]:g}; the last is {train_steps - 1}"
        )
    if (np.diff(times) >= 0).any():
        raise ConfigError(
            f"num_inference_steps: {spacing} spacing has fewer than {steps} different timesteps among {train_steps}"
        )
    return times


def distilled_times(steps: int, train_steps: int, original_steps: int) -> Array:
    """``steps`` timesteps from high to low, evenly by index among the ``original_steps`` that a consistency model was
    distilled on (arXiv 2310.04378, section 4.3)."""
    if not 1 <= steps <= original_steps <= train_steps:
        raise ConfigError(
            f"num_inference_steps: expected at most original_inference_steps ({original_steps}), which are at most "
            f"{train_steps}; found {steps}"
        )
    original = np.arange(original_steps, 0, -1) * (train_steps // original_steps) - 1
    return original[np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(int)].astype(np.float64)


def spaced_sigmas(kind: str, steps: int, high: float, low: float) -> Array:
    """``steps`` noise levels from ``high`` to ``low``.

    karras: arXiv 2206.00364, equation 5, rho 7; exponential: even in the logarithm; beta: quantiles of the
    beta(0.6, 0.6) distribution (arXiv 2407.12173), applied to sigma as diffusers does.
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    return low + _symmetric_beta_quantile(1 - ramp, 0.6) * (high - low)


def _symmetric_beta_quantile(p: Array, a: float) -> Array:
    """x with P(X <= x) = p for X ~ beta(a, a): the series of the incomplete beta function on [0, 1/2], bisected."""
    n = np.arange(64)
    terms = np.concatenate([[1.0], np.cumprod((n[1:] - a) / n[1:])]) / (a + n)
    complete = math.gamma(a) ** 2 / math.gamma(2 * a)
    tail = np.minimum(p, 1 - p)
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(100):
        middle = (low + high) / 2
        below = middle**a * (middle[:, None] ** n * terms).sum(axis=1) / complete < tail
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p <= 0.5, high, 1 - high)


def times_of(sigmas: Array, schedule: NoiseSchedule) -> Array:
    """The timesteps, with fractions, whose Karras noise levels are ``sigmas``: linear in log sigma, clipped."""
    return np.interp(
        np.log(np.maximum(sigmas, 1e-10)), np.log(sigma_table(schedule)), np.arange(schedule.num_train_timesteps)
    )


def sigma_table(schedule: NoiseSchedule) -> Array:
    """Karras's noise level of every training timestep, finite (SMALLEST_ACP) also at zero terminal SNR."""
    acp = np.maximum(schedule.alphas_cumprod.numpy(), SMALLEST_ACP)
    return np.sqrt((1 - acp) / acp)
